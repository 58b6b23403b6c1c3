"""Rewards on disk, one by one: what was paid for once is not asked for again."""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from everalign.data.templating import Prompt
from everalign.errors import EveralignError, InputError

_FILE = "rewards.sqlite"
_TABLE = "CREATE TABLE IF NOT EXISTS rewards (key TEXT PRIMARY KEY, reward REAL NOT NULL)"
_WAIT = 30.0  # seconds for another process to finish its writing
_KEYS_AT_ONCE = 500  # SQLite bounds the parameters of a query


class RewardCache:
    """A file of rewards by scorer, prompt and completion; processes may share it. A reward is on disk once added.

    Args:
        path: an SQLite file, made when first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def in_folder(cls, folder: Path) -> "RewardCache":
        """The cache that a folder holds.

        Raises:
            InputError: there is a file of that name.
        """
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: must be a folder; name another one to keep rewards in")
        return cls(folder / _FILE)

    def read(self, keys: Sequence[str]) -> dict[str, float]:
        """Return the rewards that are there, by their keys.

        Raises:
            InputError: the file is damaged, or no cache.
            EveralignError: it cannot be read.
        """
        if not self.path.exists():
            return {}
        found: dict[str, float] = {}
        with self._opened() as database:
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                some = keys[start : start + _KEYS_AT_ONCE]
                marks = ",".join("?" * len(some))
                found |= database.execute(f"SELECT key, reward FROM rewards WHERE key IN ({marks})", some)
        return found

    def add(self, key: str, reward: float) -> None:
        """Keep a reward; errors as in `read`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened() as database:
            database.execute("INSERT OR REPLACE INTO rewards VALUES (?, ?)", (key, reward))

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=_WAIT)) as database, database:
                database.execute(_TABLE)
                yield database
        except sqlite3.OperationalError as error:
            raise EveralignError(f"{self.path}: rewards cannot be kept here: {error}") from error
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.path}: no cache of rewards, or a damaged one ({error}); delete it") from error


def reward_key(fingerprint: str, prompt: Prompt, completion: str) -> str:
    """Name an answer and who scores it: a hexadecimal sha256."""
    messages = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    content = json.dumps([fingerprint, messages, completion], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
