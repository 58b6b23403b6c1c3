"""What the verbs have in common: how their flags look, how they end when interrupted, what is said of bad rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.output import say

if TYPE_CHECKING:
    from everalign.data.row_set import RowSet

INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", metavar="", help="Print the result as one JSON object.")]


def option(text: str, metavar: str | None = None) -> Any:
    """A flag with its help; those that may be left out have their defaults where they are used."""
    return typer.Option(help=text, metavar=metavar, show_default=False)


@contextmanager
def resumable(command: str = "the same command") -> Iterator[None]:
    """End a verb that is interrupted by saying which command goes on from there."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted", f"{command} goes on from here", "bold yellow")
        raise typer.Exit(INTERRUPTED) from None


def warn_of_bad_rows(rows: "RowSet[Any]") -> None:
    """Say how many bad rows were left out, and what was wrong with the first."""
    if rows.skipped:
        message = f"{rows.source}: {len(rows.skipped)} bad rows left out; the first: {rows.skipped[0]}"
        say("warning", message, "yellow")
