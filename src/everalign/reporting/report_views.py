"""Runs turned into what the report's template prints: text cells, no arithmetic left to do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from everalign.learning.promotion import what_fell
from everalign.learning.run_data import RunData, VersionData
from everalign.learning.run_files import DataSource, ModuleConsolidation
from everalign.learning.scores import Scores
from everalign.reporting.formats import METRICS, UNMEASURED, Metric, count, percent, seconds, significant
from everalign.reporting.plots import matrix_rows
from everalign.reporting.sampling_error import Errors, is_chance

_ACCURACY = METRICS["accuracy"]


@dataclass(frozen=True)
class Cell:
    """One number of a score matrix: `kind` is learned, later, future, base or unmeasured."""

    text: str
    kind: str
    change: str = ""
    direction: str = ""


@dataclass(frozen=True)
class Row:
    """A named line of a table."""

    name: str
    cells: Sequence[Any]


def matrix_view(scores: Scores, metric: Metric, errors: Errors | None = None) -> list[Row]:
    """The score matrix with the zero-shot row; cells after learning carry the change since then.

    A change that may be chance by the scores' standard errors has no direction.
    """
    order = {f"after {task}": i for i, task in enumerate(scores.learned)}
    return [
        Row(name, [_matrix_cell(scores, metric, errors, order.get(name), j, row[j]) for j in range(len(row))])
        for name, row in matrix_rows(scores)
    ]


def _matrix_cell(
    scores: Scores, metric: Metric, errors: Errors | None, i: int | None, j: int, score: float | None
) -> Cell:
    text = metric.value(score)
    if score is None:
        return Cell(text, "unmeasured")
    if i is None or scores.regime != "sequential":
        return Cell(text, "learned" if i == j else "base")
    if j >= i:
        return Cell(text, "learned" if i == j else "future")
    learned = scores.matrix[j][j]
    if learned is None:
        return Cell(text, "later")
    change = score - learned
    direction = "" if is_chance(change, errors, i, j) else metric.direction(change)
    return Cell(text, "later", metric.change(change), direction)


def forgetting_view(scores: Scores, metric: Metric, errors: Errors | None = None) -> list[Row]:
    """Per earlier task: score when learned, best since, last; change since learned; best minus last.

    Where the change may be chance by the scores' standard errors, neither has a direction.
    """
    rows, final = [], len(scores.matrix) - 1
    for j, task in enumerate(scores.learned):
        if task not in scores.forgetting:
            continue
        lost, last, learned = scores.forgetting[task], scores.matrix[-1][j], scores.matrix[j][j]
        change = scores.changes[j]
        chance = is_chance(change, errors, final, j)
        cells = [
            Cell(metric.value(learned), ""),
            Cell(metric.value(None if last is None else last + lost), ""),
            Cell(metric.value(last), ""),
            Cell(metric.change(change), "", direction="" if chance else metric.direction(change)),
            Cell(metric.change(lost), "", direction="" if chance else metric.direction(-lost)),
        ]
        rows.append(Row(task, cells))
    return rows


def drift_view(run: RunData) -> list[Row]:
    """KL(policy now || policy before the task) per version and task; empty where none was measured."""
    rows = []
    for version in run.versions:
        drift = [version.scores[task].kl_previous if task in version.scores else None for task in run.tasks]
        if any(value is not None for value in drift):
            rows.append(Row(f"after {version.task}", [significant(value) for value in drift]))
    return rows


@dataclass(frozen=True)
class ConsolidationView:
    """One task's consolidation: the sums over its modules, then each module."""

    task: str
    total: Sequence[str]
    modules: Sequence[Row]


CONSOLIDATION_COLUMNS = (
    "rank",
    "energy kept",
    "projected energy",
    "norm before",
    "norm after",
    "memory rank",
    "discarded energy",
    "lost history",
)


def consolidation_view(run: RunData) -> list[ConsolidationView]:
    """Per task: means over modules of ranks and energy shares, root of the summed squares of norms."""
    return [
        ConsolidationView(version.task, _total(version.consolidation), [_module(m) for m in version.consolidation])
        for version in run.versions
        if version.consolidation
    ]


def _total(modules: Sequence[ModuleConsolidation]) -> list[str]:
    return [
        f"{fmean(m.rank for m in modules):.1f}",
        percent(fmean(m.energy_kept for m in modules)),
        percent(fmean(m.projected_energy for m in modules), 2),
        significant(math.hypot(*(m.norm_before for m in modules))),
        significant(math.hypot(*(m.norm_after for m in modules))),
        f"{fmean(m.memory_rank for m in modules):.1f}",
        percent(fmean(m.discarded_energy for m in modules), 2),
        percent(fmean(m.bank_lost_energy for m in modules), 2),
    ]


def _module(m: ModuleConsolidation) -> Row:
    cells = [
        str(m.rank),
        percent(m.energy_kept),
        percent(m.projected_energy, 2),
        significant(m.norm_before),
        significant(m.norm_after),
        str(m.memory_rank),
        percent(m.discarded_energy, 2),
        percent(m.bank_lost_energy, 2),
    ]
    return Row(m.module, cells)


