"""Learning a reward from pairs: the Bradley-Terry loss, and how far the rewards' own confidence can be believed.

Sources: Bradley and Terry 1952 (the model); Eisenstein et al. 2023, "Helping or Herding?", arXiv 2312.09244 (the
centring term); Guo et al. 2017, "On Calibration of Modern Neural Networks" (calibration error and temperature).

A reward is a number without a unit: the difference of two rewards of the same prompt is a logit, the log-odds that the
first answer is preferred.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from everalign.objectives.segments import finite_rows, full_precision, same_shapes

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
