"""Plots of a bench: forgetting curves, and what retention costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup
from scipy.stats import t

from everalign.bench.comparison import Contest, ModelResult
from everalign.bench.records import Record
from everalign.reporting.formats import Metric, fixed, significant
from everalign.reporting.plots import DASHES, MARKERS, SERIES, Tip, figure, for_both_widths, inline_svg, legend_above

Curve = Callable[[Record, str], dict[int, float]]


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
    return for_both_widths(partial(_curves, lines, metric, name, title, labels))


def _curves(
    lines: Mapping[str, Mapping[int, tuple[float, float]]],
    metric: Metric,
    name: str,
    title: str,
    labels: tuple[str, str],
    width: float,
    ending: str,
) -> Markup:
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


def cost_plot(result: ModelResult, metric: Metric, name: str) -> Markup | None:
    """Draws every contender's Last over its processor seconds, with the interval of Last; None without costs."""
    points = {
        label: (one.costs.processor_seconds, one)
        for label, one in result.contenders.items()
        if one.costs.processor_seconds and one.numbers[metric.key]["last"].mean is not None
    }
    if not points:
        return None
    return for_both_widths(partial(_cost_plot, result, points, metric, name))


def _cost_plot(
    result: ModelResult,
    points: Mapping[str, tuple[float, Contest]],
    metric: Metric,
    name: str,
    width: float,
    ending: str,
) -> Markup:
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
