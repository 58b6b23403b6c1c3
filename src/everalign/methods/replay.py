"""Experience replay: learn a sample of earlier tasks' rows again with each new task."""

from typing import Any

from everalign.data.replay import AnyRow, ReplayBuffer
from everalign.errors import InputError
from everalign.methods.base import Method, ModuleRecord, Task
from everalign.modeling.policy import Policy


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
