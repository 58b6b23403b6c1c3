"""Estimate a run: from its recipe and a model's configuration alone, or from a learner that is about to begin."""

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from everalign.data.collate import training_plan
from everalign.data.tokenization import TokenizedRow
from everalign.errors import EveralignError, InputError
from everalign.estimate.machines import ONE, Layout, Machine, machine_at_hand, this_processor
from everalign.estimate.prediction import Clock, Prediction, calibrated, predict, predicted_memory
from everalign.estimate.shape import (
    ModelShape,
    Saved,
    meta_policy,
    model_from_config,
    saved_bytes,
    saved_bytes_on_cpu,
    shape_of,
)
from everalign.estimate.work import RunPlan, plan_run, work_of_batches
from everalign.evaluation.scorers import Scorer
from everalign.learning.context import Log, RunContext, checked_objective, make_context
from everalign.learning.options import AdapterOptions, RolloutOptions
from everalign.learning.task_files import LoadedTask
from everalign.methods import Method
from everalign.modeling.loading import load_tokenizer, readable_length
from everalign.modeling.runtime import free_memory, peak_memory, prepare_process, training_device
from everalign.options import Precision
from everalign.training.options import WeightOptions
from everalign.training.reference import Reference, ReferenceCache, sequence_logprobs
from everalign.training.stage import train_stage

_MEASURED_STEPS = 3
# How far a calibrated time may still be off: steps differ, and so do the shares of what else a run does.
_CALIBRATED_SPREAD = 1.25
# Tokens that are counted on a model that is there.
_COUNTED_TOKENS = 512
# Highest rank of a long-term adapter whose method sets none.
_RANK_CAP = 64


@dataclass(frozen=True)
class Estimated:
    """A prediction with what it was made of, which alternatives are made of too.

    Args:
        prediction: what the run takes.
        plan: its work.
        clock: turned it into seconds.
        saved: bytes of the largest micro-batch.
        context: the learner's parts, with the policy on the meta device.
    """

    prediction: Prediction
    plan: RunPlan
    clock: Clock
    saved: Saved
    context: RunContext


class _Unasked:
    """Stands for the scorer that a run would ask."""

    fingerprint = "unasked"

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        raise EveralignError("an estimate asks no scorer")


def context_from_config(arguments: Mapping[str, Any], machine: Machine, log: Log) -> RunContext:
    """Put a learner's parts together around a policy on the meta device.

    Args:
        arguments: those of `Learner`, as a recipe gives them.
        machine: where the run would be.
        log: called with one line for each thing that happens.

    Raises:
        InputError: the settings contradict each other, or the model has no usable configuration or tokenizer.
    """
    method: Method = arguments["method"]
    scorer: Scorer | None = _Unasked() if arguments.get("reward") is not None else None
    rollouts = arguments.get("rollouts") or RolloutOptions()
    adapter = arguments.get("adapter")
    goal, options = checked_objective(
        method,
        arguments.get("objective", "fpo"),
        arguments["training"],
        adapter is not None,
        arguments.get("weighting") or WeightOptions(),
        scorer,
        rollouts,
        arguments.get("correction"),
    )
    if method.prompts is not None:
        raise InputError(f"method {method.name}: what learned prompts take is not estimated; choose another method")
    prepare_process()
    adapter = adapter or AdapterOptions()
    precision: Precision = ("fp32" if machine.is_cpu else "bf16") if options.precision == "auto" else options.precision
    if options.attention == "flex" and machine.is_cpu:
        raise InputError("attention flex needs a GPU: use attention sdpa", field="attention")
    model, base_adapter = arguments["model"], arguments.get("base_adapter")
    tokenizer = load_tokenizer(model, adapter=base_adapter)
    goal.bind(model, tokenizer)
    base = model_from_config(model, base_adapter, precision, tokenizer, options.quantize)
    options = options.replace(precision=precision, max_length=readable_length(options.max_length, base, model, log))
    policy = meta_policy(base, adapter)
    return RunContext(
        model_name=model,
        base_adapter=base_adapter,
        model_key="",
        tokenizer=tokenizer,
        policy=policy,
        method=method,
        objective=goal,
        options=options,
        adapter=adapter,
        scorer=scorer,
        rollouts=rollouts,
        seed=arguments.get("seed", 0),
        max_length=options.max_length,
        tokens_per_batch=options.tokens_per_batch,
        folder=Path(),
        cache=ReferenceCache(Path()),
        log=log,
        progress=lambda *_: None,
    )


