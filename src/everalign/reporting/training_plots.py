"""The report's training curves: loss and margin over the steps of all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from everalign.learning.run_files import TrainingStep
from everalign.reporting.plots import PLOT_WIDTH, legend_above, tick_names
from everalign.reporting.svg import GRID, SERIES, drawing, figure, inline_svg


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
