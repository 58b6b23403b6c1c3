"""The HTML report on one run or several side by side: one file that needs nothing but itself."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from everalign.errors import InputError
from everalign.learning.promotion import what_fell
from everalign.learning.run_data import RunData, load_run, read_results, run_labels
from everalign.learning.run_files import ModuleConsolidation, TrainingStep
from everalign.learning.scores import Scores
from everalign.reporting.answers import CorrectorShow, answer_pairs
from everalign.reporting.formats import (
    ANSWER_METRICS,
    CORRECTION_ACCURACY,
    METRICS,
    SUMMARY_TITLES,
    UNMEASURED,
    WIDTH,
    Cell,
    Errors,
    Metric,
    best_values,
    count,
    error_matrix,
    interval_cell,
    is_chance,
    matrix_cell,
    of_last,
    of_transfer,
    percent,
    seconds,
    significant,
    summary_cells,
)
from everalign.reporting.headline import cautions, headline
from everalign.reporting.plots import (
    change_bar,
    change_lines,
    change_series,
    matrix_rows,
    progress_lines,
    training_curves,
)
from everalign.storage import write_text

_ACCURACY = METRICS["accuracy"]
_Show = Callable[[float | None], str]

# Columns of tables: which number, and how it is printed; of consolidation also how modules are taken together.
_WEIGHTS: dict[str, tuple[str, _Show]] = {
    "temperature": ("temperature", significant),
    "effective share": ("effective_share", percent),
    "largest": ("largest_weight", significant),
    "top tenth": ("top_decile_share", percent),
    "with reward": ("reward_correlation", significant),
    "with length": ("length_correlation", significant),
    "one reward": ("constant_share", percent),
    "capped": ("capped_share", percent),
    "KL, nats": ("kl_to_reference", significant),
}
_percent2 = partial(percent, digits=2)


def _mean_rank(ranks: Sequence[float]) -> float:
    return ranks[0] if len(ranks) == 1 else fmean(ranks)


def _rank(value: float | None) -> str:
    """A mean with one decimal; a single module's rank is a whole number."""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


_CONSOLIDATION: dict[str, tuple[str, Callable[[list[float]], float], _Show]] = {
    "rank": ("rank", _mean_rank, _rank),
    "energy kept": ("energy_kept", fmean, percent),
    "projected energy": ("projected_energy", fmean, _percent2),
    "norm before": ("norm_before", lambda norms: math.hypot(*norms), significant),
    "norm after": ("norm_after", lambda norms: math.hypot(*norms), significant),
    "memory rank": ("memory_rank", _mean_rank, _rank),
    "discarded energy": ("discarded_energy", fmean, _percent2),
    "lost history": ("bank_lost_energy", fmean, _percent2),
}


@dataclass(frozen=True)
class Row:
    """A named line of a table: cells, or texts."""

    name: str
    cells: Sequence[Any]


