"""The HTML report on a bench, one file that needs nothing but itself, with its forgetting curves and costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup
from scipy.stats import t

from everalign.bench.answers import WINS
from everalign.bench.comparison import Contest, ModelResult, compared
from everalign.bench.phases import Outcome
from everalign.bench.recipe import Bench
from everalign.bench.records import Record
from everalign.bench.tables import (
    COST_COLUMNS,
    NUMBER_TITLES,
    answer_measures,
    answer_text,
    answers_about,
    choice_text,
    cost_cells,
    difference_text,
    number_text,
)
from everalign.evaluation.statistics import stars
from everalign.learning.scores import Scores, known_mean
from everalign.reporting.formats import ANSWER_METRICS, METRICS, UNMEASURED, Cell, Metric, fixed, percent, significant
from everalign.reporting.plots import (
    DASHES,
    MARKERS,
    SERIES,
    Tip,
    figure,
    for_both_widths,
    inline_svg,
    legend_above,
    matrix_rows,
)
from everalign.reporting.report import Row, heat_view, matrix_view, page_template
from everalign.storage import write_text

_DRAWN = ("accuracy", "reward_accuracy")
Curve = Callable[[Record, str], dict[int, float]]


def write_bench_report(bench: Bench, outcome: Outcome, path: Path) -> Path:
    """Writes the report on a comparison, whole or not at all, and returns its path."""
    page = page_template("bench.html.j2").render(
        part=outcome.part,
        headline=headline(outcome),
        notes=outcome.notes,
        orders=[" > ".join(order) for order in outcome.orders],
        seeds=", ".join(map(str, outcome.seeds)),
        metrics=METRICS,
        models=[_model_view(result, f"model-{number}") for number, result in enumerate(outcome.models, 1)],
        cost_columns=COST_COLUMNS,
        facts=_facts(bench, outcome),
    )
    write_text(path, page)
    return path


def headline(outcome: Outcome) -> str:
    """Returns which contender ends highest on every model, and whether that is told from chance."""
    sentences = []
    metric = METRICS["accuracy"]
    for result in outcome.models:
        known = {n: one for n, one in result.contenders.items() if one.numbers["accuracy"]["last"].mean is not None}
        if not known:
            continue
        name = max(known, key=lambda n: known[n].numbers["accuracy"]["last"].mean or 0.0)
        last = known[name].numbers["accuracy"]["last"]
        best = [n for n, one in known.items() if one.numbers["accuracy"]["last"].mean == last.mean]
        names = f"{', '.join(best[:-1])} and {best[-1]} end" if len(best) > 1 else f"{name} ends"
        text = f"On {result.model}, {names} highest in accuracy: {metric.full(last.mean)}"
        if last.difference is not None and len(best) == 1:
            sure = "" if stars(last.p_holm) else ", which may be chance"
            if last.p_holm is None:
                sure = ", which no test over runs can judge: neither learns"
            text += f", {metric.change(last.difference.value)} points against {result.baseline}{sure}"
        sentences.append(f"{text}.")
        if _learned_nothing(result):
            sentences.append(
                "But nothing was learned: right after learning its tasks, no contender scores higher on them, on "
                "average, than the base model. Raise the learning rate or the epochs; tasks that contradict each other "
                "need labels."
            )
    return " ".join(sentences) or "No held-out pairs were scored."


def _learned_nothing(result: ModelResult) -> bool:
    """Whether every contender that learns has, on its own tasks, at most the base model's mean accuracy."""
    gains = []
    for one in result.contenders.values():
        for run in one.records:
            scores = run.scores["accuracy"]
            whole = len(scores.matrix) == len(run.tasks) and run.regime != "joint"
            own = [row[i] for i, row in enumerate(scores.matrix)] if whole else scores.matrix[-1]
            pairs = [(a, b) for a, b in zip(own, scores.zero_shot, strict=True) if a is not None and b is not None]
            if run.learns and pairs:
                gains.append(fmean(a - b for a, b in pairs))
    return bool(gains) and max(gains) <= 0


