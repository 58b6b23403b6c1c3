"""Plots as inline SVG that takes its colours and font from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from everalign.learning.run_files import TrainingStep
from everalign.learning.scores import Scores
from everalign.reporting.formats import WIDTH, Errors, Metric, elided, of_change, of_mean

INK = "#0a0b01"
MUTED = "#0a0b02"
GRID = "#0a0b03"
HEAT = "#0a0b04"
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
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
PLOT_WIDTH = 560.0


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """An empty transparent figure of `width` x `height` CSS pixels; text and axes made inside take the page's style."""
    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(width / 72, height / 72), layout="constrained")
        made.patch.set_alpha(0)
        yield made


def inline_svg(drawn: Figure, name: str, title: str, description: str) -> Markup:
    """Return a figure as an `<svg>` element, which screen readers announce by `title` and `description`.

    Args:
        drawn: the figure.
        name: must differ between the figures of one page: it keeps the ids inside them apart.
        title: what the figure shows.
        description: its numbers in words.
    """
    text = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        FigureCanvasSVG(drawn).print_svg(text, metadata=metadata)
    svg = re.sub(r"<!--.*?-->", "", text.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)  # "axes_1" would repeat in every figure of the page
    svg = re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*", _font, svg)
    svg = svg.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    opening = re.search(r'<svg[^>]*(viewBox="0 0 ([\d.]+) [\d.]+")[^>]*>', svg)
    if opening is None:
        raise ValueError("matplotlib wrote an SVG without a view box")
    head = (
        f'<svg {opening.group(1)} class="plot" style="max-width: {opening.group(2)}px" role="img" '
        f'aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-description">{escape(description)}</desc>'
    )
    return Markup(head + svg[opening.end() :])


def _font(match: re.Match[str]) -> str:
    weight, size = match.groups()
    return f"font-size: {size}px" + (f"; font-weight: {weight}" if weight else "")


def score_heatmap(scores: Scores, metric: Metric, limits: tuple[float, float], name: str, label: str) -> Markup | None:
    """Draw the score matrix below the zero-shot row; a box marks each task's score right after learning it.

    Args:
        scores: of one run.
        metric: of which they are.
        limits: the scores drawn palest and strongest, so that several runs can share one scale.
        name: of the figure, see `inline_svg`.
        label: of the run.

    Returns:
        The plot; None where nothing was scored.
    """
    rows, tasks = matrix_rows(scores), scores.tasks
    if all(score is None for _, _, row in rows for score in row):
        return None
    low, high = limits
    with figure(max(PLOT_WIDTH, 150 + 62 * len(tasks)), 96 + 46 * len(rows)) as drawn:
        axes = drawn.subplots()
        for y, (_, i, row) in enumerate(rows):
            for x, score in enumerate(row):
                place, width, height = (x - 0.47, y - 0.46), 0.94, 0.92
                if score is not None:
                    strength = 0.08 + 0.5 * ((score - low) / (high - low) if high > low else 0.5)
                    axes.add_patch(Rectangle(place, width, height, facecolor=HEAT, alpha=strength, linewidth=0))
                colour = MUTED if score is None else INK
                axes.text(x, y, metric.value(score), ha="center", va="center", color=colour, fontsize=15)
                if x == i and score is not None and scores.regime != "joint":
                    axes.add_patch(Rectangle(place, width, height, fill=False, edgecolor=INK, linewidth=2))
        axes.set_xlim(-0.5, len(tasks) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(tasks)), _tick_names(tasks))
        names = {f"after {task}": f"after {name}" for task, name in _numbered_if_long(tasks).items()}
        axes.set_yticks(range(len(rows)), [elided(names.get(moment, moment), 22) for moment, _, _ in rows])
        axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        texts = [[f"{task} {metric.full(score)}" for task, score in zip(tasks, row, strict=True)] for _, _, row in rows]
        words = "; ".join(f"{moment}: {', '.join(cells)}" for (moment, _, _), cells in zip(rows, texts, strict=True))
        return inline_svg(drawn, name, f"{metric.title} of {label} by task, after each task", words)


