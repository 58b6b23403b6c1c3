"""Crash-safe storage: atomic files and folders, locks between processes, and a journal of finished work.

Two ways to survive a kill: `write_text` and `new_folder` leave the old state or the new one, never a part; a `Journal`
keeps the results of long work one by one until the whole can be written. A full disk, a folder that is read-only and a
lost lock are errors that name the file and what to do.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from everalign.distributed import on_main
from everalign.errors import EveralignError, InputError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from torch import Tensor

AnyModel = TypeVar("AnyModel", bound=BaseModel)
Key = TypeVar("Key", int, str)

_PARTIAL = ".partial"
_BLOCK = 1 << 20
_CHECKSUM = "sha256"
_JOURNAL_FORMAT = 1  # stored in the file as `user_version`
_JOURNAL_WAIT = 30.0  # seconds for another process that is writing
_READING = "BEGIN"
"""All that is read is of one moment: the first `put` of another process may come in between."""
_KEYS_PER_QUERY = 500  # SQLite limits the parameters of a query

# The file descriptor of a lock and how often it was entered, by the lock's path, process and thread.
_held: dict[tuple[str, int, int], tuple[int, int]] = {}

_AGAIN = "then give the same command again; what was finished is kept"
_FULL = f"the disk is full: free some space, {_AGAIN}"
_NOT_WHOLE = f"see whether the disk is full, {_AGAIN}"
_READ_ONLY = "it may not be written to: make it writable, or choose another output"
_FAILED = f"the disk or the network file system failed: check it, {_AGAIN}"
_NO_FOLDER = "a part of this path is a file and no folder: choose another output"
_A_FOLDER = "a folder has this name: choose another output"
_TAKEN = "another process has written something there: choose another output"
_NO_LOCKS = "this file system has no locks, or its lock server does not answer: write to another one"
# What is wrong where a file cannot be written, and what to do about it.
_FAULTS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: f"your quota of the disk is used up: free some space, {_AGAIN}",
    errno.EFBIG: f"it is larger than the file system or a limit (ulimit -f) allows: lift the limit, {_AGAIN}",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _READ_ONLY),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN), _FAILED),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), _NO_FOLDER),
    **dict.fromkeys((errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS), _NO_LOCKS),
    errno.EISDIR: _A_FOLDER,
    errno.ENOTEMPTY: _TAKEN,
}
_SQLITE_FAULTS = {
    "disk is full": _FULL,
    "readonly": _READ_ONLY,
    "unable to open": _READ_ONLY,
    "locked": f"another process holds it, or the network file system has lost its lock: end that process, {_AGAIN}",
    "I/O error": _FAILED,
}
# Errors that are the user's: another output would do.
_INPUT_FAULTS = (_READ_ONLY, _NO_FOLDER, _A_FOLDER, _TAKEN)
# What torch says of a file that it could not write to its end; it does not say why.
_TORCH_FAULTS = ("PytorchStreamWriter", "iostream error", "unexpected pos")


# ---- Faults ----


def write_fault(error: BaseException, path: Path) -> EveralignError | None:
    """Return the error for a file that could not be written, with what to do; None where that was not the problem.

    Args:
        error: of the system, or of a library that writes: safetensors and tokenizers give the system's number in their
            message, torch says only that it could not.
        path: what was to be written.
    """
    said = re.search(r"\(os error (\d+)\)", str(error))
    if isinstance(error, OSError):
        reason, advice = error.strerror, _FAULTS.get(error.errno or 0)
    elif said:
        reason, advice = os.strerror(int(said[1])), _FAULTS.get(int(said[1]))
    elif isinstance(error, RuntimeError) and any(word in str(error) for word in _TORCH_FAULTS):
        reason, advice = "torch could not write all of it", _NOT_WHOLE
    else:
        return None
    if advice is None:
        return None
    if isinstance(error, OSError) and isinstance(error.filename, str) and advice == _READ_ONLY:
        path = Path(error.filename)
    kind = InputError if advice in _INPUT_FAULTS else EveralignError
    # What it was to be called in the end.
    return kind(f"{str(path).replace(_PARTIAL, '')}: cannot be written ({reason}): {advice}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager that turns what the system or a library says of a failed write into ours, see `write_fault`."""
    try:
        yield
    except Exception as error:
        fault = write_fault(error, path)
        if fault is None:
            raise
        raise fault from error


