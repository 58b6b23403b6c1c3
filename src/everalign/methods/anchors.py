"""Anchored replay: what a replayed answer's log-probability was at the end of its task, and a pull back to it.

Only what got worse is pulled: a chosen answer that became less likely, a rejected one that became likelier; of a scored
row, an answer of more than the row's mean weight and one of less. With S the summed log-probability of an answer now,
Ŝ at the end of its task, and h the Huber loss with threshold 1,

    α · [h(relu(Ŝ_w − S_w)) + h(relu(S_l − Ŝ_l))]

is added to the loss of each replayed row. One number an answer is kept and no forward pass is added. One-sided anchors
of replayed preferences go back to mfr-dpo/DAPR (a public repository of 2026), which keeps a number a token.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from everalign.data.collate import Batch
from everalign.data.tokenization import TokenizedRow
from everalign.training.hooks import RowTerms, Stage, sum_by_row

_EQUAL = 1e-9  # share of a row's largest weight by which equal ones may differ
VALUES, _SIGNS = "anchor", "anchor_sign"
"""Names, in `RowTerms.values`, of what a row's responses are pulled to, and of the side they are pulled from."""


class Anchors:
    """The anchors of a replay buffer's rows, in the buffer's order.

    Args:
        strength: α, at least 0; 0 for none.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self._kept: list[Tensor] = []

    def terms(self, stage: Stage) -> RowTerms | None:
        """Return the anchors of a stage's replayed rows, which are the buffer's, for `row_loss` to read."""
        if not self.strength or not stage.replayed:
            return None
        replayed = range(stage.own, stage.learned)
        values = [torch.zeros(len(row.responses)) for row in stage.rows]
        signs = [torch.zeros(len(row.responses)) for row in stage.rows]
        for number, kept in zip(replayed, self._kept, strict=True):
            # A row whose responses changed in number since has no anchor.
            if len(kept) == len(values[number]):
                values[number], signs[number] = kept, _signs(stage.rows[number], stage.objective.first_is_best)
        return RowTerms(values={VALUES: values, _SIGNS: signs})

    def row_loss(self, logprobs: Tensor, batch: Batch) -> Tensor | None:
        """Return the anchors' part of each row's loss, (B,), or None; arguments as in `StageHooks.row_loss`."""
        if _SIGNS not in batch:
            return None
        sign = batch[_SIGNS]
        worse = torch.relu(sign * (batch[VALUES] - logprobs)) * sign.abs()
        parts = huber_loss(worse, torch.zeros_like(worse), reduction="none")
        return self.strength * sum_by_row(parts, batch)

    def keep(self, stage: Stage, numbers: Sequence[int], capacity: int) -> None:
        """Add the anchors of a stage's rows that went into the buffer, under the policy as it is now.

        Args:
            stage: that of the task that ends.
            numbers: those rows, in the order in which they were added to the buffer.
            capacity: the buffer's; the oldest anchors are dropped with their rows.
        """
        if self.strength:
            self._kept = [*self._kept, *stage.logprobs(numbers)][-capacity:]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the anchors one after another, and of how many responses each row's are."""
        if not self._kept:
            return {}
        return {"anchors": torch.cat(self._kept), "anchor_sizes": torch.tensor([len(kept) for kept in self._kept])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        found = "anchors" in state
        self._kept = list(torch.split(state["anchors"], state["anchor_sizes"].tolist())) if found else []


def _signs(row: TokenizedRow, first_is_best: bool) -> Tensor:
    """Return 1 for a response that is to stay likely, −1 for one that is to stay unlikely, 0 for one in between."""
    if first_is_best or len(row.weights) == 1:
        return torch.tensor([1.0] + [-1.0] * (len(row.weights) - 1))
    weights = torch.tensor(row.weights, dtype=torch.float64)
    above = weights - weights.mean()
    # The mean of equal numbers is not always that number.
    return torch.where(above.abs() > _EQUAL * weights.max(), above.sign(), 0.0).float()
