"""Correct every answer of a file, in batches that survive a kill.

    rows = load_uncorrected("answers.jsonl")
    correct_rows(rows, Corrector.from_pretrained("runs/corrector"), "corrections.jsonl")

What is finished stands beside the output in a file that is named after corrector, options and rows, until the output is
written whole; the same call goes on from there.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everalign.correction.corrector import Corrected, CorrectionOptions, Corrector
from everalign.data.uncorrected import Uncorrected, UncorrectedSet
from everalign.errors import EveralignError, InputError
from everalign.files import check_new_file, write_text
from everalign.line_store import LineStore, json_line

ROWS_PER_BATCH = 64


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
    store = LineStore.beside(path, f"{corrector.fingerprint}\n{options!r}\n{rows.fingerprint}")
    done = _kept(store, len(rows))
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
        store.add([asdict(one) for one in found])
        done += found
        progress("correcting", len(done), len(rows))
    write_text(path, "".join(json_line(_columns(row, one)) for row, one in zip(rows, done, strict=True)))
    store.remove()
    return CorrectionRun(path, tuple(done), resumed)


def _check(rows: UncorrectedSet, path: Path, overwrite: bool, rows_per_batch: int, options: CorrectionOptions) -> None:
    if not rows:
        raise InputError(f"{rows.source}: no rows in it")
    check_new_file(path, ".jsonl", overwrite)
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


def _kept(store: LineStore, most: int) -> list[Corrected]:
    """Return what became of the rows that an earlier run has finished."""
    try:
        found = [Corrected(**one) for one in store.read()]
    except TypeError:
        raise store.damaged() from None
    if len(found) > most:
        raise store.damaged()
    return found
