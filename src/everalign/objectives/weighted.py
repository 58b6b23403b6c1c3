"""Learning from scored answers: weighted supervised fine-tuning, and its form for answers of unknown origin.

Source: Du et al. 2025, "RLHF in an SFT Way: From Optimal Solution to Reward-Weighted Alignment" (VAR), arXiv
2502.11026. This is a *reconstruction* from the stated principle, the minimisation of KL(pi* || pi) by offline
reward-weighted likelihood: the paper's own in-batch formula could not be verified.

`snkl_loss` is InfoNCA's objective: Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit
Rewards", arXiv 2402.05369.
"""

import torch
from torch import Tensor

from everalign.objectives.partition_function import (
    Segments,
    finite_or_minus_inf,
    finite_rows,
    full_precision,
    positive,
    same_shapes,
    segment_logsumexp,
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
        _refuse_single_responses(segments)
        finite_rows(log_ratio, "log-ratio")
    labels = _label_log_probs(rewards, segments, temperature, check_finite)
    found = _segment_log_softmax(log_ratio, segments)
    # A label of probability 0 adds nothing, while 0 * -inf would be NaN.
    difference = (labels.to(found.dtype) - found).masked_fill(labels.isneginf(), 0.0)
    return segment_sum(labels.exp().to(found.dtype) * difference, segments)


def non_negative(weights: Tensor) -> Tensor:
    """`weights` unchanged; a `ValueError` names the rows that are NaN, infinite or negative."""
    if bool((finite_rows(weights, "weight") < 0).any()):
        raise ValueError(f"every weight must be at least 0: row {(weights < 0).nonzero()[0].item()} is negative")
    return weights


def _label_log_probs(rewards: Tensor, segments: Segments, temperature: float, check_finite: bool) -> Tensor:
    rewards = rewards.detach().double()
    scores = rewards / temperature
    if check_finite:
        finite_or_minus_inf(rewards, "reward")
        warn_of_dead_groups(rewards, segments)
        finite_or_minus_inf(scores, "reward / temperature")
    return _segment_log_softmax(scores, segments).masked_fill(scores.isneginf(), -torch.inf)


def _segment_log_softmax(scores: Tensor, segments: Segments) -> Tensor:
    return scores - segment_logsumexp(scores, segments)[segments.index]


def _refuse_single_responses(segments: Segments) -> None:
    alone = segments.ids[segments.sizes == 1].tolist()
    if alone:
        raise ValueError(f"{len(alone)} group(s) have one response, from which nothing is learned: {alone[:5]}")
