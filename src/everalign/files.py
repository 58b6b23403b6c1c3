"""Files and folders that are there whole or not at all, whatever is killed when."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everalign.errors import InputError

_PARTIAL = ".partial"


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def checksums(folder: Path, exclude: frozenset[str] = frozenset()) -> dict[str, str]:
    """Return the sha256 of every file below `folder` by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in files
        if path.relative_to(folder).as_posix() not in exclude
    }


def differing_files(folder: Path, expected: dict[str, str]) -> list[str]:
    """Return the names of expected files that are missing or changed."""
    return [
        name for name, digest in expected.items() if not (folder / name).is_file() or sha256_of(folder / name) != digest
    ]


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in one step that survives a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + _PARTIAL)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by `value` as indented JSON in one step that survives a crash."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; a missing or damaged one is an InputError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; is this an Everalign run directory?") from error
    except ValueError as error:
        raise InputError(f"{path}: damaged JSON ({error}); restore the file") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error."""
    temporary = path.with_name(path.name + _PARTIAL)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
