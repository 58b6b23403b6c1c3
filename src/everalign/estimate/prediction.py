"""What a planned run takes on a machine: seconds from operations, bytes and launches; memory; disk.

The formulas, their sources and what they assume are in docs/estimate.md.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from everalign.estimate.machines import ONE, Layout, Machine
from everalign.estimate.shape import ModelShape, Saved
from everalign.estimate.work import RunPlan, TaskPlan, Work
from everalign.learning.evaluation_suite import LONGEST_ANSWER
from everalign.options import Checkpointing

# Times that what is kept for the backward pass crosses memory, by element-wise work: forward and back, and forward.
_TRAFFIC = {"training": 6.0, "forward": 2.0}
# The same of logits: written, exponentiated, summed, and multiplied back.
_LOGIT_TRAFFIC = {"training": 6.0, "forward": 4.0}
# Times that a distribution crosses memory where two are compared.
_KL_TRAFFIC = 8.0
# Passes over the layers: launches of a forward pass, and of forward and back, in units of a machine's `launch`.
_LAUNCHES = {"training": 3.0, "forward": 1.0}
# Bytes for each number that learns: itself, its gradient and AdamW's two moments, in fp32; and DDP's copy of gradients.
_LEARNED_BYTES, _BUCKET_BYTES = 16, 4
# Layers of a shared base that are whole at once: the one that is computed, and the next.
_GATHERED = 2
# Of them, those that training takes when it begins (`everalign.training.stage`), and the share of free memory that it
# may take before activations are computed twice.
_TRAINED_BYTES, _USABLE = 12, 0.8
# Logits that exist at once (`everalign.modeling.logprobs`): of a step on a processor and on a GPU; of a divergence.
_CHUNK_LOGITS = {True: 16_777_216, False: 67_108_864}
_LIVE_LOGITS, _KL_COPIES = 67_108_864, 6
# Parts of a run that alternatives to it have too.
_LEARNING = ("rollouts", "reference", "training", "consolidation")
# What a GPU's allocator holds in pieces that nothing fits into: an assumption.
_FRAGMENTS = 0.05
# Imports, the rehearsal on a shrunk copy, the report; and bytes a second at which weights are read.
_START_SECONDS = (9.0, 18.0)
_READING = (0.5e9, 3e9)
# The decompositions of a consolidation, always on the processor: operations for each (m + n)·k², and a second.
_CONSOLIDATION_FLOPS, _CONSOLIDATION_RATE = 24.0, (5e9, 40e9)
# Rows that a corrector writes at once for a gate (`everalign.correction.objective`).
_CORRECTED_AT_ONCE = 16
# Bytes of a cached log-probability, of a token of replayed text, and of what a version holds besides.
_CACHED_BYTES, _TEXT_BYTES, _VERSION_BYTES, _REPORT_BYTES = 150, 5, 40_000, 150_000


@dataclass(frozen=True)
class Range:
    """A number that lies between two; both are seconds, or dollars."""

    low: float = 0.0
    high: float = 0.0

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> "Range":
        """Return the range of `factor` times as much."""
        return Range(self.low * factor, self.high * factor)

    @property
    def middle(self) -> float:
        """The geometric mean of both ends: as far from one as from the other by a factor."""
        return math.sqrt(self.low * self.high)


@dataclass(frozen=True)
class Memory:
    """Bytes at the highest.

    Args:
        parts: by what takes them.
        checkpointing: whether activations are computed twice.
        available: of the machine.
    """

    parts: Mapping[str, float]
    checkpointing: bool
    available: float

    @property
    def peak(self) -> float:
        """All of them."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the machine has as much."""
        return self.peak <= self.available


