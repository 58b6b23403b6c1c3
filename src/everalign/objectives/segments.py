"""Segment sums in log space over the responses of one prompt, and the checks that all objectives share."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_NAMED = 5


def full_precision(values: Tensor) -> Tensor:
    """`values` in fp32, or unchanged in fp64: half-precision inputs never reach a logarithm."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def finite_rows(values: Tensor, name: str) -> Tensor:
    """`values` unchanged; a `ValueError` names the rows that are NaN or infinite."""
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return values
    bad = (~finite).flatten().nonzero().flatten().tolist()
    named = ", ".join(f"row {row} is {values.flatten()[row].item()}" for row in bad[:_ROWS_NAMED])
    more = f" and {len(bad) - _ROWS_NAMED} more" if len(bad) > _ROWS_NAMED else ""
    raise ValueError(f"every {name} must be finite: {named}{more}")


def same_shapes(**tensors: Tensor) -> None:
    """Refuse to broadcast: a `(B, 1)` beside a `(B,)` would silently become `(B, B)`."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"these must all have the same shape: {found}")


def positive(value: float, name: str) -> None:
    """A `ValueError` unless `value` is a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, not {value}")


def finite_or_minus_inf(values: Tensor, name: str) -> Tensor:
    """`values` unchanged; a `ValueError` names the rows that are NaN or +inf. -inf stands for "never"."""
    finite_rows(values.masked_fill(values.isneginf(), 0.0), f"{name} other than -inf")
    return values


@dataclass(frozen=True)
class Segments:
    """Which rows belong together. With N rows in G groups:

    Attributes:
        ids: `(G,)` the groups' own numbers, ascending; every per-group result comes in this order.
        index: `(N,)` position in `ids` of each row's group.
        sizes: `(G,)` number of rows of each group.
    """

    ids: Tensor
    index: Tensor
    sizes: Tensor


def segments_of(groups: Tensor) -> Segments:
    """The segments of `(N,)` integer group numbers, which need be neither sorted nor contiguous."""
    if groups.is_floating_point() or groups.is_complex() or groups.dim() != 1:
        raise ValueError(f"groups must be one integer a row, not {tuple(groups.shape)} of {groups.dtype}")
    ids, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    return Segments(ids, index, sizes)


def one_segment(values: Tensor) -> Segments:
    """All rows of `values` in a single group."""
    return segments_of(torch.zeros(len(values), dtype=torch.int64, device=values.device))


def segment_sum(values: Tensor, segments: Segments) -> Tensor:
    """`(N,)` -> `(G,)` sums over each group's rows."""
    return values.new_zeros(len(segments.sizes)).index_add(0, segments.index, values)


def segment_max(values: Tensor, segments: Segments) -> Tensor:
    """`(N,)` -> `(G,)` largest value of each group."""
    lowest = values.new_full((len(segments.sizes),), -torch.inf)
    return lowest.scatter_reduce(0, segments.index, values, "amax")


def segment_logsumexp(scores: Tensor, segments: Segments) -> Tensor:
    """`(N,)` -> `(G,)` log of the sum of exponentials over each group's rows; -inf where all of them are -inf."""
    top = segment_max(scores.detach(), segments)
    top = top.masked_fill(top.isneginf(), 0.0)  # -inf - -inf would be NaN
    return top + segment_sum((scores - top[segments.index]).exp(), segments).log()


def leave_one_out_logsumexp(scores: Tensor, segments: Segments) -> Tensor:
    """`(N,)` -> `(N,)` log of the sum of exponentials over the *other* rows of each row's group.

    Taking a row's own term off the whole sum is accurate for all rows but the largest, which may be nearly all
    of that sum; for it the other rows are summed afresh. A row that is alone gets -inf.
    """
    top = segment_max(scores, segments)[segments.index]
    rows = torch.arange(len(scores), device=scores.device)
    first = rows.new_full((len(segments.sizes),), len(scores))
    first = first.scatter_reduce(0, segments.index[scores == top], rows[scores == top], "amin")
    largest = first[segments.index] == rows  # one row a group, also where several tie

    others = segment_logsumexp(scores.masked_fill(largest, -torch.inf), segments)[segments.index]
    whole = segment_logsumexp(scores, segments)[segments.index]
    own_share = (scores - whole).exp().masked_fill(whole.isneginf(), 0.0)  # at most 1/2 where it is not the largest
    return torch.where(largest, others, whole + torch.log1p(-own_share))


def effective_share(log_weights: Tensor, segments: Segments) -> Tensor:
    """`(N,)` -> `(G,)` effective sample size of each group, divided by its size: (sum w)^2 / (K * sum w^2).

    1 where all weights are equal, 1 / K where one response has them all, NaN where all are zero. From log
    weights, so that no weight is too large to be squared.
    """
    log_sum = segment_logsumexp(log_weights, segments)
    return (2 * log_sum - segment_logsumexp(2 * log_weights, segments) - segments.sizes.to(log_sum.dtype).log()).exp()


def warn_of_dead_groups(rewards: Tensor, segments: Segments) -> None:
    """Warn of groups whose rewards are all -inf: nothing of them is learnt."""
    dead = segments.ids[segment_max(rewards, segments).isneginf()].tolist()
    if dead:
        named = ", ".join(map(str, dead[:_ROWS_NAMED])) + (", ..." if len(dead) > _ROWS_NAMED else "")
        message = f"every reward of {len(dead)} group(s) is -inf, their responses get weight 0: {named}"
        warnings.warn(message, stacklevel=4)  # the caller of the public function, past its no_grad
