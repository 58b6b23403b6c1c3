"""From questions to correction data: answers, their corrections, what is worth learning of them, one file.

    rows = load_drafts("questions.jsonl")
    client, stronger = ChatClient("http://127.0.0.1:8000/v1", "small"), ChatClient("http://127.0.0.1:8000/v1", "large")
    make_corrections(rows, "corrections.jsonl", answerer=EndpointAnswers(client), editor=LlmReviser(stronger))

What is asked for stands beside the output until that is written whole; the same call goes on from there and asks for
nothing twice.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from everalign.correction.filters import LONGEST_CORRECTION, NEAR, filter_corrections
from everalign.correction.generators import (
    ANSWERS,
    CORRECTIONS,
    AnswerSource,
    ApiUsage,
    Generations,
    LlmReviser,
    Progress,
    delete_journal,
    reply_journal,
)
from everalign.correction.templates import Template
from everalign.data.records import Correction, CorrectionSet
from everalign.errors import EveralignError, InputError, check_shortfall
from everalign.storage import check_new_file, exclusive, json_line, lock_of, write_text

UNEDITED = "no correction in the row"


@dataclass(frozen=True)
class Filters:
    """Which corrections are kept; see `filter_corrections`.

    Args:
        template: whose marks a correction must not have; the default one when None.
        longest: most characters of a correction.
        near: from what similarity on a row is a near-duplicate.
    """

    template: Template | None = None
    longest: int = LONGEST_CORRECTION
    near: float = NEAR


@dataclass(frozen=True)
class CorrectionData:
    """A finished file of corrections.

    Args:
        path: the file.
        rows: the corrections in it.
        dropped: how many were left out for each reason.
        failed: how many questions failed for good.
        failures: the file that holds them; None where there are none.
        costs: of each stage that asked a model.
    """

    path: Path
    rows: CorrectionSet
    dropped: Counter[str]
    failed: int
    failures: Path | None
    costs: tuple[ApiUsage, ...]

    @property
    def identities(self) -> int:
        """How many answers are their own corrections."""
        return sum(row.is_identity for row in self.rows)


@dataclass(frozen=True)
class _Item:
    """A question on its way, with where its parts came from."""

    draft: Correction
    answer: str | None = None
    correction: str | None = None
    answer_model: str | None = None
    correction_model: str | None = None


@dataclass
class _Run:
    """What happens on the way."""

    output: Path
    keep_going: bool
    log: Callable[[str], None]
    progress: Progress
    dropped: Counter[str]
    failed: list[dict[str, Any]]
    costs: list[ApiUsage]

    def through(self, items: Sequence[_Item], stage: str, found: Generations) -> list[tuple[_Item, str]]:
        """Return the items that got a text, with it; note what became of the others."""
        self.costs.append(found.usage)
        usage = found.usage
        if usage.earlier:
            self.log(f"  {usage.earlier} of {usage.replies} {stage} were had by an earlier run")
        remedy = "raise --max-new-tokens, or take a model that answers shorter"
        what = f"{stage} are unfinished or empty, and left out"
        for warning in check_shortfall(len(found.lost), len(items), what, remedy, refuse=False):
            self.log(f"  warning: {warning}")
        self.dropped.update(f"{reason} {stage[:-1]}" for reason in found.lost.values())
        self.failed += [_failure(items[i], stage, message) for i, message in found.failures.items()]
        return [(item, text) for item, text in zip(items, found.texts, strict=True) if text is not None]


def make_corrections(
    rows: CorrectionSet,
    output: str | os.PathLike[str],
    *,
    answerer: AnswerSource | None = None,
    editor: LlmReviser | None = None,
    filters: Filters | None = None,
    keep_going: bool = False,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> CorrectionData:
    """Make correction data and write it as JSON Lines that `load_corrections` reads, whole or not at all.

    A row of the output has `question`, `answer`, `correction`, where they came from (`answer_model` and
    `correction_model`, null for what the rows had themselves, and `source`), and an `id`: the row's own, or else that
    of the correction.

    Args:
        rows: the questions.
        output: the file, whose name ends in .jsonl.
        answerer: answers the questions, each once however often it is there; the rows' own answers are corrected when
            None.
        editor: corrects the answers; the rows' own corrections are taken when None.
        filters: which corrections are kept; the defaults when None.
        keep_going: pass over questions that fail for good, and write them into `NAME.failed.jsonl` beside `output`, a
            file that can be given again. Without it the first of them is an error.
        overwrite: replace `output` if it exists.
        log: called with one line for each thing that happens.
        progress: called with (stage, done, all).

    Raises:
        InputError: `output` cannot be used, another process is writing it, answers would have nobody who corrects them,
            or a row lacks what nobody gives; names the row.
        EveralignError: a question failed for good, or no correction is left. What was answered before is kept.
    """
    path, filters = Path(output), filters or Filters()
    failures = path.with_name(f"{path.stem}.failed.jsonl")
    with exclusive(lock_of(path)):
        _check(rows, path, failures, answerer, editor, keep_going, overwrite)
        run = _Run(path, keep_going, log, progress, Counter(), [], [])
        answered = _own_answers(rows, editor, run) if answerer is None else _ask_for_answers(rows, answerer, run)
        corrected = answered if editor is None else _ask_for_corrections(answered, editor, run)
        kept = _filtered(corrected, rows.source, filters, run)
        if run.failed:
            log(f"  {len(run.failed)} questions failed for good: {failures}")
            write_text(failures, "".join(map(json_line, run.failed)))
        elif keep_going:
            failures.unlink(missing_ok=True)
        write_text(path, "".join(json_line(_columns(row, item, rows.source)) for row, item in kept))
        delete_journal(path)
    found = CorrectionSet(tuple(row for row, _ in kept), str(path))
    named = failures if run.failed else None
    return CorrectionData(path, found, run.dropped, len(run.failed), named, tuple(run.costs))


def _check(
    rows: CorrectionSet,
    path: Path,
    failures: Path,
    answerer: AnswerSource | None,
    editor: LlmReviser | None,
    keep_going: bool,
    overwrite: bool,
) -> None:
    if not rows:
        raise InputError(f"{rows.source}: no rows in it")
    check_new_file(path, ".jsonl", overwrite)
    # One that a kill has left behind the failures and before the output is its own.
    if keep_going and not reply_journal(path).path.exists():
        check_new_file(failures, ".jsonl", overwrite)
    if editor is None and answerer is not None:
        raise InputError(f"the answers of {answerer.name} would have nobody who corrects them: name a stronger model")
    if editor is None and keep_going:
        raise InputError("keep going: no model is asked, so no question can fail; leave it out")


def _own_answers(rows: CorrectionSet, editor: LlmReviser | None, run: _Run) -> list[_Item]:
    """Return the answers that the rows have, with their corrections where nobody else gives any."""
    for number, row in enumerate(rows, start=1):
        if not row.has("answer"):
            raise InputError(
                f"{rows.source}: row {number}: has no answer: add 'answer' to every row, or name a model that answers"
            )
    if editor is not None:
        _note_unused(sum(row.has("correction") for row in rows), "corrections", run)
        return [_Item(row, row.answer) for row in rows]
    edits = [_Item(row, row.answer, row.correction) for row in rows if row.has("correction")]
    if not edits:
        raise InputError(f"{rows.source}: no row has a correction: name a stronger model that gives them")
    # Of one question's answers, those beside the corrected one need no correction.
    questions, edited = ({Correction(row.question).id for row in part} for part in (rows, [one.draft for one in edits]))
    if len(edited) < len(questions):
        run.dropped[UNEDITED] = len(questions) - len(edited)
    return edits


def _ask_for_answers(rows: CorrectionSet, answerer: AnswerSource, run: _Run) -> list[_Item]:
    _note_unused(sum(row.has("answer") for row in rows), "answers", run)
    first: dict[str, Correction] = {}
    for row in rows:
        first.setdefault(Correction(row.question).id, row)
    if len(first) < len(rows):
        run.log(f"  {len(rows) - len(first)} of {len(rows)} questions are there more than once and asked once")
    items = [_Item(row) for row in first.values()]
    run.log(f"answers of {answerer.name} to {len(items)} questions")
    found = answerer.answer(
        [item.draft.question for item in items], run.output, keep_going=run.keep_going, progress=run.progress
    )
    through = run.through(items, ANSWERS, found)
    return [replace(item, answer=text, answer_model=answerer.name) for item, text in through]


def _ask_for_corrections(items: Sequence[_Item], editor: LlmReviser, run: _Run) -> list[_Item]:
    run.log(f"corrections of {editor.name} of {len(items)} answers")
    pairs = [(item.draft.question, item.answer or "") for item in items]
    found = editor.correct(pairs, run.output, keep_going=run.keep_going, progress=run.progress)
    through = run.through(items, CORRECTIONS, found)
    return [replace(item, correction=text, correction_model=editor.name) for item, text in through]


def _note_unused(count: int, what: str, run: _Run) -> None:
    if count:
        run.log(f"  {count} rows have {what} of their own, which are not used: a model gives them")


def _filtered(items: Sequence[_Item], source: str, filters: Filters, run: _Run) -> list[tuple[Correction, _Item]]:
    found = [
        (Correction(item.draft.question, item.answer or "", item.correction or "", item.draft.weight), item)
        for item in items
    ]
    rows = CorrectionSet(tuple(row for row, _ in found), source)
    kept = filter_corrections(rows, template=filters.template, longest=filters.longest, near=filters.near)
    run.dropped.update(kept.dropped)
    reasons = ", ".join(f"{count} {reason}" for reason, count in kept.dropped.items() if count)
    what = f"corrections are left out by the filters ({reasons})"
    for warning in check_shortfall(len(rows) - len(kept.rows), len(rows), what, "look at the rows", refuse=False):
        run.log(f"  warning: {warning}")
    if not kept.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in run.dropped.items()) or "all failed"
        raise EveralignError(f"{source}: no correction is left ({reasons}); what was answered is kept")
    # Rows of one content are duplicates, of which the first is kept.
    items_by_id = {row.id: item for row, item in reversed(found)}
    return [(row, items_by_id[row.id]) for row in kept.rows]


def _columns(row: Correction, item: _Item, source: str) -> dict[str, Any]:
    models = {"answer_model": item.answer_model, "correction_model": item.correction_model}
    return {**row.to_json(), **models, "source": source, "id": item.draft.name or row.id}


def _failure(item: _Item, stage: str, message: str) -> dict[str, Any]:
    draft = item.draft
    question = draft.question if isinstance(draft.question, str) else [dict(message) for message in draft.question]
    answer = {} if item.answer is None else {"answer": item.answer}
    name = {} if draft.name is None else {"id": draft.name}
    weight = {} if draft.weight == 1.0 else {"weight": draft.weight}
    return {"question": question, **answer, **weight, **name, "stage": stage, "error": message}
