"""The score matrix of a run and the four numbers that sum it up: Last, BWT, AP, FWT.

Source: LifeAlign (arXiv 2509.17183), section "Metrics"; forward transfer as in GEM (Lopez-Paz and Ranzato
2017); forgetting as in Chaudhry et al. (2018), counted from the moment a task is learned.
Scores may be in any unit in which higher is better; every number here has the unit of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, get_args

from everalign.errors import InputError

Regime = Literal["sequential", "joint", "separate"]
"""How the tasks were learned: one after the other, all at once (MTL), or each from the base model (STL)."""


@dataclass(frozen=True)
class Scores:
    """Scores of one run over N tasks, of which the first k have been learned (k <= N).

    Arguments:
        tasks: N names; the first k in the order of learning, then those not learned yet.
        zero_shot: (N,) the base model's scores, None where not measured.
        matrix: (k, N) `matrix[i][j]` = score on task j after training on task i, past and future; None where
            not measured. A task without a test set has only None in its column and is left out of every mean;
            its row stays, because learning it can make the model forget the others.
        regime: "sequential"; "joint" (only the last row exists, so only `last` is defined); or "separate"
            (only the diagonal exists, and `last` is its mean).
    """

    tasks: Sequence[str]
    zero_shot: Sequence[float | None]
    matrix: Sequence[Sequence[float | None]]
    regime: Regime = "sequential"

    def __post_init__(self) -> None:
        _check_shapes(self)
        rows = [("zero_shot", self.zero_shot)]
        rows += [(f"row {i} of the score matrix", row) for i, row in enumerate(self.matrix, 1)]
        for where, row in rows:
            for task, score in zip(self.tasks, row, strict=True):
                if score is not None and not math.isfinite(score):
                    raise InputError(f"{where}: the score on task {task!r} is {score}, not a finite number")
        _check_regime(self)

    @classmethod
    def from_mappings(
        cls,
        tasks: Sequence[str],
        zero_shot: Mapping[str, float],
        rows: Sequence[Mapping[str, float]],
        regime: Regime = "sequential",
    ) -> Scores:
        """Scores from one {task: score} mapping a row; a task that a mapping lacks was not measured there."""
        unknown = {name for row in (zero_shot, *rows) for name in row}.difference(tasks)
        if unknown:
            raise InputError(f"scores for unknown tasks {sorted(unknown)}; the tasks are {list(tasks)}")
        matrix = [[row.get(task) for task in tasks] for row in rows]
        return cls(list(tasks), [zero_shot.get(task) for task in tasks], matrix, regime)

    @classmethod
    def joint(cls, tasks: Sequence[str], zero_shot: Sequence[float | None], row: Sequence[float | None]) -> Scores:
        """Scores of one model trained on all N tasks at once (MTL); `row` (N,) is measured at the end."""
        unmeasured: list[list[float | None]] = [[None] * len(tasks) for _ in range(len(tasks) - 1)]
        return cls(list(tasks), list(zero_shot), [*unmeasured, list(row)], "joint")

    @classmethod
    def separate(
        cls, tasks: Sequence[str], zero_shot: Sequence[float | None], diagonal: Sequence[float | None]
    ) -> Scores:
        """Scores of one model a task, each from the base model (STL); `diagonal` (k,) on the own tasks."""
        matrix = [[score if i == j else None for j in range(len(tasks))] for i, score in enumerate(diagonal)]
        return cls(list(tasks), list(zero_shot), matrix, "separate")

    def up_to(self, rows: int) -> Scores:
        """The scores as they stood after the first `rows` tasks (sequential runs only)."""
        if self.regime != "sequential":
            raise InputError(f"a {self.regime} run has no earlier rows to go back to")
        return Scores(self.tasks, self.zero_shot, self.matrix[:rows])

    @property
    def learned(self) -> list[str]:
        """The tasks learned so far, in the order of learning."""
        return list(self.tasks[: len(self.matrix)])

    @property
    def last(self) -> float | None:
        """Mean score over the tasks learned so far, after the last one: `Last = (1/N) sum_j m[N][j]`."""
        if self.regime == "separate":
            return known_mean(row[i] for i, row in enumerate(self.matrix))
        return known_mean(self.matrix[-1][: len(self.matrix)]) if self.matrix else None

    @property
    def backward_transfer(self) -> float | None:
        """`BWT = (1/(N-1)) sum_{j<N} (m[N][j] - m[j][j])`; None when no earlier task has scores."""
        return known_mean(change for change in self.changes[:-1])

    @property
    def average_performance(self) -> float | None:
        """`AP = (1/N) sum_k (1/k) sum_{j<=k} m[k][j]`: the mean over time of the mean over the learned."""
        if self.regime != "sequential":
            return None
        return known_mean(known_mean(row[: i + 1]) for i, row in enumerate(self.matrix))

    @property
    def forward_transfer(self) -> float | None:
        """FWT: mean over j >= 2 of `m[j-1][j] - zero_shot[j]`; None when none was tested before its turn."""
        before = (self.matrix[j - 1][j] for j in range(1, len(self.matrix)))
        return known_mean(map(_difference, before, self.zero_shot[1:]))

    @property
    def changes(self) -> list[float | None]:
        """`m[last][j] - m[j][j]`, (k,), of each task learned so far: negative where it was forgotten."""
        if not self.matrix:
            return []
        return [_difference(self.matrix[-1][j], self.matrix[j][j]) for j in range(len(self.matrix))]

    @property
    def forgetting(self) -> dict[str, float]:
        """Each earlier task's best score since it was learned minus its last score; negative if it improved.

        The latest task is absent (it has had no time to be forgotten), and so is a task without a test set.
        """
        lost: dict[str, float] = {}
        for j, task in enumerate(self.learned[:-1]):
            earlier = [row[j] for row in self.matrix[j:-1] if row[j] is not None]
            final = self.matrix[-1][j]
            if earlier and final is not None:
                lost[task] = max(score for score in earlier if score is not None) - final
        return lost

    @property
    def summary(self) -> dict[str, float | None]:
        """The four numbers by name, None where the run does not define one."""
        return {
            "last": self.last,
            "backward_transfer": self.backward_transfer,
            "average_performance": self.average_performance,
            "forward_transfer": self.forward_transfer,
        }


def known_mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of what was measured; None of nothing."""
    measured = [value for value in values if value is not None]
    return fmean(measured) if measured else None


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _check_shapes(scores: Scores) -> None:
    n = len(scores.tasks)
    if any(not task for task in scores.tasks):
        raise InputError("a task name is empty")
    repeated = sorted({task for task in scores.tasks if list(scores.tasks).count(task) > 1})
    if repeated:
        raise InputError(f"task names must differ from each other, but {repeated} appear twice or more")
    if len(scores.zero_shot) != n:
        raise InputError(f"zero_shot has {len(scores.zero_shot)} scores for {n} tasks; use None where unmeasured")
    if len(scores.matrix) > n:
        raise InputError(f"the score matrix has {len(scores.matrix)} rows for {n} tasks")
    for i, row in enumerate(scores.matrix):
        if len(row) != n:
            raise InputError(
                f"row {i + 1} of the score matrix has {len(row)} scores for {n} tasks; use None where unmeasured"
            )
    if scores.regime not in get_args(Regime):
        raise InputError(f"regime {scores.regime!r} is none of {list(get_args(Regime))}")


def _check_regime(scores: Scores) -> None:
    """A learned task is tested after itself and after every later task, or never; in a joint run only at the end."""
    if scores.regime == "joint":
        if scores.matrix and len(scores.matrix) != len(scores.tasks):
            raise InputError(f"a joint run learns all {len(scores.tasks)} tasks, not {len(scores.matrix)}")
        if any(score is not None for row in scores.matrix[:-1] for score in row):
            raise InputError("a joint run has scores in the last row only")
    elif scores.regime == "separate":
        if any(score is not None for i, row in enumerate(scores.matrix) for j, score in enumerate(row) if i != j):
            raise InputError("a separate run has scores on the diagonal only")
    else:
        for j, task in enumerate(scores.learned):
            column = [row[j] for row in scores.matrix[j:]]
            if None in column and any(score is not None for score in column):
                after = scores.tasks[j + column.index(None)]
                raise InputError(
                    f"the score on task {task!r} after learning {after!r} is missing, though the task has a test "
                    "set; evaluate every learned task after each task"
                )
