"""Command-line flags: generated from option models, and those that several verbs share."""

import importlib.util
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel

from everalign.cli.console import say
from everalign.errors import InputError
from everalign.options import declared

if TYPE_CHECKING:
    from everalign.data.readers import Source
    from everalign.data.rows import RowSet
    from everalign.data.streams import CheckedStream

INTERRUPTED = 130

Verb = TypeVar("Verb", bound=Callable[..., None])


def option(
    text: str, metavar: str | None = None, *names: str, panel: str | None = None, default: str | None = None
) -> Any:
    """A flag with its help. Without `names` it is called as its parameter; a metavar of "" takes no value.

    `default` says what holds without the flag, if the text does not.
    """
    text = text if default is None else with_default(text, default)
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel, show_default=False)


def with_default(text: str, default: Any) -> str:
    """Returns a help text that says what the default is, as it stands if it says so already."""
    if re.search(r"default|if not given|left out", text):
        return text
    if isinstance(default, bool | None):
        shown = {None: "none", True: "on", False: "off"}[default]
    elif isinstance(default, float):
        shown = f"{default:g}"
    elif isinstance(default, tuple):
        shown = ",".join(map(str, default)) or "none"
    else:
        shown = default
    return f"{text.removesuffix('.')}; {shown} by default."


def flags(
    *models: type[BaseModel], only: Collection[str] = (), names: Mapping[str, str] | None = None
) -> Callable[[Verb], Verb]:
    """Gives a verb a flag for each option of some models, which it gets in its `**given`, None where not given.

    Types, help texts, choices and defaults come from the models' fields, which check the values later.

    Args:
        models: the options, such as `TrainingOptions`. Nested models and lists get no flag.
        only: names of the options to take; all if empty.
        names: flags of options that are not called by their own name.
    """
    generated: list[inspect.Parameter] = []
    for model in models:
        for name, field in model.model_fields.items():
            about = declared(field)
            choices = get_args(about.type) if get_origin(about.type) is Literal else ()
            if about.type in (int, float, bool, str, Path):
                kind = about.type
            elif choices or about.type == tuple[str, ...]:
                kind = str  # the model checks choices and splits lists
            else:
                continue  # no flag can hold it
            if only and name not in only:
                continue
            text = about.description.partition("\n")[0]
            if not field.is_required():
                off = kind is bool and field.default is None
                text = with_default(text, False if off else None if field.default == "" else field.default)
            flag = typer.Option(
                *([names[name]] if names and name in names else []),
                help=text,
                metavar="" if kind is bool else about.title or "|".join(choices) or None,
                rich_help_panel=model.model_config.get("title"),
                show_default=False,
                callback=split_commas if get_origin(about.type) is tuple else None,
            )
            generated.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, flag]
                )
            )

    def decorate(verb: Verb) -> Verb:
        signature = inspect.signature(verb, eval_str=True)
        *own, given = signature.parameters.values()
        if given.kind is not inspect.Parameter.VAR_KEYWORD:
            raise TypeError(f"{verb.__name__} takes no **given, where its generated flags would go")
        whole = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own] + generated
        verb.__signature__ = signature.replace(parameters=whole)  # type: ignore[attr-defined]
        verb.__annotations__ = {one.name: one.annotation for one in whole}
        return verb

    return decorate


def split_commas(text: str | None) -> tuple[str, ...] | None:
    """Returns the parts of a comma-separated flag; None where the flag is not given."""
    if text is None or not text.strip():
        return None if text is None else ()
    return tuple(part.strip() for part in text.split(","))


