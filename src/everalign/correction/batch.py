"""Correct many answers in batches, resumable after a kill.

    rows = load_uncorrected("answers.jsonl")
    correct_rows(rows, Corrector.from_pretrained("runs/corrector"), "corrections.jsonl")

Corrections are journalled beside the output, in a file named after corrector, options and rows, until the output is
complete; the same call continues from there.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from everalign.correction.corrector import Corrected, CorrectionOptions, Corrector
from everalign.data.records import Correction, CorrectionSet
from everalign.errors import EveralignError, InputError, check_shortfall
from everalign.storage import Journal, check_new_file, exclusive, json_line, lock_of, write_text

ROWS_PER_BATCH = 64

# Reasons that say nothing about the answer: a warning tells how to avoid them.
_NOT_CORRECTED = (
    ("unfinished", "corrections did not end, and the answers are returned", "raise --max-new-tokens (max_new_tokens)"),
    ("too_long", "answers are too long for the corrector, and returned", "train it with more --max-length"),
)


@dataclass(frozen=True)
class CorrectionRun:
    """A finished file of corrections.

    Args:
        path: the file.
        corrected: the result for each row, in the rows' order.
        resumed: how many of them an earlier, interrupted run had corrected.
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
    """Correct rows and write them atomically as JSON Lines.

    A row of the output has `question`, `answer`, `correction`, `changed` and `reason`.

    Args:
        rows: questions with answers.
        corrector: corrects them.
        output: the file, whose name ends in .jsonl.
        options: how; the defaults when None. A gate has to be a number.
        overwrite: replace `output` if it exists.
        rows_per_batch: rows corrected at once; each batch is journalled.
        log: called with one line for each step.
        progress: called with ("correcting", rows done, rows in all).

    Raises:
        InputError: there are no rows, `output` cannot be used, another process is writing it, or the gate is a
            function.
        EveralignError: the corrector failed; names the rows. Batches corrected before are kept.
    """
    path, options = Path(output), options or CorrectionOptions()
    check_batches(rows, rows_per_batch)
    with exclusive(lock_of(path)):
        check_new_file(path, ".jsonl", overwrite)
        journal = Journal.beside(path, *journal_facts(corrector, options, rows))
        corrected, resumed = correct_batches(rows, corrector, options, rows_per_batch, journal, log, progress)
        lines = []
        for row, one in zip(rows, corrected, strict=True):
            verdict = {"correction": one.text, "changed": one.changed, "reason": one.reason}
            lines.append(json_line({"question": row.question, "answer": row.answer, **verdict}))
        write_text(path, "".join(lines))
        journal.remove()
    return CorrectionRun(path, tuple(corrected), resumed)


def correct_batches(
    rows: Sequence[Correction],
    corrector: Corrector,
    options: CorrectionOptions | None,
    rows_per_batch: int,
    journal: Journal | None,
    log: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> tuple[list[Corrected], int]:
    """Correct the rows that a journal does not hold, batch by batch.

    Args:
        rows: questions with answers.
        corrector: corrects them.
        options: the corrector's own when None.
        rows_per_batch: rows corrected at once.
        journal: keeps results by the row's index, see `journal_facts`; None to keep none.
        log: called with how many rows the journal held, and with a warning if many could not be corrected.
        progress: called with ("correcting", rows done, rows in all).

    Returns:
        The result for each row, and how many came from the journal.

    Raises:
        InputError: the journal is damaged.
        EveralignError: the corrector failed; names the rows.
    """
    done: dict[int, Corrected] = {}
    if journal is not None:
        try:
            done = {index: Corrected(**one) for index, one in journal.read(range(len(rows))).items()}
        except TypeError:
            raise journal.damaged() from None
    if resumed := len(done):
        log(f"  {resumed} of {len(rows)} rows were corrected by an earlier run")
    missing = [index for index in range(len(rows)) if index not in done]
    for start in range(0, len(missing), rows_per_batch):
        batch = missing[start : start + rows_per_batch]
        try:
            results = corrector.correct_batch([(rows[i].question, rows[i].answer) for i in batch], options)
        except EveralignError as error:
            kept = "" if journal is None else "; what was corrected before is kept"
            raise type(error)(f"rows {batch[0] + 1} to {batch[-1] + 1}: {error}{kept}") from error
        done.update(zip(batch, results, strict=True))
        if journal is not None:
            journal.put({index: asdict(done[index]) for index in batch})
        progress("correcting", len(done), len(rows))
    for reason, what, remedy in _NOT_CORRECTED:
        lost = sum(one.reason == reason for one in done.values())
        for warning in check_shortfall(lost, len(rows), what, remedy, refuse=False):
            log(f"  warning: {warning}")
    return [done[index] for index in range(len(rows))], resumed


def check_batches(rows: CorrectionSet, rows_per_batch: int) -> None:
    """Raise InputError if there are no rows, or the batch size is below 1."""
    if not rows:
        raise InputError(f"{rows.source}: no rows in it")
    if rows_per_batch < 1:
        raise InputError(f"batch size: must be at least 1, found {rows_per_batch}")


def journal_facts(corrector: Corrector, options: CorrectionOptions, rows: CorrectionSet) -> tuple[str, ...]:
    """Return what corrections depend on, which names their journal.

    Raises:
        InputError: the gate is a function, which cannot be compared with that of another run.
    """
    if callable(options.gate):
        raise InputError("gate: must be a number here; a later run could not tell whether a function is the same")
    # The name that version 0.1.0 gave it, so that its journals are found; steering is part of the fingerprint now.
    described = f"{repr(options)[:-1]}, strength=0.0)"
    return corrector.fingerprint, described, rows.fingerprint
