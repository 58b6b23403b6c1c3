"""Baselines: sequential, single-task and multi-task fine-tuning, and experience replay."""

from collections.abc import Sequence
from typing import Any

from everalign.data.replay import AnyRow, ReplayBuffer
from everalign.data.rows import RowSet
from everalign.errors import InputError
from everalign.methods.base import Method, ModuleRecord, Task
from everalign.modeling.policy import Policy


class SequentialFineTuning(Method):
    """Trains one adapter on task after task: the control that shows how much is forgotten without a method."""

    name = "seqft"


class SingleTask(Method):
    """Learns each task in a fresh adapter on the base model; only the score on its own task counts."""

    name = "stl"
    regime = "separate"

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Resets the policy to the base model."""
        policy.reset(task.seed)


_EVERYTHING = 10**9
_POOLED = "all-tasks"


class MultiTask(Method):
    """Learns the union of all tasks from the base model.

    Given all tasks at once, it trains once. Given one after another, it trains each time from the base model on all
    rows so far, which it keeps.
    """

    name = "mtl"
    regime = "joint"

    def __init__(self) -> None:
        self.buffer: ReplayBuffer = ReplayBuffer(_EVERYTHING)

    def pool(self, tasks: Sequence[tuple[str, RowSet[Any]]]) -> list[tuple[str, RowSet[Any]]]:
        """Makes one task of all."""
        source = " + ".join(rows.source for _, rows in tasks)
        return [(_POOLED, type(tasks[0][1]).of([row for _, rows in tasks for row in rows], source))]

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Resets the policy to the base model."""
        policy.reset(task.seed)

    def rows(self, task: Task) -> list[AnyRow]:
        """Returns all rows of all earlier tasks."""
        return self.buffer.rows(exclude_task=task.name)

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Keeps all of the task's rows."""
        self.buffer.add(task.name, task.rows, fraction=1.0, seed=task.seed)
        return []


class ExperienceReplay(Method):
    """Trains one adapter on task after task, each joined with a buffer of rows of earlier tasks.

    The baseline ER of LifeAlign (arXiv 2509.17183).

    Args:
        replay: share of a task's rows that goes into the buffer, drawn at random after training.
        capacity: most rows in the buffer; the oldest are dropped first.
    """

    name = "er"

    def __init__(self, replay: float = 0.2, capacity: int = 3000) -> None:
        if not 0.0 <= replay <= 1.0:
            raise InputError(f"replay is a share between 0 and 1, found {replay}")
        self._replay = replay
        self.buffer: ReplayBuffer = ReplayBuffer(capacity)

    def settings(self) -> dict[str, Any]:
        """Returns the replay share and the capacity."""
        return {"replay": self._replay, "capacity": self.buffer.capacity}

    def rows(self, task: Task) -> list[AnyRow]:
        """Returns the buffer's rows of other tasks."""
        return self.buffer.rows(exclude_task=task.name)

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Draws this task's share into the buffer."""
        self.buffer.add(task.name, task.rows, self._replay, task.seed)
        return []
