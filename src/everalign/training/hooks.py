"""Hooks of continual-learning methods into one training stage, and what they may read of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from everalign.data.collate import Batch, Review, batches_by_length
from everalign.data.tokenization import TokenizedRow
from everalign.distributed import add_up, share
from everalign.modeling.policy import Policy
from everalign.training.base_objective import Objective
from everalign.training.reference import sequence_logprobs

RowValues = Sequence[Tensor]


@dataclass(frozen=True)
class RowTerms:
    """What a method adds to the rows of a stage.

    Args:
        weights: for each row of the stage, what its weight in the objective's loss is multiplied by; None for 1.
        values: by name, for each row of the stage (K,) numbers, one for each of its responses. They stand in every
            batch under that name, (S,) for its S responses, for `StageHooks.row_loss` to read.
        review: learned rows that take the place of the stage's last steps; None for none.
    """

    weights: Sequence[float] | None = None
    values: Mapping[str, RowValues] = field(default_factory=dict)
    review: Review | None = None


def make_batch(
    rows: Sequence[TokenizedRow],
    numbers: Sequence[int],
    objective: Objective,
    shared: bool,
    reference: RowValues | None,
    terms: RowTerms | None = None,
) -> Batch:
    """Lay out some rows of a stage with what the objective and the method read of them.

    Args:
        rows: all rows of the stage.
        numbers: which; none for a batch of some row that does not count.
        objective: lays them out.
        shared: compute a prompt once for all its answers.
        reference: of each row of the stage (K,) log-probabilities under the reference; None for none.
        terms: what a method adds; None for nothing.
    """
    shown = [rows[number] for number in numbers or [0]]
    if terms is not None and terms.weights is not None:
        shown = [
            replace(row, weight=row.weight * terms.weights[n]) for row, n in zip(shown, numbers or [0], strict=True)
        ]
    batch = objective.collate(shown, shared)
    if reference is not None:
        batch["reference"] = torch.cat([reference[number] for number in numbers or [0]])
    if terms is not None:
        batch["counts"] = torch.ones(len(shown))
        # The loss may read some of a row's responses only.
        kept = [
            [any(own is one for one in objective.computed(row).responses) for own in row.responses] for row in shown
        ]
        for name, values in terms.values.items():
            found = [values[number][torch.tensor(mask)] for number, mask in zip(numbers or [0], kept, strict=True)]
            batch[name] = torch.cat(found)
    if not numbers:
        counted = {"weight", "weights", "count", "counts"} & batch.keys()
        batch |= {name: torch.zeros_like(batch[name]) for name in counted}
    return batch


@dataclass(frozen=True)
class Stage:
    """A stage that is about to be trained, is being trained, or was.

    Its rows are, in this order, the task's own, those replayed beside them, and those that are at hand but not learned
    (constraints, rows to choose a setting on).

    Args:
        policy: what learns.
        objective: what a batch teaches.
        rows: all rows, tokenised.
        own: how many are the task's own.
        replayed: how many follow them and are learned too.
        reference: of each row (K,), log-probabilities of its responses under the reference; None where the objective
            needs none.
        tokens_per_batch: tokens computed at once, padding included.
    """

    policy: Policy
    objective: Objective
    rows: Sequence[TokenizedRow]
    own: int
    replayed: int
    reference: RowValues | None
    tokens_per_batch: int

    @property
    def learned(self) -> int:
        """How many rows are learned."""
        return self.own + self.replayed

    def logprobs(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return for each of these rows (K,) summed log-probabilities of its responses under the policy as it is now.

        In nats, fp32, on the CPU.
        """
        return sequence_logprobs(self.policy, [self.rows[number] for number in numbers], self.tokens_per_batch)

    def loss(self, numbers: Sequence[int]) -> float:
        """Return the objective's mean loss over these rows under the policy as it is now."""
        batches, count = self._batches(numbers)
        with self.policy.evaluating():
            return sum(share(lambda own: [float(self._loss(batch, count)) for batch in own], batches))

    def gradient(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return the gradient of the objective's mean loss over these rows.

        The gradients that the trainer accumulates stay as they are.

        Returns:
            A tensor for each parameter that learns, in the order of `parameters`, detached.
        """
        learned = parameters(self.policy)
        batches, count = self._batches(numbers)

        def compute(own: Sequence[Batch]) -> list[Tensor]:
            sums = [torch.zeros_like(parameter) for parameter in learned]
            with torch.enable_grad():
                for batch in own:
                    for total, part in zip(sums, torch.autograd.grad(self._loss(batch, count), learned), strict=True):
                        total += part
            return sums

        return add_up(compute, batches)

    def _batches(self, numbers: Sequence[int]) -> tuple[list[Batch], Tensor]:
        """Lay these rows out; returns the batches and what the loss of all of them is divided by."""
        shared, rows = self.policy.head.shared, [self.rows[number] for number in numbers]
        lengths = [self.objective.tokens(row, shared, self.policy.prefix_length) for row in rows]
        chosen = [[numbers[i] for i in places] for places in batches_by_length(lengths, self.tokens_per_batch)]
        batches = [make_batch(self.rows, places, self.objective, shared, self.reference) for places in chosen]
        return batches, torch.stack([batch["count"] for batch in batches]).sum()

    def _loss(self, batch: Batch, count: Tensor) -> Tensor:
        batch = self.policy.on_device(batch)
        return self.objective.loss(self.policy, batch, count.to(batch["weight"].device))[0]


def sum_by_row(parts: Tensor, batch: Batch) -> Tensor:
    """Sum what stands for a batch's responses, (S,), over the responses of each row: (B,)."""
    sums = torch.zeros(len(batch["weight"]), dtype=parts.dtype, device=parts.device)
    return sums.index_add_(0, batch["row"], parts)


def parameters(policy: Policy) -> list[torch.nn.Parameter]:
    """Return the parameters that learn, in the policy's order."""
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


class StageHooks:
    """What takes part in the training of a stage besides the objective. Every hook does nothing by default.

    The trainer calls `begin_stage`; in every step `row_loss` for each micro-batch, `penalty`, `adjust_gradients` and
    `after_step`; then `end_stage`. What has to survive a kill within a stage is in `stage_state`, which is kept with
    every checkpoint and with the finished stage.

    Several processes call the same hooks with the same stage, but `row_loss` and `penalty`: `row_loss` with their own
    rows, so that what a method sums over a step's rows it has to `everalign.distributed.gather`; `penalty` all of them,
    of whose gradients the mean counts.

    Class attributes:
        watches_stages: whether `begin_stage` is needed even if an earlier call has finished the stage.
    """

    watches_stages = False

    def begin_stage(self, stage: Stage) -> RowTerms | None:
        """Prepares for a stage, before its first step; returns what to add to its rows."""
        return None

    def row_loss(self, logprobs: Tensor, batch: Batch) -> Tensor | None:
        """Returns what to add to the loss of each row of a micro-batch, (B,), or None.

        The step's loss grows by the mean over its rows, also where the objective's own is a mean over tokens.

        Args:
            logprobs: (S,) summed log-probabilities of the batch's responses under the policy, in nats, with gradients.
            batch: as collated, with the values of `RowTerms`; `row` (S,) says whose each response is, and `counts` (B,)
                is 0 for a row that stands in for none.
        """
        return None

    def penalty(self, policy: Policy) -> Tensor | None:
        """Returns a scalar to add to every step's loss, or None."""
        return None

    def adjust_gradients(self, policy: Policy) -> None:
        """Changes a step's complete gradients in place, once they are clipped and before the optimiser reads them."""

    def after_step(self, policy: Policy) -> None:
        """Looks at the policy after an optimiser step."""

    def end_stage(self, stage: Stage) -> None:
        """Finishes a stage after its last step; may change the policy."""

    def stage_state(self) -> dict[str, Tensor]:
        """Returns what steps have changed in the method, on the CPU."""
        return {}

    def load_stage_state(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restores what `stage_state` returned; called after `begin_stage`."""
