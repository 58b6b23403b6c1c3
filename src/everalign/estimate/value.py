"""What better answers are worth, by the user's own evaluation: net value and break-even. Loads nothing heavy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everalign.errors import InputError
from everalign.learning.run_data import BASE, RESULTS
from everalign.learning.run_files import AnswerResult, EvaluationFile, read_json

# A judge of answers before a reward model, and lengths taken out before not.
_WIN_RATES = ("judge_win_rate_lc", "judge_win_rate", "reward_win_rate_lc", "reward_win_rate")

Triple = tuple[float, float, float]
"""A value, and the lower and upper end of its interval."""


@dataclass(frozen=True)
class WinRate:
    """How often a run's answers beat its opponent's, over all tasks that were evaluated.

    Args:
        value: share of prompts won, ties counting half.
        low: lower end of its 95 % interval.
        high: upper end.
        metric: which one of an evaluation's.
        prompts: number of prompts.
        version: whose answers.
    """

    value: float
    low: float
    high: float
    metric: str
    prompts: int
    version: str

    @property
    def better(self) -> Triple:
        """Share of answers that get better less those that get worse: 2w − 1, from −1 to 1, with its ends."""
        return 2 * self.value - 1, 2 * self.low - 1, 2 * self.high - 1


def read_win_rate(path: Path) -> WinRate:
    """Read the win rate of the newest version that an evaluation holds.

    Args:
        path: `evaluation/results.json` of a run, or the run directory.

    Raises:
        InputError: there is no evaluation, it is damaged, or it has no win rate.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.exists():
        raise InputError(
            f"{file}: no such file; write it with: everalign evaluate RUN --judge URL#MODEL", where=str(file)
        )
    results = read_json(file, EvaluationFile).results
    rows = [row for row in results if row.version != BASE]
    if not rows:
        raise InputError(
            f"{file}: field results: no version of the run was evaluated, only the base model", field="results"
        )
    version = rows[-1].version
    newest = [row for row in rows if row.version == version]
    metric = next((name for name in _WIN_RATES if all(name in row.metrics for row in newest)), None)
    if metric is None:
        known = ", ".join(sorted({name for row in newest for name in row.metrics})) or "none"
        raise InputError(
            f"{file}: field metrics: no win rate among them ({known}); evaluate with --judge URL#MODEL or --reward DIR",
            field="metrics",
        )
    value, low, high = _pooled(file, newest, metric)
    return WinRate(value, low, high, metric, sum(row.prompts for row in newest), version)


def _pooled(file: Path, rows: Sequence[AnswerResult], metric: str) -> Triple:
    """Return the mean over tasks by their prompts; half widths add up as those of independent samples."""
    total = sum(row.prompts for row in rows)
    if not total:
        raise InputError(f"{file}: field prompts: no prompt was evaluated", field="prompts")
    for row in rows:
        value, low, high = row.metrics[metric]
        if not 0 <= low <= value <= high <= 1:
            what = f"must be a share and the ends of its interval, found {[value, low, high]}"
            raise InputError(f"{file}: field {metric}: {what}", field=metric)
    value = sum(row.prompts * row.metrics[metric][0] for row in rows) / total
    below, above = (
        math.sqrt(sum((row.prompts * (row.metrics[metric][end] - row.metrics[metric][0])) ** 2 for row in rows)) / total
        for end in (1, 2)
    )
    return value, max(0.0, value - below), min(1.0, value + above)


@dataclass(frozen=True)
class Value:
    """What a run's better answers are worth.

    Args:
        win_rate: of the evaluation.
        each: dollars for one better answer; a worse one costs as much.
        cost: dollars of the run: between its ends, low, high.
        answers: that are served over the time that counts; None where it was not said.
    """

    win_rate: WinRate
    each: float
    cost: Triple
    answers: float | None = None

    @property
    def per_answer(self) -> Triple:
        """Dollars that an answer is worth more than before; negative where it is worth less."""
        value, low, high = (self.each * share for share in self.win_rate.better)
        return value, low, high

    @property
    def net(self) -> Triple | None:
        """Dollars in all, the run's cost taken off, with both ends; None without a number of answers."""
        if self.answers is None:
            return None
        (value, low, high), (cost, cheap, dear) = self.per_answer, self.cost
        return self.answers * value - cost, self.answers * low - dear, self.answers * high - cheap

    @property
    def break_even(self) -> tuple[float | None, float | None, float | None]:
        """Answers after which the run has paid, with the fewest and the most; None for never."""
        (value, low, high), (cost, cheap, dear) = self.per_answer, self.cost
        after, fewest, most = (
            spent / worth if worth > 0 else None for spent, worth in ((cost, value), (cheap, high), (dear, low))
        )
        return after, fewest, most

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        rate = self.win_rate
        return {
            "metric": rate.metric,
            "version": rate.version,
            "prompts": rate.prompts,
            "win_rate": [rate.value, rate.low, rate.high],
            "value_per_better_answer": self.each,
            "cost": list(self.cost),
            "value_per_answer": list(self.per_answer),
            "answers": self.answers,
            "net_value": None if self.net is None else list(self.net),
            "break_even_answers": list(self.break_even),
        }


def parse_api_price(text: str | None) -> tuple[float, float] | None:
    """Read `IN,OUT`, dollars for a million tokens."""
    if text is None:
        return None
    try:
        prices = tuple(float(part) for part in text.split(","))
    except ValueError:
        prices = ()
    if len(prices) != 2 or not all(math.isfinite(price) and price >= 0 for price in prices):
        raise InputError(
            f"--api-price {text}: must be two prices of a million tokens, read and written, such as 2.5,10",
            field="--api-price",
        )
    return prices[0], prices[1]
