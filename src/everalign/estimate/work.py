"""The work of a run: its steps, and the tokens that are computed, by the code that training plans batches with."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from everalign.data.chat_tokens import encode_prompt
from everalign.data.collate import Batch, batches_by_length, collate, row_tokens, training_plan
from everalign.data.records import Scored
from everalign.data.rows import RowSet, spread
from everalign.data.tokenization import TokenizedRow, truncate
from everalign.errors import InputError
from everalign.learning.context import RunContext
from everalign.learning.evaluation_suite import MOST_WRITTEN
from everalign.learning.task_training import prepare
from everalign.methods.ewc import ElasticWeightConsolidation
from everalign.methods.gradient_projection import GradientMemory
from everalign.modeling.attention import runs_of
from everalign.training.base_objective import Objective
from everalign.training.options import StageOptions

MOST_ROWS = 1000
"""Rows that are tokenised at most, of all files together."""

# A plan is made of at most so many rows; larger sets are multiples of it.
_PLANNED_ROWS = 20_000
# Micro-batches of a plan that are laid out and counted.
_COUNTED_BATCHES = 24
# Rows that the policy and its reference are compared on before a stage (`everalign.learning.task_training`).
_PROBE_ROWS = 16
# Held-out pairs that a divergence is measured on (`everalign.evaluation.preference`).
_KL_PAIRS = 64


@dataclass(frozen=True)
class Work:
    """What is computed of some batches.

    Args:
        tokens: T, positions that are computed, padding included where there is any.
        targets: K, response tokens, for which the output matrix is needed.
        pairs: of positions for which attention computes a score.
        batches: micro-batches.
    """

    tokens: float = 0.0
    targets: float = 0.0
    pairs: float = 0.0
    batches: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tokens + other.tokens,
            self.targets + other.targets,
            self.pairs + other.pairs,
            self.batches + other.batches,
        )

    def times(self, factor: float) -> "Work":
        """Return the work of `factor` times as much."""
        return Work(self.tokens * factor, self.targets * factor, self.pairs * factor, self.batches * factor)


@dataclass(frozen=True)
class Rows:
    """Tokenised rows that stand for more of their kind.

    Args:
        sample: tokenised ones.
        count: how many there are.
    """

    sample: Sequence[TokenizedRow]
    count: int

    def spread_over(self, count: int) -> list[TokenizedRow]:
        """Return `count` rows, the sample over and over."""
        return [self.sample[i % len(self.sample)] for i in range(count)]


@dataclass(frozen=True)
class StagePlan:
    """A stage of a task.

    Args:
        stage: the objective's name.
        rows: that are learned, replayed ones included.
        replayed: how many of them are.
        steps: optimiser steps.
        work: forward and backward.
        reference: forward, of the reference policy.
        largest: rows of the micro-batch of the most tokens.
        largest_work: its own work.
        uneven: of the processes, the largest share of a step's tokens over the mean, over all steps.
    """

    stage: str
    rows: int
    replayed: int
    steps: int
    work: Work
    reference: Work
    largest: Sequence[TokenizedRow]
    largest_work: Work
    uneven: float = 1.0


@dataclass(frozen=True)
class TaskPlan:
    """A task.

    Args:
        name: its name.
        stages: in order.
        scoring: forward passes of held-out rows afterwards.
        kl: of these, positions at which whole distributions are compared, twice each.
        answers: held-out prompts that are answered afterwards.
        rollouts: answers that are sampled before it is learned, and tokens of each.
        corrections: held-out answers that a corrector corrects for the gate.
        memory_rank: rank of the long-term adapter meanwhile.
    """

    name: str
    stages: Sequence[StagePlan]
    scoring: Work
    kl: float
    answers: int
    rollouts: tuple[int, int]
    corrections: int
    memory_rank: int


@dataclass(frozen=True)
class RunPlan:
    """A run.

    Args:
        tasks: in order.
        start: forward passes of the base model over all held-out rows.
        answers: held-out prompts that it answers.
        calls: how often some are answered, one set after another.
        prompt: tokens of an average prompt.
        answer: tokens of an average response.
        rows: of each task, its own.
        tokens_per_batch: tokens computed at once.
        kept_rows: in the replay buffer at the end.
    """

    tasks: Sequence[TaskPlan]
    start: Work
    answers: int
    calls: int
    prompt: float
    answer: float
    rows: Sequence[Rows]
    tokens_per_batch: int
    kept_rows: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return sum(stage.steps for task in self.tasks for stage in task.stages)

    @property
    def training(self) -> Work:
        """Forward and backward of all stages."""
        return sum((stage.work for task in self.tasks for stage in task.stages), Work())


def plan_run(
    context: RunContext,
    tasks: Sequence[tuple[str, RowSet[Any], RowSet[Any] | None]],
    sample_answers: int,
    packed: bool,
    gated: bool,
    learned: Collection[str] = (),
    processes: int = 1,
) -> RunPlan:
    """Plan a run, or what is left of it.

    Args:
        context: the learner's parts; its policy may lie on the meta device.
        tasks: name, training rows and held-out rows of each.
        sample_answers: held-out prompts of a task that are answered.
        packed: whether rows are computed without padding, as on a processor and by FlexAttention.
        gated: whether every task is scored before it is learned too.
        learned: names of tasks that are learned already, whose held-out rows alone are computed.
        processes: how many share the work.

    Raises:
        InputError: what the learner would refuse of the rows.
    """
    method, left = context.method, [task for task in tasks if task[0] not in learned]
    limit = max(1, MOST_ROWS // max(1, sum(1 if test is None else 2 for _, _, test in tasks)))
    names = [name for name, _, _ in left]
    own = [_tokenized(context, rows, limit) for _, rows, _ in left]
    tests = [_held_out(context, test, limit) for _, _, test in tasks if test is not None]
    if method.regime == "joint":
        names, own_rows = ["all-tasks"], [pooled(own)]
    else:
        own_rows = own
    replayed, kept = _replayed(context, own_rows, limit)
    start = sum((forward_work(context, test, packed) for test in tests), Work())
    kl = _kl_work(context, tests, packed)
    times = 2 if method.consolidates else 1
    corrects = gated and context.objective.name == "correction"
    answers = sum(min(sample_answers, test.count) for test in tests)
    before = max((update.left.shape[1] for update in context.policy.long_term().values()), default=0)
    plans = []
    for number, (name, rows) in enumerate(zip(names, own_rows, strict=True)):
        if method.name == "gdumb" and method.buffer is not None:
            share = float(method.settings()["replay"])
            rows, replayed[number] = balanced_rows(rows, replayed[number], number, share, method.buffer.capacity)
        rank = before + context.adapter.rank * number if method.long_term else 0
        sampled = context.scorer is not None and left[min(number, len(left) - 1)][1].prompts_alone
        rounds = context.rollouts.rounds if sampled else 1
        stages = [
            plan_stage(context, objective, options, rows, replayed[number], packed, processes, number + len(learned))
            for objective, options in context.stages()
        ]
        # At most: how many first answers agree is not known.
        drawn = rows.count * context.rollouts.samples * rounds
        plans.append(
            TaskPlan(
                name,
                stages * rounds,
                (start + kl).times(times) + (start if gated else Work()),
                kl.targets * times,
                answers,
                (drawn, context.rollouts.max_new_tokens) if sampled else (0, 0),
                # Before and after, of the answers as they are and of people's corrections.
                4 * sum(min(MOST_WRITTEN, test.count) for test in tests) if corrects else 0,
                min(rank, getattr(method, "rank_cap", rank)),
            )
        )
    sample = [row for rows in own for row in rows.sample]
    return RunPlan(
        plans,
        start,
        answers,
        len(tests) if answers else 0,
        sum(len(row.prompt) for row in sample) / len(sample),
        sum(len(tokens) for row in sample for tokens in row.responses) / sum(len(row.responses) for row in sample),
        own,
        context.tokens_per_batch,
        kept,
    )


def _replayed(context: RunContext, own: Sequence[Rows], limit: int) -> tuple[list[Rows | None], int]:
    """Return for each task what the method's buffer will hold of earlier ones, those learned already included."""
    buffer = context.method.buffer
    if buffer is None:
        return [None] * len(own), 0
    held = buffer.rows()
    some = list(context.objective.tokenize(spread(held, limit), (), context)) if held else []
    share = float(context.method.settings().get("replay", 1.0))
    return replayed_rows(own, share, buffer.capacity, [Rows(some, len(held))] if some else [])


# ---- rows ----


def _tokenized(context: RunContext, rows: RowSet[Any], limit: int) -> Rows:
    """Tokenise some of a task's rows as training would, and count those of all that would be left."""
    some = replace(rows, items=tuple(spread(rows.items, limit)))
    if context.scorer is not None and rows.prompts_alone:
        answers = tuple([token] * context.rollouts.max_new_tokens for token in range(3, 3 + context.rollouts.samples))
        room = context.max_length
        made = []
        for row in some:
            prompt, kept = truncate(encode_prompt(context.tokenizer, row.prompt), answers, room)
            made.append(TokenizedRow(row.id, prompt, kept, (1.0,) * len(answers)))
        return Rows(made, len(rows))
    if context.scorer is not None and not any(row.has("rewards") for row in some):
        scored = []
        for row in some:
            answered = row if isinstance(row, Scored) else Scored.from_preference(row, rewards=None)
            # They stand for those which a scorer would give.
            scored.append(replace(answered, rewards=tuple(map(float, range(len(answered.completions))))))
        some = replace(some, items=tuple(scored))
    prepared = prepare(context, some)
    tokens = context.objective.tokenize(prepared.rows, (), context)
    if not len(tokens):
        raise InputError(f"{rows.source}: no row is left to learn")
    return Rows(list(tokens), max(1, round(len(rows) * len(tokens) / len(some))))


def _held_out(context: RunContext, test: RowSet[Any], limit: int) -> Rows:
    judged = context.objective.held_out(test, context.log)
    count = min(context.options.test_limit or len(judged), len(judged))
    if not count:
        return Rows([], 0)
    some = replace(judged, items=tuple(spread(judged.items, min(limit, count))))
    return Rows(list(context.objective.tokenize_held_out(some, context)), count)


def pooled(parts: Sequence[Rows]) -> Rows:
    """Return the rows of several sets as one, each in its share."""
    total = sum(part.count for part in parts)
    size = min(total, _PLANNED_ROWS)
    rows = [row for part in parts for row in part.spread_over(max(1, round(part.count * size / total)))]
    return Rows(rows, total)


def replayed_rows(
    own: Sequence[Rows], share: float, capacity: int, held: Sequence[Rows] = ()
) -> tuple[list[Rows | None], int]:
    """Return for each task the rows of earlier ones in a replay buffer that holds some, and how many in the end."""
    held = list(held)
    found: list[Rows | None] = []
    for rows in own:
        found.append(pooled(held) if held else None)
        kept = math.floor(share * rows.count + 1e-9)
        held += [replace(rows, count=kept)] if kept else []
        while (excess := sum(part.count for part in held) - capacity) > 0:
            oldest = held.pop(0)  # the oldest are dropped first
            held = [replace(oldest, count=oldest.count - excess), *held] if oldest.count > excess else held
    return found, sum(part.count for part in held)


def balanced_rows(own: Rows, old: Rows | None, earlier: int, share: float, capacity: int) -> tuple[Rows, Rows | None]:
    """Return what GDumb learns of a task's rows and of those of earlier tasks, which are as many as the task's."""
    drawn, held = max(1, math.floor(share * own.count + 1e-9)), 0 if old is None else old.count
    kept = min(drawn, max(1, capacity - held, capacity // (earlier + 1)))
    left = min(held, capacity - kept)
    return replace(own, count=kept), replace(old, count=left) if old is not None and left else None


# ---- what is computed of them ----


def plan_stage(
    context: RunContext,
    objective: Objective,
    options: StageOptions,
    own: Rows,
    old: Rows | None,
    packed: bool,
    processes: int = 1,
    earlier: int = 0,
) -> StagePlan:
    method = context.method
    apart, old = (old, None) if isinstance(method, GradientMemory) else (None, old)
    rows = own if old is None else pooled([own, old])
    shared = context.policy.head.shared
    planned = rows.spread_over(min(rows.count, _PLANNED_ROWS))
    lengths = [objective.tokens(row, shared, 0) for row in planned]
    plan = training_plan(lengths, options.batch_size, options.tokens_per_batch, options.epochs, context.seed, processes)
    shares = [sum(len(batch) * max(lengths[i] for i in batch) for batch in share) for share in plan.shares]
    slowest = sum(max(shares[first : first + processes]) for first in range(0, len(shares), processes))
    batches = [batch for share in plan.shares for batch in share]
    total = max(1, round(options.epochs * rows.count))
    steps = -(-total // options.batch_size)
    work = work_of_batches(
        [[planned[i] for i in batch] for batch in batches], lambda part: objective.collate(part, shared), shared, packed
    ).times(total / sum(map(len, batches)))
    work += _of_method(context, objective, own, apart, earlier, steps, packed)
    reference = Work()
    if objective.needs_reference:
        # A cached base model knows what it has computed for earlier tasks.
        computed = own if context.options.reference == "base" else rows
        probe = Rows(rows.sample, min(_PROBE_ROWS, rows.count))
        reference = forward_work(context, computed, packed) + forward_work(context, probe, packed).times(2)
    largest = max(batches, key=lambda batch: len(batch) * max(lengths[i] for i in batch))
    old_count = 0 if old is None else old.count
    chosen = [planned[i] for i in largest]
    alone = _work_of(objective.collate(chosen, shared), packed)
    return StagePlan(
        objective.name, rows.count, old_count, steps, work, reference, chosen, alone, slowest * processes / sum(shares)
    )


def _of_method(
    context: RunContext, objective: Objective, own: Rows, apart: Rows | None, earlier: int, steps: int, packed: bool
) -> Work:
    """Count the passes, forward and back, that a method makes besides: over earlier rows, or for Fisher information."""
    method, shared = context.method, context.policy.head.shared
    if isinstance(method, GradientMemory) and apart is not None:
        rows, times = min(apart.count, method.memory_rows * earlier), -(-steps // method.refresh)
        sample, at_once = apart, context.tokens_per_batch
    elif isinstance(method, ElasticWeightConsolidation) and method.strength:
        rows, times, sample, at_once = min(own.count, method.fisher_rows), 1, own, 0  # one row a pass
    else:
        return Work()
    some = sample.spread_over(min(rows, _PLANNED_ROWS))
    batches = batches_by_length([objective.tokens(row, shared, 0) for row in some], at_once)
    found = work_of_batches(
        [[some[i] for i in batch] for batch in batches], lambda part: objective.collate(part, shared), shared, packed
    )
    return found.times(times * rows / len(some))


def forward_work(context: RunContext, rows: Rows, packed: bool) -> Work:
    """Count a forward pass over all responses of some rows, as references and scores are computed."""
    if not rows.count:
        return Work()  # no held-out row changes anything; the learner refuses such a set
    shared = context.policy.head.shared
    planned = rows.spread_over(min(rows.count, _PLANNED_ROWS))
    lengths = [row_tokens(row, shared) for row in planned]
    batches = [[planned[i] for i in batch] for batch in batches_by_length(lengths, context.tokens_per_batch)]
    return work_of_batches(batches, lambda part: collate(part, shared), shared, packed).times(rows.count / len(planned))


def _kl_work(context: RunContext, tests: Sequence[Rows], packed: bool) -> Work:
    """Count what the divergence from the policy before a task takes: two forward passes of chosen responses."""
    found = Work()
    for rows in tests:
        count = min(_KL_PAIRS, rows.count)
        chosen = Rows([row.only([0]) for row in spread(rows.sample, count)], count)
        found += forward_work(context, chosen, packed).times(2)
    return found


def work_of_batches(batches: Sequence[Sequence[TokenizedRow]], lay_out: Any, shared: bool, packed: bool) -> Work:
    """Lay out some of the batches and count them; the others are taken to be as they are, by their tokens."""
    some = spread(batches, _COUNTED_BATCHES)
    sizes = [sum(row_tokens(row, shared) for row in batch) for batch in batches]
    counted = sum((_work_of(lay_out(batch), packed) for batch in some), Work())
    factor = sum(sizes) / sum(spread(sizes, _COUNTED_BATCHES))
    return replace(counted.times(factor), batches=float(len(batches)))


def _work_of(batch: Batch, packed: bool) -> Work:
    ids = batch["input_ids"]
    rows, width = ids.shape
    if "segments" in batch:
        runs = runs_of(batch["segments"], batch["prefixes"])[0, 0].double()
        own, behind = runs[:, 1], runs[:, 3]
        visible = float((own * (own + 1) / 2 + own * behind).sum())
        tokens = float(own.sum())
    elif "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(1).double()
        visible, tokens = float((lengths * (lengths + 1) / 2).sum()), float(lengths.sum())
    else:
        visible, tokens = rows * width * (width + 1) / 2, float(ids.numel())
    # A mask does not spare the library's kernels any score; and padding is computed.
    dense = "segments" in batch and not packed
    return Work(
        tokens if packed else float(ids.numel()),
        float(len(batch["targets"])),
        float(rows * width * width) if dense else visible,
        1.0,
    )