@cache
def page_template(name: str) -> Template:
    """Return a template of this room: text is escaped, and a value that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("everalign.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (files("everalign.reporting") / "templates" / "report.js").read_text(encoding="utf-8")
    # By this hash a page's content policy allows the script, and no other.
    allowed = b64encode(sha256(f"\n{script}\n".encode()).digest()).decode()
    environment.globals |= {"script": Markup(script), "script_hash": allowed}
    return environment.get_template(name)


def write_report(runs: Sequence[Path], output: Path, corrector: CorrectorShow | None = None) -> Path:
    """Write the report on some runs to `output`, whole or not at all, and return its path.

    Args:
        runs: run directories.
        output: the HTML file; one that was there before is replaced.
        corrector: what a corrector did, for a section of its own.

    Raises:
        InputError: there are no runs, one cannot be read or is given twice, or the file cannot be written.
    """
    if not runs:
        raise InputError("a report needs at least one run directory")
    write_text(Path(output), render_report([load_run(run) for run in runs], corrector))
    return Path(output)


def render_report(runs: Sequence[RunData], corrector: CorrectorShow | None = None) -> str:
    """Return the report's HTML; arguments as in `write_report`."""
    labels = run_labels(runs)
    by_label = dict(zip(labels, runs, strict=True))
    scores = {label: run.scores() for label, run in by_label.items()}
    errors = {label: error_matrix(run) for label, run in by_label.items()}
    # One colour stands for one score in all heat maps, and all plots of changes have one axis.
    found = [score for one in scores.values() for _, _, row in matrix_rows(one) for score in row if score is not None]
    heat = (min(found), max(found)) if found else (0.0, 1.0)
    ends = [0.0]
    for label, one in scores.items():
        for task, line in change_series(one).items():
            for rows, change in line:
                bar = change_bar(errors[label], rows, one.learned.index(task))
                ends += [change - bar, change + bar]
    trained = {label: training for label, run in by_label.items() if (training := _training(run))}
    room = max(0.08 * (max(ends) - min(ends)), 0.01)
    limits = (min(ends) - room, max(ends) + room)
    return page_template("report.html.j2").render(
        labels=labels,
        headline=headline(runs, labels),
        cautions=cautions(runs, labels),
        summary_titles=SUMMARY_TITLES,
        summaries={key: _summaries(by_label, metric) for key, metric in METRICS.items()},
        progress=progress_lines(scores, errors, _ACCURACY, "progress"),
        curves=training_curves(trained, "curves") if len(trained) > 1 else None,
        metrics=METRICS,
        meaning=CORRECTION_ACCURACY if runs[0].facts.objective == "correction" else _ACCURACY.meaning,
        runs=[_run_view(run, label, f"run-{i}", heat, limits) for i, (label, run) in enumerate(by_label.items(), 1)],
        corrector=corrector,
        facts=facts_view(runs),
        consolidation_columns=list(_CONSOLIDATION),
        stage_columns=("stage", "reference policy", "step-0 margin", "rows", "replayed", "steps", "epochs", "time"),
        weight_columns=list(_WEIGHTS),
        rollout_columns=("round", "prompts", "answers", "unfinished", "temperature", "mean reward"),
        gate_columns=("status", "tolerance", "what fell"),
    )


def _summaries(runs: Mapping[str, RunData], metric: Metric) -> list[Row]:
    """Return a row for each run with its four numbers; the best of each column is marked."""
    scores = {label: run.scores(metric.key) for label, run in runs.items()}
    best = best_values(scores, metric)
    rows = []
    for label, one in scores.items():
        cells = summary_cells(one, metric)
        errors = {"last": of_last(runs[label]), "backward_transfer": of_transfer(runs[label])}
        bars = {name: _bar(error, metric) for name, error in errors.items() if metric.key == "accuracy"}
        rows.append(
            Row(
                label,
                [
                    Cell(
                        text, "best" if text == best.get(name) else "", "" if text == UNMEASURED else bars.get(name, "")
                    )
                    for name, text in cells.items()
                ],
            )
        )
    return rows


def _bar(error: float | None, metric: Metric) -> str:
    """Return half a 95 % interval, nothing where the error is not known."""
    return "" if error is None else f"± {metric.value(WIDTH * error)}"


def _training(run: RunData) -> list[tuple[str, Sequence[TrainingStep]]]:
    return [(version.task, version.training) for version in run.versions if version.training]


