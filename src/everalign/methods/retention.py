"""Methods that weigh rows, or replace the loss, by what the policy before the task says of them: CPPO and COPR."""

import math
from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from everalign.data.collate import Batch
from everalign.errors import InputError
from everalign.methods.base import Method, ModuleRecord, Task, check_strength
from everalign.methods.baselines import ExperienceReplay
from everalign.modeling.policy import Policy
from everalign.training.hooks import RowTerms, Stage


class ContinualPpo(Method):
    """CPPO (ICLR 2024) for preferences: row weights, and a pull to what the policy before the task gave each answer.

    With P the mean log-probability a token of a pair's chosen answer and R its margin, both under the policy as a stage
    starts, and "high" and "low" more than `bound` standard deviations from their means over the stage's rows:

        P high, R high    learn more, retain more
        P high, R low     learn more, retain less
        P low,  R high    learn more, retain less
        P low,  R low     learn less, retain less
        else              1 and 1

    The loss of a row is α·(the objective's) + strength·β·Σ Δ² over its answers, Δ the difference in log-probability a
    token from the policy before the task. From the first task on nothing but the objective counts until there is an
    earlier task. The classes are as LifeAlign's authors' code and the reviews of CPPO have them, the paper itself was
    not at hand; statistics are over the whole stage, because in a batch of n no |z| exceeds (n − 1)/√n. R is the
    implicit margin; where that is 0 for all rows, as at the start of a stage that is its own reference, it is the
    policy's own difference in log-probability a token.

    Args:
        strength: c, of what is to be retained.
        bound: k, standard deviations beyond which a value is high or low.
        lowest: α or β where there is to be less.
        highest: α or β where there is to be more.
    """

    name = "cppo"

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
        # In the task's first stage the policy is still the one before it.
        self._before = self._before or {row.id: value for row, value in zip(stage.rows, now, strict=True)}
        lengths = [torch.tensor([len(tokens) for tokens in row.responses]) for row in stage.rows]
        per_token = [value / length for value, length in zip(now, lengths, strict=True)]
        probability = torch.stack([value[0] for value in per_token])
        reward = torch.stack([_first_over_last(value) for value in per_token])
        if stage.reference is not None:
            ratios = [value - reference for value, reference in zip(now, stage.reference, strict=True)]
            margin = torch.stack([_first_over_last(value) for value in ratios])
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
        high_p, low_p = self._beyond(probability)
        high_r, low_r = self._beyond(reward)
        one, more, less = (torch.full_like(probability, value) for value in (1.0, self.highest, self.lowest))
        noisy, normal = low_p & low_r, ~((high_p | low_p) & (high_r | low_r))
        learn = torch.where(normal, one, torch.where(noisy, less, more))
        return learn, torch.where(normal, one, torch.where(high_p & high_r, more, less))

    def _beyond(self, values: Tensor) -> tuple[Tensor, Tensor]:
        centred = values - values.mean()
        limit = self.bound * values.std(unbiased=False)
        return centred > limit, centred < -limit

    def row_loss(self, logprobs: Tensor, batch: Batch) -> Tensor | None:
        """Returns strength·β·Σ Δ² of each row."""
        if not self.strength:
            return None
        change = (logprobs - batch["cppo_before"]) / batch["lengths"]
        parts = self.strength * batch["cppo_retain"] * change.square()
        return torch.zeros(len(batch["weight"]), device=parts.device).index_add_(0, batch["row"], parts)


# Margins in nats below which a stage is taken to start as its own reference.
_SAME = 1e-3


def _first_over_last(values: Tensor) -> Tensor:
    return values[0] - values[-1]


