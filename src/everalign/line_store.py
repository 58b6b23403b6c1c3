"""Results on disk in the order they come, one JSON value a line: a run that was killed goes on behind the last one."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everalign.errors import InputError
from everalign.files import write_text

_KEY_DIGITS = 16


class LineStore:
    """A file of JSON values, one a line, each on disk once added.

    Args:
        path: the file; made, with its folder, when first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def beside(cls, output: Path, key: str) -> "LineStore":
        """The store beside an output file until that is written whole; `key` names what the results depend on."""
        return cls(output.with_name(f"{output.name}.{_digest(key)}.partial"))

    @classmethod
    def within(cls, folder: Path, name: str, key: str) -> "LineStore":
        """A store that stays, in a folder of such; `key` as in `beside`."""
        return cls(folder / f"{name}-{_digest(key)}.jsonl")

    def read(self) -> list[Any]:
        """Return the values; drops a line that a kill has cut.

        Raises:
            InputError: a line is no JSON.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            found = [json.loads(line) for line in whole]
        except ValueError:
            raise self.damaged() from None
        if len(whole) < len(lines):
            write_text(self.path, b"".join(whole).decode())
        return found

    def add(self, values: Sequence[Any]) -> None:
        """Append values; they are on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json_line(value) for value in values)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file, once the output holds everything."""
        self.path.unlink(missing_ok=True)

    def damaged(self) -> InputError:
        """Return the error for values that are not what was added."""
        return InputError(f"{self.path}: what an earlier run kept is damaged: delete this file")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:_KEY_DIGITS]


def json_line(value: Any) -> str:
    """Return a value as a line of JSON Lines; raises ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
