"""Plots as inline SVG that takes its colours and font from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from everalign.learning.run_files import TrainingStep
from everalign.learning.scores import Scores
from everalign.reporting import sampling_error
from everalign.reporting.formats import Metric, shortened

INK = "#0a0b01"
MUTED = "#0a0b02"
GRID = "#0a0b03"
HEAT = "#0a0b04"
SERIES = tuple(f"#0a0b1{i}" for i in range(8))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", HEAT: "--heat"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES)
}

_STYLE = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "text.parse_math": False,  # a task name may hold a dollar sign
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 13,
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "legend.fontsize": 13,
    "legend.frameon": False,
}


def figure(width: float, height: float) -> Any:
    """An empty transparent figure of `width` x `height` CSS pixels at full size."""
    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(width / 72, height / 72), layout="constrained")
    made.patch.set_alpha(0)
    return made


def drawing() -> Any:
    """The context in which to fill a figure, so that its text and axes take the page's style."""
    return matplotlib.rc_context(_STYLE)


def inline_svg(drawn: Any, name: str, title: str, description: str) -> Markup:
    """The figure as an `<svg>` element that screen readers log by `title` and `description`.

    `name` must differ between the figures of one page: it keeps the ids inside them apart.
    """
    text = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        FigureCanvasSVG(drawn).print_svg(text, metadata=metadata)
    return Markup(_labelled(_themed(text.getvalue()), name, title, description))


def _themed(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)  # "axes_1" would repeat in every figure of the page
    svg = re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*", _font, svg)
    svg = svg.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _font(match: re.Match[str]) -> str:
    weight, size = match.groups()
    return f"font-size: {size}px" + (f"; font-weight: {weight}" if weight else "")


def _labelled(svg: str, name: str, title: str, description: str) -> str:
    opening = re.search(r"<svg[^>]*>", svg)
    box = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', svg)
    if opening is None or box is None:
        raise ValueError("matplotlib wrote an SVG without a view box")
    head = (
        f'<svg {box.group(0)} class="plot" style="max-width: {box.group(1)}px" role="img" '
        f'aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-description">{escape(description)}</desc>'
    )
    return head + svg[opening.end() :]


PLOT_WIDTH = 560.0
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", "-.", ":")


def score_heatmap(scores: Scores, metric: Metric, limits: tuple[float, float], name: str, label: str) -> Markup | None:
    """The score matrix below the zero-shot row; a box marks each task's score right after learning it.

    `limits` are the scores drawn palest and strongest, so that several runs can share one scale. None where
    nothing was scored.
    """
    rows = matrix_rows(scores)
    if all(score is None for _, row in rows for score in row):
        return None
    width = max(PLOT_WIDTH, 150 + 62 * len(scores.tasks))
    with drawing():
        drawn = figure(width, 96 + 46 * len(rows))
        axes = drawn.subplots()
        for y, (_, row) in enumerate(rows):
            for x, score in enumerate(row):
                _heat_cell(axes, x, y, score, metric, limits)
        for x, y in _just_learned(scores, rows):
            axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor=INK, linewidth=2))
        _frame_heatmap(axes, scores, [row_name for row_name, _ in rows])
        title = f"{metric.title} of {label} by task, after each task"
        return inline_svg(drawn, name, title, _in_words(scores.tasks, rows, metric))


def matrix_rows(scores: Scores) -> list[tuple[str, Sequence[float | None]]]:
    """The rows worth showing with their names: zero-shot, then every moment at which something was scored."""
    rows: list[tuple[str, Sequence[float | None]]] = [("zero-shot", scores.zero_shot)]
    for task, row in zip(scores.learned, scores.matrix, strict=True):
        if any(score is not None for score in row):
            rows.append(("all tasks" if scores.regime == "joint" else f"after {task}", row))
    return rows


def change_lines(
    scores: Scores, errors: sampling_error.Errors, metric: Metric, limits: tuple[float, float], name: str, label: str
) -> Markup | None:
    """How each task's score moved since it was learned, as later tasks came; None with nothing to show.

    Bars are 95 % intervals of each change.
    """
    lines, names = change_series(scores), _numbered_if_long(scores.learned)
    if not lines:
        return None
    with drawing():
        drawn = figure(PLOT_WIDTH, 320)
        axes = drawn.subplots()
        axes.axhline(0, color=MUTED, linewidth=1)
        for i, (task, points) in enumerate(lines.items()):
            xs, ys = zip(*points, strict=True)
            bars = [change_bar(errors, rows, scores.learned.index(task)) * metric.scale for rows in xs]
            _line(axes, xs, [y * metric.scale for y in ys], bars, shortened(names[task], 28), i)
        axes.set_ylim(limits[0] * metric.scale, limits[1] * metric.scale)
        axes.set_ylabel(f"change, {metric.change_unit}")
        _task_ticks(axes, scores.learned)
        legend_above(drawn)
        ends = ", ".join(f"{task} {metric.change(points[-1][1])}" for task, points in lines.items())
        description = f"Change of each score since its task was learned, {metric.change_unit}; at the end: {ends}"
        return inline_svg(drawn, name, f"Forgetting of {label}", description)


