"""A finished stage of training: its weights and its report, kept so that a killed run need not train it again."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from everalign.errors import EveralignError
from everalign.files import checksums, differing_files, new_folder, read_json, write_json

_WEIGHTS, _REPORT, _FILES = "policy.safetensors", "report.json", "files.json"


def keep_finished(model: nn.Module, report: Mapping[str, Any], folder: Path, stage: str) -> None:
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
    """Load what `keep_finished` kept into the model and return its report; None where there is nothing whole."""
    done = folder / "done"
    if not done.exists() or differing_files(done, read_json(done / _FILES)):
        shutil.rmtree(done, ignore_errors=True)
        return None
    model.load_state_dict(load_file(done / _WEIGHTS))
    report: dict[str, Any] = read_json(done / _REPORT)
    return report