def estimate_run(
    arguments: Mapping[str, Any],
    tasks: Sequence[LoadedTask],
    machine: Machine | None,
    log: Log,
    layout: Layout = ONE,
) -> Estimated:
    """Estimate a run from the model's configuration; no weights are loaded.

    Args:
        arguments: those of `Learner`, as a recipe gives them.
        tasks: name, training rows and held-out rows of each.
        machine: where it would run; None for this machine's processor.
        log: called with one line for each thing that happens.
        layout: how many accelerators share it.

    Raises:
        InputError: what the learner would refuse, or the model cannot be counted.
    """
    machine = this_processor() if machine is None else machine
    if layout.processes > 1 and machine.is_cpu:
        raise InputError("--processes: those of a processor share its cores; give --gpu too", field="--processes")
    if layout.fsdp and layout.processes == 1:
        raise InputError("--fsdp shares the base model between processes: give --processes N too", field="--fsdp")
    context = context_from_config(arguments, machine, log)
    shape = shape_of(context.policy, machine.is_cpu)
    if layout.fsdp and not shape.layer_bytes:
        raise InputError("--fsdp: the base model is quantised, or its layers are not known: leave it out")
    answers, gate = arguments.get("sample_answers", 0), arguments.get("gate")
    return _estimated(context, tasks, machine, shape, answers, gate, layout=layout)


def predict_learner(
    context: RunContext,
    tasks: Sequence[LoadedTask],
    sample_answers: int,
    gate: float | None,
    learned: Collection[str] = (),
) -> Prediction | None:
    """Predict what a learner, whose model is loaded, is about to do on its machine.

    Args:
        context: its parts.
        tasks: name, training rows and held-out rows of each.
        sample_answers: held-out prompts of a task that are answered.
        gate: its tolerance; None for none.
        learned: names of tasks that are learned already.

    Returns:
        None where no task is left.

    Raises:
        InputError: the GPU is unknown, or the model cannot be counted.
    """
    if context.method.prompts is not None:
        raise InputError("what learned prompts take is not estimated")
    if all(name in learned for name, _, _ in tasks):
        return None
    machine = machine_at_hand(next(context.policy.parameters()).device)
    shape = shape_of(context.policy, machine.is_cpu)
    silent = replace(context, log=lambda _: None)
    return _estimated(silent, tasks, machine, shape, sample_answers, gate, learned).prediction


def _estimated(
    context: RunContext,
    tasks: Sequence[LoadedTask],
    machine: Machine,
    shape: ModelShape,
    sample_answers: int,
    gate: float | None,
    learned: Collection[str] = (),
    layout: Layout = ONE,
) -> Estimated:
    flex = context.options.attention == "flex"
    packed = shape.packed or (flex and shape.shared)
    plan = plan_run(context, tasks, sample_answers, packed, gate is not None, learned, layout.processes)
    largest = max((stage for task in plan.tasks for stage in task.stages), key=lambda stage: stage.largest_work.tokens)
    saved = _saved(context, shape, machine, largest.largest)
    has_tests = plan.start.tokens > 0
    free = None  # a GPU is empty before
    if machine.is_cpu:  # what its process may still take when the weights are loaded
        free = max(0.0, free_memory(torch.device("cpu")) - machine.reserved - shape.weight_bytes)
    memory = predicted_memory(
        shape,
        machine,
        saved,
        round(largest.largest_work.tokens),
        largest.largest_work.targets,
        max(task.memory_rank for task in plan.tasks) + (shape.rank if context.method.consolidates else 0),
        context.options.checkpointing,
        has_tests,
        free,
        layout,
    )
    precision, twice = str(context.options.precision), memory.checkpointing
    clock = Clock(shape, machine, precision, saved.total / saved.tokens, twice, layout=layout)
    cap = int(getattr(context.method, "rank_cap", _RANK_CAP))
    consolidates = context.method.consolidates and context.method.long_term
    replayed = 0 if context.method.buffer is None else plan.kept_rows
    return Estimated(predict(plan, clock, memory, consolidates, cap, replayed), plan, clock, saved, context)


