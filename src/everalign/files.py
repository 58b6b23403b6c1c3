"""Files and folders that are there whole or not at all, whatever is killed when."""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everalign.errors import InputError
from everalign.storage import lock_file

_PARTIAL = ".partial"
_BLOCK = 1 << 20


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def is_partial(path: Path) -> bool:
    """Whether this is what a kill left of `write_text` or `new_folder`."""
    return path.name.endswith(_PARTIAL)


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


def check_new_file(path: Path, suffix: str, overwrite: bool) -> None:
    """Refuse an output whose name does not end in `suffix`, or that exists and may not be replaced."""
    if path.suffix != suffix:
        raise InputError(f"{path}: the output's name must end in {suffix}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise InputError(f"{path} exists: choose another output, or ask for --overwrite to replace a file")


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in one step that survives a crash; of several processes, the last one's text stands."""
    temporary = path.with_name(path.name + _PARTIAL)
    # Locked: two processes that wrote into the same temporary file would mix their texts.
    handle = lock_file(temporary, wait=lambda _: None)
    with os.fdopen(handle, "r+", encoding="utf-8") as file:
        file.truncate(0)
        file.write(text)
        file.flush()
        os.fsync(handle)
        os.replace(temporary, path)
    _sync(path.parent)


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
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    What an earlier, broken-off attempt left of the temporary folder is dropped. Callers hold a lock, of `path` or of
    something around it: see `everalign.storage.alone`.
    """
    temporary = path.with_name(path.name + _PARTIAL)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        # It may be as large as a model.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    follow_umask(temporary)
    for entry in [temporary, *temporary.rglob("*")]:
        _sync(entry)
    os.replace(temporary, path)
    _sync(path.parent)


def follow_umask(path: Path) -> None:
    """Give a file, or every file below a folder, the mode that a new file gets there.

    safetensors and `tempfile` make files that only their owner reads, whatever the umask says.
    """
    probe = (path if path.is_dir() else path.parent) / f".mode-{os.getpid()}{_PARTIAL}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
