"""What a run came to, as the command line tells it: texts and tables for people, plain values for `--json`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from everalign.learning.promotion import what_fell
from everalign.learning.run_data import RunData, run_labels, version_rows
from everalign.reporting import comparison_table, score_table
from everalign.reporting.answers import answer_pairs
from everalign.reporting.formats import METRICS
from everalign.reporting.headline import cautions, headline
from everalign.reporting.sampling_error import error_matrix

_ACCURACY = METRICS["accuracy"]
_COLOURS = {"gained": "green", "lost": "red", "": "dim"}


def scores(run: RunData) -> dict[str, Any]:
    """Return the matrix of held-out accuracy and the numbers that sum it up; null is what was not measured."""
    found = run.scores()
    return {
        "tasks": list(found.tasks),
        "zero_shot": list(found.zero_shot),
        "matrix": [list(row) for row in found.matrix],
        **found.summary,
    }


def answers(run: RunData) -> dict[str, list[dict[str, Any]]]:
    """Return, by task, what the base model and what the promoted policy wrote to each sampled prompt."""
    return {task: [asdict(pair) for pair in pairs] for task, pairs in answer_pairs(run).items()}


def summary(runs: Sequence[RunData]) -> list[RenderableType]:
    """Return one run's score table, or a comparison of several, and what follows from it in words."""
    labels = run_labels(runs)
    found = {label: run.scores() for label, run in zip(labels, runs, strict=True)}
    alone = len(runs) == 1
    table = score_table(found[labels[0]], errors=error_matrix(runs[0])) if alone else comparison_table(found)
    warnings = [Text(caution, style="dim") for caution in cautions(runs, labels)]
    return [table, Text(""), Text(headline(runs, labels)), *warnings, Text("")]


def version_table(run: RunData) -> Table:
    """Return the versions as a table with what became of each."""
    table = Table(caption=_caption(run), caption_justify="left")
    for title in ("version", "task", "learned (UTC)"):
        table.add_column(title, overflow="fold")
    for title in ("then", "now", "change"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("status")
    for row in version_rows(run):
        change = None if row["then"] is None or row["now"] is None else row["now"] - row["then"]
        table.add_row(
            Text(row["version"]),
            Text(row["task"]),
            row["created"][:16].replace("T", " "),
            _ACCURACY.value(row["then"]),
            _ACCURACY.value(row["now"]),
            Text(_ACCURACY.change(change), style=_COLOURS[_ACCURACY.direction(change)]),
            row["status"],
        )
    return table


def _caption(run: RunData) -> Text:
    refused = [
        f"\n{version.id}: {what_fell(version.manifest.gate)}."
        for version in run.everything
        if version.manifest.gate is not None and version.refused
    ]
    return Text(
        "Accuracy on the version's own task, %: when it was learned, and under the promoted version. "
        f"Changes in points.{''.join(refused)}",
        style="dim",
    )
