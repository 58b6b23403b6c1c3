"""Numbers, tables and score matrices as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from everalign.learning.scores import Scores
from everalign.reporting.sampling_error import Errors, is_chance

UNMEASURED = "–"


@dataclass(frozen=True)
class Metric:
    """One of a score's fields and how to print it: `scale` times the value, with `digits` decimals."""

    key: str
    title: str
    unit: str
    change_unit: str
    scale: float
    digits: int
    meaning: str

    def value(self, score: float | None) -> str:
        """The bare number, without its unit, for tables whose head names the unit."""
        return fixed(None if score is None else score * self.scale, self.digits)

    def full(self, score: float | None) -> str:
        """The number with its unit, for sentences."""
        return self.value(score) if score is None else f"{self.value(score)}{self.unit}"

    def change(self, difference: float | None) -> str:
        """A difference with its sign, without its unit; one that rounds to nothing has no sign."""
        return signed(None if difference is None else difference * self.scale, self.digits)

    def amount(self, difference: float) -> str:
        """A difference's size with its unit, for sentences."""
        return f"{fixed(abs(difference) * self.scale, self.digits)} {self.change_unit}"

    def direction(self, difference: float | None) -> str:
        """Return `gained`, `lost`, or nothing for a difference that rounds to zero or was not measured."""
        text = self.change(difference)
        return {"+": "gained", "−": "lost"}.get(text[0], "")


METRICS = {
    metric.key: metric
    for metric in (
        Metric(
            "accuracy",
            "Accuracy",
            "%",
            "points",
            100,
            1,
            "Share of held-out pairs whose chosen response has the higher likelihood per token.",
        ),
        Metric(
            "margin",
            "Margin",
            " nats per token",
            "nats per token",
            1,
            3,
            "Mean log-likelihood per token of the chosen response minus that of the rejected one.",
        ),
        Metric(
            "reward_accuracy",
            "Reward accuracy",
            "%",
            "points",
            100,
            1,
            "Share of held-out pairs with a positive margin against the base model; ties count half.",
        ),
    )
}


def fixed(number: float | None, digits: int) -> str:
    """`digits` decimals, a true minus sign, never a negative zero."""
    if number is None:
        return UNMEASURED
    text = f"{number:.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", "−")


def signed(number: float | None, digits: int) -> str:
    """As `fixed`, with a plus sign before what is above zero."""
    text = fixed(number, digits)
    return f"+{text}" if number is not None and number > 0 and float(text) > 0 else text


def percent(share: float | None, digits: int = 1) -> str:
    """A share between 0 and 1 as a percentage."""
    return UNMEASURED if share is None else f"{fixed(100 * share, digits)}%"


def significant(number: float | None, digits: int = 3) -> str:
    """`digits` significant digits."""
    if number is None:
        return UNMEASURED
    return f"{number:#.{digits}g}".removesuffix(".").replace("-", "−")


def count(number: int) -> str:
    """A whole number with narrow no-break spaces between the thousands."""
    return f"{number:,}".replace(",", "\u202f")


def seconds(duration: float) -> str:
    """A duration in the largest fitting units."""
    if duration < 60:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def shortened(text: str, length: int) -> str:
    """At most `length` characters: of a longer text the beginning and the end, which tell names apart."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"


SUMMARY_TITLES = {
    "last": "Last",
    "backward_transfer": "BWT",
    "average_performance": "AP",
    "forward_transfer": "FWT",
}
_CHANGES = ("backward_transfer", "forward_transfer")
_COLOURS = {"gained": "green", "lost": "red", "": "dim"}


def score_table(scores: Scores, metric: str = "accuracy", title: str = "", errors: Errors | None = None) -> Table:
    """The score matrix: a row for each moment, a column for each task.

    The score right after learning a task stands in brackets; later ones carry the change since then, green or
    red; scores on tasks not learned yet are dim, and so are changes that may be chance by the scores' standard errors.
    The caption sums up.
    """
    kind = METRICS[metric]
    table = Table(title=Text(title) if title else None, caption=_caption(scores, kind), caption_justify="left")
    table.add_column("after learning", style="bold")
    for task in scores.tasks:
        table.add_column(Text(task), justify="right")
    table.add_row("nothing", *(Text(kind.value(score), style="dim") for score in scores.zero_shot), end_section=True)
    for i, task in enumerate(scores.learned):
        if any(score is not None for score in scores.matrix[i]):
            name = Text("all tasks" if scores.regime == "joint" else task)
            table.add_row(name, *(_cell(scores, i, j, kind, errors) for j in range(len(scores.tasks))))
    return table


def comparison_table(runs: Mapping[str, Scores], metric: str = "accuracy", title: str = "") -> Table:
    """One row for each run: Last, BWT, AP and FWT; the best of a column is bold."""
    kind = METRICS[metric]
    table = Table(title=Text(title) if title else None, caption=_unit_line(kind), caption_justify="left")
    table.add_column("run")
    for name in SUMMARY_TITLES.values():
        table.add_column(name, justify="right")
    best = best_values(runs, kind)
    for label, scores in runs.items():
        cells = summary_cells(scores, kind)
        styled = (Text(text, style="bold" if text == best.get(name) else "") for name, text in cells.items())
        table.add_row(Text(label), *styled)
    return table


def summary_cells(scores: Scores, metric: Metric) -> dict[str, str]:
    """The four numbers as text; transfers are differences and carry a sign."""
    return {
        name: metric.change(value) if name in _CHANGES else metric.value(value)
        for name, value in scores.summary.items()
    }


def best_values(runs: Mapping[str, Scores], metric: Metric) -> dict[str, str]:
    """The highest of each number as it is printed, where at least two runs have it and they differ."""
    best = {}
    for name in SUMMARY_TITLES:
        known = [scores for scores in runs.values() if scores.summary[name] is not None]
        texts = {summary_cells(scores, metric)[name] for scores in known}
        if len(texts) > 1:
            winner = max(known, key=lambda scores: scores.summary[name] or 0.0)
            best[name] = summary_cells(winner, metric)[name]
    return best


def _cell(scores: Scores, i: int, j: int, metric: Metric, errors: Errors | None) -> Text:
    score = scores.matrix[i][j]
    if score is None:
        return Text(UNMEASURED, style="dim")
    if i == j and scores.regime != "joint":
        return Text(f"[{metric.value(score)}]", style="bold")
    if j > i:
        return Text(metric.value(score), style="dim")
    learned = scores.matrix[j][j]
    if learned is None:
        return Text(metric.value(score))
    change = score - learned
    text = Text(f"{metric.value(score)} ")
    direction = "" if is_chance(change, errors, i, j) else metric.direction(change)
    return text.append(metric.change(change), style=_COLOURS[direction])


def _caption(scores: Scores, metric: Metric) -> Text:
    cells = summary_cells(scores, metric)
    parts = [f"{title} {cells[name]}" for name, title in SUMMARY_TITLES.items() if cells[name] != UNMEASURED]
    summary = "   ".join(parts) or "no held-out pairs were scored"
    return Text(f"{summary}\n").append_text(_unit_line(metric))


def _unit_line(metric: Metric) -> Text:
    return Text(f"{metric.title}, {metric.unit.strip()}. Changes in {metric.change_unit}.", style="dim")
