"""Correct every answer of a file, in batches that survive a kill.

    rows = load_uncorrected("answers.jsonl")
    correct_rows(rows, Corrector.from_pretrained("runs/corrector"), "corrections.jsonl")

What is finished stands beside the output in a file that is named after corrector, options and rows, until the output is
written whole; the same call goes on from there.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everalign.correction.corrector import Corrected, CorrectionOptions, Corrector
from everalign.data.uncorrected import Uncorrected, UncorrectedSet
from everalign.errors import EveralignError, InputError
from everalign.files import write_text

ROWS_PER_BATCH = 64
_KEY_DIGITS = 16


@dataclass(frozen=True)
class CorrectionRun:
    """A finished file of corrections.

    Args:
        path: the file written.
        corrected: what became of each row, in the rows' order.
        resumed: how many of them an earlier, broken-off run had corrected.
    """

    path: Path
    corrected: tuple[Corrected, ...]
    resumed: int


def correct_rows(
    rows: UncorrectedSet,
    corrector: Corrector,
    output: str | os.PathLike[str],
    *,
    options: CorrectionOptions | None = None,
    overwrite: bool = False,
    rows_per_batch: int = ROWS_PER_BATCH,
    announce: Callable[[str], None] = lambda _: None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> CorrectionRun:
    """Correct rows and write them as JSON Lines, whole or not at all.

    A row of the output has `question`, `answer`, `correction`, `changed` and `reason`.

    Args:
        rows: the answers.
        corrector: corrects them.
        output: the file, whose name ends in .jsonl.
        options: how; the defaults when None. A gate has to be a number.
        overwrite: replace `output` if it exists.
        rows_per_batch: rows handed to the corrector at once; after each batch its corrections are on disk.
        announce: called with one line for each thing that happens.
        progress: called with ("correcting", rows done, rows in all).

    Raises:
        InputError: there are no rows, `output` cannot be used, or the gate is a function.
        EveralignError: the corrector failed; names the rows. What was corrected before is kept.
    """
    path, options = Path(output), options or CorrectionOptions()
    _check(rows, path, overwrite, rows_per_batch, options)
    store = _Store(path, f"{corrector.fingerprint}\n{options!r}\n{rows.fingerprint}")
    done = store.read(len(rows))
    resumed = len(done)
    if resumed:
        announce(f"  {resumed} of {len(rows)} rows were corrected by an earlier run")
    for start in range(resumed, len(rows), rows_per_batch):
        batch = rows[start : start + rows_per_batch]
        try:
            found = corrector.correct_batch([(row.question, row.answer) for row in batch], options)
        except EveralignError as error:
            where = f"rows {start + 1} to {start + len(batch)}"
            raise type(error)(f"{where}: {error}; what was corrected before is kept") from error
        store.add(found)
        done += found
        progress("correcting", len(done), len(rows))
    write_text(path, "".join(_line(_columns(row, one)) for row, one in zip(rows, done, strict=True)))
    store.remove()
    return CorrectionRun(path, tuple(done), resumed)


def _check(rows: UncorrectedSet, path: Path, overwrite: bool, rows_per_batch: int, options: CorrectionOptions) -> None:
    if not rows:
        raise InputError(f"{rows.source}: no rows in it")
    if path.suffix != ".jsonl":
        raise InputError(f"{path}: the output's name must end in .jsonl")
    if path.is_dir() or (path.exists() and not overwrite):
        raise InputError(f"{path} exists: choose another output, or ask for --overwrite to replace a file")
    if rows_per_batch < 1:
        raise InputError(f"batch size: must be at least 1, found {rows_per_batch}")
    if callable(options.gate):
        raise InputError("gate: must be a number here; a later run could not tell whether a function is the same")


def _columns(row: Uncorrected, corrected: Corrected) -> dict[str, Any]:
    return {
        "question": row.question,
        "answer": row.answer,
        "correction": corrected.text,
        "changed": corrected.changed,
        "reason": corrected.reason,
    }


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


class _Store:
    """What became of the first rows, one line a row, in a file beside the output that belongs to one run alone."""

    def __init__(self, output: Path, key: str) -> None:
        digest = hashlib.sha256(key.encode()).hexdigest()[:_KEY_DIGITS]
        self._path = output.with_name(f"{output.name}.{digest}.partial")

    def read(self, most: int) -> list[Corrected]:
        """Return the rows that are finished; drops a line that a kill has cut."""
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            found = [Corrected(**json.loads(line)) for line in whole]
        except (ValueError, TypeError):
            found = None
        if found is None or len(found) > most:
            raise InputError(f"{self._path}: the corrections of an earlier run are damaged: delete this file")
        if len(whole) < len(lines):
            write_text(self._path, b"".join(whole).decode())
        return found

    def add(self, corrected: Sequence[Corrected]) -> None:
        """Append what became of the next rows; it is on disk when this returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(_line(asdict(one)) for one in corrected)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file, once the output holds everything."""
        self._path.unlink(missing_ok=True)
