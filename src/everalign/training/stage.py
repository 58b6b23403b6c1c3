"""A finished stage of training: its weights and its report, kept so that a killed run need not train it again."""

import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from everalign.data.collate import TrainingPlan, largest_token, row_tokens, training_plan
from everalign.data.tokenization import TargetGroup, TokenizedGroup, TokenizedPair
from everalign.errors import EveralignError, InputError
from everalign.modeling.options import Checkpointing
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import SavedBytes, free_memory, language_model, recomputable_layers, recomputing
from everalign.storage import checksums, differing_files, new_folder, read_json, write_json
from everalign.training.objectives import Objective
from everalign.training.options import StageOptions
from everalign.training.trainer import (
    GradientHook,
    Penalty,
    Reference,
    Steps,
    TokenizedRow,
    Trainer,
    training_arguments,
)

_WEIGHTS, _REPORT, _FILES = "policy.safetensors", "report.json", "files.json"


def save_result(model: nn.Module, report: Mapping[str, Any], folder: Path, stage: str) -> None:
    """Keep a stage's result in `folder`, whole or not at all, and drop the checkpoints there.

    Args:
        model: what was trained; its `state_dict` is kept.
        report: what JSON can hold.
        folder: the stage's.
        stage: its name, for messages.

    Raises:
        EveralignError: weights are NaN or infinite. The trainer sees a loss only before each step, so nobody has
            looked at what the last one left.
    """
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise EveralignError(f"{stage} left NaN or infinite weights: lower the learning rate, or train in fp32")
    with new_folder(folder / "done") as done:
        save_file(weights, done / _WEIGHTS)
        write_json(done / _REPORT, report)
        write_json(done / _FILES, checksums(done))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def load_finished(model: nn.Module, folder: Path) -> dict[str, Any] | None:
    """Load what `save_result` kept into the model and return its report; None where there is nothing whole."""
    done = folder / "done"
    if not done.exists() or differing_files(done, read_json(done / _FILES)):
        shutil.rmtree(done, ignore_errors=True)
        return None
    model.load_state_dict(load_file(done / _WEIGHTS))
    report: dict[str, Any] = read_json(done / _REPORT)
    return report


_MARK = "complete.json"
_PREFIX = "checkpoint-"


