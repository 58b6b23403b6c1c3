"""A task's rows on their way to training: as a set, with rewards where they have none, prepared by the objective."""

import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from everalign.data.readers import Source
from everalign.data.records import (
    Correction,
    CorrectionSet,
    Preference,
    PreferenceSet,
    Scored,
    ScoredSet,
)
from everalign.data.rows import RowSet
from everalign.data.tokenization import TokenizedRows
from everalign.errors import InputError, ShortfallError
from everalign.learning.context import RunContext
from everalign.learning.rollouts import check_sampling, sample_and_score, score
from everalign.learning.task_files import Load
from everalign.learning.tracking import Attempt
from everalign.methods import Task
from everalign.modeling.policy import Snapshot
from everalign.storage import exclusive
from everalign.training.base_objective import Objective, PreparedRows
from everalign.training.reference import Reference, policy_key, sequence_logprobs
from everalign.training.stage import StageResult, train_stage

Rows = Sequence[Preference] | Sequence[Scored] | Sequence[Correction] | Source
AnySet = RowSet[Any]

_SETS: tuple[type[AnySet], ...] = (PreferenceSet, ScoredSet, CorrectionSet)


def as_set(rows: Rows, load: Load) -> AnySet:
    """Return rows as a set of their kind.

    Args:
        rows: a set, a sequence of records, or whatever else a reader takes.
        load: reads what is neither.
    """
    if isinstance(rows, RowSet):
        return rows
    given: Any = rows
    first = next(iter(given), None) if isinstance(given, Sequence) and not isinstance(given, str) else None
    kind = next((kind for kind in _SETS if isinstance(first, kind.record)), None)
    return load(given) if kind is None else kind.of(given)


@dataclass(frozen=True)
class GivenTask:
    """A task as it was given.

    Args:
        name: unique in a run.
        rows: its training rows; None where only its test set is given.
        test: held-out rows; None for none.
        label: whose policy learns the rows and is scored on them; None of a method that does not read labels.
    """

    name: str
    rows: AnySet | None
    test: AnySet | None
    label: str | None

    @classmethod
    def of(cls, context: RunContext, name: str, rows: AnySet | None, test: AnySet | None) -> "GivenTask":
        """Return a task with the label of its rows, which is its name where they have none.

        Raises:
            InputError: the rows have several labels.
        """
        found: dict[str, AnySet] = {}
        for given in (rows, test):
            if context.method.labelled and given is not None:
                found |= dict.fromkeys(given.labels, given)
        if len(found) > 1:
            names = ", ".join(map(repr, found))
            raise InputError(
                f"task {name!r}: its rows have several labels ({names}), and a task has one: split the rows "
                "(rows.by_label()), and learn those of each label as a task of their own"
            )
        return cls(name, rows, test, next(iter(found), name) if context.method.labelled else None)


def prepare_rows(context: RunContext, rows: AnySet) -> PreparedRows:
    """Make a task's rows ready to be learned.

    Answers without rewards get them here; prompts alone are left to be sampled when it is their turn.

    Raises:
        InputError: the objective does not learn from this kind of rows, there are no rewards or weights for them, or
            most of them are lost on the way (see `everalign.errors`).
        EveralignError: scoring failed.
    """
    if isinstance(rows, ScoredSet) and rows.prompts_alone and context.scorer is not None:
        check_sampling(context, rows)
        prepared = PreparedRows(rows, rows, to_sample=True)
    else:
        prepared = replace(prepare(context, _rewarded(context, rows)), given=rows)
    for warning in prepared.warnings:
        context.log(f"  warning: {rows.source}: {warning}")
    return replace(prepared, lines=(*context.notes(rows), *prepared.lines))


def prepare(context: RunContext, rows: AnySet, scale: float | None = None) -> PreparedRows:
    """Let the objective prepare rows that have all it needs; errors name their source."""
    try:
        return context.objective.prepare(rows, context, scale)
    except InputError as error:
        raise error.at(rows.source) from error


def _rewarded(context: RunContext, rows: AnySet) -> AnySet:
    """Return rows with the rewards that the run's scorer gives them, if it has one and they have none."""
    if context.scorer is None or any(row.has("rewards") for row in rows):
        return rows
    answers = [row if isinstance(row, Scored) else Scored.from_preference(row, rewards=None) for row in rows]
    unscored = ScoredSet(tuple(answers), rows.source).require("completions")
    key = hashlib.sha256(f"{context.scorer.fingerprint} {unscored.fingerprint}".encode()).hexdigest()
    context.log(f"scoring {rows.source}")
    path = context.folder / f"{key[:32]}.scored.jsonl"
    # Runs may share the folder: the second finds the file of the first, and asks for nothing again.
    waiting = "is scoring the same answers: waiting for it"
    with exclusive(path.with_suffix(".lock"), wait=lambda holder: context.log(f"  {holder} {waiting}")):
        return replace(score(context, unscored, path), source=rows.source)


_PROBE_ROWS = 16
# Nats that chosen answers gain on rejected ones, over all of their tokens: less is nothing, in answers of any length.
_STANDSTILL = 0.3
# A margin at step 0 that is none: the stage begins at its reference.
_NO_MARGIN = 1e-3
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