def _saved(context: RunContext, shape: ModelShape, machine: Machine, largest: Sequence[TokenizedRow]) -> Saved:
    """Count what the largest micro-batch keeps: on the meta device, on two layers of it, or on the model itself."""
    policy, objective = context.policy, context.objective
    if not next(policy.parameters()).is_meta:
        # A row of few tokens tells enough: what is kept grows with their number.
        row = max(largest, key=lambda row: len(row.prompt) + max(map(len, row.responses)))
        each = max(2, _COUNTED_TOKENS // (1 + len(row.responses)))
        responses = tuple(tokens[:each] for tokens in row.responses)
        return saved_bytes(policy, objective, [replace(row, prompt=row.prompt[-each:], responses=responses)])
    if machine.is_cpu:
        config = policy.language_model.config
        return saved_bytes_on_cpu(config, str(context.options.precision), context.adapter, objective, shape.layers)
    found = saved_bytes(policy, objective, largest)
    if context.options.attention == "flex":
        rows, width = objective.collate(largest, shape.shared)["input_ids"].shape
        return replace(found, total=found.total - rows * width**2 * shape.itemsize)
    return found


# ---- measured ----


@dataclass(frozen=True)
class Measured:
    """What three real steps took.

    Args:
        seconds: of the last two, on a machine that does nothing else.
        predicted: the middle of what was predicted for them.
        peak: bytes that the process, or the GPU, held at the highest.
        machine: where.
    """

    seconds: float
    predicted: float
    peak: float
    machine: str

    @property
    def factor(self) -> float:
        """Measured over predicted."""
        return self.seconds / self.predicted

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {**asdict(self), "factor": self.factor}

    def one_line(self) -> str:
        """One line of text."""
        return (
            f"Measured: two real steps took {self.seconds:.3g} s, predicted were {self.predicted:.3g} s "
            f"({self.factor:.2f} times); at the highest {self.peak / 2**30:.2f} GiB. The times are corrected by that."
        )


def measure(arguments: Mapping[str, Any], estimated: Estimated, log: Log) -> tuple[Estimated, Measured]:
    """Load the model, train three steps on rows of the first task, and return the estimate that this corrects.

    Nothing is written but temporary files. The first step, in which libraries prepare themselves, does not count.

    Raises:
        InputError: the model cannot be used here, or the machine is another one than what was asked about.
    """
    wanted, device = estimated.clock.machine, training_device(log)
    here = machine_at_hand(device)
    if here.name != wanted.name:
        raise InputError(
            f"--measure: this machine is {here.name}, and the estimate is for {wanted.name}: leave --measure out, "
            f"or give --gpu {here.name}",
            field="--measure",
        )
    with tempfile.TemporaryDirectory() as folder:
        context = make_context(
            arguments["model"],
            arguments.get("base_adapter"),
            arguments["method"],
            arguments.get("objective", "fpo"),
            arguments["training"],
            arguments.get("adapter"),
            arguments.get("weighting") or WeightOptions(),
            estimated.context.scorer,
            arguments.get("rollouts") or RolloutOptions(),
            arguments.get("correction"),
            arguments.get("seed", 0),
            Path(folder),
            log,
            lambda *_: None,
        )
        seconds, predicted = _timed(context, estimated, device)
    found = Measured(seconds, predicted, float(peak_memory(device)), here.name)
    factor = found.factor
    prediction = calibrated(estimated.prediction, factor, _CALIBRATED_SPREAD)
    return replace(estimated, prediction=prediction, clock=replace(estimated.clock, factor=(factor, factor))), found


def _timed(context: RunContext, estimated: Estimated, device: torch.device) -> tuple[float, float]:
    """Return what the second and third step took, and what was predicted for them."""
    objective, options = context.stages()[-1]
    rows = estimated.plan.rows[0].spread_over(_MEASURED_STEPS * options.batch_size)
    stamps: list[float] = []

    def stamp(done: int, total: int) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            stamps.append(time.perf_counter())
        else:  # a processor's own time, divided by its threads, which other programs do not lengthen
            stamps.append(time.process_time() / torch.get_num_threads())

    def reference() -> Reference:
        return Reference("stage_start", sequence_logprobs(context.policy, rows, context.tokens_per_batch))

    options = options.replace(epochs=1.0, checkpoint_steps=0)
    train_stage(
        context.policy,
        objective,
        rows,
        options,
        None,
        seed=context.seed,
        reference=reference if objective.needs_reference else None,
        progress=stamp,
    )
    shared = context.policy.head.shared
    lengths = [objective.tokens(row, shared) for row in rows]
    plan = training_plan(lengths, options.batch_size, options.tokens_per_batch, 1.0, context.seed)
    batches = [[rows[i] for i in batch] for share in plan.shares[1:] for batch in share]
    clock = estimated.clock
    work = work_of_batches(batches, partial(objective.collate, shared=shared), shared, clock.shape.packed)
    return stamps[-1] - stamps[0], clock.seconds(work, "training").middle
