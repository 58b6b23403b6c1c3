"""Single-task training: every task from the base model, as if it were the only one."""

from everalign.methods.base import Method, Task
from everalign.modeling.policy import Policy


class SingleTask(Method):
    """Learn each task in a fresh adapter on the base model; only the score on the own task counts."""

    name = "stl"
    regime = "separate"

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Go back to the base model."""
        policy.reset(task.seed)