def _model_view(result: ModelResult, anchor: str) -> dict[str, Any]:
    """What the template prints of one model; `anchor` keeps the ids of its plots apart."""
    tasks = list(result.zero_shot_tasks["accuracy"])
    return {
        "model": result.model,
        "tasks": tasks,
        "baseline": result.baseline,
        "columns": {
            key: [
                "runs",
                *NUMBER_TITLES.values(),
                *(f"Δ {NUMBER_TITLES[name]}" for name in compared(result, key)),
                *tasks,
            ]
            for key in METRICS
        },
        "tables": {key: _metric_rows(result, metric) for key, metric in METRICS.items()},
        "forgetting": [
            curves(
                result,
                METRICS[key],
                change_since_learned,
                f"{anchor}-{key}-forgetting",
                f"Forgetting in {METRICS[key].title.lower()} on {result.model}",
                ("tasks learned since", f"change in {METRICS[key].title.lower()}, {METRICS[key].change_unit}"),
            )
            for key in _DRAWN
        ],
        "progress": [
            curves(
                result,
                METRICS[key],
                mean_of_learned,
                f"{anchor}-{key}-progress",
                f"Mean {METRICS[key].title.lower()} over the tasks learned so far on {result.model}",
                ("tasks learned", f"mean {METRICS[key].title.lower()}, {METRICS[key].unit.strip()}"),
            )
            for key in _DRAWN
        ],
        "costs": [cost_plot(result, METRICS[key], f"{anchor}-{key}-cost") for key in _DRAWN],
        "answers": _answers(result),
        "cost_rows": [Row(name, cost_cells(one)) for name, one in result.contenders.items()],
        "matrices": [_matrices(one) for one in result.contenders.values()],
    }


def _metric_rows(result: ModelResult, metric: Metric) -> list[Row]:
    zero = result.zero_shot_tasks[metric.key]
    differences = compared(result, metric.key)
    empty = [Cell(UNMEASURED)] * (len(NUMBER_TITLES) - 1 + len(differences))
    first = [Cell(""), Cell(metric.value(result.zero_shot[metric.key]), "base"), *empty]
    rows = [Row("base model", [*first, *(Cell(metric.value(value), "base") for value in zero.values())])]
    for name, one in result.contenders.items():
        numbers = one.numbers[metric.key]
        cells = [Cell(str(one.runs)), *(Cell(number_text(metric, key, numbers[key])) for key in NUMBER_TITLES)]
        for key in differences:
            number = numbers[key]
            sure = number.difference is not None and stars(number.p_holm)
            direction = metric.direction(number.difference.value) if number.difference is not None and sure else ""
            cells.append(Cell(difference_text(metric, number), direction=direction))
        rows.append(Row(name, [*cells, *(Cell(metric.value(one.tasks[metric.key][task])) for task in zero)]))
    return rows


def _answers(result: ModelResult) -> dict[str, Any] | None:
    """The table of what answers are worth, and the share of prompts won by task; None where nothing was asked."""
    measures = answer_measures(result)
    if not measures:
        return None
    rows, wins = [], []
    for name, one in result.contenders.items():
        rows.append(
            Row(name, [str(one.runs), *(answer_text(measure, one.answers.get(measure)) for measure in measures)])
        )
        if won := one.answer_tasks.get(WINS[0]):
            wins.append(Row(name, [percent(share) for share in won.values()]))
    tasks = next((list(won) for one in result.contenders.values() if (won := one.answer_tasks.get(WINS[0]))), [])
    return {
        "about": answers_about(result, measures),
        "columns": ["runs", *(ANSWER_METRICS[measure][0] for measure in measures)],
        "rows": rows,
        "tasks": tasks,
        "wins": wins,
    }


