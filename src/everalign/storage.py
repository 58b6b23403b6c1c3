"""Files, folders, tensors and journals that survive a kill: written whole or not at all, checked when read."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from everalign.errors import EveralignError, InputError

if TYPE_CHECKING:
    from torch import Tensor

Key = TypeVar("Key", int, str)

_WAIT = 30.0  # seconds for another process to finish its writing
_KEYS_AT_ONCE = 500  # SQLite bounds the parameters of a query
_FORMAT = 1  # stands in the file as `user_version`
_TABLE = "CREATE TABLE entries (key PRIMARY KEY, value TEXT NOT NULL, checksum TEXT NOT NULL)"


class Journal:
    """JSON values by key in an SQLite file, each on disk when `put` returns; processes may share it.

    What is read is what was put: a value whose checksum differs is an error, and what a kill cut is undone by SQLite.

    Args:
        path: the file; made, with its folder, when first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def beside(cls, output: Path, *facts: str) -> "Journal":
        """The journal beside an output file until that is written whole; named after what the results depend on."""
        return cls(output.with_name(f"{output.name}.{_digest(*facts)}.partial"))

    @classmethod
    def within(cls, folder: Path, name: str, *facts: str) -> "Journal":
        """A journal that stays, in a folder of such; `facts` as in `beside`."""
        return cls(folder / f"{name}-{_digest(*facts)}.sqlite")

    def read(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """Return the values that are there, in the order of the keys.

        Raises:
            InputError: the file is damaged, or something else; the message says to delete it.
            EveralignError: it cannot be read.
        """
        wanted = list(dict.fromkeys(keys))
        if not wanted or not self.path.exists():
            return {}
        rows: dict[Key, tuple[str, str]] = {}
        with self._opened() as database:
            if self._is_empty(database):
                return {}
            for start in range(0, len(wanted), _KEYS_AT_ONCE):
                some = wanted[start : start + _KEYS_AT_ONCE]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, value, checksum FROM entries WHERE key IN ({marks})"
                rows |= {key: (value, checksum) for key, value, checksum in database.execute(query, some)}
        if any(checksum != _digest(repr(key), value) for key, (value, checksum) in rows.items()):
            raise self.damaged()
        return {key: json.loads(rows[key][0]) for key in wanted if key in rows}

    def put(self, values: Mapping[Key, Any]) -> None:
        """Keep values, all of them or none; errors as in `read`, and ValueError for NaN and infinity."""
        texts = {key: json.dumps(value, allow_nan=False) for key, value in values.items()}
        rows = [(key, text, _digest(repr(key), text)) for key, text in texts.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened() as database:
            # Immediate: a transaction that reads first could not wait for another process that writes.
            database.execute("BEGIN IMMEDIATE")
            if self._is_empty(database):
                database.execute(_TABLE)
                database.execute(f"PRAGMA user_version = {_FORMAT}")
            database.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)
            database.execute("COMMIT")

    def remove(self) -> None:
        """Delete the file, once the output holds everything."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)

    def damaged(self) -> InputError:
        """Return the error for values that are not what was put."""
        return InputError(f"{self.path}: what an earlier run kept is damaged: delete this file")

    def _is_empty(self, database: sqlite3.Connection) -> bool:
        """Whether nothing was put yet; refuses a file that another program or an earlier format has written."""
        (version,) = database.execute("PRAGMA user_version").fetchone()
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if (version, tables) == (_FORMAT, ["entries"]):
            return False
        if version or tables:
            raise InputError(
                f"{self.path}: was not kept by this version of Everalign: delete this file, or name another"
            )
        return True

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None)) as database:
                yield database
        except sqlite3.OperationalError as error:
            raise EveralignError(f"{self.path}: nothing can be kept here: {error}") from error
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{self.path}: what an earlier run kept is damaged, or was not kept by this version of Everalign "
                f"({error}): delete this file"
            ) from error


# The open file that holds a lock and how often it was entered, by the lock's path, process and thread.
_held: dict[tuple[str, int, int], tuple[int, int]] = {}


def lock_of(output: Path) -> Path:
    """Return the lock file of an output file or folder; it stands beside it for as long as somebody writes there."""
    named = Path(os.path.abspath(output)) if output.name in ("", "..") else output
    return named.with_name(f"{named.name}.lock")


@contextmanager
def exclusive(
    lock: Path, doing: str = "writing this output", wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Let no other process, and no other thread of this one, into the block as long as this one is in it.

    The lock is released when the process ends, whatever way. The same thread may enter it again.

    Args:
        lock: the lock file, made with its folder and removed in the end; it says who holds it.
        doing: what the other one is at, for the message.
        wait: called with who holds it, before waiting until they are done; None to wait for nobody.

    Raises:
        InputError: another one holds it, and is not to be waited for; names the process and the host.
        EveralignError: the file system has no locks.
    """
    made = not lock.parent.exists()
    key = (os.path.realpath(lock), os.getpid(), threading.get_ident())
    handle, depth = _held.get(key) or (lock_file(lock, doing, wait), 0)
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
            # While it is still held: whoever waits for it sees that the name is gone, and begins again.
            lock.unlink(missing_ok=True)
            os.close(handle)
            if made:
                with suppress(OSError):  # something came to be in it
                    lock.parent.rmdir()


def lock_file(lock: Path, doing: str = "writing this output", wait: Callable[[str], None] | None = None) -> int:
    """Open a file and lock it; whoever closes it lets the next one in. Arguments and errors as in `alone`."""
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # who made the folder has removed it, for nothing came of it
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
            if _is_still(lock, handle):
                return handle
        except BaseException as error:
            os.close(handle)
            if isinstance(error, OSError):
                raise EveralignError(f"{lock}: cannot be locked ({error.strerror}): write elsewhere") from error
            raise
        os.close(handle)


def _is_still(lock: Path, handle: int) -> bool:
    """Whether the open file is the one of that name: its former holder removes or renames it."""
    try:
        named = os.stat(lock)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(handle))


def json_line(value: Any) -> str:
    """Return a value as a line of JSON Lines; raises ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


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


_CHECKSUM = "sha256"


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Replace a file by named tensors in one step; several processes may write it at the same time."""
    from safetensors.torch import save_file  # here and below: reading a run needs no torch

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


def read_tensors(path: Path, names: tuple[str, ...], what: str) -> "dict[str, Tensor] | None":
    """Return the tensors of `write_tensors`, None where there is no file.

    Args:
        path: the file.
        names: the tensors that it has to hold.
        what: names the file's role in an error.

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
        intact = torch.equal(stored[_CHECKSUM], _checksum(tensors))
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path}: the {what} is damaged ({error}): delete this file") from error
    if not intact:
        raise InputError(f"{path}: the {what} is damaged (its values changed): delete this file")
    return tensors


def _checksum(tensors: Mapping[str, "Tensor"]) -> "Tensor":
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
