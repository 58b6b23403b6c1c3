"""What the verbs share: option declarations, interrupts, unused rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.console import say

if TYPE_CHECKING:
    from everalign.data.rows import RowSet

INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", metavar="", help="Print the result as one JSON object.")]


def _trust(given: bool) -> bool:
    if given:
        from everalign.modeling.loading import allow_remote_code

        allow_remote_code()
    return given


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", metavar="", help="Run Python code that the model brings along.", callback=_trust
    ),
]


def option(text: str, metavar: str | None = None) -> Any:
    """A flag with its help; those that may be left out have their defaults where they are used."""
    return typer.Option(help=text, metavar=metavar, show_default=False)


def flag(text: str, panel: str | None = None, metavar: str | None = None, name: str | None = None) -> Any:
    """A flag with its help; without `name` it is called as its parameter. No metavar where it takes no value: ""."""
    names = [] if name is None else [name]
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


def phrases(text: str | None) -> tuple[str, ...] | None:
    """Return what stands between the commas of a flag's value; None where the flag is not given."""
    if text is None or not text.strip():
        return None if text is None else ()
    return tuple(words.strip() for words in text.split(","))


@contextmanager
def resumable(command: str = "the same command") -> Iterator[None]:
    """End a verb that is interrupted by saying which command goes on from there."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted", f"{command} goes on from here", "bold yellow")
        raise typer.Exit(INTERRUPTED) from None


def report_unused(rows: "RowSet[Any]") -> None:
    """Say how many bad rows were left out and what was wrong with the first, and which columns are not read."""
    if rows.skipped:
        message = f"{rows.source}: {len(rows.skipped)} bad rows left out; the first: {rows.skipped[0]}"
        say("warning", message, "yellow")
    if rows.ignored:
        say("note", f"{rows.source}: columns that are not read: {', '.join(rows.ignored)}", "cyan")


REWARDS = "Rewards (objectives var, snkl)"
_ESTIMATORS = "Normaliser of var: group, group_loo, in_batch, reference, quantile or support."

Estimator = Annotated[str | None, flag(_ESTIMATORS, REWARDS)]
Temperature = Annotated[float | None, flag("Reward that is worth one nat.", REWARDS)]
TargetEss = Annotated[float | None, flag("Find the temperature for this effective share.", REWARDS)]
ScaleRewards = Annotated[bool | None, flag("Divide rewards by their deviation; on.", REWARDS, "")]
WeightCap = Annotated[float | None, flag("Largest weight (var); 0 for none.", REWARDS)]
LengthNormalize = Annotated[bool | None, flag("Log-probabilities per token (estimator support).", REWARDS, "")]
WeightFloor = Annotated[float | None, flag("Completions that weigh less are left out.", REWARDS)]
DropConstant = Annotated[bool | None, flag("Leave out prompts whose rewards are all one.", REWARDS, "")]
