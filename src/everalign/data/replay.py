"""The replay buffer: a first-in-first-out store of earlier tasks' rows: preferences, scored ones, or corrections."""

import json
import math
import random
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

from everalign.data.file_formats import jsonl_rows
from everalign.data.records import Correction, Preference, Scored
from everalign.errors import InputError

AnyRow = Preference | Scored | Correction
# Columns that tell the kinds apart on disk; a row with none of them is a preference.
_KINDS: dict[str, type[Scored] | type[Correction]] = {"completions": Scored, "correction": Correction}


def drawn(task: str, rows: int, fraction: float, seed: int) -> list[int]:
    """Draw `floor(fraction * rows)` of a task's rows, as `ReplayBuffer.add` does; returns their places."""
    if not 0.0 <= fraction <= 1.0:
        raise InputError(f"replay fraction: must lie between 0 and 1, found {fraction}")
    # 0.29 * 100 is 28.999... in binary; the small term gives the count that the decimal numbers mean.
    count = math.floor(fraction * rows + 1e-9)
    # The random order is kept, so that what eviction leaves of a task is still a random sample of it.
    return random.Random(f"{seed}/{task}").sample(range(rows), count)


class ReplayBuffer:
    """Keeps a share of every task's rows and forgets the oldest rows first.

    Args:
        capacity: most rows held at once; at least 1. The LifeAlign authors' code uses 3000.
    """

    def __init__(self, capacity: int = 3000) -> None:
        if capacity < 1:
            raise InputError(f"replay capacity: must be at least 1, found {capacity}", field="capacity")
        self.capacity = capacity
        self._entries: deque[tuple[str, AnyRow]] = deque(maxlen=capacity)  # which drops the oldest itself

    def add(self, task: str, rows: Sequence[AnyRow], fraction: float = 0.2, seed: int = 0) -> int:
        """Stores `floor(fraction * len(rows))` rows of a finished task, drawn without replacement.

        The draw depends on `seed`, the task's name and the number of rows, never on the global random state.
        The task's name is part of it because tasks over the same prompts would else keep the same prompts.

        Returns:
            How many rows were drawn; fewer stay where that exceeds the capacity.
        """
        places = drawn(task, len(rows), fraction, seed)
        self._entries.extend((task, rows[place]) for place in places)
        return len(places)

    def balanced_with(self, task: str, rows: Sequence[AnyRow], fraction: float, seed: int) -> "ReplayBuffer":
        """Returns a buffer that holds a share of another task's rows too, drawn as `add` draws them.

        Above the capacity it drops rows of the task that has most, again and again, of several such tasks the oldest:
        the greedy balance of GDumb (ECCV 2020), with tasks for classes. What is left of a task is a random sample.
        """
        entries = [*self._entries, *((task, rows[place]) for place in drawn(task, len(rows), fraction, seed))]
        sizes, surplus = Counter(name for name, _ in entries), Counter[str]()
        for _ in range(len(entries) - self.capacity):
            largest = max(sizes, key=lambda name: sizes[name])
            sizes[largest] -= 1
            surplus[largest] += 1
        buffer = ReplayBuffer(self.capacity)
        for name, row in entries:
            surplus[name] -= 1
            if surplus[name] < 0:
                buffer._entries.append((name, row))
        return buffer

    def rows(self, exclude_task: str | None = None) -> list[AnyRow]:
        """The stored rows, oldest first, without those of one task if asked."""
        return [row for task, row in self._entries if exclude_task is None or task != exclude_task]

    def names(self, exclude_task: str | None = None) -> list[str]:
        """The task of each of `rows`, in their order."""
        return [task for task, _ in self._entries if exclude_task is None or task != exclude_task]

    def ids(self) -> list[str]:
        """The stored rows' ids, oldest first."""
        return [row.id for _, row in self._entries]

    def tasks(self) -> dict[str, int]:
        """How many rows of each task are held, oldest task first."""
        return dict(Counter(task for task, _ in self._entries))

    def to_jsonl(self, path: str | Path) -> None:
        """Writes the rows' content, oldest first, one object a line with the task's name in `task`."""
        with Path(path).open("w", encoding="utf-8", newline="\n") as stream:
            for task, row in self._entries:
                stream.write(json.dumps({"task": task, **row.to_json()}, ensure_ascii=False) + "\n")

    @classmethod
    def from_jsonl(cls, path: str | Path, capacity: int = 3000) -> "ReplayBuffer":
        """Reads what `to_jsonl` wrote; above `capacity` the oldest rows are dropped.

        Raises:
            InputError: a line is no row of a replay buffer; names the file and the line.
        """
        buffer = cls(capacity)
        for where, value in jsonl_rows(Path(path)):
            if isinstance(value, InputError):
                raise value
            columns = value if isinstance(value, dict) else {}
            kind = next((kind for column, kind in _KINDS.items() if column in columns), Preference)
            row, task = kind.from_json(value, where), columns.get("task")
            if not isinstance(task, str):
                raise InputError(f"{where}: field 'task': must be the task's name; the file is no replay buffer")
            buffer._entries.append((task, row))
        return buffer

    def __len__(self) -> int:
        return len(self._entries)
