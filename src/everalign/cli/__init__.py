"""The command line: `everalign VERB ...`.

Results go to standard output (with `--json` one JSON object and nothing else), all the rest to standard error.
Exit codes: 0 done, 1 failed, 2 bad input, 3 refused by a gate, 4 not enough evidence for one, 130 interrupted.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer

from everalign import distributed
from everalign.cli.bench import bench
from everalign.cli.console import notes, say
from everalign.cli.correct import correct
from everalign.cli.estimate import estimate
from everalign.cli.evaluate import evaluate
from everalign.cli.feedback import feedback
from everalign.cli.launch import check_verb, end_with_launcher
from everalign.cli.learn import learn
from everalign.cli.reward import reward
from everalign.cli.runs import demo, export, report, rollback, versions, watch
from everalign.cli.serve import EPILOG as SERVE_EPILOG
from everalign.cli.serve import serve
from everalign.errors import EveralignError, InputError

# A wrong flag or argument. Some versions of typer take it from click, others carry it inside; BadParameter is public.
_UsageError = cast(type[Exception], typer.BadParameter.__bases__[0])

app = typer.Typer(
    help="Keeps a language model aligned while preferences keep changing.",
    epilog="Help for a command: everalign learn --help. "
    "Exit codes: 0 done, 1 failed, 2 bad input, 3 refused by a gate, 4 not enough evidence for one.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(
    epilog="Example: everalign learn --model tiny --task polite=polite.jsonl,polite.test.jsonl --output runs/polite"
)(learn)
app.command(epilog="Example: everalign demo --output runs/demo")(demo)
app.command(epilog="Example: everalign bench recipes/demo_methods.yaml --tune --output runs/demo_methods")(bench)
app.command(epilog="Example: everalign estimate --model tiny --task polite=polite.jsonl --gpu h100 --price 2.5")(
    estimate
)
app.command(epilog="Example: everalign evaluate runs/polite --reward runs/reward --every")(evaluate)
app.add_typer(reward, name="reward")
app.add_typer(correct, name="correct")
app.add_typer(feedback, name="feedback")
app.command(epilog=SERVE_EPILOG)(serve)
app.command(epilog="Example: everalign report runs/lifealign runs/seqft --output comparison.html")(report)
app.command(epilog="Example: everalign watch runs/polite")(watch)
app.command(epilog="Example: everalign versions runs/polite")(versions)
app.command(epilog="Example: everalign rollback runs/polite 001-polite")(rollback)
app.command(epilog="Example: everalign export runs/polite polite-model")(export)


def _print_version(wanted: bool) -> None:
    if wanted:
        from everalign import __version__

        print(f"everalign {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
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
    warnings.showwarning = _show_warning
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if int(os.environ.get("RANK", "0")) > 0:
        # The main process prints for all of them.
        sys.stdout, notes.quiet = open(os.devnull, "w"), True  # noqa: SIM115  # until the process ends
    try:
        end_with_launcher()
        check_verb(arguments)
        code = app(args=arguments, prog_name="everalign", standalone_mode=False, obj=arguments)
        distributed.stop()
    except EveralignError as error:
        return _fail(str(error), error.exit_code, isinstance(error, distributed.LostProcessError))
    except _UsageError as error:
        return _fail(_usage(error), InputError.exit_code)
    except OSError as error:
        # A full disk, a missing permission: nothing in a traceback would help.
        return _fail(str(error), EveralignError.exit_code)
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


def _usage(error: Exception) -> str:
    """What is wrong with a flag, and where its verb explains itself."""
    command = getattr(getattr(error, "ctx", None), "command_path", "everalign")
    message = getattr(error, "format_message", lambda: str(error))()
    return f"{message}\nSee: {command} --help"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say("warning", str(message), "yellow")