def _matrices(one: Contest) -> dict[str, Any]:
    """A contender's mean matrices over seeds, for every order."""
    by_order: dict[tuple[str, ...], list[Record]] = {}
    for record in one.records:
        by_order.setdefault(tuple(record.order), []).append(record)
    orders = []
    for order, records in by_order.items():
        means = {key: mean_scores([record.matrix(key) for record in records]) for key in _DRAWN}
        found = [score for _, _, row in matrix_rows(means["accuracy"]) for score in row if score is not None]
        limits = (min(found), max(found)) if found else (0.0, 1.0)
        orders.append(
            {
                "order": " > ".join(order),
                "tasks": means["accuracy"].tasks,
                "rows": {key: matrix_view(scores, METRICS[key]) for key, scores in means.items() if key != "accuracy"},
                "heatmap": heat_view(means["accuracy"], METRICS["accuracy"], limits),
            }
        )
    return {"name": one.name, "orders": orders}


def mean_scores(runs: Sequence[Scores]) -> Scores:
    """Returns the mean of score matrices of the same tasks in the same order."""
    first = runs[0]
    columns = range(len(first.tasks))
    zero = [known_mean(run.zero_shot[j] for run in runs) for j in columns]
    matrix = [[known_mean(run.matrix[i][j] for run in runs) for j in columns] for i in range(len(first.matrix))]
    return Scores(first.tasks, zero, matrix, first.regime)


def _facts(bench: Bench, outcome: Outcome) -> list[tuple[str, str]]:
    """What the runs were made with, a line each."""
    records = [record for result in outcome.models for one in result.contenders.values() for record in one.records]
    facts: Mapping[str, Any] = records[0].facts
    machines = {str(record.facts.get("machine", {}).get("cpu")) for record in records}
    resumed = sum(record.cost is not None and record.cost.resumed for record in records)
    runs = (
        f"{len(records)}; the times of {resumed} that were interrupted are left out" if resumed else f"{len(records)}"
    )
    return [
        ("recipe", bench.digest),
        ("code", ", ".join(sorted({record.code for record in records}))),
        ("runs", runs),
        ("processors", ", ".join(sorted(machines))),
        ("libraries", choice_text(dict(facts.get("libraries", {})))),
        (
            "settings of the first run",
            choice_text({key: value for key, value in facts.get("settings", {}).items() if value is not None}),
        ),
        ("hours of training", significant(sum(r.cost.seconds for r in records if r.cost is not None) / 3600)),
    ]


def change_since_learned(record: Record, metric: str) -> dict[int, float]:
    """Returns, by the number of tasks learned since, the mean change of a task's score since it was learned."""
    scores, found = record.matrix(metric), dict[int, list[float]]()
    if scores.regime != "sequential":
        return {}
    for i, row in enumerate(scores.matrix):
        for j in range(i + 1):
            learned, score = scores.matrix[j][j], row[j]
            if learned is not None and score is not None:
                found.setdefault(i - j, []).append(score - learned)
    return {lag: fmean(changes) for lag, changes in sorted(found.items())}


def mean_of_learned(record: Record, metric: str) -> dict[int, float]:
    """Returns, by the number of tasks learned so far, the mean score over them."""
    scores = record.matrix(metric)
    if scores.regime != "sequential":
        return {}
    means = {rows: scores.up_to(rows).last for rows in range(1, len(scores.matrix) + 1)}
    return {rows: mean for rows, mean in means.items() if mean is not None}


