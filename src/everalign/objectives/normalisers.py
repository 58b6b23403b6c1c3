"""Estimates of the partition function Z(x) that turns exponentiated rewards into density ratios.

The policy that maximises reward minus temperature times KL to the reference is

    pi*(y|x) = pi_ref(y|x) exp(r(x,y) / temperature) / Z(x),    Z(x) = E_{y ~ pi_ref} exp(r(x,y) / temperature)

All functions are in log space and follow the mean-1 convention: Z is a mean, not a sum, so that weights
exp(score - log Z) average to about 1 and a learning rate means what it does without weights.
"""

import math

import torch
from torch import Tensor

from everalign.objectives.segments import (
    Segments,
    leave_one_out_logsumexp,
    one_segment,
    segment_logsumexp,
    segment_sum,
)


def group_log_mean(scores: Tensor, segments: Segments) -> Tensor:
    """`(N,)` -> `(N,)` log Z from all K responses of the row's prompt, the row itself among them."""
    return (segment_logsumexp(scores, segments) - segments.sizes.to(scores.dtype).log())[segments.index]


def leave_one_out_log_mean(scores: Tensor, segments: Segments) -> Tensor:
    """`(N,)` -> `(N,)` log Z from the K - 1 other responses of the row's prompt.

    A response that is its prompt's only one is its own normaliser, which gives it weight 1.
    """
    sizes = segments.sizes[segments.index]
    others = leave_one_out_logsumexp(scores, segments) - (sizes - 1).to(scores.dtype).log()
    return torch.where(sizes == 1, scores, others)


def in_batch_log_mean(scores: Tensor, segments: Segments, include_own: bool) -> Tensor:
    """`(N,)` -> `(N,)` one log Z for the whole batch, or (by default) one from all *other prompts'* rows.

    A row's own prompt is left out as a whole, since its other responses' scores may depend on the row through
    their baseline. With one response a prompt this is leaving out one row.

    Raises:
        ValueError: the batch holds a single prompt, and its own rows are not to be included.
    """
    if include_own:
        return group_log_mean(scores, one_segment(scores))
    if len(segments.sizes) < 2:
        raise ValueError("in_batch needs at least two groups: each one's normaliser comes from the other groups")
    per_group = segment_logsumexp(scores, segments)
    others = leave_one_out_logsumexp(per_group, one_segment(per_group))
    return (others - (len(scores) - segments.sizes).to(scores.dtype).log())[segments.index]


def quantile_log_normaliser(temperature: float) -> float:
    """log Z of a reward that is uniform on [0, 1] under the reference: log[temperature * (exp(1/temperature) - 1)]."""
    return math.log(temperature) + 1 / temperature + math.log(-math.expm1(-1 / temperature))


def mid_ranks(rewards: Tensor, reference_rewards: Tensor) -> Tensor:
    """`(N,)`, `(N, M)` -> `(N,)` share of the reference rewards below each reward, those equal to it counting half."""
    below = (reference_rewards < rewards[:, None]).double().mean(dim=1)
    equal = (reference_rewards == rewards[:, None]).double().mean(dim=1)
    return below + equal / 2


def leave_one_out_baseline(rewards: Tensor, segments: Segments) -> Tensor:
    """`(N,)` -> `(N,)` mean reward of the other responses to the row's prompt, -inf rewards left aside.

    Of the *others*, because a mean that includes the row's own reward takes 1/K of it away again, which
    multiplies the temperature by K / (K - 1).

    Raises:
        ValueError: some rows have no other response to compare with.
    """
    finite = rewards.isfinite()
    counts = segment_sum(finite.double(), segments)[segments.index] - finite.double()
    if bool((counts == 0).any()):
        alone = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"give baselines: no other response tells what is usual for the prompt of row {alone[0]}")
    known = rewards.masked_fill(~finite, 0.0)
    return (segment_sum(known, segments)[segments.index] - known) / counts
