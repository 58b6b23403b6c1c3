"""The command line: `everalign VERB ...`.

Results go to standard output (with `--json` one JSON object and nothing else), all the rest to standard error.
Exit codes: 0 done, 1 failed, 2 bad input, 3 refused by a gate, 4 not enough evidence for one, 130 interrupted.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from everalign import distributed
from everalign.cli.console import notes, say
from everalign.cli.launch import check_verb, end_with_launcher
from everalign.errors import EveralignError, InputError, naming_nondeterministic, system_error

# A wrong flag or argument. Some versions of typer take it from click, others carry it inside; BadParameter is public.
_UsageError = cast(type[Exception], typer.BadParameter.__bases__[0])

if TYPE_CHECKING:
    app: typer.Typer  # the whole command line, made when it is asked for

# Each verb's module, and an example. A module is imported when its verb is called, or when help lists them all: most of
# the time until a mistake is reported is that of imports.
_VERBS = {
    "learn": (
        "learn",
        "Example: everalign learn --model tiny --task polite=polite.jsonl,polite.test.jsonl --output runs/polite",
    ),
    "demo": ("runs", "Example: everalign demo --output runs/demo"),
    "bench": ("bench", "Example: everalign bench recipes/demo_methods.yaml --tune --output runs/demo_methods"),
    "estimate": (
        "estimate",
        "Example: everalign estimate --model tiny --task polite=polite.jsonl --gpu h100 --price 2.5",
    ),
    "evaluate": ("runs", "Example: everalign evaluate runs/polite --reward runs/reward --every"),
    "reward": ("reward", None),
    "correct": ("correct", None),
    "feedback": ("feedback", None),
    "serve": (
        "serve",
        "Example: everalign serve --upstream http://127.0.0.1:8000/v1 --corrector runs/corrector "
        "--store sqlite:///feedback.db; API keys are read from the environment: EVERALIGN_API_KEYS (clients), "
        "OPENAI_API_KEY (the upstream; NAME_API_KEY for NAME=URL), CORRECTOR_API_KEY and APPROVER_API_KEY (a corrector "
        "and a judge on a server). Each server is sent only its own key",
    ),
    "report": ("runs", "Example: everalign report runs/lifealign runs/seqft --output comparison.html"),
    "watch": ("runs", "Example: everalign watch runs/polite"),
    "versions": ("runs", "Example: everalign versions runs/polite"),
    "rollback": ("runs", "Example: everalign rollback runs/polite 001-polite"),
    "export": ("runs", "Example: everalign export runs/polite polite-model"),
}


def make_app(verb: str | None = None) -> typer.Typer:
    """Returns the command line with one verb, or with all of them where it is none."""
    app = typer.Typer(
        help="Keeps a language model aligned while preferences keep changing.",
        epilog="Help for a command: everalign learn --help. "
        "Exit codes: 0 done, 1 failed, 2 bad input, 3 refused by a gate, 4 not enough evidence for one.",
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_everalign)
    for name in [verb] if verb in _VERBS else _VERBS:
        module, example = _VERBS[name]
        found = getattr(import_module(f"everalign.cli.{module}"), name)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name, epilog=example)(found)
    return app


def __getattr__(name: str) -> Any:
    if name == "app":
        return make_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _print_version(wanted: bool) -> None:
    if wanted:
        from everalign import __version__

        print(f"everalign {__version__}")
        raise typer.Exit


def _everalign(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, metavar="", help="Print the version and exit."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)
        raise typer.Exit(InputError.exit_code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors that the user can act on are one line without a traceback.

    Args:
        arguments: without the program's name; those of the process when None.
    """
    warnings.showwarning = lambda message, *_, **__: say("warning", str(message), "yellow")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if int(os.environ.get("RANK", "0")) > 0:
        # The main process prints for all of them.
        sys.stdout, notes.quiet = open(os.devnull, "w"), True  # noqa: SIM115  # until the process ends
    try:
        end_with_launcher()
        check_verb(arguments)
        with naming_nondeterministic():
            code = make_app(next(iter(arguments), None))(
                args=arguments, prog_name="everalign", standalone_mode=False, obj=arguments
            )
        distributed.stop()
    except EveralignError as error:
        return _fail(str(error), error.exit_code, isinstance(error, distributed.LostProcessError))
    except _UsageError as error:
        # What is wrong with a flag, and where its verb explains itself.
        command = getattr(getattr(error, "ctx", None), "command_path", "everalign")
        message = getattr(error, "format_message", error.__str__)()
        return _fail(f"{message}\nSee: {command} --help", InputError.exit_code)
    except OSError as error:
        # A full disk, a missing permission: nothing in a traceback would help.
        from everalign.storage import write_fault

        fault = write_fault(error, Path(error.filename or "output"))
        return _fail(str(fault or system_error(error)), EveralignError.exit_code)
    except Exception as error:
        if distributed.world() == 1:
            raise
        trace = "".join(traceback.format_exception(error))
        return _fail(
            f"{type(error).__name__}: {error}", EveralignError.exit_code, distributed.lost_contact(error), trace
        )
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int, lost: bool = False, trace: str = "") -> int:
    def show(message: str) -> None:
        notes.quiet = False
        if not lost:
            sys.stderr.write(trace)
        say("error", message, "bold red")

    return distributed.report_failure(message, code, show, lost)
