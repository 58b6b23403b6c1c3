"""Numbers, standard errors and tables as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from everalign.learning.run_data import RunData
from everalign.learning.run_files import Score
from everalign.learning.scores import Scores

WIDTH = 1.96
"""Standard errors to either side, for 95 %."""

Errors = Sequence[Sequence[float | None]]
"""Standard errors of a score matrix, in its shape; None where a score's is unknown."""

_MORE = 4
_SHARES = ("accuracy", "reward_accuracy")


def standard_error(score: Score | None, metric: str = "accuracy") -> float | None:
    """Return a score's standard error; None where it was not measured, or its spread is not on record."""
    if score is None:
        return None
    if metric not in _SHARES:
        return score.margin_error
    n = score.pairs + _MORE
    share = (getattr(score, metric) * score.pairs + _MORE / 2) / n
    return math.sqrt(share * (1 - share) / n)


def error_matrix(run: RunData, metric: str = "accuracy") -> list[list[float | None]]:
    """Return the standard errors of the run's score matrix, (k, N) as `Scores.matrix`."""
    matrix = run.scores(metric).matrix
    # A joint run's scores stand in the last row, whatever number of versions has led to them.
    last = run.versions[-1].scores if run.versions else {}
    rows = [last for _ in matrix] if run.regime == "joint" else [version.scores for version in run.versions]
    return [
        [
            None if score is None else standard_error(found.get(task), metric)
            for task, score in zip(run.tasks, row, strict=True)
        ]
        for found, row in zip(rows, matrix, strict=True)
    ]


def is_chance(change: float | None, errors: Errors | None, i: int, j: int) -> bool:
    """Whether task j's change from when it was learned to version i is within its 95 % interval around nothing."""
    error = None if errors is None else of_change(errors[i][j], errors[j][j])
    return change is not None and error is not None and abs(change) < WIDTH * error


def of_change(first: float | None, second: float | None) -> float | None:
    """Return the standard error of a difference; of scores on the same rows it is an upper bound."""
    return None if first is None or second is None else math.hypot(first, second)


def of_mean(errors: Sequence[float | None]) -> float | None:
    """Return the standard error of the mean of independent scores; None of nothing."""
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(known) if known else None


def of_last(run: RunData) -> float | None:
    """Return the standard error of Last."""
    errors = error_matrix(run)
    if not errors:
        return None
    learned = range(len(errors))
    return of_mean([errors[i][i] for i in learned] if run.regime == "separate" else [errors[-1][j] for j in learned])


def of_transfer(run: RunData) -> float | None:
    """Return the standard error of BWT."""
    errors = error_matrix(run)
    return of_mean([of_change(errors[-1][j], errors[j][j]) for j in range(len(errors) - 1)]) if errors else None


UNMEASURED = "–"
SUMMARY_TITLES = {
    "last": "Last",
    "backward_transfer": "BWT",
    "average_performance": "AP",
    "forward_transfer": "FWT",
}
_COLOURS = {"gained": "green", "lost": "red", "": "dim"}


def fixed(number: float | None, digits: int) -> str:
    """`digits` decimals, a true minus sign, never a negative zero."""
    if number is None:
        return UNMEASURED
    text = f"{number:.{digits}f}"
    return (text.removeprefix("-") if float(text) == 0 else text).replace("-", "−")


def signed(number: float | None, digits: int) -> str:
    """As `fixed`, with a plus sign before what is above zero."""
    text = fixed(number, digits)
    return f"+{text}" if number is not None and number > 0 and float(text) > 0 else text


def percent(share: float | None, digits: int = 1) -> str:
    """A share between 0 and 1 as a percentage."""
    return UNMEASURED if share is None else f"{fixed(100 * share, digits)}%"


def significant(number: float | None, digits: int = 3) -> str:
    """`digits` significant digits."""
    return UNMEASURED if number is None else f"{number:#.{digits}g}".removesuffix(".").replace("-", "−")


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


