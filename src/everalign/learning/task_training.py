"""Train one task: its stages against explicit references, with rollouts between rounds where rows are prompts."""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everalign.data.records import ScoredSet
from everalign.data.replay import AnyRow
from everalign.data.tokenization import TargetGroup, TokenizedGroups, TokenizedPair, TokenizedPairs
from everalign.errors import ShortfallError
from everalign.learning.context import RunContext
from everalign.learning.rollouts import sample_and_score
from everalign.learning.task_rows import TaskRows, encode_rows, fewest_answers, weigh_rows
from everalign.methods import Task
from everalign.objectives import implicit_margin
from everalign.training.objectives import Objective
from everalign.training.options import StageOptions
from everalign.training.reference import group_log_probs, pair_log_probs, policy_key
from everalign.training.stage import load_finished, run_stage, save_result

_PROBE_ROWS = 16

Encoded = TokenizedPairs | TokenizedGroups


@dataclass(frozen=True)
class StageReport:
    """What one stage of a task did, as the manifest tells it.

    Args:
        stage: `sft` or the objective's name.
        reference: the reference policy, or None where the objective needs none.
        steps: optimiser steps.
        epochs: passes over the rows.
        seconds: wall-clock time of training, of the last uninterrupted piece where it was resumed.
        step0_margin: mean implicit margin before the first step on a probe of the rows; exactly 0 when the reference
            is the policy that the stage starts from. None without a reference, or where rows are no pairs.
        step0_log_ratio: of rows that are no pairs, the mean over the probe's responses of |log π − log π_ref|, in
            nats; 0 as above.
        rows: rows of the stage, replayed ones included.
        replayed: how many of them are replayed.
        curve: logged steps.
    """

    stage: str
    reference: str | None
    steps: int
    epochs: float
    seconds: float
    rows: int
    replayed: int
    curve: list[dict[str, Any]]
    step0_margin: float | None = None
    step0_log_ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the curve."""
        return {key: value for key, value in asdict(self).items() if key != "curve"}


@dataclass(frozen=True)
class _Reference:
    """Reference log-probabilities of all rows, and of the probe rows computed as the probe will be."""

    name: str
    rows: Tensor | list[Tensor]
    probe_rows: Sequence[TokenizedPair | TargetGroup]
    probe: Tensor


def train_stages(setup: RunContext, pairs: Encoded, replayed: int, work: Path, seed: int) -> list[StageReport]:
    """Train the policy in place on a task's rows.

    Args:
        setup: what stays the same from task to task.
        pairs: the task's rows with the replayed ones behind them.
        replayed: how many are replayed.
        work: folder for checkpoints and for finished stages; what it holds of other rows is left alone.
        seed: seeds the order of the rows.
    """
    work = work / pairs.fingerprint[:16]
    compares = any(objective.needs_reference for objective, _ in setup.stages())
    policy_before = _reference(setup, pairs) if compares and setup.options.reference == "previous_task" else None
    reports = []
    for index, (objective, options) in enumerate(setup.stages()):
        folder = work / f"{index}-{objective.name}"
        earlier = load_finished(setup.policy, folder)
        if earlier is not None:
            report = StageReport(**earlier)
        else:
            reference = (policy_before or _reference(setup, pairs)) if objective.needs_reference else None
            report = _train_stage(setup, objective, options, pairs, replayed, folder, seed + index, reference)
        reports.append(report)
    return reports


def _train_stage(
    setup: RunContext,
    objective: Objective,
    options: StageOptions,
    pairs: Encoded,
    replayed: int,
    folder: Path,
    seed: int,
    reference: _Reference | None,
) -> StageReport:
    start: dict[str, float] = {}
    against = ""
    if reference is not None:
        start, what = _step0(setup, reference)
        against = f", reference = {reference.name}, {what}"
    setup.log(f"  {objective.name}: {len(pairs)} rows ({replayed} replayed){against}")
    result = run_stage(
        setup.policy,
        objective,
        pairs,
        options,
        folder / "checkpoints",
        seed=seed,
        reference=None if reference is None else reference.rows,
        penalty=setup.method.penalty,
        gradient_hook=setup.method.adjust_gradients,
        progress=lambda done, total: setup.progress(objective.name, done, total),
        log=setup.log,
    )
    report = StageReport(
        stage=objective.name,
        reference=None if reference is None else reference.name,
        steps=result.steps,
        epochs=result.epochs,
        seconds=round(result.seconds, 3),
        rows=len(pairs),
        replayed=replayed,
        curve=result.curve,
        **start,
    )
    save_result(setup.policy, asdict(report), folder, objective.name)
    return report


def _reference(setup: RunContext, pairs: Encoded) -> _Reference:
    """Compute or look up the reference, which at this moment is the base model or the policy as it is."""
    preferences = [row for row in pairs if isinstance(row, TokenizedPair)]
    groups = [row for row in pairs if isinstance(row, TargetGroup)]
    everything: Sequence[TokenizedPair | TargetGroup] = groups or preferences
    base = setup.options.reference == "base"
    key = policy_key(setup.model_key, {} if base else setup.policy.total())
    tokens = setup.options.tokens_per_batch
    probe_rows = everything[:: max(1, len(everything) // _PROBE_ROWS)][:_PROBE_ROWS]
    rows: Tensor | list[Tensor]
    with setup.policy.as_base() if base else nullcontext():
        if groups:
            rows = setup.cache.group_log_probs(setup.policy, key, groups, tokens)
        else:
            rows = setup.cache.log_probs(setup.policy, key, preferences, tokens)
        probe = _probe_log_probs(setup, probe_rows)
    return _Reference(setup.options.reference, rows, probe_rows, probe)


def _probe_log_probs(setup: RunContext, rows: Sequence[TokenizedPair | TargetGroup]) -> Tensor:
    """Of pairs (P, 2); of groups one for each of their responses, in a row."""
    groups = [row for row in rows if isinstance(row, TargetGroup)]
    if groups:
        return torch.cat(group_log_probs(setup.policy, groups, setup.options.tokens_per_batch))
    pairs = [row for row in rows if isinstance(row, TokenizedPair)]
    return pair_log_probs(setup.policy, pairs, setup.options.tokens_per_batch)


def _step0(setup: RunContext, reference: _Reference) -> tuple[dict[str, float], str]:
    """Measure on the probe, in the batches the reference was measured in, so that equal policies give exactly 0.

    Returns:
        The report's field with its value, and how it is announced.
    """
    policy = _probe_log_probs(setup, reference.probe_rows)
    if isinstance(reference.probe_rows[0], TargetGroup):
        ratio = (policy - reference.probe).abs().mean().item()
        return {"step0_log_ratio": ratio}, f"mean |log-ratio| at step 0 = {ratio:.6g}"
    chosen, rejected = policy.unbind(1)
    reference_chosen, reference_rejected = reference.probe.unbind(1)
    margins = implicit_margin(chosen, rejected, reference_chosen, reference_rejected, setup.options.beta)
    margin = margins.mean().item()
    return {"step0_margin": margin}, f"margin at step 0 = {margin:.6g}"


# Random generators take 32 bits.
_SEEDS = 2**31
# Stages of a task use consecutive seeds; tasks are this far apart, and runs of neighbouring seeds further.
_TASK_STRIDE, _RUN_STRIDE = 1000, 1_000_003


@dataclass(frozen=True)
class TaskResult:
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


def train_task(setup: RunContext, task: Task, rows: TaskRows, work: Path) -> TaskResult:
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
    if not isinstance(prompts, ScoredSet) or not prompts.prompts_alone:
        return TaskResult(task, _train(setup, rows, replayed, work, task.seed), rows.facts, [], rows.warnings)
    reports: list[StageReport] = []
    rollouts: list[dict[str, float]] = []
    weighed, scale, warnings = rows, None, rows.warnings
    for number in range(1, setup.rollouts.rounds + 1):
        sampling, seed = (_seed(task, number, purpose) for purpose in ("sampling", "training"))
        try:
            rollout = sample_and_score(setup, prompts, work / "rollouts", number, fewest_answers(setup), sampling)
        except ShortfallError as error:
            if number == 1:
                raise
            # What earlier rounds have taught stands: the policy has come to write longer.
            warnings += (f"round {number} is not learned: {error}",)
            setup.log(f"  warning: {warnings[-1]}")
            break
        rollouts.append(rollout.facts)
        setup.log(f"  round {number}: {rollout.one_line()}")
        for warning in rollout.warnings:
            setup.log(f"  warning: {prompts.source}: {warning}")
            warnings += (f"round {number}: {warning}",)
        if number > 1 and rollout.settled:
            setup.log("  all answers have the same reward: there is nothing left to learn from them")
            break
        weighed = weigh_rows(setup, rollout.rows, scale)
        # The first round's, so that a reward is worth as many nats in every round.
        scale = weighed.facts["scale"] if weighed.facts else None
        for line in weighed.lines:
            setup.log(line)
        # Each in its own folder: where it samples what the round before did, that one's result is not its own.
        reports += _train(setup, weighed, replayed, work / f"round-{number}", seed)
    return TaskResult(replace(task, rows=weighed.rows), reports, weighed.facts, rollouts, warnings)


def task_seed(run_seed: int, index: int) -> int:
    """Return the seed of a run's task by its place in the line: what was left out does not change the next one's."""
    return (run_seed * _RUN_STRIDE + index * _TASK_STRIDE) % _SEEDS


def _seed(task: Task, number: int, purpose: str) -> int:
    """Seeds that neither rounds nor tasks nor purposes share, but by chance."""
    return random.Random(f"{task.seed}/{number}/{purpose}").randrange(_SEEDS)


def _train(setup: RunContext, rows: TaskRows, replayed: list[AnyRow], work: Path, seed: int) -> list[StageReport]:
    encoded = encode_rows(setup, rows.rows, replayed)
    if encoded.altered:
        setup.log(f"  {encoded.one_line()}")
    return train_stages(setup, encoded, len(replayed), work, seed)
