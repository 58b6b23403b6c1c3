"""Base class of the continual-learning methods and the hooks that the learner calls."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from everalign.data.messages import Prompt
from everalign.data.replay import AnyRow, ReplayBuffer
from everalign.data.rows import RowSet
from everalign.errors import InputError
from everalign.modeling.policy import Policy
from everalign.modeling.prompt_pool import PromptShape
from everalign.training.hooks import StageHooks
from everalign.training.objectives import OBJECTIVES

Answerer = Callable[[Sequence[Prompt], int], list[tuple[int, str]]]


def check_share(name: str, value: float) -> None:
    """Refuses what is no share.

    Raises:
        InputError: it does not lie between 0 and 1.
    """
    if not 0.0 <= value <= 1.0:
        raise InputError(f"{name} is a share between 0 and 1, found {value}", field=name)


def check_strength(name: str, value: float) -> None:
    """Refuses what is no strength.

    Raises:
        InputError: it is negative or not finite.
    """
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{name} is a number of at least 0, found {value}", field=name)


@dataclass(frozen=True)
class Task:
    """A task of a run.

    Args:
        name: unique in a run.
        rows: its training rows: preferences, scored rows or corrections.
        index: 1 for the first task of the policy's lineage, with labels of its label; refused and rolled-back tasks do
            not count.
        seed: seeds everything random in this task.
        answer: writes one sampled answer to each of some prompts with the policy as it is, given a seed; returns those
            that ended, with their prompts' numbers.
        label: what its rows belong to; None of a method that keeps no policy apart for each label.
    """

    name: str
    rows: Sequence[AnyRow]
    index: int
    seed: int
    answer: Answerer | None = None
    label: str | None = None


@dataclass(frozen=True)
class ModuleRecord:
    """Measurements of one module's consolidation. Energies are shares of ‖·‖²_F, norms are Frobenius norms.

    Args:
        module: name of the module in the base model.
        energy_kept: share of the update's energy that denoising kept.
        rank: rank of the denoised update.
        projected_energy: share of the denoised update's energy inside the span of earlier updates.
        norm_before: norm of the task's update.
        norm_after: norm of the update that was added to long-term memory.
        memory_rank: rank of the long-term memory afterwards.
        discarded_energy: share of the memory's energy that the rank cap cut off.
        bank_lost_energy: share of the history's energy that the bank's cap cut off.
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


class Method(StageHooks):
    """Base of the continual-learning methods: hooks that the learner calls around the training of each task.

    A method says what is carried from task to task; the objective says what a batch teaches, so that every method works
    with every objective. Every hook does nothing by default. A new method is a subclass in a file of its own and a line
    in `everalign.methods.table`; its constructor's arguments become arguments of `make_method`.

    The learner calls, for each task: `begin_task`; `rows`, `apart` and `own_rows`; for each stage of its training the
    hooks of `StageHooks`; then `end_task`. It stores `state_dict` and `buffer` with the finished version, and restores
    them on resume or rollback.

    Class attributes:
        name: the method's name on the command line.
        regime: `sequential`; `joint` if all tasks may be learned at once; `separate` if each starts anew.
        gamma: focusing exponent for the objective `fpo`; None for the objective's own.
        buffer: rows of earlier tasks, None for a method without replay.
        long_term: whether the policy between tasks is the long-term adapter.
        consolidates: whether `end_task` changes the policy, which is then scored before and after.
        labelled: whether each label has a policy of its own, which `answering` switches to.
        prompts: size of the pool of prompts that it learns in place of an adapter; None for an adapter.
        starts_anew: whether each task starts from the base model.
        starts_elsewhere: whether `begin_task` changes what the policy answers, so that the reference `previous_task` is
            not the policy that the training starts from. Not of methods that start anew: nothing is before their tasks.
        rate_factor: what the stages' learning rates are multiplied by.
        reference: the one reference policy that it makes sense with; None for any.
        pairs_only: whether it learns from preferences alone.
    """

    name: ClassVar[str]
    regime: ClassVar[str] = "sequential"
    gamma: float | None = None
    buffer: ReplayBuffer | None = None
    long_term = False
    consolidates = False
    labelled = False
    prompts: PromptShape | None = None
    starts_anew: ClassVar[bool] = False
    starts_elsewhere: ClassVar[bool] = False
    rate_factor = 1.0
    reference: ClassVar[str | None] = None
    pairs_only: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        """Returns the arguments that shape the result, for the manifest."""
        return {}

    def __repr__(self) -> str:
        gamma = {} if self.gamma is None else {"gamma": self.gamma}
        given = ", ".join(f"{name}={value!r}" for name, value in {**gamma, **self.settings()}.items())
        return f"{type(self).__name__}({given})"

    def check_fits(self, objective: str, reference: str | None, adapter: bool) -> None:
        """Refuses what the method cannot be combined with, before anything is loaded.

        Args:
            objective: its name.
            reference: the reference policy that was asked for; None for none.
            adapter: whether the shape of an adapter was asked for.

        Raises:
            InputError: names the option and says why.
        """
        if self.pairs_only and objective in OBJECTIVES and OBJECTIVES[objective].rows != "preferences":
            raise InputError(
                f"{self.name} learns from preferences, and the objective {objective} from other rows: choose an "
                "objective such as dpo, or another method",
                field="objective",
            )

    def pool(self, tasks: Sequence[tuple[str, RowSet[Any]]]) -> list[tuple[str, RowSet[Any]]]:
        """Returns what to learn one after another, given all tasks at once as (name, rows). For `joint` methods."""
        return list(tasks)

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Prepares the policy for a task; resets it to the base model where the method `starts_anew`."""
        if self.starts_anew:
            policy.reset(task.seed)

    def rows(self, task: Task) -> list[AnyRow]:
        """Returns rows of earlier tasks to learn together with the task's own."""
        return []

    def warning(self, task: Task, rows: Sequence[AnyRow]) -> str | None:
        """Returns what is wrong with the `rows` of a task that is to be learned all the same; None if nothing is."""
        return None

    def apart(self, task: Task) -> list[AnyRow]:
        """Returns rows that the stages' hooks need and that are not learned."""
        return []

    def own_rows(self, task: Task) -> Sequence[AnyRow]:
        """Returns those of the task's own rows that are learned; called again with those of every round."""
        return task.rows

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Carries over what the task taught; returns a record for each module that was consolidated."""
        return []

    def adopt(self, policy: Policy, label: str | None) -> None:
        """Takes the policy, as a version of the line has left it, as its label's; called once for each label."""

    def answering(self, policy: Policy, label: str | None) -> AbstractContextManager[None]:
        """Context manager that makes the policy the one that answers to a label."""
        return nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state to keep until the next task, besides the adapter and the replay buffer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned, possibly from before the first task."""