def _run_view(
    run: RunData, label: str, anchor: str, heat: tuple[float, float], limits: tuple[float, float]
) -> dict[str, Any]:
    """Return what the template prints of one run; `anchor` keeps the ids of its plots apart from other runs'."""
    scores, errors = run.scores(), error_matrix(run)
    stages = [(version.task, stage) for version in run.versions for stage in version.manifest.stages]
    rollouts = [(version.task, rollout) for version in run.versions for rollout in version.manifest.rollouts]
    data = [
        (version.task, use, rows)
        for version in run.versions
        for use, rows in (("train", version.manifest.train), ("test", version.manifest.test))
        if rows
    ]
    drift = {
        f"after {version.task}": [
            version.scores[task].kl_previous if task in version.scores else None for task in run.tasks
        ]
        for version in run.versions
    }
    return {
        "label": label,
        "tasks": run.tasks,
        "regime": run.regime,
        "heatmap": heat_view(scores, _ACCURACY, heat, errors),
        "refused": bool(run.off_lineage and not run.versions),
        "changes": change_lines(scores, errors, _ACCURACY, limits, f"{anchor}-changes", label),
        "curves": training_curves({label: _training(run)}, f"{anchor}-curves"),
        "matrices": {
            key: matrix_view(run.scores(key), metric, error_matrix(run, key)) for key, metric in METRICS.items()
        },
        "forgetting": forgetting_view(scores, _ACCURACY, errors),
        "drift": [
            Row(name, [significant(value) for value in row])
            for name, row in drift.items()
            if any(value is not None for value in row)
        ],
        "consolidation": [
            {
                "task": version.task,
                "total": _consolidation_cells(version.consolidation),
                "modules": [Row(module.module, _consolidation_cells([module])) for module in version.consolidation],
            }
            for version in run.versions
            if version.consolidation
        ],
        "effects": effect_view(run),
        "stages": [
            Row(
                task,
                [
                    stage.stage,
                    stage.reference or UNMEASURED,
                    significant(stage.step0_margin),
                    count(stage.rows),
                    count(stage.replayed),
                    count(stage.steps),
                    f"{stage.epochs:g}",
                    seconds(stage.seconds),
                ],
            )
            for task, stage in stages
        ],
        "weights": [
            Row(version.task, [show(version.manifest.weights.get(field)) for field, show in _WEIGHTS.values()])
            for version in run.versions
            if version.manifest.weights is not None
        ],
        "rollouts": [
            Row(
                task,
                [
                    *(f"{rollout[name]:.0f}" for name in ("round", "prompts", "answers", "unfinished")),
                    *(significant(rollout[name]) for name in ("sampling_temperature", "mean_reward")),
                ],
            )
            for task, rollout in rollouts
        ],
        "gate": gate_view(run),
        "data": [Row(task, [use, rows.source, count(rows.rows), rows.fingerprint]) for task, use, rows in data],
        "answers": answer_pairs(run),
        "evaluation": evaluation_view(run),
    }


def evaluation_view(run: RunData) -> dict[str, dict[str, Any]]:
    """Return by task what `everalign evaluate` measured: a row for each measure, a column for each version."""
    found: dict[str, dict[str, Any]] = {}
    results = read_results(run.path)
    for task in dict.fromkeys(result.task for result in results):
        shown = [result for result in results if result.task == task]
        lines = [
            Row(title, [interval_cell(one.metrics.get(name), factor) for one in shown])
            for name, (title, factor) in ANSWER_METRICS.items()
            if any(name in one.metrics for one in shown)
        ]
        found[task] = {"rows": lines, "versions": [one.version for one in shown], "prompts": shown[0].prompts}
    return found


def matrix_view(scores: Scores, metric: Metric, errors: Errors | None = None) -> list[Row]:
    """Return the score matrix below the zero-shot row; cells after learning carry the change since then.

    A change that may be chance by the scores' standard errors has no direction.
    """
    return [
        Row(name, [matrix_cell(scores, metric, errors, i, j) for j in range(len(row))])
        for name, i, row in matrix_rows(scores)
    ]


