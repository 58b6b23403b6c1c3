"""CPPO for preferences: row weights, and a pull to what the policy before the task gave each answer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from everalign.data.collate import Batch
from everalign.data.tokenization import TokenizedRow
from everalign.methods.base import Method, Task, check_strength
from everalign.modeling.policy import Policy
from everalign.training.hooks import RowTerms, Stage, sum_by_row

# Margins in nats below which a stage is taken to start as its own reference.
_SAME = 1e-3


class ContinualPpo(Method):
    """CPPO (ICLR 2024), for preferences.

    With P the mean log-probability a token of a pair's chosen answer and R its margin, both under the policy as a stage
    starts, and "high" and "low" more than `bound` standard deviations from their means over the stage's rows:

        P high, R high    learn more, retain more
        P high, R low     learn more, retain less
        P low,  R high    learn more, retain less
        P low,  R low     learn less, retain less
        else              1 and 1

    The loss of a row is α·(the objective's) + strength·β·Σ Δ² over its answers, Δ the difference in log-probability a
    token from the policy before the task. In the first task the objective alone counts.

    The classes are those of LifeAlign's authors' code and of the reviews of CPPO; the paper itself was not at hand.
    Statistics are over the whole stage, because in a batch of n no |z| exceeds (n − 1)/√n. R is the implicit margin;
    where that is 0 for all rows, as at the start of a stage that is its own reference, it is the policy's own
    difference in log-probability a token.

    Args:
        strength: c, of what is to be retained.
        bound: k, standard deviations beyond which a value is high or low.
        lowest: α or β where there is to be less.
        highest: α or β where there is to be more.
    """

    name = "cppo"
    # The policy before the task is at hand in its first stage only.
    watches_stages = True

    def __init__(self, strength: float = 0.1, bound: float = 1.0, lowest: float = 0.5, highest: float = 2.0) -> None:
        check_strength("strength", strength)
        for label, value in (("bound", bound), ("lowest", lowest), ("highest", highest)):
            check_strength(label, value)
        self.strength, self.bound, self.lowest, self.highest = strength, bound, lowest, highest
        self._index = 0
        self._before: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {"strength": self.strength, "bound": self.bound, "lowest": self.lowest, "highest": self.highest}

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Notes whether there is an earlier task."""
        self._index, self._before = task.index, {}

    def begin_stage(self, stage: Stage) -> RowTerms | None:
        """Sorts the rows into the classes and notes what the policy before the task gives their answers."""
        if self._index < 2:
            return None
        now = stage.logprobs(range(len(stage.rows)))
        # In the task's first stage the policy is still the one before it. Answers that a later round has sampled are
        # kept as likely as they were when they were.
        self._before = {**{row.id: value for row, value in zip(stage.rows, now, strict=True)}, **self._before}
        lengths = [torch.tensor([len(tokens) for tokens in row.responses]) for row in stage.rows]
        per_token = [value / length for value, length in zip(now, lengths, strict=True)]
        ends = [_best_and_worst(row, stage.objective.first_is_best) for row in stage.rows]
        probability = torch.stack([value[best] for value, (best, _) in zip(per_token, ends, strict=True)])
        reward = _differences(per_token, ends)
        if stage.reference is not None:
            ratios = [value - reference for value, reference in zip(now, stage.reference, strict=True)]
            margin = _differences(ratios, ends)
            reward = margin if bool((margin.abs() > _SAME).any()) else reward
        learn, retain = self.coefficients(probability, reward)
        return RowTerms(
            weights=learn.tolist(),
            values={
                "cppo_before": [self._before[row.id] for row in stage.rows],
                "cppo_retain": [
                    value.repeat(len(row.responses)) for value, row in zip(retain, stage.rows, strict=True)
                ],
            },
        )

    def coefficients(self, probability: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
        """Return α and β (N,) of rows with these P and R (N,)."""
        beyond = []
        for values in (probability, reward):
            centred, limit = values - values.mean(), self.bound * values.std(unbiased=False)
            beyond.append((centred > limit, centred < -limit))
        (high_p, low_p), (high_r, low_r) = beyond
        one, more, less = (torch.full_like(probability, value) for value in (1.0, self.highest, self.lowest))
        noisy, normal = low_p & low_r, ~((high_p | low_p) & (high_r | low_r))
        learn = torch.where(normal, one, torch.where(noisy, less, more))
        return learn, torch.where(normal, one, torch.where(high_p & high_r, more, less))

    def row_loss(self, logprobs: Tensor, batch: Batch) -> Tensor | None:
        """Returns strength·β·Σ Δ² of each row."""
        if not self.strength:
            return None
        change = (logprobs - batch["cppo_before"]) / batch["lengths"]
        parts = self.strength * batch["cppo_retain"] * change.square()
        return sum_by_row(parts, batch)


def _best_and_worst(row: TokenizedRow, first_is_best: bool) -> tuple[int, int]:
    """Return the places of a row's best and worst responses: chosen and rejected, or by weight; one may be both."""
    weights = list(row.weights)
    if first_is_best:
        return 0, len(weights) - 1
    return weights.index(max(weights)), weights.index(min(weights))


def _differences(values: Sequence[Tensor], ends: Sequence[tuple[int, int]]) -> Tensor:
    return torch.stack([value[best] - value[worst] for value, (best, worst) in zip(values, ends, strict=True)])
