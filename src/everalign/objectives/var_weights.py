"""VAR weights: how much each scored completion counts, and the temperature that sets it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from everalign.objectives.partition_function import (
    check_options,
    effective_share,
    finite_or_minus_inf,
    finite_rows,
    log_normalisers,
    log_ratios,
    measured_rewards,
    one_segment,
    per_prompt_rows,
    positive,
    same_shapes,
    segments_of,
    warn_of_dead_groups,
)

# Where a temperature is looked for, in units of the scaled reward, and how often that range is halved: 64
# halvings of its logarithm leave fp64 nothing to tell apart.
_COLDEST, _HOTTEST, _HALVINGS = 1e-9, 1e9, 64


@torch.no_grad()
def global_scale(rewards: Tensor) -> float:
    """Standard deviation of all finite rewards of a dataset, `(N,)`, to be given as `reward_scale`.

    One number for all prompts. Dividing every prompt's rewards by its own deviation would give each prompt its own
    temperature, and the weights no common target.

    Raises:
        ValueError: a reward is NaN or +inf (names the rows), or the finite ones do not differ.
    """
    finite = finite_or_minus_inf(rewards.double(), "reward")
    finite = finite[finite.isfinite()]
    scale = finite.std(correction=0).item() if len(finite) else 0.0
    if not scale > 0:
        raise ValueError(f"{len(finite)} finite reward(s) do not differ: they have no scale to divide by")
    return scale


@torch.no_grad()
def solve_temperature(log_weights_at: Callable[[float], Tensor], target_ess: float) -> float:
    """A temperature at which the weights' effective sample size is a share `target_ess` of their number.

    The share is that of all rows together, (sum w)^2 / (N * sum w^2). For `group` weights it grows with the
    temperature, from one response a group to all of them, so there is one such temperature. With a sampler's
    log-probabilities or a cap there may be several; one of them is found.

    Args:
        log_weights_at: log weights `(N,)` at a temperature, -inf for a weight of 0.
        target_ess: share to reach, between 0 and 1.

    Raises:
        ValueError: `target_ess` is not between 0 and 1, or beyond what any temperature reaches.
    """
    if not 0 < target_ess < 1:
        raise ValueError(f"target_ess must be between 0 and 1, not {target_ess}")

    def share_at(temperature: float) -> float:
        log_weights = log_weights_at(temperature)
        return effective_share(log_weights, one_segment(log_weights)).sum().item()

    coldest, hottest = share_at(_COLDEST), share_at(_HOTTEST)
    if not coldest <= target_ess <= hottest:
        raise ValueError(
            f"no temperature gives an effective sample size of {target_ess:g}: it goes from {coldest:.3g} of the rows, "
            f"where the best reward takes all, to {hottest:.3g}, where rewards do not matter"
        )
    low, high = math.log(_COLDEST), math.log(_HOTTEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if share_at(math.exp(middle)) < target_ess else (low, middle)
    return math.exp(high)


Estimator = Literal["group", "group_loo", "support", "in_batch", "reference", "quantile"]

# Quantiles have a standard deviation of 0.29: this is about as sharp as 1 is for rewards divided by theirs.
_QUANTILE_TEMPERATURE = 0.25


@dataclass(frozen=True)
class VarWeights:
    """Weights of N responses, and what they were made with.

    Attributes:
        weights: `(N,)` fp64, at least 0, about 1 on average (exactly 1 within every group for `group` and `support`).
        log_normalisers: `(N,)` fp64 log Z of each row: weight = exp(score - log Z), unless capped.
        temperature: the given, default or solved temperature, in units of reward / `reward_scale`.
    """

    weights: Tensor
    log_normalisers: Tensor
    temperature: float


@torch.no_grad()
def var_weights(
    rewards: Tensor,
    groups: Tensor,
    *,
    estimator: Estimator = "group",
    temperature: float | None = None,
    target_ess: float | None = None,
    reward_scale: float = 1.0,
    reference_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    lengths: Tensor | None = None,
    baselines: Tensor | None = None,
    reference_rewards: Tensor | None = None,
    include_own: bool = False,
    weight_cap: float | None = None,
) -> VarWeights:
    """The weight of every response, exp(score - log Z), `(N,)`.

        score = reward / (reward_scale * temperature) + log pi_ref - log mu

    The two log-probabilities are those given; without them the responses are taken to be drawn from the reference
    itself, where they cancel. An estimator says where Z comes from, and what weighted fine-tuning then reaches:

    ===========  =============================================================  =====================================
    estimator    Z(prompt) is the mean of exp(score) over                       optimum of the weighted loss
    ===========  =============================================================  =====================================
    `group`      the prompt's K responses                                       soft best of K; pi* as K grows
    `group_loo`  the prompt's other K - 1 responses                             pi* for any K of at least 2
    `support`    the prompt's listed responses, which were *not* sampled        pi* restricted to the list
    `in_batch`   the other prompts' responses (`include_own`: the whole batch)  pi* (`include_own`: pi* + O(1/batch))
    `reference`  `reference_rewards`, independent draws from the reference      pi*
    `quantile`   nothing: rewards become quantiles, whose Z is known            pi* of the quantile
    ===========  =============================================================  =====================================

    `group` and `support` weights are at most K. The others can be large, and noisy: cap them (20 is what AWR uses)
    wherever the optimum may be that of the capped target, pi_ref * min(exp(score), cap * Z). A response that is alone
    in its group weighs 1 under `group`, `group_loo` and `support`, whatever its reward.

    Args:
        rewards: `(N,)` rewards; -inf for a response never to be given, whose weight is 0.
        groups: `(N,)` integer number of each response's prompt, in any order.
        estimator: see the table.
        temperature: scaled reward that is worth one nat; 1.0 unless given, or 0.25 for `quantile`.
        target_ess: instead of a temperature, share in (0, 1) of the rows that the weights shall be worth.
        reward_scale: what rewards are divided by, `global_scale` of the dataset for example. One number for all
            prompts: a scale per prompt would give each its own temperature. Applies to every reward given.
        reference_logprobs: `(N,)` log-probabilities of whole responses under the reference, in nats. For `support`
            (required), else together with `sampler_logprobs`.
        sampler_logprobs: `(N,)` the same under the policy that wrote the responses, if that was not the reference.
        lengths: `(N,)` number of tokens of each response, for `support`: divides `reference_logprobs` by it, since
            summed log-probabilities let length decide. A heuristic without a target of its own.
        baselines: `(P,)` usual reward of each prompt, indexed by group number, for `in_batch`: prompts compete there,
            and each one's offset would decide. Without it, the mean of the prompt's other responses.
        reference_rewards: `(P, M)` rewards of M reference responses per prompt, indexed by group number, for
            `reference` and `quantile`. They must not be those of the N responses themselves.
        include_own: for `in_batch`, count the response's own prompt in Z too, as (1/B) sum_j exp(score_j) does.
        weight_cap: largest weight, above 0; none unless given.

    Raises:
        ValueError: a value is NaN or infinite (names the rows), shapes differ, an option is missing, out of range,
            or would be ignored, no temperature reaches `target_ess`, or a weight is too large for fp64.
    """
    options = {"reference_logprobs": reference_logprobs, "sampler_logprobs": sampler_logprobs, "lengths": lengths}
    options |= {"baselines": baselines, "reference_rewards": reference_rewards}
    given = {name for name, value in options.items() if value is not None}
    given |= {"reward_scale"} if reward_scale != 1 else set()
    check_options(estimator, given | ({"include_own"} if include_own else set()))
    _check_numbers(temperature, target_ess, reward_scale, weight_cap)

    same_shapes(rewards=rewards, groups=groups)
    segments = segments_of(groups)
    rewards = finite_or_minus_inf(rewards.double(), "reward") / reward_scale
    warn_of_dead_groups(rewards, segments)
    if baselines is not None:
        finite_rows(baselines, "baseline")
        baselines = per_prompt_rows(baselines, groups, "baselines", 1) / reward_scale
    if reference_rewards is not None:
        finite_or_minus_inf(reference_rewards, "reference reward")
        reference_rewards = per_prompt_rows(reference_rewards, groups, "reference_rewards", 2) / reward_scale
    gains, origin, drawn = measured_rewards(estimator, rewards, segments, baselines, reference_rewards)
    ratios = log_ratios(rewards, reference_logprobs, sampler_logprobs, lengths)

    def normalised(temperature: float) -> tuple[Tensor, Tensor]:
        scores = finite_or_minus_inf(gains / temperature, "reward / temperature") + ratios
        log_z = log_normalisers(estimator, scores, segments, drawn, include_own, temperature)
        # A score of -inf weighs nothing even where all that it is compared with is -inf too.
        log_weights = (scores - log_z).masked_fill(scores.isneginf(), -torch.inf)
        if weight_cap is not None:
            log_weights = log_weights.clamp(max=math.log(weight_cap))
        log_weights = finite_or_minus_inf(log_weights, "log weight (a weight_cap bounds it)")
        return log_weights, log_z + origin / temperature

    if target_ess is not None:
        temperature = solve_temperature(lambda t: normalised(t)[0], target_ess)
    elif temperature is None:
        temperature = _QUANTILE_TEMPERATURE if estimator == "quantile" else 1.0
    log_weights, log_z = normalised(temperature)
    weights = log_weights.exp()
    if weight_cap is None:
        return VarWeights(finite_rows(weights, "weight (a weight_cap bounds it)"), log_z, temperature)
    # Capped weights are the cap itself, not the exponential of its logarithm.
    return VarWeights(weights.masked_fill(log_weights >= math.log(weight_cap), weight_cap), log_z, temperature)


@torch.no_grad()
def cross_weights(
    rewards: Tensor,
    reference_logprobs: Tensor,
    lengths: Tensor | None,
    *,
    temperature: float = 1.0,
    reward_scale: float = 1.0,
) -> VarWeights:
    """Experimental: the weight of every response among all of the batch as answers to its own prompt, `(B,)`.

        w_i = exp(s_ii) / sum_j exp(s_ij),    s_ij = reward_ij / (reward_scale * temperature) + log pi_ref(y_j | x_i)

    This literal reading of weights "pi_ref * exp(reward)", normalised over the batch, costs B^2 evaluations of reward
    and reference, has no exact target, and depends on the size of the batch. Weights are in [0, 1] and do *not*
    average to 1: the learning rate has to make up for their mean.

    Args:
        rewards: `(B, B)` reward of response j as an answer to prompt i; -inf for one never to be given.
        reference_logprobs: `(B, B)` log-probability of response j to prompt i under the reference, in nats, summed
            over its tokens, which must be the same ones for every prompt.
        lengths: `(B,)` number of tokens of each response, by which the log-probabilities are divided. `None` leaves
            them summed; then short responses win, or every response its own prompt where lengths are equal.
        temperature: scaled reward that is worth one nat, above 0.
        reward_scale: what rewards are divided by, above 0.

    Raises:
        ValueError: a value is NaN or infinite (names the rows of the flattened matrix), shapes differ or are not
            square, a length is below 1, or `temperature` or `reward_scale` is not above 0.
    """
    _check_numbers(temperature, None, reward_scale, None)
    if rewards.dim() != 2 or rewards.shape[0] != rewards.shape[1]:
        raise ValueError(f"rewards must be a square matrix, prompts by responses, not {tuple(rewards.shape)}")
    ratios = log_ratios(rewards.double(), reference_logprobs, None, lengths)
    rewards = finite_or_minus_inf(rewards.double(), "reward") / reward_scale
    scores = finite_or_minus_inf(rewards / temperature, "reward / temperature") + ratios
    log_z, own = scores.logsumexp(dim=1), scores.diagonal()
    # A score of -inf weighs nothing even where all that it is compared with is -inf too.
    return VarWeights((own - log_z).exp().masked_fill(own.isneginf(), 0.0), log_z, temperature)


def _check_numbers(
    temperature: float | None, target_ess: float | None, reward_scale: float, weight_cap: float | None
) -> None:
    if temperature is not None and target_ess is not None:
        raise ValueError("give temperature or target_ess, not both: one is found from the other")
    for name, value in {"temperature": temperature, "reward_scale": reward_scale, "weight_cap": weight_cap}.items():
        if value is not None:
            positive(value, name)
