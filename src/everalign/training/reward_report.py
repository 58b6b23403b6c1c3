"""How good a reward model is, on pairs it was not trained on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from everalign.objectives import calibrating_temperature, dpo_loss, pair_calibration_error


@dataclass(frozen=True)
class RewardReport:
    """What a reward model makes of N held-out pairs, every pair counting the same.

    Args:
        pairs: N.
        accuracy: share of pairs whose chosen answer has the higher reward; ties count half.
        log_loss: mean of -log σ(chosen - rejected), in nats; log 2 = 0.693 is a coin's.
        calibration_error: expected calibration error of σ(chosen - rejected), between 0 and 1.
        temperature: what to divide rewards by so that σ gives the right probabilities; fitted on these same pairs.
            None where there is no best one, since every pair (or no more than chance) is ranked as wished.
        calibrated_error: the calibration error at that temperature; on the pairs it was fitted on, so too low.
        length_correlation: Pearson's correlation of an answer's reward with its length in tokens, over all 2N answers;
            None where one of the two is constant. Far from 0, the model may judge by length.
    """

    pairs: int
    accuracy: float
    log_loss: float
    calibration_error: float
    temperature: float | None
    calibrated_error: float | None
    length_correlation: float | None


def reward_report(rewards: Tensor, lengths: Tensor) -> RewardReport:
    """Judge rewards of held-out pairs.

    Args:
        rewards: (N, 2) of chosen and rejected; centred or not.
        lengths: (N, 2) tokens of the answers.
    """
    rewards = rewards.double()
    difference = rewards[:, 0] - rewards[:, 1]
    temperature = calibrating_temperature(difference)
    return RewardReport(
        pairs=len(rewards),
        accuracy=((difference.sign() + 1) / 2).mean().item(),
        log_loss=dpo_loss(difference).mean().item(),
        calibration_error=pair_calibration_error(difference),
        temperature=temperature,
        calibrated_error=None if temperature is None else pair_calibration_error(difference / temperature),
        length_correlation=_correlation(rewards.flatten(), lengths.double().flatten()),
    )


def _correlation(first: Tensor, second: Tensor) -> float | None:
    if first.min() == first.max() or second.min() == second.max():
        return None
    return torch.corrcoef(torch.stack([first, second]))[0, 1].item()