# ---- Files ----


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically and durably; of several processes, the last one's text stays."""
    temporary = path.with_name(path.name + _PARTIAL)
    with writing(path):
        # Locked, because two processes that write the same temporary file would mix their texts.
        handle = _lock_file(temporary, wait=lambda _: None)
        with os.fdopen(handle, "r+", encoding="utf-8") as file:
            try:
                file.truncate(0)
                file.write(text)
                file.flush()
                os.fsync(handle)
                _check_locks()
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file that becomes `path` when the block ends without an error.

    For files that are too large for `write_text`. Callers hold a lock on `path`, see `exclusive`.
    """
    temporary = path.with_name(path.name + _PARTIAL)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(temporary)
        _check_locks()
        os.replace(temporary, path)
        _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by `value` as indented JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the value of a JSON file of ours; InputError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; is this an Everalign run directory?") from error
    except ValueError as error:
        raise InputError(f"{path}: damaged JSON ({error}); restore the file") from error


def read_model(path: Path, model: type[AnyModel], hint: str = "restore the file") -> AnyModel:
    """Return the content of a JSON file of ours as a pydantic model; InputError names the file and the bad field."""
    content = read_json(path)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "the file"
        message = f"{path}: field {field!r}: {problem['msg']}; {hint}"
        raise InputError(message, where=str(path), field=field, hint=hint) from None


def json_line(value: Any) -> str:
    """Return a value as a line of JSON Lines; ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def check_new_file(path: Path, suffix: str, overwrite: bool) -> None:
    """Refuse an output whose name does not end in `suffix`, or that exists and may not be replaced."""
    if path.suffix != suffix:
        raise InputError(f"{path}: the output's name must end in {suffix}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise InputError(f"{path} exists: choose another output, or ask for --overwrite to replace a file")


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def checksums(folder: Path, exclude: frozenset[str] = frozenset()) -> dict[str, str]:
    """Return the sha256 of every file below `folder`, by its relative path."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: sha256_of(folder / name) for name in names if name not in exclude}


def differing_files(folder: Path, expected: dict[str, str]) -> list[str]:
    """Return the names of files that are missing or whose sha256 is not the expected one."""
    return [
        name for name, digest in expected.items() if not (folder / name).is_file() or sha256_of(folder / name) != digest
    ]


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Replace a file by named tensors, atomically; several processes may write it at the same time."""
    from safetensors.torch import save_file

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=_PARTIAL)
        os.close(handle)
        try:
            save_file({**tensors, _CHECKSUM: _tensor_checksum(tensors)}, temporary)
            follow_umask(Path(temporary))
            os.replace(temporary, path)
        except BaseException:  # a full disk or Ctrl-C: nobody else would ever remove the file
            os.unlink(temporary)
            raise


def read_tensors(path: Path, names: tuple[str, ...], what: str) -> "dict[str, Tensor] | None":
    """Return the tensors of a file of `write_tensors`; None if there is no file.

    Args:
        path: the file.
        names: the tensors that it must contain.
        what: the file's role, used in errors.

    Raises:
        InputError: the file is damaged; the message says to delete it.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        return None
    try:
        stored = load_file(path)
        tensors = {name: stored[name] for name in names}
        intact = torch.equal(stored[_CHECKSUM], _tensor_checksum(tensors))
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path}: the {what} is damaged ({error}): delete this file") from error
    if not intact:
        raise InputError(f"{path}: the {what} is damaged (its values changed): delete this file")
    return tensors


def _tensor_checksum(tensors: Mapping[str, "Tensor"]) -> "Tensor":
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


# ---- URLs ----


def is_url(name: str | os.PathLike[str]) -> bool:
    """Whether this is the URL of a file, such as s3://bucket/rows.jsonl."""
    return isinstance(name, str) and "://" in name


def url_filesystem(url: str) -> "tuple[AbstractFileSystem, str]":
    """Return fsspec's file system of a URL, and the file's name there.

    Raises:
        InputError: nothing can open such a URL, or the package that could is missing.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: {error}; or copy the file here", where=url) from None


def open_url(url: str) -> BinaryIO:
    """Open the file at a URL for reading; OSError as `open` has it, and InputError as in `url_filesystem`."""
    filesystem, name = url_filesystem(url)
    return filesystem.open(name, "rb")  # type: ignore[no-any-return]


# ---- Folders ----


def is_partial(path: Path) -> bool:
    """Whether this is a temporary file or folder of `write_text`, `new_folder` or a journal."""
    return path.name.endswith(_PARTIAL)


def check_free(folder: Path) -> None:
    """Refuse an output folder that exists and is not empty; what is there is never overwritten."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: choose another output folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    A temporary folder of an earlier, killed attempt is deleted. Callers hold a lock on `path` or on something around
    it, see `exclusive`.
    """
    temporary = path.with_name(path.name + _PARTIAL)
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(path):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            follow_umask(temporary)
            for entry in [temporary, *temporary.rglob("*")]:
                _sync(entry)
            _check_locks()
            os.replace(temporary, path)
        except BaseException:
            # It may be as large as a model.
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(path.parent)


def follow_umask(path: Path) -> None:
    """Give a file, or every file below a folder, the mode of a new file there.

    safetensors and `tempfile` create files that only their owner can read, whatever the umask says.
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
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- Locks ----


