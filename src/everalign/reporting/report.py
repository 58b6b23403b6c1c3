"""The report: one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from everalign.errors import InputError
from everalign.learning.run_data import RunData, load_run, run_labels
from everalign.learning.scores import Scores
from everalign.reporting import report_views as views
from everalign.reporting.answers import AnswerPair, CorrectorShow, answer_pairs
from everalign.reporting.formats import METRICS, SUMMARY_TITLES, Metric, best_values, summary_cells
from everalign.reporting.headline import cautions, headline
from everalign.reporting.plots import (
    change_bar,
    change_lines,
    change_series,
    matrix_rows,
    progress_lines,
    score_heatmap,
    training_curves,
)
from everalign.reporting.sampling_error import error_matrix
from everalign.storage import write_text

_ACCURACY = METRICS["accuracy"]


@dataclass(frozen=True)
class RunView:
    """One run as the template prints it."""

    label: str
    anchor: str
    tasks: Sequence[str]
    regime: str
    heatmap: Markup | None
    changes: Markup | None
    curves: Markup | None
    matrices: Mapping[str, Sequence[views.Row]]
    forgetting: Sequence[views.Row]
    drift: Sequence[views.Row]
    consolidation: Sequence[views.ConsolidationView]
    effects: Sequence[views.Row]
    stages: Sequence[views.Row]
    weights: Sequence[views.Row]
    rollouts: Sequence[views.Row]
    gate: Sequence[views.Row]
    data: Sequence[views.Row]
    answers: Mapping[str, Sequence[AnswerPair]]


def write_report(runs: Sequence[Path], output: Path, corrector: CorrectorShow | None = None) -> Path:
    """Write the report on one run, or on several side by side, to `output` and return its path.

    What a `corrector` did gets a section of its own. The file appears whole or not at all; one that was there before
    is replaced.
    """
    if not runs:
        raise InputError("a report needs at least one run directory")
    page = render_report([load_run(run) for run in runs], corrector)
    try:
        write_text(Path(output), page)
    except OSError as error:
        raise InputError(f"{output}: the report cannot be written there: {error.strerror}") from error
    return Path(output)


def render_report(runs: Sequence[RunData], corrector: CorrectorShow | None = None) -> str:
    """The report's HTML."""
    labels = run_labels(runs)
    scores = {label: run.scores() for label, run in zip(labels, runs, strict=True)}
    environment = Environment(
        loader=PackageLoader("everalign.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        labels=labels,
        headline=headline(runs, labels),
        cautions=cautions(runs, labels),
        summary_titles=SUMMARY_TITLES,
        summaries={metric: _summaries(runs, labels, METRICS[metric]) for metric in METRICS},
        progress=progress_lines(scores, _errors(runs, labels), _ACCURACY, "progress"),
        metrics=METRICS,
        runs=_run_views(runs, labels),
        corrector=corrector,
        facts=views.facts_view(runs),
        consolidation_columns=views.CONSOLIDATION_COLUMNS,
        stage_columns=views.STAGE_COLUMNS,
        weight_columns=views.WEIGHT_COLUMNS,
        rollout_columns=views.ROLLOUT_COLUMNS,
        gate_columns=views.GATE_COLUMNS,
    )


def _summaries(runs: Sequence[RunData], labels: Sequence[str], metric: Metric) -> list[views.Row]:
    """A row for each run: the four numbers, the best of each column marked."""
    scores = {label: run.scores(metric.key) for label, run in zip(labels, runs, strict=True)}
    best = best_values(scores, metric)
    return [
        views.Row(
            label,
            [
                views.Cell(text, "best" if text == best.get(name) else "")
                for name, text in summary_cells(one, metric).items()
            ],
        )
        for label, one in scores.items()
    ]


def _run_views(runs: Sequence[RunData], labels: Sequence[str]) -> list[RunView]:
    scores = [run.scores() for run in runs]
    heat, change = _heat_limits(scores), _change_limits(runs)
    return [
        _run_view(run, label, f"run-{i}", heat, change)
        for i, (run, label) in enumerate(zip(runs, labels, strict=True), 1)
    ]


def _run_view(run: RunData, label: str, anchor: str, heat: tuple[float, float], change: tuple[float, float]) -> RunView:
    scores = run.scores()
    training = [(version.task, version.training) for version in run.versions]
    return RunView(
        label=label,
        anchor=anchor,
        tasks=run.tasks,
        regime=run.regime,
        heatmap=score_heatmap(scores, _ACCURACY, heat, f"{anchor}-heatmap", label),
        changes=change_lines(scores, error_matrix(run), _ACCURACY, change, f"{anchor}-changes", label),
        curves=training_curves(training, f"{anchor}-curves", label),
        matrices={
            key: views.matrix_view(run.scores(key), metric, error_matrix(run, key)) for key, metric in METRICS.items()
        },
        forgetting=views.forgetting_view(scores, _ACCURACY, error_matrix(run)),
        drift=views.drift_view(run),
        consolidation=views.consolidation_view(run),
        effects=views.effect_view(run),
        stages=views.stage_view(run),
        weights=views.weight_view(run),
        rollouts=views.rollout_view(run),
        gate=views.gate_view(run),
        data=views.data_view(run),
        answers=answer_pairs(run),
    )


def _heat_limits(scores: Sequence[Scores]) -> tuple[float, float]:
    """The lowest and the highest score of all runs, so that one colour means one score everywhere."""
    found = [score for one in scores for _, row in matrix_rows(one) for score in row if score is not None]
    return (min(found), max(found)) if found else (0.0, 1.0)


def _change_limits(runs: Sequence[RunData]) -> tuple[float, float]:
    """Axis limits that hold every run's changes with their bars, and zero, with some room."""
    found = [0.0]
    for run in runs:
        scores, errors = run.scores(), error_matrix(run)
        for task, line in change_series(scores).items():
            for rows, change in line:
                bar = change_bar(errors, rows, scores.learned.index(task))
                found += [change - bar, change + bar]
    room = max(0.08 * (max(found) - min(found)), 0.01)
    return min(found) - room, max(found) + room


def _errors(runs: Sequence[RunData], labels: Sequence[str]) -> dict[str, list[list[float | None]]]:
    return {label: error_matrix(run) for label, run in zip(labels, runs, strict=True)}
