"""How well a corrector expects held-out corrections, and how much it copies; one forward pass and no decoding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everalign.data.batches import batches_by_length
from everalign.data.groups import EncodedGroup
from everalign.data.layout import Batch, lay_out_groups, row_tokens
from everalign.modeling.policy import Policy
from everalign.modeling.whole_model import WholeModel


@dataclass(frozen=True)
class CorrectorReport:
    """What a corrector makes of N held-out rows, every token counting the same.

    Args:
        rows: N, the rows whose correction and answer both fit.
        perplexity: exp of the mean negative log-likelihood per token of the corrections, ends included.
        copy_log_likelihood: mean log-likelihood per token of the original answers as output, in nats; 0 would be
            certain to copy.
        starts_by_copying: share of rows where greedy decoding would begin with the answer's first token.
        copies: share of rows where greedy decoding would return the whole answer unchanged.
        identities: rows whose answer is its own correction.
        keeps: share of these where it would be returned unchanged; None where there are none.
    """

    rows: int
    perplexity: float
    copy_log_likelihood: float
    starts_by_copying: float
    copies: float
    identities: int
    keeps: float | None


@dataclass(frozen=True)
class _Sums:
    """Of S sequences: log-likelihood in nats, tokens, and whether greedy decoding gives the first token and all."""

    log_probs: Tensor
    lengths: Tensor
    first: Tensor
    all: Tensor


def corrector_report(
    model: Policy | WholeModel, rows: Sequence[EncodedGroup], tokens_per_batch: int
) -> CorrectorReport:
    """Judge a corrector.

    Args:
        model: in evaluation mode.
        rows: N of them, each with two responses: the correction and the answer.
        tokens_per_batch: tokens computed at once, padding included.
    """
    shared, order, parts = model.head.shared, [], []
    for numbers in batches_by_length([row_tokens(row, shared) for row in rows], tokens_per_batch):
        batch = model.on_device(lay_out_groups([rows[number] for number in numbers], shared))
        parts.append(_sums(batch, *model.response_choices(batch)))
        order += numbers
    correction, answer = (_of_response(parts, place) for place in (0, 1))
    same = torch.tensor([rows[number].responses[0] == rows[number].responses[1] for number in order])
    return CorrectorReport(
        rows=len(rows),
        perplexity=math.exp(-(correction.log_probs.sum() / correction.lengths.sum()).item()),
        copy_log_likelihood=(answer.log_probs.sum() / answer.lengths.sum()).item(),
        starts_by_copying=answer.first.mean().item(),
        copies=answer.all.mean().item(),
        identities=int(same.sum()),
        keeps=answer.all[same].mean().item() if same.any() else None,
    )


def _sums(batch: Batch, log_probs: Tensor, tokens: Tensor) -> _Sums:
    """Return the sums (2B,) fp64 on the CPU of a batch of B rows."""
    lengths, sequences = batch["lengths"], batch["sequences"]
    total = torch.zeros(len(lengths), device=log_probs.device, dtype=torch.float64)
    right = (tokens == batch["targets"]).double()
    # A sequence's tokens stand in their order, though not together.
    firsts = sequences.argsort(stable=True)[lengths.cumsum(0) - lengths]
    found = (
        total.index_add(0, sequences, log_probs.double()),
        lengths.double(),
        right[firsts],
        (total.index_add(0, sequences, right) == lengths).double(),
    )
    return _Sums(*(values.cpu() for values in found))


def _of_response(parts: Sequence[_Sums], place: int) -> _Sums:
    """Return the sums of every row's response at a place."""
    names = ("log_probs", "lengths", "first", "all")
    return _Sums(*(torch.cat([getattr(part, name)[place::2] for part in parts]) for name in names))