def train_task(
    context: RunContext, task: Task, rows: PreparedRows, work: Path, before: Snapshot | None = None
) -> TaskResult:
    """Train the policy in place on a task and on what the method replays beside it.

    Args:
        context: the learner's parts.
        task: the task; of prompts alone, what is learned is sampled here.
        rows: its rows, prepared.
        work: folder for checkpoints and samples; what a killed attempt left there is continued.
        before: the policy before the task, where that is not the policy as it is now.

    Raises:
        ShortfallError: most answers sampled in the first round did not end, or most prompts have too few that did.
    """
    result = TaskResult(task, rows.facts, warnings=rows.warnings)
    method = context.method
    replayed = method.rows(task)
    if warning := method.warning(task, replayed):
        _warn(context, result, warning)
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
        own, apart = method.own_rows(result.task), method.apart(result.task)
        tokenized = context.objective.tokenize(own, [*replayed, *apart], context)
        if tokenized.altered:
            context.log(f"  {tokenized.one_line()}")
        # What the folder holds of other rows is left alone.
        folder = folder / tokenized.fingerprint[:16]
        reference = _reference(context, tokenized, before)
        for index, (objective, options) in enumerate(context.stages()):
            attempt = Attempt(work.name, task.name, number, index, objective.name)
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
                    apart=len(apart),
                    learns_for=f"{context.model_key} {method.name} {method.settings()} {task.index} {task.name}",
                    hooks=method,
                    progress=partial(context.progress, objective.name),
                    figures=None if context.tracker is None else partial(context.tracker.figures, attempt),
                    log=context.log,
                )
            )
            _note_standstill(context, result, objective)
    return result


def _note_standstill(context: RunContext, result: TaskResult, objective: Objective) -> None:
    """Warn where the stage that ends has taught next to nothing: what a learning rate far too low looks like."""
    stage = result.reports[-1]
    gained = objective.gained(stage.curve)
    if gained is not None and abs(stage.step0_margin or 0.0) < _NO_MARGIN and abs(gained) < _STANDSTILL:
        _warn(
            context,
            result,
            f"{stage.stage} taught next to nothing: after {stage.steps} steps chosen answers have gained "
            f"{gained:.2g} nats on rejected ones; the learning rate may be too low "
            f"({context.options.learning_rate:g} now)",
        )


def _warn(context: RunContext, result: TaskResult, warning: str) -> None:
    """Log a warning, and keep it with the version."""
    result.warnings += (warning,)
    context.log(f"  warning: {warning}")


def _reference(context: RunContext, rows: TokenizedRows, before: Snapshot | None) -> Callable[[], Reference]:
    """Return what computes or looks up the reference; at once where it is the policy before the task's stages."""
    policy, name = context.policy, str(context.options.reference)

    def compute() -> Reference:
        with ExitStack() as stack:
            if name == "base":
                updates = {}
                stack.enter_context(policy.as_base())
            elif name == "previous_task" and before is not None:
                updates = dict(before.updates)
                stack.enter_context(stack.enter_context(policy.as_snapshot(before))())
            else:
                updates = policy.total()
            key = policy_key(context.model_key, updates)
            probe = rows[:: max(1, len(rows) // _PROBE_ROWS)][:_PROBE_ROWS]
            progress = partial(context.progress, "reference")
            logprobs = context.cache.logprobs(policy, key, rows, context.tokens_per_batch, progress)
            probed = sequence_logprobs(policy, probe, context.tokens_per_batch)
        return Reference(name, logprobs, probe, probed)

    if name == "previous_task" and context.objective.needs_reference:
        found = compute()
        return lambda: found
    return compute


def _sample_round(
    context: RunContext, result: TaskResult, prompts: PreparedRows, folder: Path, number: int, scale: float | None
) -> PreparedRows | None:
    """Sample a round's answers, score and weigh them; None where there is nothing (more) to learn from them."""
    seed = _seed(result.task, number, "sampling")
    try:
        rollout = sample_and_score(context, prompts.rows, folder, number, seed, scale)
    except ShortfallError as error:
        if number == 1:
            raise
        # What earlier rounds have taught stands: the policy has come to write longer.
        _warn(context, result, f"round {number} is not learned: {error}")
        return None
    result.rollouts.append(rollout.facts)
    context.log(f"  round {number}: {rollout.one_line()}")
    for warning in rollout.warnings:
        context.log(f"  warning: {prompts.rows.source}: {warning}")
        result.warnings += (f"round {number}: {warning}",)
    if number > 1 and len({reward for row in rollout.rows for reward in row.rewards}) == 1:
        context.log("  all answers have the same reward: there is nothing left to learn from them")
        return None
    learned = prepare(context, rollout.rows, scale or rollout.scale)
    for line in learned.lines:
        context.log(line)
    return learned


def _seed(task: Task, number: int, purpose: str) -> int:
    """Seeds that neither rounds nor tasks nor purposes share, but by chance."""
    return random.Random(f"{task.seed}/{number}/{purpose}").randrange(_SEEDS)
