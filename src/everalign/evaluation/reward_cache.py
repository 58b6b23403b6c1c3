"""Rewards on disk, one by one: what was paid for once is not asked for again."""

import hashlib
import json
from pathlib import Path

from everalign.data.messages import Prompt
from everalign.errors import InputError
from everalign.keyed_store import KeyedStore

_FILE = "rewards.sqlite"


class RewardCache(KeyedStore[float]):
    """A file of rewards by scorer, prompt and completion; processes may share it. A reward is on disk once added.

    Args:
        path: an SQLite file, made when first written to.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "reward", "REAL")

    @classmethod
    def in_folder(cls, folder: Path) -> "RewardCache":
        """The cache that a folder holds.

        Raises:
            InputError: there is a file of that name.
        """
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: must be a folder; name another one to keep rewards in")
        return cls(folder / _FILE)


def reward_key(fingerprint: str, prompt: Prompt, completion: str) -> str:
    """Name an answer and who scores it: a hexadecimal sha256."""
    messages = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    content = json.dumps([fingerprint, messages, completion], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
