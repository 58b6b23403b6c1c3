"""Segment sums in log space, and estimators of the partition function Z(x)."""

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
    """Warn of groups whose rewards are all -inf: nothing of them is learned."""
    dead = segments.ids[segment_max(rewards, segments).isneginf()].tolist()
    if dead:
        named = ", ".join(map(str, dead[:_ROWS_NAMED])) + (", ..." if len(dead) > _ROWS_NAMED else "")
        message = f"every reward of {len(dead)} group(s) is -inf, their responses get weight 0: {named}"
        warnings.warn(message, stacklevel=4)  # the caller of the public function, past its no_grad


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


_OFF_POLICY = {"reference_logprobs", "sampler_logprobs"}

# What an estimator looks at beyond rewards, groups, temperature and cap. Anything else is refused, not ignored.
_OPTIONS: dict[str, set[str]] = {
    "group": {*_OFF_POLICY, "reward_scale"},
    "group_loo": {*_OFF_POLICY, "reward_scale"},
    "support": {"reference_logprobs", "lengths", "reward_scale"},
    "in_batch": {*_OFF_POLICY, "reward_scale", "baselines", "include_own"},
    "reference": {*_OFF_POLICY, "reward_scale", "reference_rewards"},
    "quantile": {*_OFF_POLICY, "reference_rewards"},  # ranks have no scale
}
_REQUIRED = {"support": "reference_logprobs", "reference": "reference_rewards", "quantile": "reference_rewards"}


def check_options(estimator: str, given: set[str]) -> None:
    """A `ValueError` unless `estimator` exists, has what it needs, and uses all that is given."""
    if estimator not in _OPTIONS:
        raise ValueError(f"estimator must be one of {', '.join(_OPTIONS)}, not {estimator!r}")
    ignored = sorted(given - _OPTIONS[estimator])
    if ignored:
        raise ValueError(f"estimator {estimator!r} would ignore {', '.join(ignored)}: leave them out")
    if estimator in _REQUIRED and _REQUIRED[estimator] not in given:
        raise ValueError(f"estimator {estimator!r} needs {_REQUIRED[estimator]}")
    if estimator != "support" and len(given & _OFF_POLICY) == 1:
        raise ValueError(
            "give both reference_logprobs and sampler_logprobs, or neither where the reference wrote the responses: "
            "one alone would aim at pi_ref twice, or at none"
        )


def per_prompt_rows(values: Tensor, groups: Tensor, name: str, dimensions: int) -> Tensor:
    """`(P, ...)` values of each prompt -> `(N, ...)` fp64, those of each row's prompt."""
    if values.dim() != dimensions or 0 in values.shape:
        raise ValueError(f"{name} must have {dimensions} dimension(s), none of them 0, not shape {tuple(values.shape)}")
    if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < len(values):
        raise ValueError(f"{name} is indexed by group number, of which it has 0 to {len(values) - 1}: see groups")
    return values.double()[groups]


def log_ratios(
    rewards: Tensor, reference_logprobs: Tensor | None, sampler_logprobs: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """`(N,)` log pi_ref - log mu, as far as given: 0 where the reference itself wrote the responses."""
    ratios = torch.zeros_like(rewards)
    for name, logprobs, sign in (("reference", reference_logprobs, 1), ("sampler", sampler_logprobs, -1)):
        if logprobs is not None:
            same_shapes(rewards=rewards, **{f"{name}_logprobs": logprobs})
            ratios = ratios + sign * finite_rows(logprobs.double(), f"{name} log-probability")
    if lengths is None:
        return ratios
    if lengths.shape != rewards.shape[:1] or bool((lengths < 1).any()):
        raise ValueError(f"lengths must be {len(rewards)} token counts of at least 1, not {lengths.tolist()[:5]}")
    return ratios / lengths.double()


def measured_rewards(
    estimator: str, rewards: Tensor, segments: Segments, baselines: Tensor | None, reference_rewards: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rewards measured from an origin, that origin, and the reference rewards from the same; by row.

    For `in_batch` the origin is the baseline, and part of the method; for `quantile` rewards become ranks. Elsewhere
    the origin cancels in the weights, and keeps the digits of small differences between large rewards.
    """
    if estimator == "quantile" and reference_rewards is not None:
        # The share of the reference rewards below each reward, those equal to it counting half.
        below = (reference_rewards < rewards[:, None]).double().mean(dim=1)
        equal = (reference_rewards == rewards[:, None]).double().mean(dim=1)
        ranks = (below + equal / 2).masked_fill(rewards.isneginf(), -torch.inf)
        return ranks, torch.zeros_like(ranks), None
    if estimator == "in_batch":
        origin = leave_one_out_baseline(rewards, segments) if baselines is None else baselines
        return rewards - origin, origin, None
    highest = (
        segment_max(rewards, segments)[segments.index] if reference_rewards is None else reference_rewards.amax(dim=1)
    )
    origin = highest.masked_fill(highest.isneginf(), 0.0)
    return rewards - origin, origin, None if reference_rewards is None else reference_rewards - origin[:, None]


def log_normalisers(
    estimator: str,
    scores: Tensor,
    segments: Segments,
    reference_rewards: Tensor | None,
    include_own: bool,
    temperature: float,
) -> Tensor:
    """`(N,)` log Z of each row's prompt, by one of the estimators that `var_weights` describes.

    `reference_rewards` `(N, M)` are those of each row's prompt, measured from where the scores' rewards are.

    Raises:
        ValueError: the estimator is `in_batch`, the batch holds a single prompt, and its own rows are not included.
    """
    if estimator == "quantile":
        # Of a reward that is uniform on [0, 1] under the reference: log[temperature * (exp(1/temperature) - 1)].
        log_z = math.log(temperature) + 1 / temperature + math.log(-math.expm1(-1 / temperature))
        return torch.full_like(scores, log_z)
    if estimator == "reference" and reference_rewards is not None:
        return (reference_rewards / temperature).logsumexp(dim=1) - math.log(reference_rewards.shape[1])
    sizes = segments.sizes[segments.index].to(scores.dtype)
    if estimator == "group_loo":
        # From the K - 1 other responses; one that is alone is its own normaliser, which gives it weight 1.
        return torch.where(sizes == 1, scores, leave_one_out_logsumexp(scores, segments) - (sizes - 1).log())
    if estimator == "in_batch" and not include_own:
        # From all *other prompts'* rows. The row's own prompt is left out as a whole, since its other responses'
        # scores may depend on the row through their baseline. With one response a prompt, one row is left out.
        if len(segments.sizes) < 2:
            raise ValueError("in_batch needs at least two groups: each one's normaliser comes from the other groups")
        per_group = segment_logsumexp(scores, segments)
        others = leave_one_out_logsumexp(per_group, one_segment(per_group))[segments.index]
        return others - (len(scores) - sizes).log()
    # From all responses of the prompt, or of the whole batch, the row itself among them.
    own = one_segment(scores) if estimator == "in_batch" else segments
    return (segment_logsumexp(scores, own) - own.sizes.to(scores.dtype).log())[own.index]