def require(doing: str, *packages: str) -> None:
    """Refuses a verb on pages or a gateway where one of its packages is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{doing} needs {missing[0]}, which is not installed: pip install 'everalign[serve]'")


def _trust(given: bool) -> bool:
    if given:
        from everalign.modeling.loading import allow_remote_code

        allow_remote_code()
    return given


Json = Annotated[bool, option("Print the result as one JSON object.", "", "--json")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", metavar="", help="Run Python code that comes with the model.", callback=_trust),
]
SkipBadRows = Annotated[bool, option("Skip bad rows and report them.", "", "--skip-bad-rows")]
Columns = Annotated[
    str | None,
    option(
        'What the file calls columns, such as "prompt=question"; as they are called here by default.',
        "NAME=COLUMN,...",
    ),
]
AllowOverlap = Annotated[bool, option("Allow rows to be in both the training and the test set.", "", "--allow-overlap")]
Overwrite = Annotated[bool, option("Replace the output file.", "", "--overwrite")]
Seed = Annotated[int, option("Random seed; 0 by default.")]
Template = Annotated[str | None, option("Prompt template of the corrector; what its folder names by default.", "ID")]
Objectives = Annotated[
    str | None,
    option('Objectives that a corrector on a server was trained with: "helpful,harmless"; none by default.', "WORDS"),
]
Gate = Annotated[
    float | None,
    option("Keep answers with at least this mean log-likelihood, in nats per token.", "NATS", default="none"),
]
Guarded = Annotated[
    bool, typer.Option("--guards/--no-guards", help="Return the original answer if a correction cannot be trusted.")
]
Approve = Annotated[
    str | None,
    option("Scorer that must prefer a correction to the answer.", "DIR|MODULE:FUNCTION|URL#MODEL", default="none"),
]
Margin = Annotated[float | None, option("Smallest difference for --approve, in units of its rewards.", default="0")]
MaxNewTokens = Annotated[int | None, option("Longest correction, in tokens; twice the answer plus 256 by default.")]
LocalPrecision = Annotated[str | None, option("Precision of a corrector in this process.", "fp32|bf16", default="fp32")]
Strength = Annotated[
    float | None,
    option("Steer towards copying (below 0) or correcting (above 0), see correct steer.", "ALPHA", default="0"),
]
Device = Annotated[
    str | None, option("Device of a corrector in this process, such as cuda:0.", default="the GPU if there is one")
]
TokensPerBatch = Annotated[
    int | None, option("Tokens computed at once, fewer save memory; 8192, or 4096 of a corrector, by default.")
]
Concurrency = Annotated[int | None, option("Maximum number of concurrent requests to a server.", default="8")]
RequestsPerMinute = Annotated[
    float | None, option("Maximum number of requests to a server per minute.", default="no limit")
]
Timeout = Annotated[float | None, option("Seconds to wait for a server's reply.", default="60")]
JudgeInstructions = Annotated[
    Path | None, option("Instructions for a judge: what makes an answer good; built-in ones by default.", "FILE")
]


@contextmanager
def resumable(command: str = "the same command") -> Iterator[None]:
    """Ends an interrupted verb with the command that continues it."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted", f"{command} continues from here", "bold yellow")
        raise typer.Exit(INTERRUPTED) from None


def source(name: str, columns: str | None) -> "Source":
    """Returns a file or a Hub name with the names of its columns, as --columns says them."""
    from everalign.data.readers import parse_columns, renamed

    return renamed(name, None if columns is None else parse_columns(columns))


def check_inputs(model: str | None, *sources: str | None, output: Path | None = None) -> None:
    """Refuses a model's folder and files of rows that are not there, before anything heavy is loaded.

    An `output` folder must be new or empty.
    """
    from everalign.data.file_formats import check_source
    from everalign.options import check_model_path
    from everalign.storage import check_free

    check_model_path(model or "")
    for name in sources:
        if name is not None:
            check_source(name)
    if output is not None:
        check_free(output)


def report_unused(rows: "RowSet[Any]") -> None:
    """Reports how many bad rows were skipped, with the first reason, and the columns that are not read."""
    _report(rows.source, len(rows.skipped), rows.skipped[0] if rows.skipped else "", rows.ignored)


def report_skipped(source: str, checked: "CheckedStream") -> None:
    """Reports the same of rows that are not held in memory."""
    _report(source, checked.skipped, checked.first, checked.ignored)


def _report(source: str, skipped: int, first: str, ignored: Sequence[str]) -> None:
    if skipped:
        say("warning", f"{source}: {skipped} bad rows left out; the first: {first}", "yellow")
    if ignored:
        say("note", f"{source}: columns that are not read: {', '.join(ignored)}", "cyan")