def matrix_rows(scores: Scores) -> list[tuple[str, int, Sequence[float | None]]]:
    """Return the moments at which something was scored: name, row of the matrix (-1 for zero-shot), scores."""
    joint = scores.regime == "joint"
    rows = [
        ("all tasks" if joint else f"after {task}", i, row)
        for i, (task, row) in enumerate(zip(scores.learned, scores.matrix, strict=True))
        if any(score is not None for score in row)
    ]
    return [("zero-shot", -1, scores.zero_shot), *rows]


def change_lines(
    scores: Scores, errors: Errors, metric: Metric, limits: tuple[float, float], name: str, label: str
) -> Markup | None:
    """Draw how each task's score has moved since it was learned, with 95 % intervals.

    Args:
        scores: of one run.
        errors: their standard errors.
        metric: of which they are.
        limits: of the y axis, so that several runs can share one scale.
        name: of the figure, see `inline_svg`.
        label: of the run.

    Returns:
        The plot; None where no task was scored again after a later one.
    """
    lines, names = change_series(scores), _numbered_if_long(scores.learned)
    if not lines:
        return None
    with figure(PLOT_WIDTH, 320) as drawn:
        axes = drawn.subplots()
        axes.axhline(0, color=MUTED, linewidth=1)
        for task, points in lines.items():
            bars = [change_bar(errors, rows, scores.learned.index(task)) for rows, _ in points]
            _line(axes, points, bars, metric, names[task])
        axes.set_ylim(limits[0] * metric.scale, limits[1] * metric.scale)
        axes.set_ylabel(f"change, {metric.change_unit}")
        _task_axis(axes, len(scores.learned), "after learning task", _tick_names(scores.learned))
        legend_above(drawn)
        ends = ", ".join(f"{task} {metric.change(points[-1][1])}" for task, points in lines.items())
        description = f"Change of each score since its task was learned, {metric.change_unit}; at the end: {ends}"
        return inline_svg(drawn, name, f"Forgetting of {label}", description)


def change_bar(errors: Errors, rows: int, task: int) -> float:
    """Return half the 95 % interval of a task's change once `rows` tasks are learned; 0 right after its own."""
    return 0.0 if rows - 1 == task else WIDTH * (of_change(errors[rows - 1][task], errors[task][task]) or 0.0)


def change_series(scores: Scores) -> dict[str, list[tuple[int, float]]]:
    """Return each earlier task's points (number of tasks learned, change since this one was learned)."""
    series: dict[str, list[tuple[int, float]]] = {}
    moments = range(1, len(scores.matrix) + 1) if scores.regime == "sequential" else ()
    for rows in moments:
        for task, change in zip(scores.learned, scores.up_to(rows).changes, strict=False):
            if change is not None:
                series.setdefault(task, []).append((rows, change))
    return {task: points for task, points in series.items() if len(points) > 1}


def progress_lines(
    runs: Mapping[str, Scores], errors: Mapping[str, Errors], metric: Metric, name: str
) -> Markup | None:
    """Draw each run's mean score over the tasks learned so far, with 95 % intervals; None below two moments."""
    series = {}
    for label, scores in runs.items():
        if scores.regime == "sequential":
            means = ((rows, scores.up_to(rows).last) for rows in range(1, len(scores.matrix) + 1))
            points = [(rows, mean) for rows, mean in means if mean is not None]
            if len(points) > 1:
                series[label] = points
    if not series:
        return None
    with figure(PLOT_WIDTH, 300) as drawn:
        axes = drawn.subplots()
        for label, points in series.items():
            bars = [WIDTH * (of_mean(errors[label][rows - 1][:rows]) or 0.0) for rows, _ in points]
            _line(axes, points, bars, metric, label)
        axes.set_ylabel(f"{metric.title.lower()}, {metric.unit.strip()}")
        _task_axis(axes, max(points[-1][0] for points in series.values()), "tasks learned")
        legend_above(drawn)
        ends = ", ".join(f"{label} {metric.full(points[-1][1])}" for label, points in series.items())
        description = f"{metric.title} averaged over the tasks learned so far; at the end: {ends}"
        return inline_svg(drawn, name, f"Mean {metric.title.lower()} over the tasks learned so far", description)


