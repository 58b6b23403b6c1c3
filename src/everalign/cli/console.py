"""Terminal output: results on standard output; messages and progress bars on standard error."""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from everalign.learning.run_data import RunData

# Lines in a file or a pipe are not wrapped, because programs read whole ones.
_WIDEST = 10_000
_LEFT = ("measure", "meaning")

# Standard error: announcements, progress, warnings, errors. Lines are left to the terminal to wrap.
notes = Console(stderr=True, soft_wrap=True, highlight=False)


def say(label: str, message: str, style: str) -> None:
    """Prints `label: message` on standard error, the label in a style."""
    notes.print(Text.assemble((f"{label}:", style), f" {message}"))


def show(*results: RenderableType) -> None:
    """Prints tables and texts on standard output, unwrapped where that is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDEST)
    for result in results:
        console.print(result)


def table(head: Sequence[str], lines: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """Returns a table of numbers; columns of words ("measure", "meaning") are left-aligned."""
    made = Table(title=title, title_justify="left")
    for name in head:
        made.add_column(name, justify="left" if name in _LEFT else "right", overflow="fold")
    for line in lines:
        made.add_row(*line)
    return made


def show_line(label: str, value: object) -> None:
    """Prints a label and a value on one unwrapped line, so that a path can be copied."""
    Console(highlight=False, soft_wrap=True).print(Text.assemble((f"{label:<7} ", "dim"), str(value)))


def show_json(value: dict[str, Any]) -> None:
    """Prints one JSON object on standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    print()


# Steps of a big model take long: a shorter window would often hold too few of them for an estimate.
_WINDOW_SECONDS = 300.0
# Where no bar can be shown, a line this often.
_LINE_SECONDS = 30.0
# What is shown of a training step: the figure, its name, and how it is printed.
_FIGURES = (("loss", "loss", "{:.3g}"), ("accuracy", "accuracy", "{:.0%}"))