def change_bar(errors: sampling_error.Errors, rows: int, task: int) -> float:
    """Half the 95 % interval of a task's change by the time that so many tasks were learned; 0 where it is learned."""
    if rows - 1 == task:
        return 0.0
    return sampling_error.WIDTH * (sampling_error.of_change(errors[rows - 1][task], errors[task][task]) or 0.0)


def _line(axes: Any, xs: Sequence[int], ys: Sequence[float], bars: Sequence[float], label: str, number: int) -> None:
    axes.errorbar(xs, ys, yerr=bars, label=label, capsize=3, elinewidth=1, **_line_style(number))


def change_series(scores: Scores) -> dict[str, list[tuple[int, float]]]:
    """Each earlier task's points (number of tasks learned, change since this one was learned)."""
    series: dict[str, list[tuple[int, float]]] = {}
    if scores.regime != "sequential":
        return series
    for rows in range(1, len(scores.matrix) + 1):
        for task, change in zip(scores.learned, scores.up_to(rows).changes, strict=False):
            if change is not None:
                series.setdefault(task, []).append((rows, change))
    return {task: points for task, points in series.items() if len(points) > 1}


def progress_lines(
    runs: Mapping[str, Scores], errors: Mapping[str, sampling_error.Errors], metric: Metric, name: str
) -> Markup | None:
    """Each run's mean score over the tasks learned so far, as tasks come; None below two moments.

    Bars are 95 % intervals of each mean.
    """
    series = {label: progress_series(scores) for label, scores in runs.items()}
    series = {label: points for label, points in series.items() if len(points) > 1}
    if not series:
        return None
    with drawing():
        drawn = figure(PLOT_WIDTH, 300)
        axes = drawn.subplots()
        for i, (label, points) in enumerate(series.items()):
            xs, ys = zip(*points, strict=True)
            means = [sampling_error.of_mean(errors[label][rows - 1][:rows]) or 0.0 for rows in xs]
            bars = [sampling_error.WIDTH * error * metric.scale for error in means]
            _line(axes, xs, [y * metric.scale for y in ys], bars, shortened(label, 28), i)
        axes.set_ylabel(f"{metric.title.lower()}, {metric.unit.strip()}")
        _count_ticks(axes, max(points[-1][0] for points in series.values()))
        legend_above(drawn)
        ends = ", ".join(f"{label} {metric.full(points[-1][1])}" for label, points in series.items())
        description = f"{metric.title} averaged over the tasks learned so far; at the end: {ends}"
        return inline_svg(drawn, name, f"Mean {metric.title.lower()} over the tasks learned so far", description)


def progress_series(scores: Scores) -> list[tuple[int, float]]:
    """Points (number of tasks learned, mean score over them)."""
    if scores.regime != "sequential":
        return []
    means = ((rows, scores.up_to(rows).last) for rows in range(1, len(scores.matrix) + 1))
    return [(rows, mean) for rows, mean in means if mean is not None]


def _in_words(tasks: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]], metric: Metric) -> str:
    lines = []
    for row_name, row in rows:
        numbers = (f"{task} {metric.full(score)}" for task, score in zip(tasks, row, strict=True))
        lines.append(f"{row_name}: {', '.join(numbers)}")
    return "; ".join(lines)


def _heat_cell(axes: Any, x: int, y: int, score: float | None, metric: Metric, limits: tuple[float, float]) -> None:
    low, high = limits
    if score is not None:
        strength = 0.08 + 0.5 * ((score - low) / (high - low) if high > low else 0.5)
        axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=HEAT, alpha=strength, linewidth=0))
    colour = MUTED if score is None else INK
    axes.text(x, y, metric.value(score), ha="center", va="center", color=colour, fontsize=15)


def _just_learned(scores: Scores, rows: Sequence[tuple[str, Sequence[float | None]]]) -> list[tuple[int, int]]:
    """(column, row) of every score taken right after learning that task."""
    if scores.regime == "joint":
        return []
    names = [row_name for row_name, _ in rows]
    cells = ((x, f"after {task}") for x, task in enumerate(scores.learned) if scores.matrix[x][x] is not None)
    return [(x, names.index(row_name)) for x, row_name in cells]


def _frame_heatmap(axes: Any, scores: Scores, row_names: Sequence[str]) -> None:
    tasks = scores.tasks
    names = {f"after {task}": f"after {name}" for task, name in _numbered_if_long(tasks).items()}
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(len(row_names) - 0.5, -0.5)
    axes.set_xticks(range(len(tasks)), tick_names(tasks))
    axes.set_yticks(range(len(row_names)), [shortened(names.get(row, row), 22) for row in row_names])
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def tick_names(tasks: Sequence[str]) -> list[str]:
    """The tasks' names where they fit side by side, otherwise their numbers."""
    return list(tasks) if _fit(tasks) else [str(number) for number in range(1, len(tasks) + 1)]