def heat_view(scores: Scores, metric: Metric, limits: tuple[float, float], errors: Errors | None = None) -> list[Row]:
    """Return the score matrix with colours, palest at the first of the limits; nothing where nothing was scored."""
    low, high = limits
    rows, found = matrix_view(scores, metric, errors), matrix_rows(scores)
    if all(score is None for _, _, row in found for score in row):
        return []
    shown = []
    for line, (moment, i, row) in zip(rows, found, strict=True):
        cells = []
        for j, (cell, score) in enumerate(zip(line.cells, row, strict=True)):
            if score is None:
                cells.append(cell)
                continue
            strength = (score - low) / (high - low) if high > low else 0.5
            bar = "" if errors is None or i < 0 else f" {_bar(errors[i][j], metric)}"
            text = f"{scores.tasks[j]}, {moment}: {metric.value(score)}{bar}{metric.unit}"
            cells.append(replace(cell, strength=round(strength, 3), title=text))
        shown.append(Row(line.name, cells))
    return shown


def forgetting_view(scores: Scores, metric: Metric, errors: Errors | None = None) -> list[Row]:
    """Return a row for each earlier task: score when learned, best since, last; last minus learned; best minus last.

    Where the change may be chance by the scores' standard errors, neither difference has a direction.
    """
    rows, final = [], len(scores.matrix) - 1
    for j, task in enumerate(scores.learned):
        if task not in scores.forgetting:
            continue
        lost, last, learned = scores.forgetting[task], scores.matrix[-1][j], scores.matrix[j][j]
        change = scores.changes[j]
        chance = is_chance(change, errors, final, j)
        values = [metric.value(score) for score in (learned, None if last is None else last + lost, last)]
        moved = ((metric.change(change), change), (metric.change(lost), -lost))
        cells = [Cell(text, direction="" if chance else metric.direction(value)) for text, value in moved]
        rows.append(Row(task, [*map(Cell, values), *cells]))
    return rows


def _consolidation_cells(modules: Sequence[ModuleConsolidation]) -> list[str]:
    columns = _CONSOLIDATION.values()
    return [show(over([getattr(module, field) for module in modules])) for field, over, show in columns]


def effect_view(run: RunData) -> list[Row]:
    """Return the accuracy right before and after consolidation, per version and task scored both times."""
    rows = []
    for version in run.versions:
        scored_before = version.before or {}
        for task in (task for task in run.tasks if task in scored_before and task in version.scores):
            before, after = scored_before[task].accuracy, version.scores[task].accuracy
            change = Cell(_ACCURACY.change(after - before), direction=_ACCURACY.direction(after - before))
            texts = (task, _ACCURACY.value(before), _ACCURACY.value(after))
            rows.append(Row(version.task, [*map(Cell, texts), change]))
    return rows


def gate_view(run: RunData) -> list[Row]:
    """Return a row for each version with what became of it; nothing where there was no gate and no rollback."""
    if not run.off_lineage and all(version.manifest.gate is None for version in run.versions):
        return []
    rows = []
    for version in run.all_versions:
        verdict, status = version.manifest.gate, run.status(version) or "in the line"
        cells = [UNMEASURED] * 2 if verdict is None else [percent(verdict.tolerance), what_fell(verdict) or "nothing"]
        rows.append(Row(version.id, [status, *cells]))
    return rows


def facts_view(runs: Sequence[RunData]) -> list[Row]:
    """Return a row for each fact on how the runs were set up, a cell for each run."""
    tables = []
    for run in runs:
        facts = run.facts
        off = ", ".join(version.id for version in run.off_lineage)
        left_out = {"versions left out": off} if off else {}
        tables.append(
            {
                "directory": str(run.path),
                "model": facts.model,
                "model fingerprint": facts.model_fingerprint,
                "objective": facts.objective,
                **_flat(facts.method.model_dump(), "method: "),
                **_flat(facts.settings, "setting: "),
                "seed": str(facts.seed),
                "created": facts.created,
                "promoted version": run.current or "none",
                **left_out,
                **_flat({"everalign": facts.everalign, **facts.libraries}, "version: "),
                **_flat(facts.machine, "machine: "),
            }
        )
    names = dict.fromkeys(name for table in tables for name in table)
    return [Row(name, [table.get(name, UNMEASURED) for table in tables]) for name in names]


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Return nested settings as printed values by dotted name, behind a prefix."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat
