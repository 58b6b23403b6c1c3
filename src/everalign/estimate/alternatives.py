"""What else the user could do with the same rows, by the same formulas: see docs/estimate.md."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from everalign.estimate.estimator import Estimated, context_from_config
from everalign.estimate.prediction import Clock, Range, predicted_memory
from everalign.estimate.shape import saved_bytes, saved_bytes_on_cpu, shape_of
from everalign.estimate.work import Rows, Work, plan_stage, pooled
from everalign.learning.context import Log

# Defaults of TRL 1.16: per_device_train_batch_size; GRPOConfig.num_generations and max_completion_length. Both trainers
# compute activations twice (gradient_checkpointing), and GRPO has no reference (beta 0).
_TRL_BATCH = 8
_GRPO_ANSWERS, _GRPO_LONGEST = 8, 512
# Answers that GRPO writes side by side: an assumption.
_GRPO_AT_ONCE = 64
# Logits that TRL holds: as computed, in fp32, and their log-softmax.
_TRL_LOGITS = 3


@dataclass(frozen=True)
class Alternative:
    """Something else to do.

    Args:
        name: what.
        seconds: of training; None where nothing is trained, or where it cannot be told.
        memory: bytes at the highest; None where nothing is trained here.
        available: of the machine.
        dollars: that do not depend on the hours, such as those of calls; None for none.
        note: what it means, or what is missing.
    """

    name: str
    seconds: Range | None
    memory: float | None
    available: float
    note: str
    dollars: float | None = None

    def cost(self, price: float | None) -> Range | None:
        """Return dollars at a price of dollars an hour; None where it is not known."""
        if self.dollars is not None:
            return Range(self.dollars, self.dollars)
        return None if self.seconds is None or price is None else self.seconds.times(price / 3600)

    def to_dict(self, price: float | None) -> dict[str, Any]:
        """Return it as JSON holds it."""
        cost = self.cost(price)
        return {
            "name": self.name,
            "seconds": None if self.seconds is None else [self.seconds.low, self.seconds.high],
            "memory": self.memory,
            "fits": None if self.memory is None else self.memory <= self.available,
            "cost": None if cost is None else [cost.low, cost.high],
            "note": self.note,
        }


def alternatives(
    estimated: Estimated,
    arguments: Mapping[str, Any],
    upstream: str | None,
    api_price: tuple[float, float] | None,
    answers: float | None,
    log: Log,
) -> list[Alternative]:
    """Return what else could be done: training in other ways, training another model, and calling one.

    Args:
        estimated: the run.
        arguments: those of `Learner`.
        upstream: the model whose answers a corrector corrects.
        api_price: dollars for a million tokens that a larger model reads, and writes.
        answers: that are served over the time that counts.
        log: called with one line for each thing that happens.
    """
    return [
        _joint(estimated),
        _trl_dpo(estimated),
        _grpo(estimated),
        _upstream(estimated, arguments, upstream, log),
        _calls(estimated, api_price, answers),
    ]


def _joint(estimated: Estimated) -> Alternative:
    """Training anew on all rows so far, after every task."""
    name, own, memory = "retrain on all tasks together", estimated.plan.rows, estimated.prediction.memory
    context, clock, seconds = estimated.context, estimated.clock, Range()
    for number in range(1, len(own) + 1):
        rows = pooled(own[:number])
        for goal, options in context.stages():
            stage = plan_stage(context, goal, options, rows, None, clock.shape.packed, clock.layout.processes)
            seconds += clock.seconds(stage.reference, "forward")
            seconds += clock.seconds(stage.work, "training", 0, stage.steps, stage.uneven)
    count = sum(part.count for part in own)
    note = f"after every task, from the base model; {count:,} rows in the end" if len(own) > 1 else "one task: the same"
    return Alternative(name, seconds, memory.peak, memory.available, note)


def _trl_dpo(estimated: Estimated) -> Alternative:
    """DPO as TRL computes it: every prompt twice, padding, the reference in every step, all logits at once."""
    name, clock, plan = "DPO with TRL", estimated.clock, estimated.plan
    available = clock.machine.memory
    if any(len(row.responses) != 2 for rows in plan.rows for row in rows.sample):
        return Alternative(name, None, None, available, "for preferences alone")
    options = estimated.context.options
    work, steps, longest = Work(), 0, 0
    for rows in plan.rows:
        found, widest = _trl_batches(rows)
        work += found.times(options.epochs)
        steps += math.ceil(options.epochs * rows.count / options.batch_size)
        longest = max(longest, widest)
    trl = replace(clock, recomputed=True)
    seconds = trl.seconds(work, "training", 0, steps) + trl.seconds(work, "forward")
    shape, sequences = clock.shape, 2 * _TRL_BATCH
    tokens = sequences * longest
    kept = (
        tokens * shape.layers * shape.hidden * shape.itemsize + estimated.saved.layer * tokens / estimated.saved.tokens
    )
    logits = _TRL_LOGITS * 4.0 * tokens * shape.vocabulary
    base = _standing(estimated)
    note = "prompts twice, padding, references in every step, activations computed twice"
    return Alternative(name, seconds, base + kept + logits, available, note)


def _standing(estimated: Estimated) -> float:
    """Return the bytes of what is there whatever is computed."""
    parts = estimated.prediction.memory.parts
    return sum(parts.get(part, 0.0) for part in ("libraries", "weights", "learned", "gathered layers"))


def _trl_batches(rows: Rows) -> tuple[Work, int]:
    """Return the work of one epoch in batches of 8 pairs in random order, padded to the longest, and that length."""
    order = list(rows.sample)
    random.Random(0).shuffle(order)
    work, widest = Work(), 0
    for start in range(0, len(order), _TRL_BATCH):
        batch = order[start : start + _TRL_BATCH]
        width = max(len(row.prompt) + len(tokens) for row in batch for tokens in row.responses)
        count, widest = 2 * len(batch), max(widest, width)
        work += Work(count * width, count * width, count * width * (width + 1) / 2, 1)
    return work.times(rows.count / len(order)), widest


def _grpo(estimated: Estimated) -> Alternative:
    """GRPO on the same prompts: answers are written, scored by a model of the same size, and learned once."""
    clock, plan, context = replace(estimated.clock, recomputed=True), estimated.plan, estimated.context
    count = sum(rows.count for rows in plan.rows) * _GRPO_ANSWERS * context.options.epochs
    low, high = min(plan.answer, _GRPO_LONGEST), float(_GRPO_LONGEST)
    ends = []
    for tokens in (low, high):
        read = count * (plan.prompt + tokens)
        work = Work(read, count * tokens, count * (plan.prompt + tokens) ** 2 / 2, count / _TRL_BATCH)
        steps = math.ceil(count / (_TRL_BATCH * context.options.batch_size))
        written = clock.decoding(count, tokens, plan.prompt, _GRPO_AT_ONCE)
        ends.append(
            written + clock.seconds(work, "training", 0, steps) + clock.seconds(replace(work, targets=0), "forward")
        )
    shape = clock.shape
    tokens = _TRL_BATCH * (plan.prompt + high)
    kept = tokens * shape.layers * shape.hidden * shape.itemsize
    kept += estimated.saved.layer * tokens / estimated.saved.tokens + _TRL_LOGITS * 4.0 * tokens * shape.vocabulary
    base = _standing(estimated)
    cache = _GRPO_AT_ONCE * (plan.prompt + high) * shape.cache_bytes
    memory = base + shape.weight_bytes + max(kept, cache)
    note = f"{_GRPO_ANSWERS} answers of up to {_GRPO_LONGEST} tokens a prompt, and a reward model of the same size"
    return Alternative("GRPO", Range(ends[0].low, ends[1].high), memory, clock.machine.memory, note)


def _upstream(estimated: Estimated, arguments: Mapping[str, Any], upstream: str | None, log: Log) -> Alternative:
    """Training the model itself whose answers a corrector would correct, on as many rows."""
    name, machine = "train the upstream instead", estimated.clock.machine
    if estimated.context.objective.name != "correction":
        return Alternative(name, None, None, machine.memory, "the run trains the model itself")
    if upstream is None:
        return Alternative(name, None, None, machine.memory, "give --upstream MODEL, the model that is corrected")
    context = context_from_config({**arguments, "model": upstream}, machine, log)
    shape = shape_of(context.policy, machine.is_cpu)
    largest = max((s for t in estimated.plan.tasks for s in t.stages), key=lambda stage: stage.largest_work.tokens)
    config, precision = context.policy.language_model.config, str(context.options.precision)
    if machine.is_cpu:
        saved = saved_bytes_on_cpu(config, precision, context.adapter, context.objective, shape.layers)
    else:
        saved = saved_bytes(context.policy, context.objective, largest.largest)
    memory = predicted_memory(
        shape, machine, saved, round(largest.largest_work.tokens), largest.largest_work.targets, 0,
        context.options.checkpointing, False, layout=estimated.clock.layout,
    )  # fmt: skip
    own = estimated.clock
    clock = Clock(shape, machine, precision, saved.total / saved.tokens, memory.checkpointing, own.factor, own.layout)
    seconds = clock.seconds(estimated.plan.training, "training", 0, estimated.plan.steps, 1.0)
    return Alternative(name, seconds, memory.peak, machine.memory, f"{upstream}, as many rows and tokens")


def _calls(estimated: Estimated, price: tuple[float, float] | None, answers: float | None) -> Alternative:
    """Calling a larger model for every answer, with nothing trained."""
    name, plan, machine = "API calls to a larger model", estimated.plan, estimated.clock.machine
    if price is None:
        return Alternative(name, None, None, machine.memory, "give --api-price IN,OUT in dollars a million tokens")
    each = (plan.prompt * price[0] + plan.answer * price[1]) / 1e6
    note = f"${1000 * each:,.2f} for 1,000 answers of {plan.prompt:.0f} + {plan.answer:.0f} tokens"
    if answers is None:
        return Alternative(name, None, None, machine.memory, f"{note}; give --answers N for a sum")
    return Alternative(name, None, None, machine.memory, note, dollars=each * answers)
