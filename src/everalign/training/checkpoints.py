"""Checkpoints inside a stage: marked complete when they are, and found again after a kill."""

import json
import warnings
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from everalign.files import checksums, differing_files, write_json

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