class OptimalPolicyRegularization(ExperienceReplay):
    """COPR for pairs (ACL Findings 2025), after a secondary source: fits targets instead of the objective's loss.

    With Δ = log π(chosen) − log π(rejected), a pair's target is P* = σ(Δ_before + 2r/β), Δ_before under the policy
    before its task and r drawn from Beta(1, 2); its distance is ½ Σ (log P − log P*)² over both answers, P = σ(Δ). New
    pairs lower their distance. Of each earlier task the buffer's pairs must not be farther than as the stage started:
    J, their mean excess, has a multiplier with ln λ ← ln λ + rate·λ·J after each step, and the loss is divided by
    1 + Σλ. A target, two numbers, is kept for each pair of the buffer. β is the objective's; of its loss nothing else
    is used. A supervised stage before it is learned as plain replay does.

    Args:
        rate: of the multipliers' ascent.
        replay: share of a task's rows that goes into the buffer, drawn at random after training.
        capacity: most rows in the buffer; the oldest are dropped first.
    """

    name = "copr"

    def __init__(self, rate: float = 0.1, replay: float = 0.2, capacity: int = 3000) -> None:
        super().__init__(replay, capacity)
        check_strength("rate", rate)
        self.rate, self.watches_stages = rate, True
        self._seed = 0
        self._targets: dict[str, Tensor] = {}
        self._names: list[str] = []
        self._multipliers = torch.ones(0)
        self._excess: list[tuple[Tensor, Tensor]] = []

    def settings(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {"rate": self.rate, **super().settings()}

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Notes the task's seed."""
        self._seed = task.seed
        self._new: dict[str, Tensor] = {}
        self._names = self.buffer.names(exclude_task=task.name)

    def begin_stage(self, stage: Stage) -> RowTerms | None:
        """Sets the new pairs' targets, and how far the earlier ones are from theirs."""
        self._stage = stage
        if len(stage.objective.computed(stage.rows[0]).responses) == 1:
            return None
        if any(len(row.responses) != 2 for row in stage.rows):
            raise InputError("copr learns from pairs: use preferences, or another method")
        gaps = torch.stack([_first_over_last(value) for value in stage.logprobs(range(len(stage.rows)))])
        if not self._new:
            beta = stage.objective.options.beta
            for row, gap in zip(stage.rows[: stage.own], gaps, strict=False):
                advantage = Random(f"{self._seed}/{row.id}/advantage").betavariate(1, 2)
                self._new[row.id] = _log_shares(gap + 2 * advantage / beta)
        targets = [
            (self._new if number < stage.own else self._targets)[row.id] for number, row in enumerate(stage.rows)
        ]
        start = _distance(gaps, torch.stack(targets))
        earlier = list(dict.fromkeys(self._names))
        tasks = [0] * stage.own + [1 + earlier.index(name) for name in self._names]
        self._multipliers, self._excess = torch.ones(len(earlier)), []
        return RowTerms(
            weights=[0.0] * len(stage.rows),
            values={
                "copr_target": targets,
                "copr_task": [torch.tensor([float(task)] * 2) for task in tasks],
                "copr_start": [value.repeat(2) for value in start],
            },
        )

    def row_loss(self, logprobs: Tensor, batch: Batch) -> Tensor | None:
        """Returns each pair's distance, those of earlier tasks as what they exceed by, times λ."""
        distance = _distance(logprobs[::2] - logprobs[1::2], batch["copr_target"].view(-1, 2))
        task, excess = batch["copr_task"][::2].long(), distance - batch["copr_start"][::2]
        self._excess.append((task.detach(), torch.where(batch["counts"] > 0, excess, 0.0).detach()))
        multipliers = torch.cat([torch.ones(1), self._multipliers]).to(distance)
        scale = 1 + multipliers[1:].sum()
        return torch.where(task > 0, multipliers[task] * excess, distance) / scale

    def after_step(self, policy: Policy) -> None:
        """Raises the multipliers of the tasks that have lost, lowers those of the others."""
        if not self._excess:
            return
        tasks, excess = (torch.cat(parts).cpu() for parts in zip(*self._excess, strict=True))
        self._excess = []
        for number in range(len(self._multipliers)):
            own = excess[tasks == number + 1]
            if len(own):
                step = self.rate * float(self._multipliers[number] * own.mean())
                self._multipliers[number] *= math.exp(max(-1.0, min(1.0, step)))

    def stage_state(self) -> dict[str, Tensor]:
        """Returns the multipliers, and the new pairs' targets, which are set before the first stage only."""
        targets = {f"target/{row}": value for row, value in self._new.items()}
        return {**targets, "multipliers": self._multipliers}

    def load_stage_state(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restores them."""
        self._multipliers = state["multipliers"].clone()
        self._new = {name.removeprefix("target/"): value for name, value in state.items() if name != "multipliers"}

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Draws this task's share into the buffer, and keeps its targets."""
        super().end_task(policy, task)
        known = {**self._targets, **self._new}
        self._targets = {id: known[id] for id in self.buffer.ids()}
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the targets of the buffer's pairs."""
        return {f"target/{row}": value for row, value in self._targets.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores them."""
        self._targets = {name.removeprefix("target/"): value for name, value in state.items()}


def _log_shares(gap: Tensor) -> Tensor:
    """Return the logarithms of σ(gap) and σ(−gap), side by side."""
    return torch.stack([logsigmoid(gap), logsigmoid(-gap)], dim=-1)


def _distance(gaps: Tensor, targets: Tensor) -> Tensor:
    """Return ½ Σ (log P − log P*)² of pairs with these gaps (B,) and targets (B, 2)."""
    return (_log_shares(gaps) - targets).square().sum(dim=-1) / 2
