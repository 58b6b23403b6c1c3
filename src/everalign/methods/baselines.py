"""Baselines: sequential, single-task and multi-task fine-tuning, and experience replay, with its anchors and review."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from everalign.data.collate import Batch, Review
from everalign.data.replay import AnyRow, ReplayBuffer
from everalign.data.rows import RowSet
from everalign.errors import InputError
from everalign.methods.base import Method, ModuleRecord, Task, check_share, check_strength
from everalign.modeling.policy import Policy
from everalign.training.hooks import RowTerms, Stage, sum_by_row

_EQUAL = 1e-9  # share of a row's largest weight by which equal ones may differ
VALUES, _SIGNS = "anchor", "anchor_sign"
"""Names, in `RowTerms.values`, of what a row's responses are pulled to, and of the side they are pulled from."""


class Anchors:
    """Anchored replay: replayed answers are pulled back to the log-probabilities that they had at their task's end.

    Only what got worse is pulled: a chosen answer that became less likely, a rejected one that became likelier; of a
    scored row, an answer of more than the row's mean weight and one of less. With S the summed log-probability of an
    answer now, Ŝ at the end of its task, and h the Huber loss with threshold 1,

        α · [h(relu(Ŝ_w − S_w)) + h(relu(S_l − Ŝ_l))]

    is added to the loss of each replayed row. One number an answer is kept, in the replay buffer's order, and no
    forward pass is added. One-sided anchors of replayed preferences go back to mfr-dpo/DAPR (a public repository of
    2026), which keeps a number a token.

    Args:
        strength: α, at least 0; 0 for none.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self._kept: list[Tensor] = []

    def terms(self, stage: Stage) -> RowTerms | None:
        """Return the anchors of a stage's replayed rows, which are the buffer's, for `row_loss` to read."""
        if not self.strength or not stage.replayed:
            return None
        replayed = range(stage.own, stage.learned)
        values = [torch.zeros(len(row.responses)) for row in stage.rows]
        signs = [torch.zeros(len(row.responses)) for row in stage.rows]
        for number, kept in zip(replayed, self._kept, strict=True):
            weights = torch.tensor(stage.rows[number].weights, dtype=torch.float64)
            # A row whose responses changed in number since has no anchor.
            if len(kept) != len(values[number]):
                continue
            values[number] = kept
            # 1 for a response that is to stay likely, −1 for one that is to stay unlikely, 0 for one in between.
            if stage.objective.first_is_best or len(weights) == 1:
                signs[number] = torch.tensor([1.0] + [-1.0] * (len(weights) - 1))
            else:
                above = weights - weights.mean()
                # The mean of equal numbers is not always that number.
                signs[number] = torch.where(above.abs() > _EQUAL * weights.max(), above.sign(), 0.0).float()
        return RowTerms(values={VALUES: values, _SIGNS: signs})

    def row_loss(self, logprobs: Tensor, batch: Batch) -> Tensor | None:
        """Return the anchors' part of each row's loss, (B,), or None; arguments as in `StageHooks.row_loss`."""
        if _SIGNS not in batch:
            return None
        sign = batch[_SIGNS]
        worse = torch.relu(sign * (batch[VALUES] - logprobs)) * sign.abs()
        parts = huber_loss(worse, torch.zeros_like(worse), reduction="none")
        return self.strength * sum_by_row(parts, batch)

    def keep(self, stage: Stage, numbers: Sequence[int], capacity: int) -> None:
        """Add the anchors of a stage's rows that went into the buffer, under the policy as it is now.

        Args:
            stage: that of the task that ends.
            numbers: those rows, in the order in which they were added to the buffer.
            capacity: the buffer's; the oldest anchors are dropped with their rows.
        """
        if self.strength:
            self._kept = [*self._kept, *stage.logprobs(numbers)][-capacity:]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the anchors one after another, and of how many responses each row's are."""
        if not self._kept:
            return {}
        return {"anchors": torch.cat(self._kept), "anchor_sizes": torch.tensor([len(kept) for kept in self._kept])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        found = "anchors" in state
        self._kept = list(torch.split(state["anchors"], state["anchor_sizes"].tolist())) if found else []


class SequentialFineTuning(Method):
    """Trains one adapter on task after task: the control that shows how much is forgotten without a method."""

    name = "seqft"


class SingleTask(Method):
    """Learns each task in a fresh adapter on the base model; only the score on its own task counts."""

    name = "stl"
    regime = "separate"
    starts_anew = True


_EVERYTHING = 10**9
_POOLED = "all-tasks"


class MultiTask(Method):
    """Learns the union of all tasks from the base model.

    Given all tasks at once, it trains once. Given one after another, it trains each time from the base model on all
    rows so far, which it keeps.
    """

    name = "mtl"
    regime = "joint"
    starts_anew = True

    def __init__(self) -> None:
        self.buffer: ReplayBuffer = ReplayBuffer(_EVERYTHING)

    def pool(self, tasks: Sequence[tuple[str, RowSet[Any]]]) -> list[tuple[str, RowSet[Any]]]:
        """Makes one task of all."""
        source = " + ".join(rows.source for _, rows in tasks)
        return [(_POOLED, type(tasks[0][1]).of([row for _, rows in tasks for row in rows], source))]

    def rows(self, task: Task) -> list[AnyRow]:
        """Returns all rows of all earlier tasks."""
        return self.buffer.rows(exclude_task=task.name)

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Keeps all of the task's rows."""
        self.buffer.add(task.name, task.rows, fraction=1.0, seed=task.seed)
        return []


class BufferOnly(Method):
    """GDumb: learns, from the base model, a buffer of all tasks so far and nothing else (ECCV 2020).

    The control that shows what a method adds to the rows it keeps. Each task gives the buffer the same share of its
    rows; where they are too many, the task that has most loses some, as classes do in the paper.

    Args:
        replay: share of a task's rows that goes into the buffer, drawn at random; one row at least.
        capacity: most rows in the buffer, and so most that are learned.
    """

    name = "gdumb"
    starts_anew = True

    def __init__(self, replay: float = 0.2, capacity: int = 3000) -> None:
        check_share("replay", replay)
        self._replay = replay
        self.buffer: ReplayBuffer = ReplayBuffer(capacity)

    def settings(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {"replay": self._replay, "capacity": self.buffer.capacity}

    def rows(self, task: Task) -> list[AnyRow]:
        """Returns what the buffer with the task's share holds of other tasks."""
        return self._filled(task).rows(exclude_task=task.name)

    def own_rows(self, task: Task) -> Sequence[AnyRow]:
        """Returns what it holds of this task."""
        filled = self._filled(task)
        return filled.rows()[len(filled.rows(exclude_task=task.name)) :]

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Puts the task's share into the buffer."""
        self.buffer = self._filled(task)
        return []

    def _filled(self, task: Task) -> ReplayBuffer:
        share = max(self._replay, 1 / len(task.rows))
        return self.buffer.balanced_with(task.name, task.rows, share, task.seed)


class ExperienceReplay(Method):
    """Trains one adapter on task after task, each joined with a buffer of rows of earlier tasks.

    The baseline ER of LifeAlign (arXiv 2509.17183); with `anchors`, anchored replay (see `Anchors`).

    Args:
        replay: share of a task's rows that goes into the buffer, drawn at random after training.
        capacity: most rows in the buffer; the oldest are dropped first.
        anchors: strength of the pull of replayed answers back to the log-probabilities that they had; 0 for none.
        review: share of a stage's steps, its last ones, in which all tasks so far are seen equally often; 0 for none.
            The number of steps stays the same.
    """

    name = "er"

    def __init__(self, replay: float = 0.2, capacity: int = 3000, anchors: float = 0.0, review: float = 0.0) -> None:
        check_share("replay", replay)
        check_strength("anchors", anchors)
        check_share("review", review)
        for label, value in (("anchors", anchors), ("review", review)):
            if value and not replay:
                raise InputError(f"{label} is for replayed rows, and replay is 0: leave it out", field=label)
        self._review = review
        self._replay, self._anchors = replay, Anchors(anchors)
        self.buffer: ReplayBuffer = ReplayBuffer(capacity)
        self.watches_stages = anchors > 0
        self._stage: Stage | None = None
        self._replayed_tasks: list[str] = []

    def settings(self) -> dict[str, Any]:
        """Returns the replay share and the capacity; the anchors' strength and the review's share where not 0."""
        extra = {"anchors": self._anchors.strength, "review": self._review}
        given = {name: value for name, value in extra.items() if value}
        return {"replay": self._replay, "capacity": self.buffer.capacity, **given}

    def rows(self, task: Task) -> list[AnyRow]:
        """Returns the buffer's rows of other tasks."""
        self._replayed_tasks = self.buffer.names(exclude_task=task.name)
        return self.buffer.rows(exclude_task=task.name)

    def begin_stage(self, stage: Stage) -> RowTerms | None:
        """Returns the replayed rows' anchors, and the review."""
        self._stage = stage
        terms = self._anchors.terms(stage)
        if not self._review or not stage.replayed:
            return terms
        groups = [range(stage.own), *self.replayed_groups(stage)]
        return replace(terms or RowTerms(), review=Review([group for group in groups if group], self._review))

    def replayed_groups(self, stage: Stage) -> list[list[int]]:
        """Returns the stage's replayed rows, a list for each earlier task, oldest first."""
        groups: dict[str, list[int]] = {}
        for number, name in enumerate(self._replayed_tasks, stage.own):
            groups.setdefault(name, []).append(number)
        return list(groups.values())

    def row_loss(self, logprobs: Tensor, batch: Batch) -> Tensor | None:
        """Returns the anchors' part of the loss."""
        return self._anchors.row_loss(logprobs, batch)

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Draws this task's share into the buffer, with anchors under the policy as it is now."""
        drawn = min(self.buffer.add(task.name, task.rows, self._replay, task.seed), self.buffer.capacity)
        if self._anchors.strength and self._stage is not None:
            places = {row.id: number for number, row in enumerate(self._stage.rows)}
            numbers = [places[id] for id in self.buffer.ids()[len(self.buffer) - drawn :]]
            self._anchors.keep(self._stage, numbers, self.buffer.capacity)
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the anchors."""
        return self._anchors.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the anchors."""
        self._anchors.load_state_dict(state)
