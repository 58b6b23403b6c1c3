"""Plots as inline SVG that takes its colours and font from the page."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from everalign.learning.run_files import TrainingStep
from everalign.learning.scores import Scores
from everalign.reporting.formats import WIDTH, Errors, Metric, fixed, of_change, of_mean

INK = "#0a0b01"
MUTED = "#0a0b02"
GRID = "#0a0b03"
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
SERIES = tuple(f"#0a0b1{i}" for i in range(8))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {
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
PLOT_WIDTH, PHONE_WIDTH = 560.0, 320.0
"""CSS pixels of a plot, and of the one that takes its place on a narrow page, with text of the same size."""


class Tip(NamedTuple):
    """A point of a plot that tells its values when it is pointed at."""

    axes: Axes
    x: float
    y: float
    text: str


def for_both_widths(draw: Callable[[float, str], Markup | None]) -> Markup | None:
    """Return a plot drawn twice, of which the page shows the one that fits; None where there is nothing to draw.

    Args:
        draw: gets a width and an ending for the figure's name.
    """
    wide, narrow = draw(PLOT_WIDTH, ""), draw(PHONE_WIDTH, "-narrow")
    if wide is None or narrow is None:
        return None
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(wide, narrow)


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """An empty transparent figure of `width` x `height` CSS pixels; text and axes made inside take the page's style."""
    with matplotlib.rc_context(_STYLE):
        # One pixel of a screen is one of the SVG, so that tips find their points.
        made = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        made.patch.set_alpha(0)
        yield made


