"""LifeAlign without stored rows: what the policy before the task answers stands in for replay."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from everalign.data.collate import Batch
from everalign.data.records import Preference
from everalign.data.replay import AnyRow
from everalign.errors import InputError
from everalign.methods.base import Task, check_share, check_strength
from everalign.methods.lifealign import LifeAlign
from everalign.training.hooks import RowTerms, Stage, sum_by_row


class RehearsalFreeLifeAlign(LifeAlign):
    """LifeAlign that keeps the policy's own answers instead of anyone's data.

    From the second task on, the policy as it is before the task answers a share of the new task's prompts, one sampled
    answer each. These are learned beside the task by their negative log-likelihood a token, times `strength`: up to a
    constant the divergence KL(π_before ‖ π) a token on those prompts, so that the policy keeps answering as it did
    where the task does not ask for a change (self-generated replay; arXiv 2605.26097 by its abstract). The update is
    averaged and consolidated as in `LifeAlign` in `product` space, but by default whole: denoising and damping shorten
    the steps, and on real tasks cost more accuracy than they saved (`bench/results/methods.md`). Nothing of a task's
    rows is kept; weights may still reveal some of them.

    Args:
        gamma, rank_cap, average: as in `LifeAlign`.
        energy: as in `LifeAlign`; 1 for no denoising.
        keep: as in `LifeAlign`; 1 for no damping.
        strength: of the pull to what the policy answered before, at least 0.
        own_answers: share of the task's prompts that are answered first.
    """

    name = "lifealign-rf"
    pairs_only = True

    def __init__(
        self,
        gamma: float | None = None,
        energy: float = 1.0,
        keep: float = 1.0,
        rank_cap: int = 64,
        average: float = 0.0,
        strength: float = 1.0,
        own_answers: float = 0.1,
    ) -> None:
        super().__init__(gamma, energy, keep, "product", rank_cap, average, replay=0.0)
        check_strength("strength", strength)
        check_share("own_answers", own_answers)
        self.strength, self.own_answers = strength, own_answers

    def settings(self) -> dict[str, Any]:
        """Returns all arguments but gamma, which belongs to the objective."""
        inherited = {name: value for name, value in super().settings().items() if name not in ("replay", "capacity")}
        return {**inherited, "strength": self.strength, "own_answers": self.own_answers}

    def rows(self, task: Task) -> list[AnyRow]:
        """Returns what the policy answers now to some of the task's prompts, as the chosen answers of pairs.

        The rejected ones are the task's; nothing is learned from them. There may be none, see `warning`.
        """
        count = self._asked(task)
        if not count or task.answer is None:
            return []
        pairs = [row for row in task.rows if isinstance(row, Preference)]
        asked = Random(f"{task.seed}/{task.name}/own answers").sample(pairs, count)
        found: list[AnyRow] = []
        for number, text in task.answer([row.prompt for row in asked], task.seed):
            try:
                found.append(replace(asked[number], chosen=text, weight=1.0))
            except InputError:
                # The answer is the rejected one itself.
                continue
        return found

    def warning(self, task: Task, rows: Sequence[AnyRow]) -> str | None:
        """Returns that no own answer is left; an error would end a run that has learned other tasks already."""
        count = self._asked(task)
        if not count or rows:
            return None
        return (
            f"nothing keeps the policy from forgetting in this task: none of its own answers to {count} prompts can be "
            "learned; more of them would end in time with a larger --max-length (max_length), half of which an answer "
            "may have, or a lower --learning-rate"
        )

    def _asked(self, task: Task) -> int:
        """How many of the task's prompts are answered first."""
        return round(self.own_answers * len(task.rows)) if task.index > 1 and self.strength else 0

    def begin_stage(self, stage: Stage) -> RowTerms | None:
        """Leaves its own answers out of the objective's loss."""
        super().begin_stage(stage)
        if not stage.replayed:
            return None
        own = [number < stage.own for number in range(len(stage.rows))]
        counted = [torch.tensor([0.0] * 2 if is_own else [1.0, 0.0]) for is_own in own]
        return RowTerms(weights=[float(is_own) for is_own in own], values={"own_answer": counted})

    def row_loss(self, logprobs: Tensor, batch: Batch) -> Tensor | None:
        """Returns the negative log-likelihood a token of its own answers, times the strength."""
        parts = -self.strength * batch["own_answer"] * logprobs / batch["lengths"]
        return sum_by_row(parts, batch)
