"""Held-out preference accuracy, length-normalised margin, and drift from the previous policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from everalign.data.collate import batches_by_length, collate, row_tokens
from everalign.data.rows import spread
from everalign.data.tokenization import TokenizedRow
from everalign.distributed import share
from everalign.errors import DivergedError, EveralignError
from everalign.modeling.policy import Earlier, Policy
from everalign.training.reference import counted, sequence_logprobs

_TIE = 0.5
_KL_TOKENS = 4096
# Tensors of (positions x vocabulary) that a divergence holds: what was computed of the policy now; of the policy before
# the head's output, what a model makes of it on the way, the same in fp32, and its log-softmax.
_KL_COPIES = 6


@dataclass(frozen=True)
class HeldOut:
    """A task's held-out pairs with what the base model makes of them.

    Args:
        pairs: N tokenised rows of two responses, chosen and rejected.
        base: (N, 2) summed log-probabilities of chosen and rejected under the base model, in nats.
    """

    pairs: Sequence[TokenizedRow]
    base: Tensor


@dataclass(frozen=True)
class PreferenceScore:
    """How well a policy agrees with held-out preferences.

    Args:
        accuracy: share of pairs whose chosen response has the higher log-likelihood per token; ties count half.
        margin: mean of (log-likelihood per token of chosen minus that of rejected), nats per token.
        reward_accuracy: share of pairs with a positive implicit margin against the base model; ties count half, so
            the base model itself has 0.5.
        kl_previous: mean over response positions of KL(policy now ‖ policy before this task) of the next-token
            distributions, on chosen held-out responses, nats per token; None where there was no policy before.
        pairs: number of pairs scored.
        margin_error: standard error of the margin; None of a single pair.
        chosen_logprob: mean log-likelihood per token of the chosen responses, nats; what learning has changed of it is
            the difference to the base model's.
        rejected_logprob: that of the rejected responses.
        ranked: of every pair, in order, whether it counts for `accuracy`: `1`, `0`, or `=` for a tie.
        gained: the same for `reward_accuracy`.
        outcomes: of each pair whose two responses differ, 1 where the chosen one has the higher likelihood per token,
            else 0; ties ½. What two policies make of the same pairs is compared by them; they are not kept on disk.
    """

    accuracy: float
    margin: float
    reward_accuracy: float
    kl_previous: float | None
    pairs: int
    margin_error: float | None = None
    chosen_logprob: float | None = None
    rejected_logprob: float | None = None
    ranked: str = field(default="", repr=False)
    gained: str = field(default="", repr=False)
    outcomes: tuple[float, ...] = field(default=(), compare=False, repr=False)


def score_preferences(
    policy: Policy,
    held_out: HeldOut,
    *,
    tokens_per_batch: int,
    previous: Earlier | None = None,
    kl_pairs: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PreferenceScore:
    """Score the policy as it is switched now.

    Args:
        policy: what is judged.
        held_out: the task's held-out pairs.
        tokens_per_batch: tokens computed at once, padding included.
        previous: the policy before this task, for the KL; None leaves it out.
        kl_pairs: the KL is measured on at most this many evenly spaced pairs.
        progress: called with (pairs done, pairs in all).

    Raises:
        DivergedError: the policy gives NaN or infinite log-probabilities.
    """
    count = counted(progress, len(held_out.pairs))
    log_probs = torch.stack(sequence_logprobs(policy, held_out.pairs, tokens_per_batch, count))
    kl = None
    if previous is not None:
        kl = mean_kl(policy, previous, spread(held_out.pairs, kl_pairs))
    return score_log_probs(log_probs, held_out, kl)


def score_base(held_out: HeldOut) -> PreferenceScore:
    """Score the base model by the log-probabilities that are at hand.

    Raises:
        EveralignError: it gives NaN or infinite ones, for which no training is to blame.
    """
    if not torch.isfinite(held_out.base).all():
        raise EveralignError("the base model gives NaN or infinite log-probabilities: check its weights, or use fp32")
    return score_log_probs(held_out.base, held_out)


def score_log_probs(log_probs: Tensor, held_out: HeldOut, kl: float | None = None) -> PreferenceScore:
    """Score a policy by its (N, 2) summed log-probabilities of held-out pairs; errors as in `score_preferences`."""
    if not torch.isfinite(log_probs).all():
        raise DivergedError("the policy gives NaN or infinite log-probabilities: lower the learning rate, or use fp32")
    lengths = torch.tensor([[len(tokens) for tokens in pair.responses] for pair in held_out.pairs])
    per_token = log_probs / lengths
    margin = per_token[:, 0] - per_token[:, 1]
    gain = log_probs - held_out.base
    gained = gain[:, 0] - gain[:, 1]
    chosen, rejected = per_token.mean(dim=0).tolist()
    ranked, gains = (
        "".join("1" if value > 0 else "0" if value < 0 else "=" for value in values.tolist())
        for values in (margin, gained)
    )
    return PreferenceScore(
        accuracy=_share_positive(margin),
        margin=margin.mean().item(),
        reward_accuracy=_share_positive(gained),
        kl_previous=kl,
        pairs=len(held_out.pairs),
        margin_error=(margin.std() / len(margin) ** 0.5).item() if len(margin) > 1 else None,
        chosen_logprob=chosen,
        rejected_logprob=rejected,
        ranked=ranked,
        gained=gains,
        outcomes=tuple(
            _share_positive(one) for one, pair in zip(margin, held_out.pairs, strict=True) if not pair.identical
        ),
    )


def _share_positive(values: Tensor) -> float:
    return ((values > 0).double() + _TIE * (values == 0).double()).mean().item()


def mean_kl(policy: Policy, previous: Earlier, pairs: Sequence[TokenizedRow]) -> float:
    """Return the mean over response positions of KL(now ‖ previous), on the chosen responses, nats per token.

    Positions are those of the given responses, not of the policy's own samples: an estimate of drift, not of the
    sequence-level KL.
    """
    chosen = [pair.only([0]) for pair in pairs]
    lengths = [row_tokens(row, True, policy.prefix_length) for row in chosen]

    def compute(batches: Sequence[list[int]]) -> list[list[tuple[float, int]]]:
        found = []
        for numbers in batches:
            parts = []
            # Hidden states of the whole batch once, then the heads of a few positions at a time.
            batch = policy.on_device(collate([chosen[number] for number in numbers], policy.head.shared))
            states = policy.response_states(batch)
            with switched():
                states_before = policy.response_states(batch)
            for part, part_before in policy.head.chunks(states, states_before, copies=_KL_COPIES):
                now = F.log_softmax(policy.logits(part), dim=-1)
                with switched():  # the head may be adapted too
                    before = F.log_softmax(policy.logits(part_before), dim=-1)
                shares = now.exp()
                parts.append((shares.mul_(now.sub_(before)).sum(dim=-1).double().sum().item(), len(part)))
                del now, before, shares
            found.append(parts)
        return found

    with policy.as_snapshot(previous) as switched, policy.evaluating():
        parts = [part for batch in share(compute, batches_by_length(lengths, _KL_TOKENS)) for part in batch]
    total, positions = sum(total for total, _ in parts), sum(positions for _, positions in parts)
    # Rounding may leave equal distributions just below zero.
    return max(total / positions, 0.0)
