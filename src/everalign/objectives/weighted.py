"""Learning from scored answers: weighted supervised fine-tuning, and its form for answers of unknown origin.

Source: Du et al. 2025, "RLHF in an SFT Way: From Optimal Solution to Reward-Weighted Alignment" (VAR), arXiv
2502.11026. This is a *reconstruction* from the stated principle, the minimisation of KL(pi* || pi) by offline
reward-weighted likelihood: the paper's own in-batch formula could not be verified.

`snkl_loss` is InfoNCA's objective: Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit
Rewards", arXiv 2402.05369.

`weight_statistics` says in figures what weights do to a dataset, and when to worry about them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from everalign.objectives.partition_function import (
    Segments,
    effective_share,
    finite_or_minus_inf,
    finite_rows,
    full_precision,
    one_segment,
    positive,
    same_shapes,
    segment_logsumexp,
    segment_max,
    segment_sum,
    segments_of,
    warn_of_dead_groups,
)


def token_nll(sequence_logprobs: Tensor, normaliser: float | Tensor, check_finite: bool = True) -> Tensor:
    """Each response's share of the mean negative log-likelihood per token, `(B,)` -> `(B,)`, in nats.

    With `normaliser` the number of response tokens in the whole optimiser step, the sum of all the step's
    shares is its mean NLL per token, however the step was cut into micro-batches: every token counts the
    same, and eight accumulated batches teach what one batch of their rows does.

    Args:
        sequence_logprobs: `(B,)` log-probabilities of whole responses, in nats, summed over their tokens.
        normaliser: number of response tokens to divide by, above 0.
        check_finite: look at the values; without it nothing waits for a GPU to compute them.

    Raises:
        ValueError: a log-probability is NaN or infinite (names the rows), or `normaliser` is not above 0.
    """
    if check_finite:
        positive(float(normaliser), "normaliser")
        finite_rows(sequence_logprobs, "log-probability")
    return -full_precision(sequence_logprobs) / normaliser


def weighted_nll(
    sequence_logprobs: Tensor, weights: Tensor, normaliser: float | Tensor, check_finite: bool = True
) -> Tensor:
    """Each response's share of the weighted negative log-likelihood, `(B,)` -> `(B,)`, in nats.

        share_i = -w_i * log pi(y_i | x_i) / normaliser

    Over responses drawn from mu the sum of the shares has its minimum at pi proportional to mu * w. That needs
    log-probabilities *summed* over each response's tokens and one normaliser for the whole optimiser step: a mean
    over each response's tokens would aim at pi*(y) / length(y) instead, and shorten the answers.

    Weights of 1 give `token_nll` bit for bit.

    Args:
        sequence_logprobs: `(B,)` log-probabilities of whole responses, in nats, summed over their tokens.
        weights: `(B,)` weights of at least 0, see `var_weights`; constants, through which no gradient flows.
        normaliser: number of response tokens to divide by, above 0, the same for the whole optimiser step.
        check_finite: look at the values; without it nothing waits for a GPU to compute them.

    Raises:
        ValueError: a log-probability or a weight is NaN or infinite, or a weight negative (names the rows), shapes
            differ, or `normaliser` is not above 0.
    """
    same_shapes(sequence_logprobs=sequence_logprobs, weights=weights)
    share = token_nll(sequence_logprobs, normaliser, check_finite)
    if not check_finite:
        return weights.detach().to(share.dtype) * share
    # Finite in the loss's own type: fp64 holds weights that fp32 does not.
    return finite_rows(non_negative(weights.detach()).to(share.dtype), "weight") * share


def snkl_loss(
    policy_logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    groups: Tensor | Segments,
    temperature: float,
    check_finite: bool = True,
) -> Tensor:
    """The self-normalised KL divergence of each group from what its rewards ask for, `(N,)` -> `(G,)`, in nats.

        loss_g = KL( softmax_k(r_k / temperature) || softmax_k(log pi(y_k) - log pi_ref(y_k)) ),  k over group g

    Its minimum is pi*, where it is 0 for every group, no matter which policy wrote the responses, as long as every
    response has a positive probability: use it if the author is unknown, as with preference pairs collected elsewhere.
    It only moves ratios within a group, so the likelihood of a group's best response may fall.

    This is InfoNCA's cross-entropy at beta = 1 less the entropy of its labels, which no policy changes.

    Args:
        policy_logprobs: `(N,)` log-probabilities of whole responses, in nats, summed over their tokens.
        reference_logprobs: `(N,)` the same under the reference; no gradient flows through it.
        rewards: `(N,)` rewards; -inf for a response that is never to be given; no gradient flows through them.
        groups: `(N,)` integer number of each response's prompt, or the segments they make; groups must be whole
            within one call.
        temperature: reward that is worth one nat, above 0.
        check_finite: look at the values and at the groups' sizes; without it, and with segments for groups, nothing
            waits for a GPU to compute them.

    Returns:
        `(G,)` losses in the ascending order of the groups' numbers, fp32 (fp64 if the log-probabilities are). A
        group whose rewards are all -inf has loss 0, with a warning.

    Raises:
        ValueError: a value is NaN or infinite (names the rows), a group has one response only, shapes differ, or
            `temperature` is not above 0.
    """
    positive(temperature, "temperature")
    segments = groups if isinstance(groups, Segments) else segments_of(groups)
    rows = {"policy_logprobs": policy_logprobs, "reference_logprobs": reference_logprobs, "rewards": rewards}
    same_shapes(**rows, groups=segments.index)
    log_ratio = full_precision(policy_logprobs) - full_precision(reference_logprobs.detach())
    if check_finite:
        alone = segments.ids[segments.sizes == 1].tolist()
        if alone:
            raise ValueError(f"{len(alone)} group(s) have one response, from which nothing is learned: {alone[:5]}")
        finite_rows(log_ratio, "log-ratio")
    labels = _label_log_probs(rewards, segments, temperature, check_finite)
    found = log_ratio - segment_logsumexp(log_ratio, segments)[segments.index]
    # A label of probability 0 adds nothing, while 0 * -inf would be NaN.
    difference = (labels.to(found.dtype) - found).masked_fill(labels.isneginf(), 0.0)
    return segment_sum(labels.exp().to(found.dtype) * difference, segments)


def non_negative(weights: Tensor) -> Tensor:
    """`weights` unchanged; a `ValueError` names the rows that are NaN, infinite or negative."""
    if bool((finite_rows(weights, "weight") < 0).any()):
        raise ValueError(f"every weight must be at least 0: row {(weights < 0).nonzero()[0].item()} is negative")
    return weights


def _label_log_probs(rewards: Tensor, segments: Segments, temperature: float, check_finite: bool) -> Tensor:
    """Softmax of `rewards / temperature` within each segment, `(N,)` fp64, as logarithms; arguments as `snkl_loss`."""
    rewards = rewards.detach().double()
    scores = rewards / temperature
    if check_finite:
        finite_or_minus_inf(rewards, "reward")
        warn_of_dead_groups(rewards, segments)  # names the caller's caller, so that this stays a function
        finite_or_minus_inf(scores, "reward / temperature")
    labels = scores - segment_logsumexp(scores, segments)[segments.index]
    return labels.masked_fill(scores.isneginf(), -torch.inf)


# Below a tenth, nine of ten forward passes are for nothing and the gradient is as noisy as that of a tenth of the data.
LOW_EFFECTIVE_SHARE = 0.1
# A tenth of the responses holding nine tenths of the weight is all but supervised fine-tuning on that tenth.
HIGH_TOP_DECILE_SHARE = 0.9
# The divergence estimated from K responses cannot exceed log K: near it, it says nothing of how far pi* is.
HIGH_SHARE_OF_KL_CEILING = 0.9
# Half the deviation of the log weights in step with length: more than a preference for short or long answers explains.
HIGH_LENGTH_CORRELATION = 0.5
# Weights come from rewards: next to no correlation means that something else, as a log-probability, decides.
LOW_REWARD_CORRELATION = 0.1
# Where most prompts prefer nothing, training is plain fine-tuning on whatever they hold.
HIGH_CONSTANT_SHARE = 0.5
# A cap is there for outliers: beyond one response in twenty it is the cap that sets the target.
HIGH_CAPPED_SHARE = 0.05
# Of fewer rows, unrelated numbers correlate by 0.5 more than once in twenty times.
FEWEST_ROWS_TO_CORRELATE = 16


@dataclass(frozen=True)
class WeightStatistics:
    """Figures of N weights in G groups. Those within groups are over groups of two or more responses that have weight.

    A figure that does not exist is NaN: a correlation with what does not vary, a mean over no group.

    Attributes:
        rows: N.
        effective_share: effective sample size over N, all rows together: 1 for equal weights.
        effective_share_within: the same within a group, over its size, mean over groups.
        largest_weight: the largest weight.
        top_decile_share: share of all weight held by the largest tenth of the weights (rounded up).
        length_correlation: correlation of log weight with length, over rows of positive weight.
        reward_correlation: correlation of log weight with reward, over the same.
        constant_share: share of groups of two or more whose rewards are all equal.
        capped_share: share of rows at the weight cap.
        kl_to_reference: estimated KL(pi* || pi_ref) in nats, mean over groups of sum_k w_k log(K w_k), sum_k w_k = 1.
        kl_ceiling: mean over the same groups of log K, the largest value that estimate can take.
    """

    rows: int
    effective_share: float
    effective_share_within: float
    largest_weight: float
    top_decile_share: float
    length_correlation: float
    reward_correlation: float
    constant_share: float
    capped_share: float
    kl_to_reference: float
    kl_ceiling: float

    def warnings(self, can_cap: bool = True) -> list[str]:
        """What is wrong with these weights and what to do about it, one sentence or two each; empty if nothing is.

        Args:
            can_cap: whether capping the weights is something that can be advised.
        """
        enough = self.rows >= FEWEST_ROWS_TO_CORRELATE
        flatten = f"Raise the temperature{', set target_ess, or cap the weights' if can_cap else ' or set target_ess'}."
        cases = [
            (
                self.effective_share < LOW_EFFECTIVE_SHARE,
                f"The weights are worth {self.effective_share:.1%} of the responses. {flatten}",
            ),
            (
                self.top_decile_share > HIGH_TOP_DECILE_SHARE,
                f"A tenth of the responses holds {self.top_decile_share:.0%} of the weight. {flatten}",
            ),
            (
                self.kl_to_reference > HIGH_SHARE_OF_KL_CEILING * self.kl_ceiling,
                f"The estimated divergence from the reference, {self.kl_to_reference:.2f} nats, is close to the most "
                f"that groups of this size can show, {self.kl_ceiling:.2f}: only each prompt's best response counts. "
                "Raise the temperature or sample more responses a prompt.",
            ),
            (
                enough and abs(self.length_correlation) > HIGH_LENGTH_CORRELATION,
                f"Length decides the weights (correlation {self.length_correlation:+.2f}). Where reference "
                "log-probabilities are part of the weight, set length_normalize (give lengths); else look for length "
                "in the rewards.",
            ),
            (
                enough and self.reward_correlation < LOW_REWARD_CORRELATION,
                f"The weights hardly follow the rewards (correlation {self.reward_correlation:+.2f}). "
                "Lower the temperature, or look for what else enters the weights.",
            ),
            (
                self.constant_share > HIGH_CONSTANT_SHARE,
                f"{self.constant_share:.0%} of the groups have one reward for all their responses, which are learned "
                "alike, good or bad. Leave these groups out, or use finer rewards.",
            ),
            (
                self.capped_share > HIGH_CAPPED_SHARE,
                f"{self.capped_share:.0%} of the weights are capped, which changes what is learned. "
                "Raise the temperature or the cap.",
            ),
        ]
        return [sentence for holds, sentence in cases if holds]


@torch.no_grad()
def weight_statistics(
    weights: Tensor, groups: Tensor, rewards: Tensor, lengths: Tensor, *, weight_cap: float | None = None
) -> WeightStatistics:
    """Figures that tell whether weights still teach from many responses, and for their rewards.

    Args:
        weights: `(N,)` weights of at least 0, not all 0.
        groups: `(N,)` integer number of each response's prompt.
        rewards: `(N,)` rewards the weights were made of, -inf included.
        lengths: `(N,)` number of tokens of each response.
        weight_cap: the cap the weights were made with, if any.

    Raises:
        ValueError: a weight is NaN, infinite or negative (names the rows), none is positive, a reward is NaN or +inf,
            shapes differ, or `weight_cap` is not above 0.
    """
    same_shapes(weights=weights, rewards=rewards, lengths=lengths, groups=groups)
    segments = segments_of(groups)
    capped = torch.zeros_like(weights, dtype=torch.bool)
    if weight_cap is not None:
        positive(weight_cap, "weight_cap")
        capped = weights >= torch.tensor(weight_cap, dtype=weights.dtype)  # as rounded as the weights may have been
    weights, rewards = non_negative(weights).double(), finite_or_minus_inf(rewards.double(), "reward")
    if not bool((weights > 0).any()):
        raise ValueError("no weight is positive: there is nothing to learn from")
    log_weights = weights.log()
    alive = weights > 0
    # Within groups of two or more that have any weight.
    log_sums = segment_logsumexp(log_weights, segments)
    counted = (segments.sizes > 1) & log_sums.isfinite()
    log_sizes = segments.sizes.double().log()
    log_shares = log_weights - log_sums[segments.index]
    # w log(K w), whose limit at w = 0 is 0
    terms = log_shares.exp() * (log_shares + log_sizes[segments.index])
    divergence = segment_sum(terms.masked_fill(log_weights.isneginf(), 0.0), segments)
    constant = segment_max(rewards, segments) == -segment_max(-rewards, segments)
    return WeightStatistics(
        rows=len(weights),
        effective_share=effective_share(log_weights, one_segment(weights)).item(),
        effective_share_within=effective_share(log_weights, segments)[counted].mean().item(),
        largest_weight=weights.max().item(),
        top_decile_share=(weights.topk(math.ceil(len(weights) / 10)).values.sum() / weights.sum()).item(),
        length_correlation=_correlation(log_weights[alive], lengths[alive].double()),
        reward_correlation=_correlation(log_weights[alive], rewards[alive]),
        constant_share=constant[segments.sizes > 1].double().mean().item(),
        capped_share=capped.double().mean().item(),
        kl_to_reference=divergence[counted].mean().item(),
        kl_ceiling=log_sizes[counted].mean().item(),
    )


def _correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation; NaN where one of the two does not vary."""
    if len(first) < 2 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return math.nan
    return torch.corrcoef(torch.stack([first, second]))[0, 1].item()
