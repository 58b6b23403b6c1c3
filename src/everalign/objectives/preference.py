"""Losses of pairs: the implicit margin, DPO and FPO; and the Bradley-Terry loss of rewards with its calibration."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from everalign.objectives.partition_function import finite_rows, full_precision, positive, same_shapes


def implicit_margin(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    check_finite: bool = True,
) -> Tensor:
    """How much more than the reference the policy prefers the chosen response, as a logit.

    margin = beta * [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)]        (DPO, eq. 7)

    Args:
        policy_chosen: `(B,)` log-probabilities of whole chosen responses, in nats, summed over their tokens.
        policy_rejected: `(B,)` the same for the rejected responses.
        reference_chosen: `(B,)` the same under the reference policy.
        reference_rejected: `(B,)` the same under the reference policy.
        beta: strength of the pull towards the reference, above 0.
        check_finite: refuse margins that are NaN or infinite.

    Returns:
        `(B,)` margins; positive where the policy ranks the pair more as wished than the reference does.

    Raises:
        ValueError: a margin is NaN or infinite (names the rows), shapes differ, or `beta` is not above 0.
    """
    positive(beta, "beta")
    same_shapes(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    chosen = full_precision(policy_chosen) - full_precision(reference_chosen)
    rejected = full_precision(policy_rejected) - full_precision(reference_rejected)
    margin = beta * (chosen - rejected)
    return finite_rows(margin, "margin") if check_finite else margin


def dpo_loss(margin: Tensor, check_finite: bool = True) -> Tensor:
    """DPO: `-log sigmoid(margin)`, `(B,)` -> `(B,)` in nats (DPO, eq. 7).

    Raises:
        ValueError: a margin is NaN or infinite; names the rows.
    """
    return -logsigmoid(full_precision(finite_rows(margin, "margin") if check_finite else margin))


def fpo_loss(margin: Tensor, gamma: float, check_finite: bool = True) -> Tensor:
    """FPO: `-(1 - sigmoid(margin))^gamma * log sigmoid(margin)`, `(B,)` -> `(B,)` in nats (LifeAlign).

    `gamma = 0` is DPO exactly. The gradient flows through the weight too, so that with s = sigmoid(margin)

        dL/dmargin = (1 - s)^gamma * [gamma * s * log s - (1 - s)]

    For gamma = 2 that is 0.597 of DPO's gradient at margin 0, up to 1.225 of it for badly ranked pairs
    (margin about -2.15), and next to nothing for well ranked ones (1e-4 at margin 5).

    Raises:
        ValueError: a margin is NaN or infinite (names the rows), or `gamma` is negative or not finite.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be a finite number of at least 0, not {gamma}")
    # 1 - sigmoid(r) = sigmoid(-r), whose logarithm neither overflows nor cancels at either end.
    margin = full_precision(margin)
    weight = (gamma * logsigmoid(-margin)).exp()
    return weight * dpo_loss(margin, check_finite)


def fpo_gradient_at_zero(gamma: float) -> float:
    """Return FPO's gradient at margin 0 as a share of DPO's: `2^-gamma * (1 + gamma * log 2)`, 0.597 for gamma = 2.

    FPO divided by it takes steps as long as DPO's at the start of training, so that the two compare at one rate.
    """
    return float(2.0**-gamma * (1 + gamma * math.log(2)))