class _TimeLeft(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        """Nothing as long as the time is not known."""
        return Text("") if task.time_remaining is None else super().render(task).append(" left")


class Display:
    """Context manager that shows log lines and progress on standard error.

    On a terminal that is a bar for the stage in work. Elsewhere it is a line every 30 seconds, and the first and the
    last step of a stage that is trained.
    """

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=min(24, max(6, notes.width - 68))),
            TextColumn("{task.fields[steps]}"),
            _TimeLeft(compact=True),
            console=notes,
            transient=True,
            disable=not notes.is_terminal,
            speed_estimate_period=_WINDOW_SECONDS,
        )
        self._stage: str | None = None
        self._trained = False  # whether the stage reports figures
        self._measured = ""
        self._place = (0, 0)  # units done, in all
        self._lines, self._said = 0, 0.0  # lines printed for this stage, and when the last was, or the stage began
        self._task = self._bar.add_task("starting", total=None, steps="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def log(self, message: str) -> None:
        """Prints a line; one that is not indented opens a section and is bold."""
        notes.print(Text(message, style="" if message.startswith(" ") else "bold"))
        self._begin(None, None)  # work of unknown length: reading, scoring, consolidating

    def progress(self, stage: str, done: int, total: int, unit: str | None = None) -> None:
        """Moves the bar to `done` of `total` of a stage: steps where it is trained, otherwise rows or `unit`."""
        if stage != self._stage:
            self._begin(stage, total)
        self._place = done, total
        unit = unit or ("steps" if self._trained else "rows")
        self._show(f"{done}/{total} {unit}", done >= total and not self._trained)

    def figures(self, stage: str, step: int, measured: Mapping[str, float]) -> None:
        """Shows what was measured at a step of training; without figures, such a stage begins."""
        if stage != self._stage:
            self._begin(stage, None)
        self._trained = True
        if not measured:
            return
        found = [(name, text, measured[key]) for key, name, text in _FIGURES if key in measured]
        self._measured = "".join(f", {name} {text.format(value)}" for name, text, value in found)
        done, total = self._place
        self._show(f"{done}/{total} steps", done >= total, first=not self._lines)

    def _show(self, steps: str, last: bool, first: bool = False) -> None:
        self._bar.update(self._task, completed=self._place[0], total=self._place[1], steps=steps + self._measured)
        if not notes.is_terminal:
            now = time.monotonic()
            if first or now - self._said >= _LINE_SECONDS or (last and self._lines):
                rest = ""
                if not last and (left := self._bar.tasks[0].time_remaining):
                    minutes, seconds = divmod(round(left), 60)
                    hours, minutes = divmod(minutes, 60)
                    exact = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
                    rest = f", {f'{hours} h {minutes} min' if hours else exact} left"
                notes.print(f"  {self._stage}: {steps}{self._measured}{rest}")
                self._lines, self._said = self._lines + 1, now
        if last:
            self._begin(None, None)  # work of unknown length: reading, scoring, consolidating

    def _begin(self, stage: str | None, total: int | None) -> None:
        # A new line instead of a reset one: rich keeps a known total even where None is given.
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(stage or "working", total=total, steps="")
        self._stage, self._trained, self._measured = stage, False, ""
        self._place, self._lines, self._said = (0, 0), 0, time.monotonic()


# ---- what a run came to ----


def run_scores(run: "RunData") -> dict[str, Any]:
    """Returns the matrix of held-out accuracy and the numbers that sum it up; null is what was not measured."""
    found = run.scores()
    matrix = [list(row) for row in found.matrix]
    return {"tasks": list(found.tasks), "zero_shot": list(found.zero_shot), "matrix": matrix, **found.summary}


def run_answers(run: "RunData") -> dict[str, list[dict[str, Any]]]:
    """Returns, by task, what the base model and what the promoted policy wrote to each sampled prompt."""
    from everalign.reporting.answers import answer_pairs

    return {task: [asdict(pair) for pair in pairs] for task, pairs in answer_pairs(run).items()}


def run_summary(runs: Sequence["RunData"]) -> list[RenderableType]:
    """Returns one run's score table, or a comparison of several, and what follows from it in words."""
    from everalign.learning.run_data import run_labels
    from everalign.reporting import comparison_table, score_table
    from everalign.reporting.formats import CORRECTION_ACCURACY, error_matrix
    from everalign.reporting.headline import cautions, headline

    labels = run_labels(runs)
    found = {label: run.scores() for label, run in zip(labels, runs, strict=True)}
    alone = len(runs) == 1
    scores = score_table(found[labels[0]], errors=error_matrix(runs[0])) if alone else comparison_table(found)
    about = [Text(CORRECTION_ACCURACY, style="dim")] if runs[0].facts.objective == "correction" else []
    warnings = [Text(caution, style="dim") for caution in cautions(runs, labels)]
    return [scores, *about, Text(""), Text(headline(runs, labels)), *warnings, Text("")]


def version_table(run: "RunData") -> Table:
    """Returns the versions with their accuracies, then and now, and what became of each."""
    from everalign.learning.promotion import what_fell
    from everalign.learning.run_data import version_rows
    from everalign.reporting.formats import METRICS

    accuracy, colours = METRICS["accuracy"], {"gained": "green", "lost": "red", "": "dim"}
    refused = [
        f"\n{version.id}: {what_fell(version.manifest.gate)}."
        for version in run.all_versions
        if version.manifest.gate is not None and version.refused
    ]
    caption = (
        "Accuracy on the version's own task, %: when it was learned, and under the promoted version. "
        f"Changes in points.{''.join(refused)}"
    )
    made = Table(caption=Text(caption, style="dim"), caption_justify="left")
    rows = version_rows(run)
    timed = any(row["predicted"] for row in rows)
    for title in ("version", "task", "learned (UTC)"):
        made.add_column(title, overflow="fold")
    for title in ("then", "now", "change"):
        made.add_column(title, justify="right", no_wrap=True)
    made.add_column("status")
    for title in ("predicted", "took") if timed else ():
        made.add_column(title, justify="right")
    for row in rows:
        # What a version that was not kept had learned is not what the promoted one gained.
        kept = row["status"] in ("", "promoted") and row["then"] is not None and row["now"] is not None
        change = row["now"] - row["then"] if kept else None
        made.add_row(
            Text(row["version"]),
            Text(row["task"] if row["label"] in (None, row["task"]) else f"{row['task']} (label {row['label']})"),
            row["created"][:16].replace("T", " "),
            accuracy.value(row["then"]),
            accuracy.value(row["now"]),
            Text(accuracy.change(change), style=colours[accuracy.direction(change)]),
            row["status"],
            *((_time_and_memory(row["predicted"]), _time_and_memory(row["actual"])) if timed else ()),
        )
    return made


def _time_and_memory(found: dict[str, Any] | None) -> str:
    """What a task was predicted to take, or what it took; a dash where that is not known."""
    from everalign.reporting.formats import seconds

    if found is None:
        return "–"
    if "processor_seconds" in found:
        shown = f"{seconds(found['seconds'])} ({seconds(found['processor_seconds'])} of processors)"
    else:
        low, high = found["seconds"]
        shown = f"{seconds(low)} to {seconds(high)}"
    return f"{shown}, {found['memory'] / 2**30:.1f} GiB"
