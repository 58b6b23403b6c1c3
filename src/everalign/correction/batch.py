"""Correct many answers, in batches that survive a kill.

    rows = load_uncorrected("answers.jsonl")
    correct_rows(rows, Corrector.from_pretrained("runs/corrector"), "corrections.jsonl")

What is finished stands beside the output in a file that is named after corrector, options and rows, until the output is
written whole; the same call goes on from there. `correct_batches` does so with a journal of its caller's.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from everalign.correction.corrector import Corrected, CorrectionOptions, Corrector
from everalign.correction.templates import Question
from everalign.data.records import Correction, CorrectionSet
from everalign.data.rows import RowSet
from everalign.errors import EveralignError, InputError, check_shortfall
from everalign.storage import Journal, check_new_file, exclusive, json_line, lock_of, write_text

ROWS_PER_BATCH = 64

# Reasons for an answer to be returned that say nothing of the answer.
_NOT_CORRECTED = (
    ("unfinished", "corrections did not end, and the answers are returned", "raise --max-new-tokens (max_new_tokens)"),
    ("too_long", "answers are too long for the corrector, and returned", "train it with more --max-length"),
)


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
    rows: CorrectionSet,
    corrector: Corrector,
    output: str | os.PathLike[str],
    *,
    options: CorrectionOptions | None = None,
    overwrite: bool = False,
    rows_per_batch: int = ROWS_PER_BATCH,
    log: Callable[[str], None] = lambda _: None,
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
        log: called with one line for each thing that happens.
        progress: called with ("correcting", rows done, rows in all).

    Raises:
        InputError: there are no rows, `output` cannot be used, another process is writing it, or the gate is a
            function.
        EveralignError: the corrector failed; names the rows. What was corrected before is kept.
    """
    path, options = Path(output), options or CorrectionOptions()
    check_batches(rows, rows_per_batch)
    with exclusive(lock_of(path)):
        check_new_file(path, ".jsonl", overwrite)
        journal = Journal.beside(path, *journal_facts(corrector, options, rows))
        done, resumed = correct_batches(rows, corrector, options, rows_per_batch, journal, log, progress)
        write_text(path, "".join(json_line(_columns(row, one)) for row, one in zip(rows, done, strict=True)))
        journal.remove()
    return CorrectionRun(path, tuple(done), resumed)


def correct_batches(
    rows: Sequence[Answered],
    corrector: Corrector,
    options: CorrectionOptions | None,
    rows_per_batch: int,
    journal: Journal | None,
    log: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> tuple[list[Corrected], int]:
    """Correct rows batch by batch, and go on behind those that a store has.

    Args:
        rows: anything with a question and an answer.
        corrector: corrects them.
        options: how; the corrector's own when None.
        rows_per_batch: rows handed to the corrector at once.
        journal: where corrections are kept by row, named by `journal_facts`; None to keep none.
        log: told how many rows the journal had, and if many could not be corrected.
        progress: called with ("correcting", rows done, rows in all).

    Returns:
        What became of each row, and how many of these came from the journal.

    Raises:
        InputError: the journal is damaged.
        EveralignError: the corrector failed; names the rows.
    """
    done = {} if journal is None else _kept(journal, len(rows))
    resumed = len(done)
    if resumed:
        log(f"  {resumed} of {len(rows)} rows were corrected by an earlier run")
    missing = [number for number in range(len(rows)) if number not in done]
    for start in range(0, len(missing), rows_per_batch):
        batch = missing[start : start + rows_per_batch]
        try:
            found = corrector.correct_batch([(rows[number].question, rows[number].answer) for number in batch], options)
        except EveralignError as error:
            kept = "" if journal is None else "; what was corrected before is kept"
            raise type(error)(f"rows {batch[0] + 1} to {batch[-1] + 1}: {error}{kept}") from error
        new = dict(zip(batch, found, strict=True))
        if journal is not None:
            journal.put({number: asdict(one) for number, one in new.items()})
        done |= new
        progress("correcting", len(done), len(rows))
    for reason, what, remedy in _NOT_CORRECTED:
        lost = sum(one.reason == reason for one in done.values())
        for warning in check_shortfall(lost, len(rows), what, remedy, refuse=False):
            log(f"  warning: {warning}")
    return [done[number] for number in range(len(rows))], resumed


def check_batches(rows: RowSet[Any], rows_per_batch: int) -> None:
    """Raise InputError if there is nothing to correct, or the batch size is none."""
    if not rows:
        raise InputError(f"{rows.source}: no rows in it")
    if rows_per_batch < 1:
        raise InputError(f"batch size: must be at least 1, found {rows_per_batch}")


def journal_facts(corrector: Corrector, options: CorrectionOptions, rows: RowSet[Any]) -> tuple[str, ...]:
    """Return what corrections depend on.

    Raises:
        InputError: the gate is a function, which cannot be known again.
    """
    if callable(options.gate):
        raise InputError("gate: must be a number here; a later run could not tell whether a function is the same")
    return corrector.fingerprint, repr(options), rows.fingerprint


def _columns(row: Correction, corrected: Corrected) -> dict[str, Any]:
    return {
        "question": row.question,
        "answer": row.answer,
        "correction": corrected.text,
        "changed": corrected.changed,
        "reason": corrected.reason,
    }


def _kept(journal: Journal, count: int) -> dict[int, Corrected]:
    """Return what became of the rows that an earlier run has finished, by the rows' numbers."""
    try:
        return {number: Corrected(**one) for number, one in journal.read(range(count)).items()}
    except TypeError:
        raise journal.damaged() from None
