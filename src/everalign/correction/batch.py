"""Correct many answers in batches, resumable after a kill.

    rows = load_uncorrected("answers.jsonl")
    correct_rows(rows, Corrector.from_pretrained("runs/corrector"), "corrections.jsonl")

Corrections are journalled beside the output, in a file named after corrector, options and rows, until the output is
complete; the same call continues from there.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from everalign.bulk.files import Columns, OutputFile
from everalign.bulk.job import Words, numbered_rows
from everalign.correction.corrector import Corrected, CorrectionOptions, Corrector
from everalign.data.messages import prompt_columns
from everalign.data.records import Correction, CorrectionSet
from everalign.errors import EveralignError, InputError, check_shortfall
from everalign.storage import Journal, check_new_file, exclusive, json_line, lock_of, write_text

ROWS_PER_BATCH = 64

_KEPT = "; what was corrected before is kept"

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
            lines.append(json_line(_output_row(row, one)))
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
        kept = "" if journal is None else _KEPT
        results = _correct_batch(corrector, options, [rows[i] for i in batch], [i + 1 for i in batch], kept)
        done.update(zip(batch, results, strict=True))
        if journal is not None:
            journal.put({index: asdict(done[index]) for index in batch})
        progress("correcting", len(done), len(rows))
    for warning in shortfalls(Counter(one.reason for one in done.values() if one.reason), len(rows)):
        log(f"  warning: {warning}")
    return [done[index] for index in range(len(rows))], resumed


def _correct_batch(
    corrector: Corrector,
    options: CorrectionOptions | None,
    rows: Sequence[Correction],
    numbers: Sequence[int],
    kept: str = "",
) -> list[Corrected]:
    """Correct some rows; `numbers` are theirs from 1, for errors, which end in `kept`."""
    try:
        return corrector.correct_batch([(row.question, row.answer) for row in rows], options)
    except EveralignError as error:
        raise type(error)(f"{numbered_rows(numbers)}: {error}{kept}") from error


def _output_row(row: Correction, one: Corrected) -> dict[str, Any]:
    verdict = {"correction": one.text, "changed": one.changed, "reason": one.reason}
    return {**prompt_columns(row.question, "question"), "answer": row.answer, **verdict}


def shortfalls(reasons: Mapping[str, float], rows: int) -> list[str]:
    """Return a warning for each reason that says nothing about an answer, where it kept many of them as they are."""
    return [
        warning
        for reason, what, remedy in _NOT_CORRECTED
        for warning in check_shortfall(int(reasons.get(reason, 0)), rows, what, remedy, refuse=False)
    ]


def check_batches(rows: CorrectionSet, rows_per_batch: int) -> None:
    """Raise InputError if there are no rows, or the batch size is below 1."""
    if not rows:
        raise InputError(f"{rows.source}: no rows in it")
    if rows_per_batch < 1:
        raise InputError(f"batch size: must be at least 1, found {rows_per_batch}")


def journal_facts(corrector: Corrector, options: CorrectionOptions, rows: CorrectionSet) -> tuple[str, ...]:
    """Return what corrections depend on, which names their journal; errors as in `_corrector_facts`."""
    return *_corrector_facts(corrector, options), rows.fingerprint


def _corrector_facts(corrector: Corrector, options: CorrectionOptions) -> tuple[str, str]:
    """Return what corrections depend on beside the rows.

    Raises:
        InputError: the gate is a function, which cannot be compared with that of another run.
    """
    if callable(options.gate):
        raise InputError("gate: must be a number here; a later run could not tell whether a function is the same")
    # The name that version 0.1.0 gave it, so that its journals are found; steering is part of the fingerprint now.
    described = f"{repr(options)[:-1]}, strength=0.0)"
    return corrector.fingerprint, described


class CorrectionWork:
    """Correcting as work for `run_bulk`.

    Args:
        corrector: corrects the rows.
        options: how; a gate has to be a number.
        rows_per_batch: rows corrected at once.

    Raises:
        InputError: the batch size is below 1, or the gate is a function.
    """

    words = Words("correct", "correcting", "corrected")
    columns: ClassVar[Columns] = {
        "question": "text",
        "answer": "text",
        "correction": "text",
        "changed": "boolean",
        "reason": "text",
        "tools": "text",
        "chat_template_kwargs": "text",
    }

    def __init__(
        self, corrector: Corrector, options: CorrectionOptions | None = None, rows_per_batch: int = ROWS_PER_BATCH
    ) -> None:
        if rows_per_batch < 1:
            raise InputError(f"batch size: must be at least 1, found {rows_per_batch}")
        self._corrector, self._options = corrector, options or CorrectionOptions()
        self._rows_per_batch = rows_per_batch
        self.facts: tuple[str, ...] = _corrector_facts(corrector, self._options)
        self._written = 0

    def begin(self, output: OutputFile) -> None:
        """Counts from here."""
        self._written = 0

    def end(self) -> Mapping[str, float]:
        """Returns the tokens written since `begin`."""
        return {"written": self._written}

    def length(self, row: Correction) -> int:
        """Returns the characters of question and answer, about."""
        return len(str(row.question)) + len(row.answer)

    def batches(self, rows: Sequence[Correction]) -> Iterator[range]:
        """Cuts rows into batches of equally many."""
        for start in range(0, len(rows), self._rows_per_batch):
            yield range(start, min(start + self._rows_per_batch, len(rows)))

    def run(self, rows: Sequence[Correction], numbers: Sequence[int]) -> list[Any]:
        """Returns a `Corrected` for each row as a dict; errors as in `correct_batches`."""
        results = _correct_batch(self._corrector, self._options, rows, numbers, _KEPT)
        self._written += sum(one.output_tokens or 0 for one in results)
        return [asdict(one) for one in results]

    def is_result(self, row: Correction, result: Any) -> bool:
        """Whether this can be a `Corrected`."""
        try:
            return isinstance(Corrected(**result).text, str)
        except TypeError:
            return False

    def output(self, row: Correction, result: Any) -> Mapping[str, Any]:
        """Returns question, answer, correction, and whether and why it changed."""
        return _output_row(row, Corrected(**result))

    def totals(self, row: Correction, result: Any) -> Mapping[str, float]:
        """Returns the counts of `Corrected` where they are known, and why answers were kept, as `kept REASON`."""
        counts = ("forward_passes", "accepted_draft_tokens", "rejected_draft_tokens", "output_tokens")
        found = {name: result[name] for name in ("changed", *counts) if result[name] is not None}
        return found if result["reason"] is None else {**found, f"kept {result['reason']}": 1}
