"""Train one stage: checkpoints inside it, its result kept at the end, so that a killed run need not train it again."""

import hashlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from everalign.data.collate import TrainingPlan, training_plan
from everalign.data.tokenization import TokenizedRow
from everalign.distributed import gather, on_main, start
from everalign.errors import DivergedError, InputError, naming_nondeterministic
from everalign.modeling.runtime import SavedBytes, free_memory, language_model, recomputable_layers, recomputing
from everalign.options import Checkpointing
from everalign.storage import checksums, differing_files, new_folder, read_json, write_json, writing
from everalign.training.base_objective import Objective
from everalign.training.hooks import Stage, StageHooks
from everalign.training.options import StageOptions
from everalign.training.reference import Reference, sequence_logprobs
from everalign.training.trainer import Steps, Trainer, training_arguments

_WEIGHTS, _REPORT, _FILES = "policy.safetensors", "report.json", "files.json"
_HOOKS = "method.safetensors"
_MARK, _CHECKPOINT = "complete.json", "checkpoint-"
# Which stage a checkpoint or a result is of; those of version 0.1.0 do not say.
_STAGE = "stage.json"
# Complete checkpoints to keep: a kill may come while one is written.
_CHECKPOINTS = 2
# What a stage's options may differ in between two calls.
_FREE_OPTIONS = {"checkpointing", "checkpoint_steps", "logging_steps"}
# Share of the free memory that activations, gradients and the optimiser may take: other things come and go beside them.
_USABLE = 0.8
# Bytes for each trained parameter: a gradient and AdamW's two moments, in fp32.
_TRAINED_BYTES = 12

Figures = Callable[[int, Mapping[str, float]], None]
"""Called with the steps done and what was measured over the last of them: once before the first step, with nothing,
then at every logged step (`steps` in all, `loss`, the objective's own such as `accuracy` and `margin`, `learning_rate`,
`tokens_per_second`)."""
StageFigures = Callable[[str, int, Mapping[str, float]], None]
"""The same, with the stage's name in front."""


