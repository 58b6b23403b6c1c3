"""Values on disk, one by one, by the keys of what they cost: what was paid for once is not asked for again."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from everalign.errors import EveralignError, InputError

Value = TypeVar("Value", float, str)

_WAIT = 30.0  # seconds for another process to finish its writing
_KEYS_AT_ONCE = 500  # SQLite bounds the parameters of a query


class KeyedStore(Generic[Value]):
    """A file of values by their keys; processes may share it. A value is on disk once added.

    Args:
        path: an SQLite file, made when first written to.
        column: what one value is called; its table has the plural.
        kind: `REAL` for numbers, `TEXT` for texts.
    """

    def __init__(self, path: Path, column: str, kind: str) -> None:
        self.path = path
        self._column, self._name = column, "replies" if column == "reply" else f"{column}s"
        self._table = f"CREATE TABLE IF NOT EXISTS {self._name} (key TEXT PRIMARY KEY, {column} {kind} NOT NULL)"

    def read(self, keys: Sequence[str]) -> dict[str, Value]:
        """Return the values that are there, by their keys.

        Raises:
            InputError: the file is damaged, or no such store.
            EveralignError: it cannot be read.
        """
        if not self.path.exists():
            return {}
        found: dict[str, Value] = {}
        with self._opened() as database:
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                some = keys[start : start + _KEYS_AT_ONCE]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, {self._column} FROM {self._name} WHERE key IN ({marks})"
                found |= database.execute(query, some)
        return found

    def add(self, key: str, value: Value) -> None:
        """Keep a value; errors as in `read`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened() as database:
            database.execute(f"INSERT OR REPLACE INTO {self._name} VALUES (?, ?)", (key, value))

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=_WAIT)) as database, database:
                database.execute(self._table)
                yield database
        except sqlite3.OperationalError as error:
            raise EveralignError(f"{self.path}: {self._name} cannot be kept here: {error}") from error
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.path}: no cache of {self._name}, or a damaged one ({error}); delete it") from error