def curves(
    result: ModelResult, metric: Metric, curve: Curve, name: str, title: str, labels: tuple[str, str]
) -> Markup | None:
    """Draws a line a contender, the mean over its runs with 95 % intervals over them; None where there are no points.

    Args:
        result: of one model.
        metric: of the scores.
        curve: a run's points.
        name: of the figure, see `inline_svg`.
        title: what it shows.
        labels: of the two axes.
    """
    lines = {
        label: points
        for label, one in result.contenders.items()
        if len(points := _averaged([curve(record, metric.key) for record in one.records])) > 1
    }
    if not lines:
        return None

    def draw(width: float, ending: str) -> Markup:
        tips: list[Tip] = []
        with figure(width, 340) as drawn:
            axes = drawn.subplots()
            for number, (label, points) in enumerate(lines.items()):
                axes.errorbar(
                    list(points),
                    [mean * metric.scale for mean, _ in points.values()],
                    yerr=[bar * metric.scale for _, bar in points.values()],
                    label=label,
                    **_style(number),
                    linestyle=DASHES[number % len(DASHES)],
                    linewidth=2,
                )
                for x, (mean, bar) in points.items():
                    text = f"{label}, {x} {labels[0]}: {fixed(mean * metric.scale, metric.digits)}"
                    text += "" if math.isnan(bar) else f" ± {fixed(bar * metric.scale, metric.digits)}"
                    tips.append(Tip(axes, x, mean * metric.scale, text))
            axes.set_xticks(sorted({x for points in lines.values() for x in points}))
            axes.set_xlabel(labels[0])
            axes.set_ylabel(labels[1])
            axes.grid(axis="y", linewidth=0.8)
            legend_above(drawn, width)
            ends = ", ".join(f"{label} {metric.value([*points.values()][-1][0])}" for label, points in lines.items())
            return inline_svg(drawn, name + ending, title, f"{title}; at the end: {ends}", tips)

    return for_both_widths(draw)


def cost_plot(result: ModelResult, metric: Metric, name: str) -> Markup | None:
    """Draws every contender's Last over its processor seconds, with the interval of Last; None without costs."""
    points = {
        label: (one.costs.processor_seconds, one)
        for label, one in result.contenders.items()
        if one.costs.processor_seconds and one.numbers[metric.key]["last"].mean is not None
    }
    if not points:
        return None

    def draw(width: float, ending: str) -> Markup:
        tips: list[Tip] = []
        with figure(width, 360) as drawn:
            axes = drawn.subplots()
            for number, (label, (seconds, one)) in enumerate(points.items()):
                mean, below, above = _last(one, metric.key)
                axes.errorbar(
                    [seconds],
                    [mean * metric.scale],
                    yerr=[[below * metric.scale], [above * metric.scale]],
                    label=label,
                    **_style(number),
                    linestyle="none",
                )
                text = f"{label}: {metric.full(mean)}, {significant(seconds)} s"
                tips.append(Tip(axes, seconds, mean * metric.scale, text))
            zero = result.zero_shot[metric.key]
            if zero is not None:
                axes.axhline(zero * metric.scale, linestyle=":", linewidth=1, color=SERIES[7])
            axes.set_xlabel("CPU seconds of a run's training")
            axes.set_ylabel(f"Last {metric.title.lower()}, {metric.unit.strip()}")
            axes.grid(linewidth=0.8)
            legend_above(drawn, width)
            texts = [
                f"{label} {significant(x)} s, {metric.full(_last(one, metric.key)[0])}"
                for label, (x, one) in points.items()
            ]
            title = f"Cost and retention on {result.model}"
            description = f"{title}, the dotted line is the base model: {', '.join(texts)}"
            return inline_svg(drawn, name + ending, title, description, tips)

    return for_both_widths(draw)


def _last(one: Contest, metric: str) -> tuple[float, float, float]:
    """Last, and how far its interval goes down and up."""
    number = one.numbers[metric]["last"]
    mean = number.mean or 0.0
    low, high = mean if number.low is None else number.low, mean if number.high is None else number.high
    return mean, max(0.0, mean - low), max(0.0, high - mean)


def _averaged(runs: Sequence[Mapping[int, float]]) -> dict[int, tuple[float, float]]:
    """Mean of every point, and half its 95 % interval over runs by Student's t; NaN of a single run, which has none."""
    found = {}
    for x in sorted({x for run in runs for x in run}):
        values = [run[x] for run in runs if x in run]
        bar = math.nan
        if len(values) > 1:
            bar = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        found[x] = (fmean(values), bar)
    return found


def _style(number: int) -> dict[str, Any]:
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 7,
        "capsize": 3,
        "elinewidth": 1,
    }
