"""Tensors on disk with their checksum: written whole or not at all, and checked before anything is used."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from everalign.errors import InputError
from everalign.files import follow_umask

_CHECKSUM = "sha256"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace a file by named tensors in one step; several processes may write it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        save_file({**tensors, _CHECKSUM: _checksum(tensors)}, temporary)
        follow_umask(Path(temporary))
        os.replace(temporary, path)
    except BaseException:  # a full disk or Ctrl-C: nobody else would ever remove the file
        os.unlink(temporary)
        raise


def read_tensors(path: Path, names: tuple[str, ...], what: str) -> dict[str, Tensor] | None:
    """Return the tensors of `write_tensors`, None where there is no file.

    Args:
        path: the file.
        names: the tensors that it has to hold.
        what: names the file's role in an error.

    Raises:
        InputError: the file is damaged; the message says to delete it.
    """
    if not path.exists():
        return None
    try:
        stored = load_file(path)
        tensors = {name: stored[name] for name in names}
        intact = torch.equal(stored[_CHECKSUM], _checksum(tensors))
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path}: the {what} is damaged ({error}): delete this file") from error
    if not intact:
        raise InputError(f"{path}: the {what} is damaged (its values changed): delete this file")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