@dataclass(frozen=True)
class Prediction:
    """What a run takes.

    Args:
        machine: on which.
        steps: optimiser steps.
        seconds: by part of the run.
        tasks: seconds by task, with what is scored after it.
        task_steps: optimiser steps by task.
        memory: at the highest.
        disk: bytes by what is written.
        flops: operations of all matrix products.
        calibrated: measured over predicted seconds of real steps; None where nothing was measured.
        layout: how many machines of this kind share it.
    """

    machine: Machine
    steps: int
    seconds: Mapping[str, Range]
    tasks: Mapping[str, Range]
    task_steps: Mapping[str, int]
    memory: Memory
    disk: Mapping[str, float]
    flops: float
    calibrated: float | None = None
    layout: Layout = ONE

    @property
    def total(self) -> Range:
        """Seconds of the whole run."""
        return sum(self.seconds.values(), Range())

    @property
    def learning(self) -> Range:
        """Seconds of what teaches alone: without the start, held-out rows and sample answers."""
        return sum((self.seconds[name] for name in _LEARNING if name in self.seconds), Range())

    def tasks_to_dict(self) -> dict[str, dict[str, Any]]:
        """Return what each task takes, as a run keeps it (`everalign.learning.run_files.Predicted`)."""
        return {
            name: {
                "steps": self.task_steps[name],
                "seconds": [round(part.low, 3), round(part.high, 3)],
                "memory": round(self.memory.peak),
            }
            for name, part in self.tasks.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {
            "machine": asdict(self.machine),
            "processes": self.layout.processes,
            "fsdp": self.layout.fsdp,
            "steps": self.steps,
            "seconds": {"low": self.total.low, "expected": self.total.middle, "high": self.total.high},
            "parts": {name: [part.low, part.high] for name, part in self.seconds.items()},
            "tasks": {
                name: {"steps": self.task_steps[name], "seconds": [part.low, part.high]}
                for name, part in self.tasks.items()
            },
            "memory": {
                "peak": self.memory.peak,
                "available": self.memory.available,
                "fits": self.memory.fits,
                "checkpointing": self.memory.checkpointing,
                "parts": dict(self.memory.parts),
            },
            "disk": {"total": sum(self.disk.values()), "parts": dict(self.disk)},
            "flops": self.flops,
            "calibrated": self.calibrated,
        }


@dataclass(frozen=True)
class Clock:
    """Turns work on a model into seconds on a machine.

    Args:
        shape: the model's.
        machine: where.
        precision: `fp32` or `bf16`.
        saved: bytes that are kept of a token for the backward pass.
        recomputed: whether activations are computed twice.
        factor: measured over predicted, low and high.
        layout: how many share the work.
    """

    shape: ModelShape
    machine: Machine
    precision: str
    saved: float
    recomputed: bool = False
    factor: tuple[float, float] = (1.0, 1.0)
    layout: Layout = ONE

    def flops(self, work: Work, kind: str, memory_rank: int = 0) -> float:
        """Return the operations of matrix products.

        Forward 2·T·N, 2·T·r·Σ(m+n), 2·K·V·d, and 4 for each score and number of a head; back to the inputs as much
        again (of attention, twice), and for the adapters' own gradients once more. The output matrix's gradient is
        taken in the forward pass.
        """
        shape = self.shape
        adapters, memory = shape.rank * shape.adapted, memory_rank * shape.adapted
        if kind == "forward":
            passed = 2 * work.tokens * (shape.matrices + adapters + memory)
            return passed + 2 * work.targets * shape.vocabulary * shape.hidden + 4 * work.pairs * shape.attention
        passed = work.tokens * (4 * shape.matrices + 6 * adapters + 4 * memory)
        head = 4 * work.targets * shape.vocabulary * shape.hidden
        again = 0.0
        if self.recomputed:
            again = 2 * work.tokens * (shape.matrices + adapters + memory) + 4 * work.pairs * shape.attention
        return passed + head + 12 * work.pairs * shape.attention + again

    @property
    def reduced(self) -> float:
        """Bytes that a process sends in an optimiser step, for the sum of the fp32 gradients around a ring."""
        return 2 * 4.0 * self.shape.trained * (1 - 1 / self.layout.processes)

    def exchanged(self, batches: float, kind: str, steps: float) -> float:
        """Return the seconds that links take at their full rate, for micro-batches of one process, and steps."""
        layout, machine = self.layout, self.machine
        if layout.processes == 1:
            return 0.0
        passes = batches * (2 if kind == "training" else 1)
        # What a process receives to have every layer of a shared base once.
        gathered = self.shape.layer_bytes * (1 - 1 / layout.sharing)
        return passes * gathered / machine.link + steps * self.reduced / layout.rate(machine)

    def seconds(
        self, work: Work, kind: str, memory_rank: int = 0, steps: int = 0, uneven: float | None = None
    ) -> Range:
        """Return what work takes: products at a share of the peak, the rest at a share of the bandwidth, launches.

        Args:
            work: of all processes.
            kind: `training`, forward and back, or `forward`.
            memory_rank: of the long-term adapter.
            steps: of the optimiser.
            uneven: the largest share of the processes over the mean; None where whole batches are dealt out.
        """
        machine, shape, count = self.machine, self.shape, self.layout.processes
        if uneven is None:
            uneven = max(1.0, math.ceil(work.batches / count) * count / work.batches) if work.batches else 1.0
        work = work.times(uneven / count)
        products = self.flops(work, kind, memory_rank) / machine.peak(self.precision)
        moved = work.tokens * self.saved * _TRAFFIC[kind] * (4 / 3 if self.recomputed and kind == "training" else 1)
        moved += work.targets * shape.vocabulary * 4 * _LOGIT_TRAFFIC[kind]
        moved += work.batches * shape.weight_bytes * (2 if kind == "training" else 1)
        launches = work.batches * shape.layers * machine.launch * _LAUNCHES[kind] + steps * machine.step
        low, high = (
            products / machine.share[best] + moved / machine.bandwidth / machine.traffic[best] + launches
            for best in (1, 0)
        )
        sent = self.exchanged(work.batches, kind, steps)
        # At best while something is computed, at worst while nothing is.
        low, high = max(low, sent / machine.traffic[1]), high + sent / machine.traffic[0]
        return Range(low * self.factor[0], high * self.factor[1])

    def decoding(self, rows: float, tokens: float, context: float, at_once: float, alone: bool = False) -> Range:
        """Return what writing takes: `rows` answers of `tokens` tokens each, `at_once` of them side by side.

        Every step reads all weights, and keys and values of what stands before (Pope et al. 2022, arXiv 2211.05102),
        and gathers the layers of a shared base. Of several processes one does it if `alone`; else each has a part.
        """
        if not rows or not tokens:
            return Range()
        shape, machine = self.shape, self.machine
        rows = rows if alone else rows / self.layout.processes
        steps, beside = math.ceil(rows / at_once) * tokens, min(rows, at_once)
        read = shape.weight_bytes + beside * (context + tokens / 2) * shape.cache_bytes
        numbers = shape.matrices + shape.vocabulary * shape.hidden
        products = 2 * numbers * beside / machine.peak(self.precision)
        launches = shape.layers * machine.launch + self.exchanged(1, "forward", 0) / machine.traffic[0]
        low, high = (
            steps * (max(products / machine.share[best], read / machine.bandwidth / machine.traffic[best]) + launches)
            for best in (1, 0)
        )
        return Range(low * self.factor[0], high * self.factor[1])

    def comparing(self, positions: float) -> Range:
        """Return what a divergence takes besides its forward passes: whole distributions, read and written."""
        moved = _KL_TRAFFIC * positions * self.shape.vocabulary * 4 / self.machine.bandwidth / self.layout.processes
        low, high = (moved / self.machine.traffic[best] for best in (1, 0))
        return Range(low * self.factor[0], high * self.factor[1])


def predicted_memory(
    shape: ModelShape,
    machine: Machine,
    saved: Saved,
    tokens: int,
    targets: float,
    memory_rank: int,
    checkpointing: Checkpointing,
    kl: bool,
    free: float | None = None,
    layout: Layout = ONE,
) -> Memory:
    """Return the bytes that a run takes at the highest.

    Args:
        shape: the model's.
        machine: where.
        saved: what a micro-batch keeps.
        tokens: positions of the largest micro-batch.
        targets: response tokens in it.
        memory_rank: highest rank of the long-term adapter.
        checkpointing: as it was asked for.
        kl: whether distributions of two policies are compared.
        free: of a processor's memory, what may still be taken.
        layout: how many processes share the work.
    """
    whole = shape.weight_bytes - shape.layer_bytes
    weights = whole + shape.layer_bytes / layout.sharing
    learned = _LEARNED_BYTES + (_BUCKET_BYTES if layout.processes > 1 else 0)
    factor = tokens / saved.tokens
    kept, layer = saved.total * factor, saved.layer * factor
    base = {
        "libraries": machine.reserved,
        "weights": float(weights),
        "learned": float(learned * shape.trained),
        "long-term memory": 4.0 * memory_rank * shape.adapted,
    }
    if layout.sharing > 1:
        base["gathered layers"] = _GATHERED * shape.layer_bytes / shape.layers
    room = free if free is not None else machine.memory - machine.reserved - weights
    needed = kept + _TRAINED_BYTES * shape.trained
    recomputed = checkpointing == "on" or (checkpointing == "auto" and needed > _USABLE * room)
    if recomputed and layer:
        # Inputs of layers, one layer in full, and what lies outside of them, such as the mask that they share.
        outside = max(0.0, kept - shape.layers * layer)
        kept = min(kept, shape.layers * tokens * shape.hidden * shape.itemsize + layer + outside)
    rows = max(128.0, _CHUNK_LOGITS[machine.is_cpu] // shape.vocabulary) if shape.chunked else targets
    block = min(rows, targets) * shape.vocabulary * (shape.itemsize if machine.is_cpu else shape.itemsize + 4)
    # What the backward pass of one layer makes on its way.
    step = kept + layer + block
    compared = min(_LIVE_LOGITS, _KL_COPIES * targets * shape.vocabulary) * 4.0 if kl else 0.0
    parts = {**base, "activations": kept, "a step besides": max(step, compared) - kept}
    if not machine.is_cpu:
        parts["fragments"] = _FRAGMENTS * (sum(parts.values()) - machine.reserved)
    return Memory(parts, recomputed, machine.memory)


def predict(
    plan: RunPlan, clock: Clock, memory: Memory, consolidates: bool, rank_cap: int, replayed_rows: int
) -> Prediction:
    """Return what a planned run takes.

    Args:
        plan: its work.
        clock: turns it into seconds.
        memory: at the highest.
        consolidates: whether every task's update goes into long-term memory.
        rank_cap: highest rank of that.
        replayed_rows: that are kept at the end.
    """
    shape = clock.shape
    low, high = (shape.weight_bytes / rate for rate in reversed(_READING))
    parts = {
        "start": Range(_START_SECONDS[0] + low, _START_SECONDS[1] + high),
        "held-out rows": clock.seconds(plan.start, "forward"),
        "sample answers": _written(clock, plan, plan.answers, plan.calls),
    }
    tasks: dict[str, Range] = {}
    flops = clock.flops(plan.start, "forward")
    for task in plan.tasks:
        rank = task.memory_rank
        found = _task_parts(plan, task, clock)
        if consolidates:
            work = _CONSOLIDATION_FLOPS * shape.adapted * (min(2 * rank_cap, rank + shape.rank) + shape.rank) ** 2
            found["consolidation"] = Range(work / _CONSOLIDATION_RATE[1], work / _CONSOLIDATION_RATE[0])
        for name, seconds in found.items():
            parts[name] = parts.get(name, Range()) + seconds
        tasks[task.name] = sum(found.values(), Range())
        flops += clock.flops(task.scoring, "forward", rank + shape.rank)
        for stage in task.stages:
            flops += clock.flops(stage.work, "training", rank) + clock.flops(stage.reference, "forward", rank)
    return Prediction(
        layout=clock.layout,
        machine=clock.machine,
        steps=plan.steps,
        seconds=parts,
        tasks=tasks,
        task_steps={task.name: sum(stage.steps for stage in task.stages) for task in plan.tasks},
        memory=memory,
        disk=_disk(plan, shape, consolidates, rank_cap, replayed_rows),
        flops=flops,
    )


def _task_parts(plan: RunPlan, task: TaskPlan, clock: Clock) -> dict[str, Range]:
    """Return the seconds of a task by what takes them, without its consolidation."""
    rank, (answers, tokens) = task.memory_rank, task.rollouts
    found = {"reference": Range(), "training": Range()}
    if answers:
        # As many at once as twice the tokens of a micro-batch hold (`everalign.learning.rollouts`).
        at_once = max(1.0, 2 * plan.tokens_per_batch / (plan.prompt + tokens))
        found["rollouts"] = clock.decoding(answers, tokens, plan.prompt, at_once)
    for stage in task.stages:
        found["reference"] += clock.seconds(stage.reference, "forward", rank)
        found["training"] += clock.seconds(stage.work, "training", rank, stage.steps, stage.uneven)
    scored = clock.seconds(task.scoring, "forward", rank + clock.shape.rank)
    found["held-out rows"] = scored + clock.comparing(task.kl)
    found["sample answers"] = _written(clock, plan, task.answers, 1)
    if task.corrections:
        found["gate"] = clock.decoding(task.corrections, plan.answer, plan.prompt, _CORRECTED_AT_ONCE)
    return found


def _written(clock: Clock, plan: RunPlan, prompts: int, calls: int) -> Range:
    """Return what sample answers take, written in so many calls: short ones at best, the longest at worst."""
    at_once = max(1.0, prompts / max(1, calls))
    longest = (min(plan.answer, LONGEST_ANSWER), float(LONGEST_ANSWER))
    low, high = (clock.decoding(prompts, tokens, plan.prompt, at_once, alone=True) for tokens in longest)
    return Range(low.low, high.high)


def _disk(plan: RunPlan, shape: ModelShape, consolidates: bool, rank_cap: int, replayed_rows: int) -> dict[str, float]:
    """Return the bytes of what a run leaves: versions, caches, and checkpoints while it trains."""
    versions, rank = 0.0, 0
    for number, _ in enumerate(plan.tasks, start=1):
        rank = min(number * shape.rank, rank_cap) if consolidates else shape.rank
        bank = 4.0 * min(number * shape.rank, 2 * rank_cap) * shape.adapted if consolidates else 0.0
        versions += 4.0 * rank * shape.adapted + bank + _VERSION_BYTES
    responses = sum(rows.count * len(rows.sample[0].responses) for rows in plan.rows)
    return {
        "versions": versions,
        "replayed rows": replayed_rows * (plan.prompt + 2 * plan.answer) * _TEXT_BYTES * len(plan.tasks) / 2,
        "checkpoints": 2.0 * _TRAINED_BYTES * shape.trained,
        "cache": float(responses * _CACHED_BYTES * len(plan.tasks)),
        "report": float(_REPORT_BYTES),
    }


def calibrated(prediction: Prediction, factor: float, spread: float) -> Prediction:
    """Return the prediction with all but the start multiplied by a measured factor, and within `spread` of it."""

    def middle(name: str, part: Range) -> Range:
        return part if name == "start" else Range(part.middle * factor / spread, part.middle * factor * spread)

    return replace(
        prediction,
        seconds={name: middle(name, part) for name, part in prediction.seconds.items()},
        tasks={name: middle("", part) for name, part in prediction.tasks.items()},
        calibrated=factor,
    )
