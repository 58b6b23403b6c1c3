"""What a bench found: every contender's numbers with intervals, and its differences to the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

from everalign.bench.answers import MEASURES, Number, Said, corrected, measure_said, measure_tasks
from everalign.bench.records import METRICS, PAIR_METRICS, Record, final_scores
from everalign.evaluation.statistics import Array, Interval, crossed_bootstrap, paired_permutation_test
from everalign.learning.scores import known_mean

_OUTCOME = {"1": 1.0, "0": 0.0, "=": 0.5}
NUMBERS = ("last", "backward_transfer", "average_performance", "forward_transfer", "worst")
COMPARED = ("last", "backward_transfer")
"""Numbers that are compared with the baseline pair by pair."""


@dataclass(frozen=True)
class Costs:
    """Means over a contender's uninterrupted runs; bytes are those kept at the end, divided by the tasks."""

    processor_seconds: float | None
    seconds: float | None
    peak_bytes: float
    adapter: float
    state: float
    buffer: float

    @property
    def kept(self) -> float:
        """All bytes that are kept for a task."""
        return self.adapter + self.state + self.buffer


@dataclass(frozen=True)
class Contest:
    """One contender on one model; `answers` are measures of what it says, `answer_tasks` the same by task."""

    name: str
    regime: str
    choice: Mapping[str, Any]
    runs: int
    paired: int
    numbers: Mapping[str, Mapping[str, Number]]
    changes: Mapping[str, float | None]
    tasks: Mapping[str, Mapping[str, float | None]]
    costs: Costs
    records: Sequence[Record]
    answers: Mapping[str, Number] = field(default_factory=dict)
    answer_tasks: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelResult:
    """All contenders on one model, and the base model's own mean scores by metric, of all and of each task."""

    model: str
    contenders: Mapping[str, Contest]
    zero_shot: Mapping[str, float | None]
    zero_shot_tasks: Mapping[str, Mapping[str, float | None]]
    baseline: str | None


def compared(result: ModelResult, metric: str) -> tuple[str, ...]:
    """The numbers of a metric that are compared with the baseline."""
    return COMPARED if result.baseline is not None and metric in PAIR_METRICS else ()


def compare(
    model: str,
    records: Mapping[str, Sequence[Record]],
    baseline: str | None,
    said: Mapping[str, Sequence[Said]] | None = None,
) -> ModelResult:
    """Compares contenders on one model by their finished runs, and by what their final policies said."""
    base = records.get(baseline or "", [])
    found = {name: _contest(name, runs, [] if name == baseline else base) for name, runs in records.items() if runs}
    numbers = {name: {metric: dict(ones) for metric, ones in one.numbers.items()} for name, one in found.items()}
    for metric in METRICS:
        for number in NUMBERS:
            # P-values are corrected for the number of contenders that have one.
            for name, one in corrected({name: ones[metric][number] for name, ones in numbers.items()}).items():
                numbers[name][metric][number] = one
    spoken = said or {}
    answers, its = measure_said(spoken, baseline), spoken.get(baseline or "", [])
    found = {
        name: replace(
            one,
            numbers=numbers[name],
            answers=answers.get(name, {}),
            answer_tasks={
                measure: measure_tasks(spoken.get(name, []), [] if name == baseline else its, measure)
                for measure in MEASURES
            },
        )
        for name, one in found.items()
    }
    some = next(iter(found.values())).records[0]
    tasks = _tasks(some)
    zero = {metric: dict(zip(some.tasks, some.scores[metric].zero_shot, strict=True)) for metric in METRICS}
    return ModelResult(
        model,
        found,
        {metric: known_mean(values.values()) for metric, values in zero.items()},
        {metric: {task: values[task] for task in tasks} for metric, values in zero.items()},
        baseline if base else None,
    )


def _contest(name: str, runs: Sequence[Record], base: Sequence[Record]) -> Contest:
    by_place = {(tuple(run.order), run.seed): run for run in base}
    both = [(run, by_place[place]) for run in runs if (place := (tuple(run.order), run.seed)) in by_place]
    numbers = {metric: {number: _number(metric, number, runs, both) for number in NUMBERS} for metric in METRICS}
    finals_by_metric = {
        metric: [dict(zip(run.tasks, final_scores(run.matrix(metric)), strict=True)) for run in runs]
        for metric in METRICS
    }
    tasks = {
        metric: {task: known_mean(finals[task] for finals in ends) for task in _tasks(runs[0])}
        for metric, ends in finals_by_metric.items()
    }
    changes = {metric: known_mean(run.change(metric) for run in runs) for metric in METRICS}
    return Contest(
        name, runs[0].regime, runs[0].choice, len(runs), len(both), numbers, changes, tasks, _costs(runs), runs
    )


