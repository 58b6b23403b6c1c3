"""The hooks of a continual-learning method. The learner calls them; every default does nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from everalign.data.replay import AnyRow, ReplayBuffer
from everalign.data.rows import RowSet
from everalign.modeling.policy import Policy


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: unique in a run.
        rows: its training rows: preferences, scored ones, or corrections.
        index: 1 for the first task that the policy learns, whatever was refused or rolled back before.
        seed: seeds everything random that belongs to this task.
    """

    name: str
    rows: Sequence[AnyRow]
    index: int
    seed: int


@dataclass(frozen=True)
class ModuleRecord:
    """What consolidation did to one module: energies are shares of ‖·‖²_F, norms are Frobenius norms.

    Args:
        module: its name in the base model.
        energy_kept: share of the update's energy that denoising kept.
        rank: rank of the denoised update.
        projected_energy: share of the denoised update's energy inside the span of earlier updates.
        norm_before: norm of the task's update.
        norm_after: norm of what was added to long-term memory.
        memory_rank: rank of the long-term memory afterwards.
        discarded_energy: share of the memory's energy that the rank cap cut off.
        bank_lost_energy: share of the history's energy that the bank's bounded bases do not hold.
    """

    module: str
    energy_kept: float
    rank: int
    projected_energy: float
    norm_before: float
    norm_after: float
    memory_rank: int
    discarded_energy: float
    bank_lost_energy: float


class Method:
    """A method composed with any objective by the learner.

    Class attributes tell the learner how to save and to score: `regime` is `sequential`, `joint` (all tasks at once)
    or `separate` (each from the base model); `long_term` says that between tasks the policy lives in the long-term
    adapter; `consolidates` says that `end_task` changes the policy.
    """

    name: ClassVar[str]
    regime: ClassVar[str] = "sequential"
    gamma: float | None = None
    buffer: ReplayBuffer | None = None
    long_term = False
    consolidates = False

    def settings(self) -> dict[str, Any]:
        """Return the arguments that shape the result, for the manifest."""
        return {}

    def pool(self, tasks: Sequence[tuple[str, RowSet[Any]]]) -> list[tuple[str, RowSet[Any]]]:
        """Return what to learn one after another, given all tasks at once as (name, rows)."""
        return list(tasks)

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Prepare the policy for a task."""

    def rows(self, task: Task) -> list[AnyRow]:
        """Return rows of earlier tasks to learn together with the task's own."""
        return []

    def penalty(self, policy: Policy) -> Tensor | None:
        """Return a scalar that is added to every step's loss, or None."""
        return None

    def adjust_gradients(self, policy: Policy) -> None:
        """Change a step's complete gradients in place, before the optimiser sees them."""

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Carry over what the task taught; returns one record per module where something was consolidated."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """Return what has to survive until the next task, apart from the adapter and the replay buffer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, be it before the first task."""