def _numbered_if_long(tasks: Sequence[str]) -> dict[str, str]:
    """What to call each task where there is more room: with its number, if the ticks show numbers."""
    fit = _fit(tasks)
    return {task: task if fit else f"{number} {task}" for number, task in enumerate(tasks, 1)}


def _fit(tasks: Sequence[str]) -> bool:
    """Whether the names fit under one axis: 8 pixels a character, each within its share of the width."""
    return max((len(task) for task in tasks), default=0) * 8 + 12 <= 400 / max(1, len(tasks))


def _line_style(i: int) -> dict[str, Any]:
    """Colour, marker and dash all differ, so that lines can be told apart without colour."""
    return {
        "color": SERIES[i % len(SERIES)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": _DASHES[i % len(_DASHES)],
        "linewidth": 2,
        "markersize": 6,
    }


def _task_ticks(axes: Any, tasks: Sequence[str]) -> None:
    axes.set_xticks(range(1, len(tasks) + 1), tick_names(tasks))
    axes.set_xlim(0.8, len(tasks) + 0.2)
    axes.set_xlabel("after learning task")
    axes.grid(axis="y", linewidth=0.8)


def _count_ticks(axes: Any, n: int) -> None:
    axes.set_xticks(range(1, n + 1))
    axes.set_xlim(0.8, n + 0.2)
    axes.set_xlabel("tasks learned")
    axes.grid(axis="y", linewidth=0.8)


def legend_above(drawn: Any) -> None:
    """A legend above the axes, each name once, in as many columns as fit."""
    handles, names = drawn.axes[0].get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    columns = max(1, int(PLOT_WIDTH / (60 + 8 * max(map(len, once)))))
    drawn.legend(once.values(), once.keys(), loc="outside upper left", ncols=min(columns, len(once)))


def training_curves(training: Sequence[tuple[str, Sequence[TrainingStep]]], name: str, label: str) -> Markup | None:
    """Loss above, margin below, over the steps of all tasks in a row; None where no step was logged.

    Each stage has its colour and counts its steps from 1; a rule stands between tasks.
    """
    if not any(steps for _, steps in training):
        return None
    stages = list(dict.fromkeys(step.stage for _, steps in training for step in steps))
    fields = [field for field in ("loss", "margin") if any(_points(steps, field) for _, steps in training)]
    if not fields:
        return None
    with drawing():
        drawn = figure(PLOT_WIDTH, 70 + 170 * len(fields))
        panels = drawn.subplots(len(fields), 1, sharex=True, squeeze=False)[:, 0]
        for axes, field in zip(panels, fields, strict=True):
            _training_panel(axes, training, field, stages)
        panels[-1].set_xlabel("training step, all tasks in a row")
        _name_spans(panels[0], training)
        legend_above(drawn)
        tasks = ", ".join(task for task, _ in training)
        description = f"{' and '.join(fields)} by step; stages {', '.join(stages)}; tasks {tasks}"
        return inline_svg(drawn, name, f"Training curves of {label}", description)


def _training_panel(
    axes: Any, training: Sequence[tuple[str, Sequence[TrainingStep]]], field: str, stages: Sequence[str]
) -> None:
    offset = 0
    for _, steps in training:
        if offset:
            axes.axvline(offset, color=GRID, linewidth=1)
        for lines in _stages(steps):
            stage = lines[0].stage
            points = [(offset + x, y) for x, y in _points(lines, field)]
            if points:
                xs, ys = zip(*points, strict=True)
                dots = "o" if len(points) == 1 else ""
                axes.plot(xs, ys, color=SERIES[stages.index(stage) % 8], linewidth=1.8, marker=dots, label=stage)
            offset += _length(lines)
    axes.set_ylabel(field if field == "loss" else "margin, nats")


def _stages(steps: Sequence[TrainingStep]) -> list[list[TrainingStep]]:
    """The steps stage by stage; rounds of one objective begin anew at the first step."""
    stages: list[list[TrainingStep]] = []
    for step in steps:
        if not stages or step.stage != stages[-1][-1].stage or step.step <= stages[-1][-1].step:
            stages.append([])
        stages[-1].append(step)
    return stages


def _points(steps: Sequence[TrainingStep], field: str) -> list[tuple[int, float]]:
    return [(step.step, value) for step in steps if (value := getattr(step, field)) is not None]


def _length(steps: Sequence[TrainingStep]) -> int:
    return max((step.step for step in steps), default=0)


def _name_spans(axes: Any, training: Sequence[tuple[str, Sequence[TrainingStep]]]) -> None:
    """The tasks above the panel, each in the middle of its steps."""
    offset = 0
    names = tick_names([task for task, _ in training])
    for name, (_, steps) in zip(names, training, strict=True):
        span = sum(_length(lines) for lines in _stages(steps))
        axes.annotate(
            name,
            (offset + span / 2, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
        )
        offset += span
