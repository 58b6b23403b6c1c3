"""COPR for pairs: fits a target policy, and keeps earlier pairs as near to theirs as they were."""

import math
from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from everalign.data.collate import Batch
from everalign.distributed import gather
from everalign.errors import InputError
from everalign.methods.base import ModuleRecord, Task, check_strength
from everalign.methods.baselines import ExperienceReplay
from everalign.modeling.policy import Policy
from everalign.training.hooks import RowTerms, Stage


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
    pairs_only = True

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

    def check_fits(self, objective: str, reference: str | None, adapter: bool) -> None:
        """Refuses rows that are no pairs, and a reference, which it has none of."""
        super().check_fits(objective, reference, adapter)
        if reference is not None:
            raise InputError("copr fits targets of its own and would ignore reference: leave it out", field="reference")

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Notes the task's seed."""
        self._seed = task.seed
        self._new: dict[str, Tensor] = {}
        self._names = self.buffer.names(exclude_task=task.name)

    def begin_stage(self, stage: Stage) -> RowTerms | None:
        """Sets the new pairs' targets, and how far the earlier ones are from theirs."""
        self._stage = stage
        gaps = torch.stack([value[0] - value[-1] for value in stage.logprobs(range(len(stage.rows)))])
        if not self._new:  # in the task's first stage, where the policy is still the one before it
            beta = stage.objective.options.beta
            for row, gap in zip(stage.rows[: stage.own], gaps, strict=False):
                advantage = Random(f"{self._seed}/{row.id}/advantage").betavariate(1, 2)
                self._new[row.id] = _log_shares(gap + 2 * advantage / beta)
        if len(stage.objective.computed(stage.rows[0]).responses) == 1:
            return None
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
                "copr_weight": [torch.full((2,), row.weight) for row in stage.rows],
            },
        )

    def row_loss(self, logprobs: Tensor, batch: Batch) -> Tensor | None:
        """Returns each pair's distance, those of earlier tasks as what they exceed by, times λ."""
        distance = _distance(logprobs[::2] - logprobs[1::2], batch["copr_target"].view(-1, 2))
        task, excess = batch["copr_task"][::2].long(), distance - batch["copr_start"][::2]
        self._excess.append((task.detach(), torch.where(batch["counts"] > 0, excess, 0.0).detach()))
        multipliers = torch.cat([torch.ones(1), self._multipliers]).to(distance)
        scale = 1 + multipliers[1:].sum()
        return batch["copr_weight"][::2] * torch.where(task > 0, multipliers[task] * excess, distance) / scale

    def after_step(self, policy: Policy) -> None:
        """Raises the multipliers of the tasks that have lost, lowers those of the others."""
        mine = [(task.cpu(), excess.cpu()) for task, excess in self._excess]
        self._excess = []
        found = [part for parts in gather(mine) for part in parts]
        if not found:
            return
        tasks, excess = (torch.cat(values) for values in zip(*found, strict=True))
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