def _tasks(run: Record) -> list[str]:
    """The tasks with held-out pairs, in the order in which the run learned them."""
    return [task for task in run.tasks if task in run.pairs["accuracy"]]


def _number(metric: str, name: str, runs: Sequence[Record], both: Sequence[tuple[Record, Record]]) -> Number:
    measure = f"{metric}.{name}"
    values = [value for run in runs if (value := run.number(measure)) is not None]
    if not values:
        return Number(None)
    deviation = stdev(values) if len(values) > 1 else None
    if metric not in PAIR_METRICS or name not in COMPARED:
        return Number(fmean(values), deviation)
    own = _interval([_parts(run, metric, name) for run in runs if run.number(measure) is not None])
    known = [pair for pair in both if all(run.number(measure) is not None for run in pair)]
    if not known:
        return Number(fmean(values), deviation, own.low, own.high)
    moved = []
    for run, other in known:
        mine, its = _parts(run, metric, name), _parts(other, metric, name)
        moved.append({task: (share, value - its[task][1]) for task, (share, value) in mine.items()})
    differences = [(run.number(measure) or 0.0) - (other.number(measure) or 0.0) for run, other in known]
    # Without learning all runs are one: equal differences in each would pass for evidence.
    varies = any(run.learns for pair in known for run in pair)
    p_value = paired_permutation_test(differences) if varies else None
    return Number(fmean(values), deviation, own.low, own.high, _interval(moved), p_value)


def _parts(run: Record, metric: str, name: str) -> dict[str, tuple[float, Array]]:
    """By task, what it counts for in a number of a run, and the (P,) values of its pairs."""
    pairs = run.pairs[metric]
    final = {task: _values(found.final) for task, found in pairs.items()}
    if name == "last":
        return {task: (1 / len(final), values) for task, values in final.items()}
    earlier = [task for task in run.tasks[:-1] if task in final]
    return {
        task: (
            1 / len(earlier) if task in earlier else 0.0,
            values - _values(learned) if (learned := pairs[task].learned) is not None else 0.0 * values,
        )
        for task, values in final.items()
    }


def _values(outcomes: str) -> Array:
    return np.array([_OUTCOME[outcome] for outcome in outcomes])


def _interval(runs: Sequence[Mapping[str, tuple[float, Array]]]) -> Interval:
    names = sorted(runs[0])
    values = [np.stack([run[name][1] for run in runs]) for name in names]
    return crossed_bootstrap(values, np.array([[run[name][0] for name in names] for run in runs]))


def _plain(number: Number) -> dict[str, Any]:
    """A number as plain values, without what is not known."""
    found = {name: getattr(number, name) for name in number.__dataclass_fields__}
    return {
        name: value._asdict() if isinstance(value, Interval) else value
        for name, value in found.items()
        if value is not None
    }


def _costs(runs: Sequence[Record]) -> Costs:
    costs = [run.cost for run in runs if run.cost is not None]
    whole = [cost for cost in costs if not cost.resumed]
    sizes = {"adapter": 0.0, "state": 0.0, "buffer": 0.0}
    for run in runs:
        kept = run.cost.kept if run.cost is not None else []
        # What goes on learning needs the last version; a model for each task needs them all.
        needed = kept if run.regime == "separate" else kept[-1:]
        for part in sizes:
            sizes[part] += sum(getattr(one, part) for one in needed) / len(run.tasks) / len(runs)
    return Costs(
        known_mean(cost.processor_seconds for cost in whole),
        known_mean(cost.seconds for cost in whole),
        max(cost.peak_bytes for cost in costs),
        **sizes,
    )


def to_json(result: ModelResult) -> dict[str, Any]:
    """Everything but the records, as plain values."""
    contenders = {}
    for name, one in result.contenders.items():
        contenders[name] = {
            "regime": one.regime,
            "choice": dict(one.choice),
            "runs": one.runs,
            "paired": one.paired,
            "numbers": {
                metric: {number: _plain(found) for number, found in ones.items()}
                for metric, ones in one.numbers.items()
            },
            "answers": {
                measure: {**_plain(found), "tasks": dict(one.answer_tasks[measure])}
                for measure, found in one.answers.items()
                if found.mean is not None
            },
            "changes": dict(one.changes),
            "tasks": {metric: dict(values) for metric, values in one.tasks.items()},
            "costs": {**asdict(one.costs), "kept": one.costs.kept},
        }
    return {
        "model": result.model,
        "baseline": result.baseline,
        "zero_shot": {metric: dict(values) for metric, values in result.zero_shot_tasks.items()},
        "contenders": contenders,
    }
