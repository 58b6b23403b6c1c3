"""The two scales of a reward: how far rewards lie apart, and how much of a difference is worth one nat."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from everalign.objectives.checks import finite_or_minus_inf
from everalign.objectives.segments import effective_share, one_segment

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