@dataclass(frozen=True)
class StageResult:
    """What one stage did.

    Args:
        stage: the objective's name.
        reference: the reference policy, or None where the objective needs none.
        steps: optimiser steps.
        epochs: passes over the rows.
        seconds: wall-clock time of training, of the last uninterrupted piece where it was resumed.
        processor_seconds: processor time of all threads meanwhile, the method's share before and after included; None
            of stages from before it was measured.
        rows: rows of the stage, replayed ones included.
        replayed: how many of them are replayed.
        curve: logged steps; `epoch` counts passes over the rows.
        step0_margin: mean implicit margin before the first step on a probe of the rows; exactly 0 when the reference
            is the policy that the stage starts from. None without a reference, or where rows are no pairs.
        step0_log_ratio: of rows that are no pairs, the mean over the probe's responses of |log π − log π_ref|, in
            nats; 0 as above.
    """

    stage: str
    reference: str | None
    steps: int
    epochs: float
    seconds: float
    rows: int
    replayed: int
    curve: list[dict[str, Any]] = field(default_factory=list, repr=False)
    step0_margin: float | None = None
    step0_log_ratio: float | None = None
    processor_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the curve."""
        return {key: value for key, value in asdict(self).items() if key != "curve"}


@naming_nondeterministic()
def train_stage(
    model: nn.Module,
    objective: Objective,
    rows: Sequence[TokenizedRow],
    options: StageOptions,
    folder: Path | None,
    *,
    seed: int,
    reference: Callable[[], Reference] | None = None,
    replayed: int | None = None,
    hooks: StageHooks | None = None,
    apart: int = 0,
    learns_for: str = "",
    progress: Callable[[int, int], None] | None = None,
    figures: Figures | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> StageResult:
    """Train a model in place on one stage's rows, or load what an earlier call has left.

    Args:
        model: its parameters that need gradients are trained: a policy, a whole model or a reward model.
        objective: what a batch teaches.
        rows: the N rows, replayed ones included.
        options: how.
        folder: holds checkpoints, and in the end the result. A later call continues from the newest complete
            checkpoint, or loads the result; one of another stage, or of another run, is passed over with a warning.
            None to keep nothing.
        seed: seeds the order of the rows.
        reference: computes the reference, where the objective needs one and the stage is not finished.
        replayed: how many of the rows are replayed, for the report; None where nothing is replayed by design.
        hooks: what a method does beside the objective, for policies.
        learns_for: the base model, and whatever else tells this stage from others that learn the same rows; what is in
            the folder for something else is passed over.
        apart: how many rows at the end are at hand for the hooks and not learned.
        progress: called with (steps done, steps in all).
        figures: called with what is measured of the training, see `Figures`.
        log: called with one line for each thing that happens.

    Raises:
        InputError: checkpointing is on, and the model's layers are not known; or a row holds a token that the model
            has no embedding for.
        DivergedError: the loss or the weights became NaN or infinite.
    """
    start()
    stage_id = "" if folder is None else _stage_id(objective, rows, options, seed, learns_for)
    finished = folder is not None and is_finished(folder, stage_id)
    if finished and not (hooks is not None and hooks.watches_stages):
        return _load_finished(model, objective, folder, None, log)  # type: ignore[arg-type]
    head = getattr(model, "head", None)
    if head is not None:
        # Before any of it is on a GPU, where such a token ends the process.
        texts = [tokens for row in rows for tokens in (row.prompt, *row.responses)]
        head.check_token(max((max(tokens, default=0) for tokens in texts), default=0))
    shared = head is not None and head.shared
    against, drift, logprobs = None if reference is None else reference(), {}, None
    busy = time.process_time()
    learned = rows[: len(rows) - apart]
    announced = f"  {objective.name}: {len(learned)} rows" + ("" if replayed is None else f" ({replayed} replayed)")
    if against is not None:
        logprobs = against.logprobs
        announced += f", reference = {against.name}"
        if against.probe:
            now = torch.cat(sequence_logprobs(model, against.probe, options.tokens_per_batch))  # type: ignore[arg-type]
            name, what, value = objective.drift(now, torch.cat(list(against.probe_logprobs)))
            drift, announced = {name: value}, f"{announced}, {what} = {value:.6g}"
    own = len(learned) - (replayed or 0)
    stage = Stage(model, objective, rows, own, replayed or 0, logprobs, options.tokens_per_batch)  # type: ignore[arg-type]
    terms = None if hooks is None else hooks.begin_stage(stage)
    if finished:
        return _load_finished(model, objective, folder, hooks, log)  # type: ignore[arg-type]
    log(announced)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory())) if folder is None else folder / "checkpoints"
        arguments = training_arguments(place, options, seed)
        prefix = getattr(model, "prefix_length", 0)
        lengths = [objective.tokens(row, shared, prefix) for row in learned]
        plan = training_plan(
            lengths,
            options.batch_size,
            options.tokens_per_batch,
            options.epochs,
            seed,
            processes=arguments.world_size,
            review=None if terms is None else terms.review,
        )
        # Rounded down: the first step of a warm-up has learning rate 0, and a short stage must not end with it.
        arguments.warmup_steps = int(options.warmup * plan.steps)
        in_step = getattr(model, "sharded", False)
        steps = Steps(rows, plan, objective, shared, logprobs, terms, own if replayed else None, in_step)
        callbacks = [
            _CheckpointCallback(stage_id, hooks),
            _StepCallback(progress, figures, plan, lengths),
        ]
        trainer = Trainer(model, objective, arguments, steps, hooks, callbacks)
        checkpoint = latest_checkpoint(place, stage_id)
        if checkpoint is not None:
            _load_hooks(hooks, checkpoint, model)
        started = time.perf_counter()
        recomputed = _recomputed(model, objective, steps, lengths, options.checkpointing, log)
        with recomputing(recomputed), writing(place):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - started
    if hooks is not None:
        hooks.end_stage(stage)
    model.zero_grad(set_to_none=True)
    # transformers saw the whole plan as one epoch.
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = StageResult(
        stage=objective.name,
        reference=None if against is None else against.name,
        steps=plan.steps,
        epochs=options.epochs,
        seconds=round(seconds, 3),
        processor_seconds=round(time.process_time() - busy, 3),
        rows=len(learned),
        replayed=replayed or 0,
        curve=[{**entry, "epoch": entry["epoch"] * options.epochs} for entry in history],
        **drift,
    )
    if folder is not None:
        save_result(model, asdict(result), folder, objective.name, hooks, stage_id)
    return result


def _stage_id(
    objective: Objective, rows: Sequence[TokenizedRow], options: StageOptions, seed: int, learns_for: str
) -> str:
    """Return a digest of what a stage is, whatever it is computed on and by how many processes."""
    facts = (objective.name, options.model_dump(exclude=_FREE_OPTIONS), seed, learns_for)
    digest = hashlib.sha256(repr(facts).encode())
    for row in rows:
        digest.update(repr((row.id, len(row.prompt), [len(tokens) for tokens in row.responses])).encode())
    return digest.hexdigest()[:16]


@on_main
def save_result(
    model: nn.Module,
    report: Mapping[str, Any],
    folder: Path,
    stage: str,
    hooks: StageHooks | None = None,
    stage_id: str = "",
) -> None:
    """Keep a stage's result in `folder`, whole or not at all, and drop the checkpoints there.

    Args:
        model: what was trained; its `state_dict` is kept.
        report: what JSON can hold.
        folder: the stage's.
        stage: its name, for messages.
        hooks: whose state is kept beside it; None for nobody's.
        stage_id: kept with it, for `is_finished`.

    Raises:
        DivergedError: weights are NaN or infinite. The trainer sees a loss only before each step, so nothing has
            checked what the last one left.
    """
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise DivergedError(f"{stage} left NaN or infinite weights: lower the learning rate, or train in fp32")
    with new_folder(folder / "done") as done:
        save_file(weights, done / _WEIGHTS)
        _save_hooks(hooks, done)
        write_json(done / _REPORT, report)
        write_json(done / _STAGE, {"stage": stage_id})
        write_json(done / _FILES, checksums(done))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


@on_main
def is_finished(folder: Path, stage_id: str = "") -> bool:
    """Whether `save_result` has kept a whole result of this stage; removes what is none, with a warning."""
    done = folder / "done"
    if not done.exists():
        return False
    if not (reason := _what_is_wrong(done, _FILES, stage_id)):
        return True
    warnings.warn(f"{done} is not used ({reason}): this stage is trained again", stacklevel=2)
    shutil.rmtree(done, ignore_errors=True)
    return False


def _what_is_wrong(folder: Path, mark: str, stage_id: str) -> str:
    """Return why a checkpoint or a result cannot be used: files that differ from its checksums, or another stage."""
    try:
        expected = json.loads((folder / mark).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return f"{mark} is missing or cut"
    if wrong := differing_files(folder, expected):
        return ", ".join(f"{name} is cut or missing" for name in wrong)
    stage = folder / _STAGE
    other = stage.exists() and read_json(stage)["stage"] not in ("", stage_id)
    return "it is of another stage or run" if other and stage_id else ""


def _load_finished(
    model: nn.Module, objective: Objective, folder: Path, hooks: StageHooks | None, log: Callable[[str], None]
) -> StageResult:
    done = folder / "done"
    log(f"  {objective.name}: was finished by an earlier call")
    model.load_state_dict(load_file(done / _WEIGHTS))
    _load_hooks(hooks, done, model)
    return StageResult(**read_json(done / _REPORT))


def _save_hooks(hooks: StageHooks | None, folder: Path) -> None:
    state = {} if hooks is None else hooks.stage_state()
    if state:
        save_file({name: value.contiguous() for name, value in state.items()}, folder / _HOOKS)


def _load_hooks(hooks: StageHooks | None, folder: Path, model: nn.Module) -> None:
    if hooks is not None and (folder / _HOOKS).exists():
        hooks.load_stage_state(load_file(folder / _HOOKS), model)  # type: ignore[arg-type]


@dataclass(eq=False)
class _CheckpointCallback(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Adds to a checkpoint what steps have changed in a method, marks it as complete, and removes earlier ones.

    transformers would remove those with the earliest times: after a clock has gone back, the newest.

    Args:
        stage_id: written into every checkpoint.
        hooks: whose state is kept; None for nobody's.
    """

    stage_id: str
    hooks: StageHooks | None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint that was just saved; last of all it gets the checksums of its files."""
        gather(None)  # each process writes files of its own
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"{_CHECKPOINT}{state.global_step}"
        _save_hooks(self.hooks, folder)
        write_json(folder / _STAGE, {"stage": self.stage_id})
        write_json(folder / _MARK, checksums(folder, exclude=frozenset({_MARK})))
        found = _checkpoints(folder.parent)
        kept = [path for step, path in found if step <= state.global_step][:_CHECKPOINTS]
        for _, path in found:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return a stage's checkpoints with their steps, the newest first."""
    found = ((path.name.removeprefix(_CHECKPOINT), path) for path in folder.glob(f"{_CHECKPOINT}*"))
    return sorted(((int(step), path) for step, path in found if step.isdigit()), reverse=True)