def inline_svg(drawn: Figure, name: str, title: str, description: str, tips: Sequence[Tip] = ()) -> Markup:
    """Return a figure as an `<svg>` element, which screen readers announce by `title` and `description`.

    Args:
        drawn: the figure.
        name: must differ between the figures of one page: it keeps the ids inside them apart.
        title: what the figure shows.
        description: its numbers in words.
        tips: points that show their values.
    """
    text = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        FigureCanvasSVG(drawn).print_svg(text, metadata=metadata)
    svg = re.sub(r"<!--.*?-->", "", text.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)  # "axes_1" would repeat in every figure of the page
    svg = re.sub(r"font: (\d+) ([\d.]+)px [^;\"]*", r"font-size: \2px; font-weight: \1", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = svg.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    opening = re.search(r'<svg[^>]*(viewBox="0 0 ([\d.]+) ([\d.]+)")[^>]*>', svg)
    if opening is None:
        raise ValueError("matplotlib wrote an SVG without a view box")
    head = (
        f'<svg {opening.group(1)} class="plot" style="max-width: {opening.group(2)}px" role="img" '
        f'aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-description">{escape(description)}</desc>'
    )
    body, end = svg[opening.end() :].rsplit("</svg>", 1)
    for tip in tips:
        x, y = tip.axes.transData.transform((tip.x, tip.y))
        body += (
            f'<circle class="tip" cx="{x:.1f}" cy="{float(opening.group(3)) - y:.1f}" r="9" fill="transparent">'
            f"<title>{escape(tip.text)}</title></circle>"
        )
    return Markup(head + body + "</svg>" + end)


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

    def draw(width: float, ending: str) -> Markup | None:
        lines, tips = change_series(scores), list[Tip]()
        if not lines:
            return None
        with figure(width, 320) as drawn:
            axes = drawn.subplots()
            axes.axhline(0, color=MUTED, linewidth=1)
            for task, points in lines.items():
                bars = [change_bar(errors, rows, scores.learned.index(task)) for rows, _ in points]
                moments = [f"{task}, after {scores.learned[rows - 1]}" for rows, _ in points]
                tips += _line(axes, points, bars, metric, task, moments, metric.change, metric.change_unit)
            axes.set_ylim(limits[0] * metric.scale, limits[1] * metric.scale)
            axes.set_ylabel(f"change, {metric.change_unit}")
            _task_axis(axes, len(scores.learned), "after learning", width, scores.learned)
            legend_above(drawn, width)
            ends = ", ".join(f"{task} {metric.change(points[-1][1])}" for task, points in lines.items())
            description = f"Change of each score since its task was learned, {metric.change_unit}; at the end: {ends}"
            return inline_svg(drawn, name + ending, f"Forgetting of {label}", description, tips)

    return for_both_widths(draw)


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

    def draw(width: float, ending: str) -> Markup | None:
        series, tips = {}, list[Tip]()
        for label, scores in runs.items():
            if scores.regime == "sequential":
                means = ((rows, scores.up_to(rows).last) for rows in range(1, len(scores.matrix) + 1))
                points = [(rows, mean) for rows, mean in means if mean is not None]
                if len(points) > 1:
                    series[label] = points
        if not series:
            return None
        with figure(width, 300) as drawn:
            axes = drawn.subplots()
            for label, points in series.items():
                bars = [WIDTH * (of_mean(errors[label][rows - 1][:rows]) or 0.0) for rows, _ in points]
                moments = [f"{label}, {rows} learned" for rows, _ in points]
                tips += _line(axes, points, bars, metric, label, moments, metric.value, metric.unit.strip())
            axes.set_ylabel(f"{metric.title.lower()}, {metric.unit.strip()}")
            _task_axis(axes, max(points[-1][0] for points in series.values()), "tasks learned", width)
            legend_above(drawn, width)
            ends = ", ".join(f"{label} {metric.full(points[-1][1])}" for label, points in series.items())
            description = f"{metric.title} averaged over the tasks learned so far; at the end: {ends}"
            title = f"Mean {metric.title.lower()} over the tasks learned so far"
            return inline_svg(drawn, name + ending, title, description, tips)

    return for_both_widths(draw)


Training = Sequence[tuple[str, Sequence[TrainingStep]]]
"""The logged steps of each task."""

# Of a curve: pixels lie closer than anybody points.
_MOST_TIPS = 60
_FIELDS = {"loss": "loss", "margin": "margin, nats", "accuracy": "accuracy, %"}


def training_curves(runs: Mapping[str, Training], name: str) -> Markup | None:
    """Draw loss, margin and accuracy over the steps of all tasks in a row; None where no step was logged.

    Of one run each stage has a colour and tasks are named; of several each run has one.
    """

    def draw(width: float, ending: str) -> Markup | None:
        every = [step for training in runs.values() for _, steps in training for step in steps]
        fields = [field for field in _FIELDS if any(getattr(step, field) is not None for step in every)]
        if not fields:
            return None
        alone, tips = len(runs) == 1, list[Tip]()
        keys = list(dict.fromkeys(step.stage for step in every)) if alone else list(runs)
        with figure(width, 70 + 150 * len(fields)) as drawn:
            panels = drawn.subplots(len(fields), 1, sharex=True, squeeze=False)[:, 0]
            borders: dict[str, tuple[int, int]] = {}
            for label, training in runs.items():
                offset = 0
                for task, steps in training:
                    start = offset
                    for lines in stage_curves(steps):
                        key = lines[0].stage if alone else label
                        for axes, field in zip(panels, fields, strict=True):
                            tips += _curve(axes, field, lines, offset, key, keys.index(key), f"{label}, {task}")
                        offset += max(step.step for step in lines)
                    borders[task] = (start, offset)
            if alone:
                _name_tasks(list(panels), borders, offset, width)
            for axes, field in zip(panels, fields, strict=True):
                axes.set_ylabel(_FIELDS[field])
            panels[-1].set_xlabel("training step, all tasks in a row")
            legend_above(drawn, width)
            tasks = ", ".join(dict.fromkeys(task for training in runs.values() for task, _ in training))
            description = f"{', '.join(fields)} by step; {', '.join(keys)}; tasks {tasks}"
            return inline_svg(drawn, name + ending, f"Training curves of {', '.join(runs)}", description, tips)

    return for_both_widths(draw)


def _curve(
    axes: Axes, field: str, lines: Sequence[TrainingStep], offset: int, key: str, number: int, where: str
) -> list[Tip]:
    """Draw one stage's curve in a panel."""
    scale, digits = (100.0, 1) if field == "accuracy" else (1.0, 3)
    points = [(one.step, scale * y) for one in lines if (y := getattr(one, field)) is not None]
    if not points:
        return []
    axes.plot(
        [offset + step for step, _ in points],
        [y for _, y in points],
        color=SERIES[number % len(SERIES)],
        linestyle=DASHES[number % len(DASHES)],
        linewidth=1.8,
        marker="o" if len(points) == 1 else "",
        label=key,
    )
    stage = lines[0].stage
    return [
        Tip(axes, offset + step, y, f"{where}, {stage}, step {step}: {field} {fixed(y, digits)}")
        for step, y in points[:: max(1, len(points) // _MOST_TIPS)]
        if math.isfinite(y)
    ]


def _name_tasks(panels: Sequence[Axes], borders: Mapping[str, tuple[int, int]], steps: int, width: float) -> None:
    """Put a rule between tasks, and each name above the first panel in the middle of its steps."""
    names, turned = fitted_names(list(borders), width)
    for (start, end), name in zip(borders.values(), names, strict=True):
        if start:
            for axes in panels:
                axes.axvline(start, color=GRID, linewidth=1)
        panels[0].annotate(
            name,
            ((start + end) / 2, 1),
            xycoords=panels[0].get_xaxis_transform(),
            textcoords="offset points",
            xytext=(0, 4),
            va="bottom",
            ha="left" if turned else "center",
            rotation=30 if turned else 0,
            rotation_mode="anchor",
        )


def stage_curves(steps: Sequence[TrainingStep]) -> list[list[TrainingStep]]:
    """Return a task's steps stage by stage; each round of one objective begins again at the first step."""
    stages: list[list[TrainingStep]] = []
    for step in steps:
        if not stages or step.stage != stages[-1][-1].stage or step.step <= stages[-1][-1].step:
            stages.append([])
        stages[-1].append(step)
    return stages


def _line(
    axes: Axes,
    points: Sequence[tuple[int, float]],
    bars: Sequence[float],
    metric: Metric,
    label: str,
    moments: Sequence[str],
    show: Callable[[float], str],
    unit: str,
) -> list[Tip]:
    """Add a line whose colour, marker and dash all differ, so that lines can be told apart without colour."""
    number = len(axes.containers)
    axes.errorbar(
        [x for x, _ in points],
        [y * metric.scale for _, y in points],
        yerr=[bar * metric.scale for bar in bars],
        label=label,
        color=SERIES[number % len(SERIES)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle=DASHES[number % len(DASHES)],
        linewidth=2,
        markersize=6,
        capsize=3,
        elinewidth=1,
    )
    return [
        Tip(axes, x, y * metric.scale, f"{moment}: {show(y)} ± {fixed(bar * metric.scale, metric.digits)} {unit}")
        for (x, y), bar, moment in zip(points, bars, moments, strict=True)
    ]


def _task_axis(axes: Axes, n: int, label: str, width: float, tasks: Sequence[str] = ()) -> None:
    names, turned = fitted_names(tasks, width)
    axes.set_xticks(range(1, n + 1), names or None)
    if turned:
        for text in axes.get_xticklabels():
            text.set(rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(0.8, n + 0.2)
    axes.set_xlabel(label)
    axes.grid(axis="y", linewidth=0.8)


_CHARACTER = 8
"""Pixels that a character needs, with room to spare."""


def legend_above(drawn: Figure, width: float = PLOT_WIDTH) -> None:
    """Put a legend above the axes, each name once and whole, in as many columns as fit."""
    handles, names = drawn.axes[0].get_legend_handles_labels()
    most = int((width - 70) / _CHARACTER)
    lines = ("\n".join(textwrap.wrap(name, most)) or name for name in names)
    once = dict(zip(lines, handles, strict=True))
    longest = max(len(line) for name in once for line in name.split("\n"))
    columns = max(1, int(width / (60 + _CHARACTER * longest)))
    drawn.legend(once.values(), once.keys(), loc="outside upper left", ncols=min(columns, len(once)))


def fitted_names(names: Sequence[str], width: float) -> tuple[list[str], bool]:
    """Return names for an axis whole: in lines where they fit side by side, else in one line each, to be turned."""
    room = int((width - 100) / max(1, len(names)) / _CHARACTER)
    lines = [textwrap.wrap(name, max(1, room), break_long_words=False) for name in names]
    if all(len(line) <= room for parts in lines for line in parts) and all(len(parts) <= 3 for parts in lines):
        return ["\n".join(parts) for parts in lines], False
    return ["\n".join(textwrap.wrap(name, 24)) or name for name in names], True