def lock_of(output: Path) -> Path:
    """Return the lock file of an output file or folder; it stands beside the output while somebody writes."""
    named = Path(os.path.abspath(output)) if output.name in ("", "..") else output
    return named.with_name(f"{named.name}.lock")


@contextmanager
def exclusive(
    lock: Path, doing: str = "writing this output", wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Keep other processes, and other threads of this one, out of the block. The same thread may enter it again.

    The lock is released when the process ends, however it ends. Of processes that share one job the main one holds it.
    If its file goes while it is held, another process may hold a new one: from then on `write_text`, `new_folder` and
    journals write nothing more here.

    Args:
        lock: the lock file, created with its folder, and removed at the end; it says who holds it.
        doing: what the holder does, for the error.
        wait: called with the holder before waiting for it; None to raise instead of waiting.

    Raises:
        InputError: another process or thread holds the lock; names process and host.
        EveralignError: the file system has no locks.
    """
    with ExitStack() as stack:
        # The main process alone enters the lock; where it cannot, all raise its error.
        on_main(stack.enter_context)(_exclusive(lock, doing, wait))
        yield


@contextmanager
def _exclusive(lock: Path, doing: str, wait: Callable[[str], None] | None) -> Iterator[None]:
    new_parent = not lock.parent.exists()
    key = (os.path.realpath(lock), os.getpid(), threading.get_ident())
    handle, depth = _held.get(key) or (_lock_file(lock, doing, wait), 0)
    _held[key] = (handle, depth + 1)
    try:
        if not depth:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        if depth:
            _held[key] = (handle, depth)
        else:
            del _held[key]
            # While it is still locked: a waiting process sees that the name is gone, and starts over.
            if _is_there(lock, handle):  # not another process's, which took its place
                with suppress(OSError):  # a folder that is read-only by now: the lock ends with the descriptor
                    lock.unlink()
            os.close(handle)
            if new_parent:
                with suppress(OSError):  # not empty
                    lock.parent.rmdir()


def _lock_file(lock: Path, doing: str = "writing this output", wait: Callable[[str], None] | None = None) -> int:
    """Return the descriptor of a locked file, unlocked when it is closed; arguments and errors as in `exclusive`."""
    while True:
        with writing(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # the folder's creator just removed it
                continue
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                if wait is None:
                    raise InputError(f"{lock}: {holder} is {doing}: wait for it, or stop it") from None
                wait(holder)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_there(lock, handle):
                return handle
        except BaseException as error:
            os.close(handle)
            if isinstance(error, OSError):
                raise EveralignError(f"{lock}: cannot be locked ({error.strerror}): {_NO_LOCKS}") from error
            raise
        os.close(handle)  # its former holder removed or renamed the file that we locked


def _is_there(lock: Path, handle: int) -> bool:
    """Whether a lock's file is still the one that is locked."""
    try:
        return os.path.samestat(os.stat(lock), os.fstat(handle))
    except OSError:  # removed, or a network file system has lost it
        return False


def _check_locks() -> None:
    """Refuse to write where a lock that this process holds is gone.

    Raises:
        EveralignError: its file was removed or replaced, so that another process may be writing too.
    """
    for (lock, process, _), (handle, _) in list(_held.items()):
        if process == os.getpid() and not _is_there(Path(lock), handle):
            raise EveralignError(
                f"{lock}: this lock was removed while it was held, so another process may be writing here too: "
                f"nothing more is written; see that no other works here, {_AGAIN}"
            )


# ---- Journals ----


class Journal:
    """A durable map from keys to JSON values in an SQLite file, for the results of work that may be killed.

    Values are on disk when `put` returns. Processes may share a journal. What a kill cut off is undone by SQLite, and a
    value whose checksum differs is an error. Of processes that share one job the main one reads and writes for all.

    Args:
        path: the file; created, with its folder, when first written to.
        facts_id: a digest of what its values depend on; one of other values is an error. Empty to tell none apart.
    """

    def __init__(self, path: Path, facts_id: str = "") -> None:
        self.path = path
        # As SQLite's `application_id`, which is 0 in files of version 0.1.0.
        self._id = int(facts_id[:7] or "0", 16)

    @classmethod
    def beside(cls, output: Path, *facts: str) -> "Journal":
        """Return the journal beside an output that is not finished; `facts` are what its results depend on."""
        facts_id = _digest(*facts)
        return cls(output.with_name(f"{output.name}.{facts_id}{_PARTIAL}"), facts_id)

    @classmethod
    def within(cls, folder: Path, name: str, *facts: str) -> "Journal":
        """Return a permanent journal in a folder; `facts` as in `beside`."""
        facts_id = _digest(*facts)
        return cls(folder / f"{name}-{facts_id}.sqlite", facts_id)

    @on_main
    def read(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """Return the values that are there, in the order of the keys.

        Raises:
            InputError: the file is damaged, or something else; the message says to delete it.
            EveralignError: the file cannot be read.
        """
        wanted = list(dict.fromkeys(keys))
        if not wanted or not self.path.exists():
            return {}
        rows: dict[Key, tuple[str, str]] = {}
        with self._open() as database:
            database.execute(_READING)
            if self._is_empty(database):
                return {}
            for start in range(0, len(wanted), _KEYS_PER_QUERY):
                some = wanted[start : start + _KEYS_PER_QUERY]
                query = f"SELECT key, value, checksum FROM entries WHERE key IN ({','.join('?' * len(some))})"
                rows |= {key: (value, checksum) for key, value, checksum in database.execute(query, some)}
        if any(checksum != _digest(repr(key), value) for key, (value, checksum) in rows.items()):
            raise self.damaged()
        return {key: json.loads(rows[key][0]) for key in wanted if key in rows}

    @on_main
    def count(self) -> int:
        """Return how many values are there; errors as in `read`."""
        if not self.path.exists():
            return 0
        with self._open() as database:
            database.execute(_READING)
            if self._is_empty(database):
                return 0
            (found,) = database.execute("SELECT COUNT(*) FROM entries").fetchone()
            return int(found)

    @on_main
    def put(self, values: Mapping[Key, Any]) -> None:
        """Store values, all or none; errors as in `read`, and ValueError for NaN and infinity."""
        texts = {key: json.dumps(value, allow_nan=False) for key, value in values.items()}
        rows = [(key, text, _digest(repr(key), text)) for key, text in texts.items()]
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        _check_locks()
        with self._open() as database:
            # Immediate: a transaction that begins by reading cannot wait for another process that writes.
            database.execute("BEGIN IMMEDIATE")
            if self._is_empty(database):
                database.execute("CREATE TABLE entries (key PRIMARY KEY, value TEXT NOT NULL, checksum TEXT NOT NULL)")
                database.execute(f"PRAGMA user_version = {_JOURNAL_FORMAT}")
                database.execute(f"PRAGMA application_id = {self._id}")
            database.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)
            database.execute("COMMIT")

    @on_main
    def remove(self) -> None:
        """Delete the file, once the output is complete."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)

    def damaged(self) -> InputError:
        """Return the error for values that are not what was put."""
        return InputError(f"{self.path}: the results kept by an earlier run are damaged: delete this file")

    def _is_empty(self, database: sqlite3.Connection) -> bool:
        """Whether nothing was put yet; refuses a file of another program, an earlier format, or other values."""
        (owner,) = database.execute("PRAGMA application_id").fetchone()
        if owner and self._id and owner != self._id:
            raise InputError(f"{self.path}: holds the results of other work: delete this file")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if (version, tables) == (_JOURNAL_FORMAT, ["entries"]):
            return False
        if version or tables:
            raise InputError(
                f"{self.path}: was not written by this version of Everalign: delete this file, or name another"
            )
        return True

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=_JOURNAL_WAIT, isolation_level=None)) as database:
                yield database
        except sqlite3.OperationalError as error:
            advice = next((text for word, text in _SQLITE_FAULTS.items() if word in str(error)), "check its folder")
            kind = InputError if advice in _INPUT_FAULTS else EveralignError
            raise kind(f"{self.path}: cannot be written ({error}): {advice}") from error
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{self.path}: the results kept by an earlier run are damaged, or not written by this "
                f"version of Everalign ({error}): delete this file"
            ) from error


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