@on_main
def latest_checkpoint(folder: Path, stage_id: str = "") -> Path | None:
    """Return the newest complete checkpoint of a stage, or None.

    One that a kill or a full disk left incomplete, or that is of another stage, is passed over with a warning that
    names it.
    """
    for _, path in _checkpoints(folder):
        if not (reason := _what_is_wrong(path, _MARK, stage_id)):
            return path
        warnings.warn(f"{path} is not a complete checkpoint ({reason}): resuming from before it", stacklevel=2)
    return None


def _recomputed(
    model: nn.Module,
    objective: Objective,
    steps: Steps,
    lengths: Sequence[int],
    checkpointing: Checkpointing,
    log: Callable[[str], None],
) -> list[nn.Module]:
    """Return the layers whose activations are computed again in the backward pass."""
    if checkpointing == "off":
        return []
    layers = recomputable_layers(model)
    if checkpointing == "on":
        if not layers:
            kind = type(language_model(model) or model).__name__
            raise InputError(f"checkpointing on: the layers of this {kind} are not known: use auto or off")
        return layers
    needed, free = _bytes_needed(model, objective, steps, lengths), free_memory(next(model.parameters()).device)
    if needed <= _USABLE * free:
        return []
    short = f"training needs about {needed / 2**30:.1f} GiB, of which {free / 2**30:.1f} are free"
    if layers:
        log(f"  {short}: activations are computed again in the backward pass (checkpointing)")
    else:
        log(f"  {short}, and this model's layers are not known: set a smaller tokens_per_batch if it fails")
    return layers