def elided(text: str, length: int) -> str:
    """At most `length` characters: of a longer text the beginning and the end, which tell names apart."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"


@dataclass(frozen=True)
class Metric:
    """A field of a held-out score, and how to print it: `scale` times the value, with `digits` decimals."""

    key: str
    title: str
    unit: str
    change_unit: str
    scale: float
    digits: int
    meaning: str

    def value(self, score: float | None) -> str:
        """The bare number, for tables whose head names the unit."""
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
        return {"+": "gained", "−": "lost"}.get(self.change(difference)[0], "")


_MARGIN = "Mean log-likelihood per token of the chosen response minus that of the rejected one."
_ACCURACY = "Share of held-out pairs whose chosen response has the higher likelihood per token."
_REWARD = "Share of held-out pairs with a positive margin against the base model; ties count half."
METRICS = {
    "accuracy": Metric("accuracy", "Accuracy", "%", "points", 100, 1, _ACCURACY),
    "margin": Metric("margin", "Margin", " nats per token", "nats per token", 1, 3, _MARGIN),
    "reward_accuracy": Metric("reward_accuracy", "Reward accuracy", "%", "points", 100, 1, _REWARD),
}


CORRECTION_ACCURACY = (
    "Accuracy: share of held-out rows whose correction has a higher likelihood per token, given question and answer, "
    "than the answer as it is."
)
"""What accuracy is of runs with the objective `correction`."""


@dataclass(frozen=True)
class Cell:
    """A number of a table.

    Args:
        text: the number.
        kind: in a score matrix `learned` (just then), `later`, `future`, `base` or `unmeasured`; in a summary `best`.
        change: since the task was learned.
        direction: `gained` or `lost`; empty where the change may be chance.
        strength: of the colour in a heat map, between 0 and 1; None for none.
        title: what is shown when it is pointed at.
    """

    text: str
    kind: str = ""
    change: str = ""
    direction: str = ""
    strength: float | None = None
    title: str = ""


def matrix_cell(scores: Scores, metric: Metric, errors: Errors | None, i: int, j: int) -> Cell:
    """Return the score on task j after learning task i, with the change since task j was learned.

    Args:
        scores: of the run.
        metric: of which they are.
        errors: their standard errors; None to take every change for real.
        i: row of the matrix; -1 for the base model.
        j: column of the matrix.
    """
    score = scores.zero_shot[j] if i < 0 else scores.matrix[i][j]
    text = metric.value(score)
    if score is None:
        return Cell(text, "unmeasured")
    if i < 0 or scores.regime == "joint":
        return Cell(text, "base")
    if j >= i or scores.regime == "separate":
        return Cell(text, "learned" if i == j else "future")
    learned = scores.matrix[j][j]
    if learned is None:
        return Cell(text, "later")
    direction = "" if is_chance(score - learned, errors, i, j) else metric.direction(score - learned)
    return Cell(text, "later", metric.change(score - learned), direction)


def score_table(scores: Scores, metric: str = "accuracy", title: str = "", errors: Errors | None = None) -> Table:
    """The score matrix: a row for each moment, a column for each task, and a summary below.

    The score right after learning a task stands in brackets; later ones carry the change since then in green or red.
    Scores on tasks not learned yet are dim, and so are changes that may be chance by the scores' standard errors.
    """
    kind = METRICS[metric]
    cells = summary_cells(scores, kind)
    parts = [f"{title} {cells[name]}" for name, title in SUMMARY_TITLES.items() if cells[name] != UNMEASURED]
    scored = any(score is not None for score in scores.zero_shot)
    none = "no version was promoted" if scored and not scores.learned else "no held-out pairs were scored"
    # Longer than a narrow table, it would be broken to fit under it.
    caption = (
        Text("   ".join(parts) or none, no_wrap=True, overflow="ignore").append("\n").append_text(_unit_line(kind))
    )
    table = Table(title=Text(title) if title else None, caption=caption, caption_justify="left")
    table.add_column("after learning", style="bold")
    for task in scores.tasks:
        table.add_column(Text(task), justify="right")
    for i, name in enumerate(["nothing", *scores.learned], -1):
        row = [matrix_cell(scores, kind, errors, i, j) for j in range(len(scores.tasks))]
        if i >= 0 and all(cell.kind == "unmeasured" for cell in row):
            continue
        texts = []
        for cell in row:
            if cell.change:
                texts.append(Text(f"{cell.text} ").append(cell.change, style=_COLOURS[cell.direction]))
            elif cell.kind == "learned":
                texts.append(Text(f"[{cell.text}]", style="bold"))
            else:
                bright = cell.kind == "later" or (i >= 0 and scores.regime == "joint")
                texts.append(Text(cell.text, style="" if bright and cell.kind != "unmeasured" else "dim"))
        name = "all tasks" if i >= 0 and scores.regime == "joint" else name
        table.add_row(Text(name), *texts, end_section=i < 0)
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
    """Last, BWT, AP and FWT as text; the transfers are differences and carry a sign."""
    return {
        name: metric.change(value) if name.endswith("transfer") else metric.value(value)
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


def _unit_line(metric: Metric) -> Text:
    return Text(f"{metric.title}, {metric.unit.strip()}. Changes in {metric.change_unit}.", style="dim")


# ---- what answers are worth ----

ANSWER_METRICS = {
    "bleu": ("BLEU-4", 1),
    "rouge_l": ("ROUGE-L", 1),
    "compat_bleu": ("BLEU-4 compat", 1),
    "compat_rouge_l": ("ROUGE-L compat", 1),
    "reward": ("reward", 1),
    "reward_win_rate": ("wins %", 100),
    "reward_win_rate_lc": ("wins % at equal length", 100),
    "judge": ("judge", 1),
    "judge_win_rate": ("judged wins %", 100),
    "judge_win_rate_lc": ("judged wins % at equal length", 100),
    "perplexity": ("perplexity", 1),
    "chosen_change": ("Δ log p chosen", 1),
    "rejected_change": ("Δ log p rejected", 1),
    "kl": ("KL to base", 1),
    "unfinished": ("unfinished %", 100),
    "length": ("characters", 1),
}
"""What `everalign evaluate` measures: the heading, and by how much a value is multiplied where it is shown."""


def interval_cell(value: Sequence[float] | None, factor: float = 1) -> str:
    """Return an estimate with the ends of its interval; a dash for what was not measured."""
    if value is None:
        return UNMEASURED
    middle, low, high = (factor * one for one in value)
    return f"{middle:.4g} [{low:.3g}, {high:.3g}]".replace("-", "−")