def training_curves(training: Sequence[tuple[str, Sequence[TrainingStep]]], name: str, label: str) -> Markup | None:
    """Draw loss above and margin below over the steps of all tasks in a row; None where no step was logged.

    Each stage has its colour and counts its steps from 1; a rule stands between tasks.
    """
    stages = list(dict.fromkeys(step.stage for _, steps in training for step in steps))
    every = [step for _, steps in training for step in steps]
    fields = [field for field in ("loss", "margin") if any(getattr(step, field) is not None for step in every)]
    if not fields:
        return None
    with figure(PLOT_WIDTH, 70 + 170 * len(fields)) as drawn:
        panels = drawn.subplots(len(fields), 1, sharex=True, squeeze=False)[:, 0]
        offset = 0
        for title, (_, steps) in zip(_tick_names([task for task, _ in training]), training, strict=True):
            start = offset
            if start:
                for axes in panels:
                    axes.axvline(start, color=GRID, linewidth=1)
            for lines in stage_curves(steps):
                stage = lines[0].stage
                colour = SERIES[stages.index(stage) % len(SERIES)]
                for axes, field in zip(panels, fields, strict=True):
                    points = [(offset + s.step, y) for s in lines if (y := getattr(s, field)) is not None]
                    if points:
                        dots = "o" if len(points) == 1 else ""
                        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, marker=dots, label=stage)
                offset += max(step.step for step in lines)
            # The task's name above the first panel, in the middle of its steps.
            place = {"xycoords": panels[0].get_xaxis_transform(), "textcoords": "offset points", "xytext": (0, 4)}
            panels[0].annotate(title, ((start + offset) / 2, 1), ha="center", va="bottom", **place)
        for axes, field in zip(panels, fields, strict=True):
            axes.set_ylabel(field if field == "loss" else "margin, nats")
        panels[-1].set_xlabel("training step, all tasks in a row")
        legend_above(drawn)
        tasks = ", ".join(task for task, _ in training)
        description = f"{' and '.join(fields)} by step; stages {', '.join(stages)}; tasks {tasks}"
        return inline_svg(drawn, name, f"Training curves of {label}", description)


def stage_curves(steps: Sequence[TrainingStep]) -> list[list[TrainingStep]]:
    """Return a task's steps stage by stage; each round of one objective begins again at the first step."""
    stages: list[list[TrainingStep]] = []
    for step in steps:
        if not stages or step.stage != stages[-1][-1].stage or step.step <= stages[-1][-1].step:
            stages.append([])
        stages[-1].append(step)
    return stages


def _line(axes: Axes, points: Sequence[tuple[int, float]], bars: Sequence[float], metric: Metric, label: str) -> None:
    """Add a line whose colour, marker and dash all differ, so that lines can be told apart without colour."""
    number = len(axes.containers)
    axes.errorbar(
        [x for x, _ in points],
        [y * metric.scale for _, y in points],
        yerr=[bar * metric.scale for bar in bars],
        label=elided(label, 28),
        color=SERIES[number % len(SERIES)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle=DASHES[number % len(DASHES)],
        linewidth=2,
        markersize=6,
        capsize=3,
        elinewidth=1,
    )


def _task_axis(axes: Axes, n: int, label: str, names: Sequence[str] | None = None) -> None:
    axes.set_xticks(range(1, n + 1), names)
    axes.set_xlim(0.8, n + 0.2)
    axes.set_xlabel(label)
    axes.grid(axis="y", linewidth=0.8)


def legend_above(drawn: Figure) -> None:
    """Put a legend above the axes, each name once, in as many columns as fit."""
    handles, names = drawn.axes[0].get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    columns = max(1, int(PLOT_WIDTH / (60 + 8 * max(map(len, once)))))
    drawn.legend(once.values(), once.keys(), loc="outside upper left", ncols=min(columns, len(once)))


def _tick_names(tasks: Sequence[str]) -> list[str]:
    """Return the tasks' names where they fit side by side, otherwise their numbers."""
    return list(tasks) if _fit(tasks) else [str(number) for number in range(1, len(tasks) + 1)]


def _numbered_if_long(tasks: Sequence[str]) -> dict[str, str]:
    """Return each task's name where there is room for it, with its number if the ticks show numbers."""
    return {task: task if _fit(tasks) else f"{number} {task}" for number, task in enumerate(tasks, 1)}


def _fit(tasks: Sequence[str]) -> bool:
    """Whether the names fit under one axis: 8 pixels a character, each within its share of the width."""
    return max((len(task) for task in tasks), default=0) * 8 + 12 <= 400 / max(1, len(tasks))