class MarkComplete(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Writes the checksums of a checkpoint's files into it once all of them are written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint that was just saved."""
        PartialState().wait_for_everyone()  # each process writes files of its own
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"{_PREFIX}{state.global_step}"
        write_json(folder / _MARK, checksums(folder, exclude=frozenset({_MARK})))


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a stage, or None.

    One that a kill or a full disk left incomplete is passed over with a warning that names it.
    """
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)), reverse=True):
        if not (reason := _incomplete(path)):
            return path
        warnings.warn(f"{path} is no complete checkpoint ({reason}): resuming from before it", stacklevel=2)
    return None


def _incomplete(path: Path) -> str:
    try:
        expected = json.loads((path / _MARK).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return f"{_MARK} is missing or cut"
    return ", ".join(f"{name} is cut or missing" for name in differing_files(path, expected))


Progress = Callable[[int, int], None]

# Of the free memory, what activations, gradients and the optimiser may take: other things come and go beside them.
_USABLE = 0.8
# Of what is learned: a gradient and AdamW's two moments, in fp32.
_BYTES_LEARNED = 12


@dataclass
class StageResult:
    """What a stage did: its curve and its cost. `epochs` counts passes over the rows."""

    steps: int
    epochs: float
    seconds: float
    curve: list[dict[str, Any]] = field(default_factory=list)


def run_stage(
    policy: Policy,
    objective: Objective,
    pairs: Sequence[TokenizedPair | TokenizedGroup | TargetGroup],
    options: StageOptions,
    folder: Path,
    *,
    seed: int,
    reference: Reference | None = None,
    penalty: Penalty | None = None,
    gradient_hook: GradientHook | None = None,
    progress: Progress | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> StageResult:
    """Train `policy` in place; resumes from the newest complete checkpoint in `folder`.

    Args:
        policy: its short-term adapter is trained.
        objective: what a batch teaches.
        pairs: the N rows, replayed ones included.
        options: how.
        folder: holds the stage's checkpoints.
        seed: seeds the order of the rows.
        reference: reference log-probabilities as in `Steps`, where the objective needs them.
        penalty: the method's regulariser.
        gradient_hook: the method's hand on complete gradients.
        progress: called with (steps done, steps in all).
        log: called with a line where activations are computed again because memory is short.

    Raises:
        InputError: checkpointing is on, and nobody knows the model's layers; or a row holds a token that the model has
            no embedding for.
    """
    shared = policy.head.shared
    # Before any of it is on a GPU, where such a token ends the process.
    policy.head.check_token(max((largest_token(pair) for pair in pairs), default=0))
    return train_rows(
        policy,
        objective,
        pairs,
        [row_tokens(pair, shared) for pair in pairs],
        options,
        folder,
        seed=seed,
        shared=shared,
        reference=reference,
        penalty=penalty,
        gradient_hook=gradient_hook,
        progress=progress,
        log=log,
    )


def train_rows(
    model: nn.Module,
    objective: Objective,
    rows: Sequence[TokenizedRow],
    lengths: Sequence[int],
    options: StageOptions,
    folder: Path,
    *,
    seed: int,
    shared: bool = False,
    reference: Reference | None = None,
    penalty: Penalty | None = None,
    gradient_hook: GradientHook | None = None,
    progress: Progress | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> StageResult:
    """Train whatever an objective can teach; resumes from the newest complete checkpoint in `folder`.

    Args:
        model: its parameters that need gradients are trained, in place.
        objective: what a batch teaches.
        rows: the N encoded rows.
        lengths: tokens computed for each row.
        options: how.
        folder: holds the checkpoints.
        seed: seeds the order of the rows.
        shared: compute a prompt once for all its answers, where the objective can.
        reference: reference log-probabilities as in `Steps`, where the objective needs them.
        penalty: a regulariser, for policies.
        gradient_hook: a hand on complete gradients, for policies.
        progress: called with (steps done, steps in all).
        log: called with a line where activations are computed again because memory is short.

    Raises:
        InputError: checkpointing is on, and nobody knows the model's layers.
    """
    arguments = _arguments(folder, options, seed)
    plan = _plan(arguments, options, lengths, seed)
    steps = Steps(rows, plan, objective, shared, reference)
    trainer = Trainer(
        model,
        objective,
        arguments,
        steps,
        penalty,
        gradient_hook,
        callbacks=[
            MarkComplete(),
            _LogLastStep(),
            *([] if progress is None else [_ProgressCallback(progress)]),
        ],
    )
    checkpoint = latest_checkpoint(folder)
    started = time.perf_counter()
    with recomputing(_recomputed(model, objective, steps, lengths, options.checkpointing, log)):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    return StageResult(plan.steps, options.epochs, seconds, _curve(trainer.state.log_history, options.epochs))


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
    candidates = {
        id(rows): rows
        for rows in (
            max(batches, key=lambda rows: len(rows) * max(lengths[row] for row in rows)),
            max(batches, key=lambda rows: max(lengths[row] for row in rows)),
        )
    }
    device, most = next(model.parameters()).device, 0
    for rows in candidates.values():
        batch = {name: value.to(device) for name, value in steps.batch(rows).items()}
        with SavedBytes(model) as saved:
            objective.loss(model, batch, batch["count"])
        most = max(most, saved.total)
    return most + _BYTES_LEARNED * sum(part.numel() for part in model.parameters() if part.requires_grad)


def _arguments(folder: Path, options: StageOptions, seed: int) -> Any:
    return training_arguments(
        folder,
        learning_rate=options.learning_rate,
        scheduler=options.scheduler,
        max_grad_norm=options.max_grad_norm,
        logging_steps=options.logging_steps,
        checkpoint_steps=options.checkpoint_steps,
        seed=seed,
    )


def _plan(arguments: Any, options: StageOptions, lengths: Sequence[int], seed: int) -> TrainingPlan:
    """Plan the stage for the processes that `arguments` found, and tell them what depends on the plan."""
    sizes = (options.batch_size, options.tokens_per_batch)
    plan = training_plan(lengths, *sizes, options.epochs, seed, processes=arguments.world_size)
    # Rounded down: the first step of a warm-up has learning rate 0, and a short stage must not end with it.
    arguments.warmup_steps = int(options.warmup * plan.steps)
    return plan


def _curve(history: list[dict[str, Any]], epochs: float) -> list[dict[str, Any]]:
    """Keep the logged steps; transformers saw the whole plan as one epoch."""
    return [{**entry, "epoch": entry["epoch"] * epochs} for entry in history if "loss" in entry]


class _LogLastStep(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True


class _ProgressCallback(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress(state.global_step, state.max_steps)