def _bytes_needed(model: nn.Module, objective: Objective, steps: Steps, lengths: Sequence[int]) -> int:
    """Measure what the largest batches keep for their backward pass; add what is learned, with its optimiser.

    That is the batch of the most tokens, and that of the longest row, whose masks may be larger.
    """
    batches = steps.batches()
    largest = max(batches, key=lambda rows: len(rows) * max(lengths[row] for row in rows))
    longest = max(batches, key=lambda rows: max(lengths[row] for row in rows))
    device, most = next(model.parameters()).device, 0
    for rows in {id(rows): rows for rows in (largest, longest)}.values():
        batch = {name: value.to(device) for name, value in steps.batch(rows).items()}
        with SavedBytes(model) as saved:
            objective.loss(model, batch, batch["count"])
        most = max(most, saved.total)
    return most + _TRAINED_BYTES * sum(part.numel() for part in model.parameters() if part.requires_grad)


class _StepCallback(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Reports progress and figures, and logs the last step.

    Args:
        progress: called with (steps done, steps in all); None for nobody.
        figures: called with what was measured; None for nobody.
        plan: the steps' rows.
        lengths: tokens of each row.
    """

    def __init__(
        self,
        progress: Callable[[int, int], None] | None,
        figures: Figures | None,
        plan: TrainingPlan,
        lengths: Sequence[int],
    ) -> None:
        self._progress, self._figures = progress, figures
        shares = [sum(lengths[row] for rows in share for row in rows) for share in plan.shares]
        # Of each step, over all processes, padding left out.
        self._tokens = [sum(shares[first : first + plan.processes]) for first in range(0, len(shares), plan.processes)]
        self._since = 0, 0.0  # the step and the time of the last figures

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = state.global_step, time.perf_counter()
        if self._figures is not None:
            self._figures(state.global_step, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self._figures is None or logs is None or "loss" not in logs:
            return
        (step, then), now = self._since, time.perf_counter()
        self._since = state.global_step, now
        tokens = sum(self._tokens[step : state.global_step])
        shown = {name: value for name, value in logs.items() if name != "epoch"}
        self._figures(
            state.global_step, {"steps": state.max_steps, **shown, "tokens_per_second": tokens / max(now - then, 1e-9)}
        )
