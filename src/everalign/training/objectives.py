"""What one batch teaches: layout of the batch, its loss, and what the loss is divided by.

Each class joins a pure function of `everalign.objectives` to the Trainer. A loss is a sum over the micro-batch
divided by the count of the whole optimiser step, so that accumulated micro-batches equal the big batch. Nothing here
looks at a value: the Trainer does, once per logging step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from everalign.data.collate import Batch, collate_chosen, collate_groups, collate_pairs, collate_targets
from everalign.data.tokenization import TargetGroup, TokenizedGroup, TokenizedPair
from everalign.errors import InputError
from everalign.objectives import dpo_loss, fpo_loss, implicit_margin, snkl_loss, token_nll, weighted_nll
from everalign.objectives.segments import Segments

Metrics = dict[str, Tensor]

DEFAULT_GAMMA = 2.0
OBJECTIVES = ("sft", "dpo", "fpo", "var", "snkl", "correction")
# Learn from scored rows. correction learns from corrections, the others from preferences, and so does snkl, as rows of
# two completions.
SCORED_OBJECTIVES = ("var", "snkl")


class Objective(Protocol):
    """What the Trainer needs to know of an objective."""

    name: str
    needs_reference: bool

    def collate(self, pairs: Sequence[Any], shared: bool) -> Batch:
        """Lay out encoded rows as tensors; `count` is what the loss of the whole step is divided by."""
        ...

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> tuple[Tensor, Metrics]:
        """Return the micro-batch's share of the step's loss, and detached metrics (one value a row)."""
        ...


class SupervisedObjective:
    """Token negative log-likelihood of the chosen responses, averaged over the step's response tokens."""

    name = "sft"
    needs_reference = False

    def collate(self, pairs: Sequence[TokenizedPair], shared: bool) -> Batch:
        """Lay out the chosen sequences; `count` is the number of their response tokens."""
        batch = collate_chosen(pairs, shared)
        return {**batch, "count": batch["lengths"].sum()}

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> tuple[Tensor, Metrics]:
        """Return Σ weight·NLL / count; metric `nll` is per token of each row."""
        sums = model(batch)
        losses = token_nll(sums, count, check_finite=False) * batch["weight"]
        return losses.sum(), {"nll": (-sums / batch["lengths"]).detach()}


class PreferenceObjective:
    """A loss of the implicit margin, averaged over the step's pairs.

    Args:
        name: how reports call it.
        margin_loss: maps margins (B,) to un-reduced losses (B,).
        beta: inverse temperature of the implicit reward.
    """

    needs_reference = True

    def __init__(self, name: str, margin_loss: Callable[[Tensor], Tensor], beta: float) -> None:
        self.name, self._margin_loss, self.beta = name, margin_loss, beta

    def collate(self, pairs: Sequence[TokenizedPair], shared: bool) -> Batch:
        """Lay out both sequences of every pair; `count` is the number of pairs."""
        return {**collate_pairs(pairs, shared), "count": torch.tensor(len(pairs))}

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> tuple[Tensor, Metrics]:
        """Return Σ weight·loss(margin) / count; metrics `margin` and `accuracy` per pair."""
        chosen, rejected = model(batch).chunk(2)
        reference_chosen, reference_rejected = batch["reference"].unbind(dim=1)
        margin = implicit_margin(chosen, rejected, reference_chosen, reference_rejected, self.beta, check_finite=False)
        losses = self._margin_loss(margin) * batch["weight"]
        detached = margin.detach()
        return losses.sum() / count, {"margin": detached, "accuracy": (detached > 0).float()}


class RewardWeightedObjective:
    """VAR: each response's negative log-likelihood times its weight, averaged over the step's response tokens.

    Summed over a response's tokens and divided by one number for the whole step, which is what makes the optimum the
    one that the weights aim at (see `everalign.objectives.weighted_nll`). With the one response that is to be written
    in every group, it is the token cross-entropy that a corrector learns by.

    Args:
        name: how reports call it.
    """

    needs_reference = False

    def __init__(self, name: str = "var") -> None:
        self.name = name

    def collate(self, groups: Sequence[TokenizedGroup], shared: bool) -> Batch:
        """Lay out the responses that count; `count` is the number of all responses' tokens."""
        tokens = sum(len(response) for group in groups for response in group.responses)
        return {**collate_groups(groups, shared), "count": torch.tensor(tokens)}

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> tuple[Tensor, Metrics]:
        """Return Σ weight·NLL / count; metric `nll` is per token of each response that counts."""
        sums = model(batch)
        losses = weighted_nll(sums, batch["weight"], count, check_finite=False)
        return losses.sum(), {"nll": (-sums / batch["lengths"]).detach()}


class SelfNormalisedObjective:
    """Each row's divergence from the shares that its rewards ask for (see `snkl_loss`), averaged over the step's rows.

    The log-ratio of policy and reference is taken as it is (β = 1): only so is pi* where the loss is 0.
    """

    name = "snkl"
    needs_reference = True

    def collate(self, groups: Sequence[TargetGroup], shared: bool) -> Batch:
        """Lay out all responses of every row; `count` is the number of rows."""
        return {**collate_targets(groups, shared), "count": torch.tensor(len(groups))}

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> tuple[Tensor, Metrics]:
        """Return Σ weight·KL / count; metrics by row: `kl` itself, and `margin` and `accuracy` of its best response.

        The margin is that of the largest over the smallest share, at β = 1; 0 where all shares are equal.
        """
        sums, sizes = model(batch), batch["sizes"]
        segments = Segments(torch.arange(len(sizes), device=sizes.device), batch["groups"], sizes)
        # Softmax at temperature 1 of the logarithms of shares gives the shares back.
        losses = snkl_loss(sums, batch["reference"], batch["log_shares"], segments, 1.0, check_finite=False)
        log_ratio = sums.detach() - batch["reference"]
        margin = log_ratio[batch["best"]] - log_ratio[batch["worst"]]
        metrics = {"kl": losses.detach(), "margin": margin, "accuracy": (margin > 0).float()}
        return (losses * batch["weight"]).sum() / count, metrics


def make_objective(name: str, beta: float = 0.1, gamma: float | None = None) -> Objective:
    """Build an objective by its name on the command line.

    Args:
        name: `sft`, `dpo`, `fpo`, `var`, `snkl` or `correction`.
        beta: inverse temperature of the implicit reward, for `dpo` and `fpo`.
        gamma: focusing exponent of `fpo` (2 when None); anything else refuses it.
    """
    if gamma is not None and name != "fpo":
        raise InputError(f"gamma is the focusing exponent of fpo; the objective {name!r} would ignore it: leave it out")
    if name == "sft":
        return SupervisedObjective()
    if name in ("var", "correction"):
        return RewardWeightedObjective(name)
    if name == "snkl":
        return SelfNormalisedObjective()
    if name == "dpo":
        return PreferenceObjective("dpo", partial(dpo_loss, check_finite=False), beta)
    if name == "fpo":
        exponent = DEFAULT_GAMMA if gamma is None else gamma
        return PreferenceObjective("fpo", partial(fpo_loss, gamma=exponent, check_finite=False), beta)
    raise InputError(f"unknown objective {name!r}: choose one of {', '.join(OBJECTIVES)}")
