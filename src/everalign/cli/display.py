"""What is happening, on standard error: announced lines, and on a terminal a progress bar below them."""

from types import TracebackType

from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from everalign.cli.output import notes

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

    def announce(self, message: str) -> None:
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