def focalpo_loss(margin: Tensor, gamma: float, check_finite: bool = True) -> Tensor:
    """FocalPO: `-sigmoid(margin)^gamma * log sigmoid(margin)`, `(B,)` -> `(B,)` in nats (arXiv 2501.06645).

    The opposite of FPO: badly ranked pairs count less. `gamma = 0` is DPO exactly.

    Raises:
        ValueError: a margin is NaN or infinite (names the rows), or `gamma` is negative or not finite.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be a finite number of at least 0, not {gamma}")
    margin = full_precision(margin)
    return (gamma * logsigmoid(margin)).exp() * dpo_loss(margin, check_finite)


def hybrid_margin(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    check_finite: bool = True,
) -> Tensor:
    """How much more the policy prefers the chosen response than it has to, as a logit.

    margin = beta * [(log pi(chosen) - log pi(rejected)) - max(0, log ref(chosen) - log ref(rejected))]

    Where the reference ranks the pair wrongly this asks for the right ranking, and not for an improvement on the wrong
    one (HyPO, arXiv 2602.11902, by its abstract). Arguments and errors as in `implicit_margin`; with log-probabilities
    divided by their responses' tokens it is the per-token form.
    """
    floor = torch.minimum(full_precision(reference_chosen), full_precision(reference_rejected))
    # max(0, c - r) = c - min(c, r)
    return implicit_margin(policy_chosen, policy_rejected, reference_chosen, floor, beta, check_finite)


DEFAULT_CENTRING = 0.01
_BINS = 10
_HALVINGS = 100


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    centring: float = DEFAULT_CENTRING,
    margin: float = 0.0,
    check_finite: bool = True,
) -> Tensor:
    """`-log sigmoid(chosen - rejected - margin) + centring * (chosen + rejected)^2`, `(B,)` -> `(B,)`, un-reduced.

    Only differences have a meaning under the first term, so that rewards may drift; the second one pulls a pair's two
    rewards towards opposite values. Computed in fp32 whatever the inputs' type (in fp64 if they are fp64).

    Args:
        chosen: `(B,)` rewards of the better answers.
        rejected: `(B,)` rewards of the worse answers.
        centring: strength of the centring term, at least 0.
        margin: how much higher the better answer's reward has to be for a loss of log 2.
        check_finite: look at the values; without it nothing waits for a GPU to compute them.

    Raises:
        ValueError: a reward is NaN or infinite (names the rows), shapes differ, `centring` is negative or not finite,
            or `margin` is not finite.
    """
    if not (math.isfinite(centring) and centring >= 0):
        raise ValueError(f"centring must be a finite number of at least 0, not {centring}")
    if not math.isfinite(margin):
        raise ValueError(f"margin must be finite, not {margin}")
    same_shapes(chosen=chosen, rejected=rejected)
    chosen, rejected = full_precision(chosen), full_precision(rejected)
    if check_finite:
        finite_rows(chosen, "chosen reward")
        finite_rows(rejected, "rejected reward")
    return -logsigmoid(chosen - rejected - margin) + centring * (chosen + rejected).square()


def pair_calibration_error(difference: Tensor) -> float:
    """Return the expected calibration error of sigmoid(difference), a number between 0 and 1.

    The answer with the higher reward is the prediction, c = sigmoid(|difference|) its confidence, between 0.5 and 1.
    In ten bins of c of equal width, mean confidence and share of right predictions are compared; the error is the mean
    of their absolute differences, weighted by the bins' pairs. Equal rewards are half right.

    Args:
        difference: `(N,)` reward of chosen minus reward of rejected, N at least 1.

    Raises:
        ValueError: a difference is NaN or infinite (names the rows), or there is none.
    """
    difference = _differences(difference)
    confidence = torch.sigmoid(difference.abs())
    right = (difference.sign() + 1) / 2
    # A confidence of exactly 1 belongs to the last bin.
    bins = ((2 * confidence - 1) * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, right - confidence)
    return (gaps.abs().sum() / len(difference)).item()


def calibrating_temperature(difference: Tensor) -> float | None:
    """Return the T above 0 that minimises the mean of -log sigmoid(difference / T), or None where there is none.

    There is none where no difference is negative (any smaller T is better) or where their mean is not positive (any
    larger T is better). The minimum is where the mean of d·sigmoid(-d/T) is 0; it is found by bisection of 1/T.

    Args:
        difference: `(N,)` reward of chosen minus reward of rejected, N at least 1.

    Raises:
        ValueError: a difference is NaN or infinite (names the rows), or there is none.
    """
    difference = _differences(difference)
    if difference.min() >= 0 or difference.mean() <= 0:
        return None

    def too_cold(inverse: float) -> bool:
        return bool((difference * torch.sigmoid(-inverse * difference)).mean() < 0)

    low, high = 0.0, 1 / difference.abs().mean().item()
    while not too_cold(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if too_cold(middle) else (middle, high)
    return 2 / (low + high)


def _differences(difference: Tensor) -> Tensor:
    if difference.numel() == 0:
        raise ValueError("there must be at least one pair")
    return finite_rows(difference.detach().cpu().double(), "difference of rewards")
