"""Train one task: its stages against explicit references, with rollouts between rounds where rows are prompts."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from everalign.data.tokenization import TokenizedRows
from everalign.errors import ShortfallError
from everalign.learning.context import RunContext
from everalign.learning.rollouts import sample_and_score
from everalign.learning.task_rows import prepare
from everalign.methods import Task
from everalign.training.base_objective import PreparedRows
from everalign.training.reference import Reference, policy_key, sequence_logprobs
from everalign.training.stage import StageResult, train_stage

_PROBE_ROWS = 16
# Random generators take 32 bits.
_SEEDS = 2**31
# Stages of a task use consecutive seeds; tasks are this far apart, and runs of neighbouring seeds further.
_TASK_STRIDE, _RUN_STRIDE = 1000, 1_000_003


@dataclass
class TaskResult:
    """What was learned.

    Attributes:
        task: the task with the rows that were learned last.
        weights: figures of the last round's weights; None where there are none.
        reports: of all stages, round after round.
        rollouts: what was sampled in each round, the last one too if there was nothing to learn from it.
        warnings: large losses.
    """

    task: Task
    weights: dict[str, Any] | None
    reports: list[StageResult] = field(default_factory=list)
    rollouts: list[dict[str, float]] = field(default_factory=list)
    warnings: tuple[str, ...] = ()


def task_seed(run_seed: int, index: int) -> int:
    """Return the seed of a run's task by its place in the line: what was left out does not change the next one's."""
    return (run_seed * _RUN_STRIDE + index * _TASK_STRIDE) % _SEEDS


def train_task(context: RunContext, task: Task, rows: PreparedRows, work: Path) -> TaskResult:
    """Train the policy in place on a task and on what the method replays beside it.

    Args:
        context: the learner's parts.
        task: the task; of prompts alone, what is learned is sampled here.
        rows: its rows, prepared.
        work: folder for checkpoints and samples; what a killed attempt left there is continued.

    Raises:
        ShortfallError: most answers sampled in the first round did not end, or most prompts have too few that did.
    """
    result = TaskResult(task, rows.facts, warnings=rows.warnings)
    replayed = context.method.rows(task)
    # A task whose answers are given has one round, without sampling.
    rounds = context.rollouts.rounds if rows.to_sample else 1
    scale, learned, folder, seed = None, rows, work, task.seed
    for number in range(1, rounds + 1):
        if rows.to_sample:
            sampled = _sample_round(context, result, rows, work / "rollouts", number, scale)
            if sampled is None:
                break
            learned, folder, seed = sampled, work / f"round-{number}", _seed(task, number, "training")
            # The first round's, so that a reward is worth as many nats in every round.
            scale = learned.facts["scale"] if learned.facts else None
            result.task, result.weights = replace(task, rows=learned.rows), learned.facts
        tokenized = context.objective.tokenize(learned.rows, replayed, context)
        if tokenized.altered:
            context.log(f"  {tokenized.one_line()}")
        # What the folder holds of other rows is left alone.
        folder = folder / tokenized.fingerprint[:16]
        reference = _reference(context, tokenized)
        for index, (objective, options) in enumerate(context.stages()):
            result.reports.append(
                train_stage(
                    context.policy,
                    objective,
                    tokenized,
                    options,
                    folder / f"{index}-{objective.name}",
                    seed=seed + index,
                    reference=reference if objective.needs_reference else None,
                    replayed=len(replayed),
                    penalty=context.method.penalty,
                    gradient_hook=context.method.adjust_gradients,
                    progress=partial(context.progress, objective.name),
                    log=context.log,
                )
            )
    return result


def _reference(context: RunContext, rows: TokenizedRows) -> Callable[[], Reference]:
    """Return what computes or looks up the reference; at once where it is the policy before the task's stages."""

    def compute() -> Reference:
        base = context.options.reference == "base"
        key = policy_key(context.model_key, {} if base else context.policy.total())
        probe = rows[:: max(1, len(rows) // _PROBE_ROWS)][:_PROBE_ROWS]
        with context.policy.as_base() if base else nullcontext():
            logprobs = context.cache.logprobs(context.policy, key, rows, context.tokens_per_batch)
            probed = sequence_logprobs(context.policy, probe, context.tokens_per_batch)
        return Reference(context.options.reference, logprobs, probe, probed)

    if context.options.reference == "previous_task" and context.objective.needs_reference:
        found = compute()
        return lambda: found
    return compute


def _sample_round(
    context: RunContext, result: TaskResult, prompts: PreparedRows, folder: Path, number: int, scale: float | None
) -> PreparedRows | None:
    """Sample a round's answers, score and weigh them; None where there is nothing (more) to learn from them."""
    seed = _seed(result.task, number, "sampling")
    try:
        rollout = sample_and_score(context, prompts.rows, folder, number, seed)
    except ShortfallError as error:
        if number == 1:
            raise
        # What earlier rounds have taught stands: the policy has come to write longer.
        result.warnings += (f"round {number} is not learned: {error}",)
        context.log(f"  warning: {result.warnings[-1]}")
        return None
    result.rollouts.append(rollout.facts)
    context.log(f"  round {number}: {rollout.one_line()}")
    for warning in rollout.warnings:
        context.log(f"  warning: {prompts.rows.source}: {warning}")
        result.warnings += (f"round {number}: {warning}",)
    if number > 1 and rollout.settled:
        context.log("  all answers have the same reward: there is nothing left to learn from them")
        return None
    learned = prepare(context, rollout.rows, scale)
    for line in learned.lines:
        context.log(line)
    return learned


def _seed(task: Task, number: int, purpose: str) -> int:
    """Seeds that neither rounds nor tasks nor purposes share, but by chance."""
    return random.Random(f"{task.seed}/{number}/{purpose}").randrange(_SEEDS)
