"""One task's teaching: its rows, or answers sampled to its prompts round after round, until the policy has learned."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from everalign.data.prompts import PromptSet
from everalign.data.replay import AnyRow
from everalign.learning.rollouts import roll_out
from everalign.learning.setup import Setup
from everalign.learning.task_rows import TaskRows, encode_rows, fewest_answers, weigh_rows
from everalign.learning.task_training import StageReport, train_task
from everalign.methods import Task
from everalign.shortfall import ShortfallError

# Random generators take 32 bits.
_SEEDS = 2**31
# Stages of a task use consecutive seeds; tasks are this far apart, and runs of neighbouring seeds further.
_TASK_STRIDE, _RUN_STRIDE = 1000, 1_000_003


@dataclass(frozen=True)
class Lesson:
    """What was taught.

    Attributes:
        task: the task with the rows that were learned last.
        reports: of all stages, round after round.
        weights: figures of the last round's weights; None where there are none.
        rollouts: what was sampled in each round, the last one too if there was nothing to learn from it.
        warnings: what cost much of what was given.
    """

    task: Task
    reports: list[StageReport]
    weights: dict[str, Any] | None
    rollouts: list[dict[str, float]]
    warnings: tuple[str, ...] = ()


def teach(setup: Setup, task: Task, rows: TaskRows, work: Path) -> Lesson:
    """Train the policy in place on a task and on what the method replays beside it.

    Args:
        setup: the learner's parts.
        task: the task; of prompts alone, what is learned is sampled here.
        rows: its rows, prepared.
        work: folder for checkpoints and samples; what a killed attempt left there is gone on with.

    Raises:
        ShortfallError: most answers sampled in the first round did not end, or most prompts have too few that did.
    """
    replayed = setup.method.rows(task)
    prompts = rows.rows
    if not isinstance(prompts, PromptSet):
        return Lesson(task, _train(setup, rows, replayed, work, task.seed), rows.facts, [], rows.warnings)
    reports: list[StageReport] = []
    rollouts: list[dict[str, float]] = []
    weighed, scale, warnings = rows, None, rows.warnings
    for number in range(1, setup.rollouts.rounds + 1):
        sampling, seed = (_seed(task, number, purpose) for purpose in ("sampling", "training"))
        try:
            rollout = roll_out(setup, prompts, work / "rollouts", number, fewest_answers(setup), sampling)
        except ShortfallError as error:
            if number == 1:
                raise
            # What earlier rounds have taught stands: the policy has come to write longer.
            warnings += (f"round {number} is not learned: {error}",)
            setup.announce(f"  warning: {warnings[-1]}")
            break
        rollouts.append(rollout.facts)
        setup.announce(f"  round {number}: {rollout.summary()}")
        for warning in rollout.warnings:
            setup.announce(f"  warning: {prompts.source}: {warning}")
            warnings += (f"round {number}: {warning}",)
        if number > 1 and rollout.settled:
            setup.announce("  all answers have the same reward: there is nothing left to learn from them")
            break
        weighed = weigh_rows(setup, rollout.rows, scale)
        # The first round's, so that a reward is worth as many nats in every round.
        scale = weighed.facts["scale"] if weighed.facts else None
        for line in weighed.lines:
            setup.announce(line)
        # Each in its own folder: where it samples what the round before did, that one's result is not its own.
        reports += _train(setup, weighed, replayed, work / f"round-{number}", seed)
    return Lesson(replace(task, rows=weighed.rows), reports, weighed.facts, rollouts, warnings)


def task_seed(run_seed: int, index: int) -> int:
    """Return the seed of a run's task by its place in the line: what was left out does not change the next one's."""
    return (run_seed * _RUN_STRIDE + index * _TASK_STRIDE) % _SEEDS


def _seed(task: Task, number: int, purpose: str) -> int:
    """Seeds that neither rounds nor tasks nor purposes share, but by chance."""
    return random.Random(f"{task.seed}/{number}/{purpose}").randrange(_SEEDS)


def _train(setup: Setup, rows: TaskRows, replayed: list[AnyRow], work: Path, seed: int) -> list[StageReport]:
    encoded = encode_rows(setup, rows.rows, replayed)
    if encoded.altered:
        setup.announce(f"  {encoded.summary()}")
    return train_task(setup, encoded, len(replayed), work, seed)
