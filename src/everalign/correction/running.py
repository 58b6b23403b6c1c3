"""Correct many answers, in batches that survive a kill.

    rows = load_uncorrected("answers.jsonl")
    correct_rows(rows, Corrector.from_pretrained("runs/corrector"), "corrections.jsonl")

What is finished stands beside the output in a file that is named after corrector, options and rows, until the output is
written whole; the same call goes on from there. `correct_batches` does so with a file of its caller's.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from everalign.correction.corrector import Corrected, CorrectionOptions, Corrector
from everalign.correction.templates import Question
from everalign.data.row_set import RowSet
from everalign.data.uncorrected import Uncorrected, UncorrectedSet
from everalign.errors import EveralignError, InputError
from everalign.files import check_new_file, write_text
from everalign.line_store import LineStore, json_line

ROWS_PER_BATCH = 64


class Answered(Protocol):
    """A row to correct."""

    @property
    def question(self) -> Question:
        """Text, or chat messages."""
        ...

    @property
    def answer(self) -> str:
        """Somebody's answer."""
        ...


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
    check_batches(rows, rows_per_batch)
    check_new_file(path, ".jsonl", overwrite)
    store = LineStore.beside(path, store_key(corrector, options, rows))
    done, resumed = correct_batches(rows, corrector, options, rows_per_batch, store, announce, progress)
    write_text(path, "".join(json_line(_columns(row, one)) for row, one in zip(rows, done, strict=True)))
    store.remove()
    return CorrectionRun(path, tuple(done), resumed)


def correct_batches(
    rows: Sequence[Answered],
    corrector: Corrector,
    options: CorrectionOptions | None,
    rows_per_batch: int,
    store: LineStore | None,
    announce: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> tuple[list[Corrected], int]:
    """Correct rows batch by batch, and go on behind those that a store has.

    Args:
        rows: anything with a question and an answer.
        corrector: corrects them.
        options: how; the corrector's own when None.
        rows_per_batch: rows handed to the corrector at once.
        store: where corrections are kept, by a `store_key`; None to keep none.
        announce: told how many rows the store had.
        progress: called with ("correcting", rows done, rows in all).

    Returns:
        What became of each row, and how many of these came from the store.

    Raises:
        InputError: the store is damaged.
        EveralignError: the corrector failed; names the rows.
    """
    done = [] if store is None else _kept(store, len(rows))
    resumed = len(done)
    if resumed:
        announce(f"  {resumed} of {len(rows)} rows were corrected by an earlier run")
    for start in range(resumed, len(rows), rows_per_batch):
        batch = rows[start : start + rows_per_batch]
        try:
            found = corrector.correct_batch([(row.question, row.answer) for row in batch], options)
        except EveralignError as error:
            kept = "" if store is None else "; what was corrected before is kept"
            raise type(error)(f"rows {start + 1} to {start + len(batch)}: {error}{kept}") from error
        if store is not None:
            store.add([asdict(one) for one in found])
        done += found
        progress("correcting", len(done), len(rows))
    return done, resumed


def check_batches(rows: RowSet[Any], rows_per_batch: int) -> None:
    """Raise InputError if there is nothing to correct, or the batch size is none."""
    if not rows:
        raise InputError(f"{rows.source}: no rows in it")
    if rows_per_batch < 1:
        raise InputError(f"batch size: must be at least 1, found {rows_per_batch}")


def store_key(corrector: Corrector, options: CorrectionOptions, rows: RowSet[Any]) -> str:
    """Return what corrections depend on.

    Raises:
        InputError: the gate is a function, which cannot be known again.
    """
    if callable(options.gate):
        raise InputError("gate: must be a number here; a later run could not tell whether a function is the same")
    return f"{corrector.fingerprint}\n{options!r}\n{rows.fingerprint}"


def _columns(row: Uncorrected, corrected: Corrected) -> dict[str, Any]:
    return {
        "question": row.question,
        "answer": row.answer,
        "correction": corrected.text,
        "changed": corrected.changed,
        "reason": corrected.reason,
    }


def _kept(store: LineStore, most: int) -> list[Corrected]:
    """Return what became of the rows that an earlier run has finished."""
    try:
        found = [Corrected(**one) for one in store.read()]
    except TypeError:
        raise store.damaged() from None
    if len(found) > most:
        raise store.damaged()
    return found
