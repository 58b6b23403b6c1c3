"""Terminal output: results on standard output; messages and progress bars on standard error."""

import json
import sys
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

# Lines in a file or a pipe are not wrapped: what reads them wants whole ones.
_WIDEST = 10_000

# Standard error: announcements, progress, warnings, errors. Lines are left to the terminal to wrap.
notes = Console(stderr=True, soft_wrap=True, highlight=False)


def say(label: str, message: str, style: str) -> None:
    """Print `label: message` on standard error, the label in a style."""
    notes.print(Text.assemble((f"{label}:", style), f" {message}"))


def show(*results: RenderableType) -> None:
    """Print tables and texts on standard output; where that is no terminal, as wide as they are."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDEST)
    for result in results:
        console.print(result)


def has_colours() -> bool:
    """Whether what is printed on standard output can be told apart by colours."""
    console = Console()
    return console.color_system is not None and not console.no_color


def show_line(label: str, value: object) -> None:
    """Print a label and a value on one line, however long: a path stays in one piece, to be copied."""
    Console(highlight=False, soft_wrap=True).print(Text.assemble((f"{label:<8}", "dim"), str(value)))


def show_yaml(value: dict[str, Any]) -> None:
    """Print a YAML document on standard output."""
    import yaml

    print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), end="")


def show_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    print()


# Steps of a big model take long: a shorter window than this would often hold too few of them for an estimate.
_WINDOW_SECONDS = 300.0


class _TimeLeft(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        """Say nothing as long as the time is not known."""
        return Text("") if task.time_remaining is None else super().render(task).append(" left")


class Display:
    """Shows a learner's announcements and progress while it is entered; the bar is gone afterwards."""

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[steps]}"),
            _TimeLeft(compact=True),
            console=notes,
            transient=True,
            disable=not notes.is_terminal,
            speed_estimate_period=_WINDOW_SECONDS,
        )
        self._stage: str | None = None
        self._task = self._bar.add_task("starting", total=None, steps="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def log(self, message: str) -> None:
        """Print a line; those that open a section are not indented and stand out."""
        notes.print(Text(message, style="" if message.startswith(" ") else "bold"))
        self._wait()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Move the bar to `done` of `total` steps of a stage."""
        if stage != self._stage:
            self._begin(stage, total)
        self._bar.update(self._task, completed=done, steps=f"{done}/{total} steps")
        if done >= total:
            self._wait()

    def _wait(self) -> None:
        """Show that work goes on whose length is not known: reading, scoring, consolidating."""
        self._begin(None, None)

    def _begin(self, stage: str | None, total: int | None) -> None:
        # A new line instead of a reset one: rich keeps a known total even where None is given.
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(stage or "working", total=total, steps="")
        self._stage = stage