def effect_view(run: RunData, metric: Metric = _ACCURACY) -> list[Row]:
    """Scores right before and after consolidation, per version and task scored both times."""
    return [
        Row(version.task, _effect_cells(version, task, metric))
        for version in run.versions
        for task in run.tasks
        if version.before is not None and task in version.before and task in version.scores
    ]


def _effect_cells(version: VersionData, task: str, metric: Metric) -> list[Cell]:
    before = getattr((version.before or {})[task], metric.key)
    after = getattr(version.scores[task], metric.key)
    return [
        Cell(task, ""),
        Cell(metric.value(before), ""),
        Cell(metric.value(after), ""),
        Cell(metric.change(after - before), "", direction=metric.direction(after - before)),
    ]


STAGE_COLUMNS = (
    "stage",
    "reference policy",
    "step-0 margin",
    "rows",
    "replayed",
    "steps",
    "epochs",
    "time",
)


def stage_view(run: RunData) -> list[Row]:
    """One line a stage of training."""
    return [
        Row(
            version.task,
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
        for version in run.versions
        for stage in version.manifest.stages
    ]


ROLLOUT_COLUMNS = ("round", "prompts", "answers", "unfinished", "temperature", "mean reward")


def rollout_view(run: RunData) -> list[Row]:
    """One line a round of sampled answers."""
    names = ("round", "prompts", "answers", "unfinished")
    return [
        Row(
            version.task,
            [
                *(f"{rollout[name]:.0f}" for name in names),
                significant(rollout["sampling_temperature"]),
                significant(rollout["mean_reward"]),
            ],
        )
        for version in run.versions
        for rollout in version.manifest.rollouts
    ]


GATE_COLUMNS = ("status", "tolerance", "what fell")


def gate_view(run: RunData) -> list[Row]:
    """One line a version with what became of it; empty where all were promoted and no gate was asked."""
    if not run.beside and all(version.manifest.gate is None for version in run.versions):
        return []
    return [
        Row(version.id, [run.status(version) or "in the line", *_gate_cells(version)]) for version in run.everything
    ]


def _gate_cells(version: VersionData) -> list[str]:
    verdict = version.manifest.gate
    if verdict is None:
        return [UNMEASURED, UNMEASURED]
    return [percent(verdict.tolerance), what_fell(verdict) or "nothing"]


WEIGHT_COLUMNS = (
    "temperature",
    "effective share",
    "largest",
    "top tenth",
    "with reward",
    "with length",
    "one reward",
    "capped",
    "KL, nats",
)


def weight_view(run: RunData) -> list[Row]:
    """One line a task that was learned from rewards."""
    return [Row(v.task, _weight_cells(v.manifest.weights)) for v in run.versions if v.manifest.weights is not None]


def _weight_cells(weights: Mapping[str, float | None]) -> list[str]:
    shares = ("effective_share", "top_decile_share", "constant_share", "capped_share")
    share = {name: UNMEASURED if weights.get(name) is None else percent(weights[name] or 0.0) for name in shares}
    number = {name: significant(weights.get(name)) for name in weights if name not in shares}
    return [
        number["temperature"],
        share["effective_share"],
        number["largest_weight"],
        share["top_decile_share"],
        number["reward_correlation"],
        number["length_correlation"],
        share["constant_share"],
        share["capped_share"],
        number["kl_to_reference"],
    ]


def data_view(run: RunData) -> list[Row]:
    """One line a data set: use, source, rows, hash."""
    lines = []
    for version in run.versions:
        lines.append(Row(version.task, ["train", *_source(version.manifest.train)]))
        if version.manifest.test:
            lines.append(Row(version.task, ["test", *_source(version.manifest.test)]))
    return lines


def _source(data: DataSource) -> list[str]:
    return [data.source, count(data.rows), data.fingerprint]


def facts_view(runs: Sequence[RunData]) -> list[Row]:
    """One line a fact, one cell a run; a fact that a run lacks is a dash."""
    tables = [_facts(run) for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    return [Row(name, [table.get(name, UNMEASURED) for table in tables]) for name in names]


def _facts(run: RunData) -> dict[str, str]:
    facts = run.facts
    versions = {"promoted version": run.current or "none"} | (
        {"versions left out": ", ".join(run.left_out)} if run.left_out else {}
    )
    return {
        "directory": str(run.path),
        "model": facts.model,
        "model fingerprint": facts.model_fingerprint,
        "objective": facts.objective,
        **{f"method: {name}": text for name, text in _flat(facts.method.model_dump()).items()},
        **{f"setting: {name}": text for name, text in _flat(facts.settings).items()},
        "seed": str(facts.seed),
        "created": facts.created,
        **versions,
        **{f"version: {name}": text for name, text in ({"everalign": facts.everalign} | facts.libraries).items()},
        **{f"machine: {name}": text for name, text in _flat(facts.machine).items()},
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names with printed values."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat
