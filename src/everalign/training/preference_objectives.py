"""Objectives that learn from preferences: SFT on the chosen responses, DPO and FPO."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from everalign.data.collate import Batch, row_tokens
from everalign.data.tokenization import TokenizedRow
from everalign.objectives import dpo_loss, fpo_loss, implicit_margin
from everalign.training.base_objective import LikelihoodObjective, Metrics, Objective
from everalign.training.options import ObjectiveOptions

DEFAULT_GAMMA = 2.0


class SupervisedObjective(LikelihoodObjective):
    """Token negative log-likelihood of the chosen responses (`sft`)."""

    def computed(self, row: TokenizedRow) -> TokenizedRow:
        """Return the chosen response."""
        return row.only([0])

    def tokens(self, row: TokenizedRow, shared: bool) -> int:
        """Return the tokens of both responses: rows are batched as in the preference stage that may follow."""
        return row_tokens(row, shared)

    def collate(self, rows: Sequence[TokenizedRow], shared: bool) -> Batch:
        """Lay out the chosen sequences; `count` is the number of their response tokens."""
        batch = super().collate(rows, shared)
        return {**batch, "count": batch["lengths"].sum()}


class DpoObjective(Objective):
    """DPO: a loss of the implicit margin, averaged over the step's pairs.

    Attributes:
        margin_loss: maps margins (B,) to un-reduced losses (B,).
    """

    needs_reference = True

    def __init__(self, name: str, options: ObjectiveOptions) -> None:
        super().__init__(name, options)
        self.margin_loss: Callable[[Tensor], Tensor] = partial(dpo_loss, check_finite=False)

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> tuple[Tensor, Metrics]:
        """Return Σ weight·loss(margin) / count; metrics `margin` and `accuracy` per pair."""
        margin = self._margin(model(batch), batch["reference"], check_finite=False)
        losses = self.margin_loss(margin) * batch["weight"]
        detached = margin.detach()
        return losses.sum() / count, {"margin": detached, "accuracy": (detached > 0).float()}

    def drift(self, policy: Tensor, reference: Tensor) -> tuple[str, str, float]:
        """Return the mean implicit margin."""
        margin = self._margin(policy, reference, check_finite=True)
        return "step0_margin", "margin at step 0", margin.mean().item()

    def _margin(self, policy: Tensor, reference: Tensor, check_finite: bool) -> Tensor:
        chosen, rejected = policy.view(-1, 2).unbind(1)
        reference_chosen, reference_rejected = reference.view(-1, 2).unbind(1)
        beta = self.options.beta
        return implicit_margin(chosen, rejected, reference_chosen, reference_rejected, beta, check_finite)


class FpoObjective(DpoObjective):
    """FPO: DPO with a focusing exponent on the probability of the wrong ranking."""

    def __init__(self, name: str, options: ObjectiveOptions) -> None:
        super().__init__(name, options)
        self.gamma = DEFAULT_GAMMA if options.gamma is None else options.gamma
        self.margin_loss = partial(fpo_loss, gamma=self.gamma, check_finite=False)

    def settings(self) -> dict[str, Any]:
        """Return γ."""
        return {"gamma": self.gamma}
