"""Estimators of the partition function Z(x), and how each turns rewards into scores and normalisers."""

import math

import torch
from torch import Tensor

from everalign.objectives.segments import (
    Segments,
    finite_rows,
    leave_one_out_logsumexp,
    one_segment,
    same_shapes,
    segment_logsumexp,
    segment_max,
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
    if reference_logprobs is not None:
        same_shapes(rewards=rewards, reference_logprobs=reference_logprobs)
        ratios = ratios + finite_rows(reference_logprobs.double(), "reference log-probability")
    if sampler_logprobs is not None:
        same_shapes(rewards=rewards, sampler_logprobs=sampler_logprobs)
        ratios = ratios - finite_rows(sampler_logprobs.double(), "sampler log-probability")
    return ratios if lengths is None else ratios / at_least_one(lengths, rewards)


def at_least_one(lengths: Tensor, beside: Tensor) -> Tensor:
    """`lengths` in fp64, one for every row of `beside`, once none is below one token."""
    if lengths.shape != beside.shape[:1] or bool((lengths < 1).any()):
        raise ValueError(f"lengths must be {len(beside)} token counts of at least 1, not {lengths.tolist()[:5]}")
    return lengths.double()


def measured_rewards(
    estimator: str, rewards: Tensor, segments: Segments, baselines: Tensor | None, reference_rewards: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rewards measured from an origin, that origin, and the reference rewards from the same; by row.

    For `in_batch` the origin is the baseline, and part of the method; for `quantile` rewards become ranks. Elsewhere
    the origin cancels in the weights, and keeps the digits of small differences between large rewards.
    """
    if estimator == "quantile" and reference_rewards is not None:
        ranks = mid_ranks(rewards, reference_rewards).masked_fill(rewards.isneginf(), -torch.inf)
        return ranks, torch.zeros_like(ranks), None
    if estimator == "in_batch":
        origin = leave_one_out_baseline(rewards, segments) if baselines is None else baselines
        return rewards - origin, origin, None
    if reference_rewards is not None:
        origin = _finite_or_zero(reference_rewards.amax(dim=1))
        return rewards - origin, origin, reference_rewards - origin[:, None]
    origin = _finite_or_zero(segment_max(rewards, segments)[segments.index])
    return rewards - origin, origin, None


def _finite_or_zero(values: Tensor) -> Tensor:
    return values.masked_fill(values.isneginf(), 0.0)


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
    """
    if estimator == "group_loo":
        return leave_one_out_log_mean(scores, segments)
    if estimator == "in_batch":
        return in_batch_log_mean(scores, segments, include_own)
    if estimator == "quantile":
        return torch.full_like(scores, quantile_log_normaliser(temperature))
    if estimator == "reference" and reference_rewards is not None:
        return (reference_rewards / temperature).logsumexp(dim=1) - math.log(reference_rewards.shape[1])
    return group_log_mean(scores, segments)
