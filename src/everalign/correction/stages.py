"""Training's stages, each kept when it is finished, so that a killed training goes on where it was."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from everalign.data.groups import EncodedGroup
from everalign.data.layout import row_tokens
from everalign.errors import EveralignError
from everalign.files import checksums, differing_files, new_folder, read_json, write_json
from everalign.modeling.policy import Policy
from everalign.modeling.whole_model import WholeModel
from everalign.training.stage import StageOptions, StageResult, train_rows
from everalign.training.teaching import RewardWeightedObjective

_WEIGHTS, _REPORT, _FILES = "model.safetensors", "report.json", "files.json"


def train_stage(
    model: Policy | WholeModel,
    rows: Sequence[EncodedGroup],
    options: StageOptions,
    folder: Path,
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[StageResult, bool]:
    """Train `model` in place, or load what an earlier call had finished.

    Args:
        model: a policy, whose adapter is trained, or a whole model.
        rows: prompts, each with the one text that is to follow it, and its weight.
        options: how.
        folder: holds checkpoints and then the finished stage.
        seed: seeds the order of the rows.
        progress: called with (steps done, steps in all).

    Returns:
        What the stage did, and whether an earlier call had finished it.

    Raises:
        EveralignError: the loss or the weights became NaN or infinite.
    """
    done = folder / "done"
    finished = _finished(model, done)
    if finished is not None:
        return finished, True
    shared = model.head.shared
    result = train_rows(
        model,
        RewardWeightedObjective(),
        rows,
        [row_tokens(row, shared) for row in rows],
        options,
        folder / "checkpoints",
        seed=seed,
        shared=shared,
        progress=progress,
    )
    _keep(model, result, done)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result, False


def _keep(model: Policy | WholeModel, result: StageResult, done: Path) -> None:
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    # The trainer sees a loss only before each step, so nobody has looked at what the last one left.
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise EveralignError("training left NaN or infinite weights: lower the learning rate, or train in fp32")
    with new_folder(done) as folder:
        save_file(weights, folder / _WEIGHTS)
        write_json(folder / _REPORT, asdict(result))
        write_json(folder / _FILES, checksums(folder))


def _finished(model: Policy | WholeModel, done: Path) -> StageResult | None:
    if not done.exists() or differing_files(done, read_json(done / _FILES)):
        shutil.rmtree(done, ignore_errors=True)
        return None
    model.load_state_dict(load_file(done / _WEIGHTS))
    return StageResult(**read_json(done / _REPORT))
