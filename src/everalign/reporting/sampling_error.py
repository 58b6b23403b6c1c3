"""How far scores may be off because held-out rows are few: standard errors, and what they say of changes.

A share's is that of two more rows of each kind (Agresti and Coull 1998): also 100 % of five rows is not certain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from everalign.learning.run_data import RunData
from everalign.learning.run_files import Score

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
