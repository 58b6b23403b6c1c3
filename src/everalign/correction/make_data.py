"""Make correction data: generate answers to questions, generate corrections of the answers, and filter them.

    rows = load_drafts("questions.jsonl")
    client, stronger = ChatClient("http://127.0.0.1:8000/v1", "small"), ChatClient("http://127.0.0.1:8000/v1", "large")
    make_corrections(rows, "corrections.jsonl", answerer=EndpointAnswers(client), reviser=LlmReviser(stronger))

Generated texts are journalled beside the output until it is complete, so that a killed run requests nothing twice.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from everalign.correction.checks import LONGEST_CORRECTION, NEAR, filter_corrections
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
    """Arguments of `filter_corrections`.

    Args:
        template: whose marks a correction must not contain; the default template when None.
        longest: most characters of a correction.
        near: similarity from which a row is a near-duplicate.
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
        usage: of each model that was used.
    """

    path: Path
    rows: CorrectionSet
    dropped: Counter[str]
    failed: int
    failures: Path | None
    usage: tuple[ApiUsage, ...]

    @property
    def identities(self) -> int:
        """How many answers are their own corrections."""
        return sum(row.is_identity for row in self.rows)


def make_corrections(
    rows: CorrectionSet,
    output: str | os.PathLike[str],
    *,
    answerer: AnswerSource | None = None,
    reviser: LlmReviser | None = None,
    filters: Filters | None = None,
    keep_going: bool = False,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> CorrectionData:
    """Make correction data and write it atomically as JSON Lines that `load_corrections` reads.

    A row of the output has `question`, `answer`, `correction`, their provenance (`answer_model` and
    `correction_model`, null where the row had its own, and `source`), and an `id`: the row's own, or that of its
    content.

    Args:
        rows: questions, with whatever answers and corrections they have.
        output: the file, whose name ends in .jsonl.
        answerer: answers each different question once; the rows' own answers are used when None.
        reviser: corrects the answers; the rows' own corrections are used when None.
        filters: which corrections are kept; the defaults when None.
        keep_going: go on when a question fails for good, and write it to `NAME.failed.jsonl` beside `output`, which
            can be used as input again. Otherwise the first failure is an error.
        overwrite: replace `output` if it exists.
        log: called with one line for each step.
        progress: called with (stage, questions done, questions in all).

    Raises:
        InputError: `output` cannot be used, another process is writing it, nobody would correct the generated answers,
            or a row lacks an answer or correction that no model gives; names the row.
        EveralignError: a question failed for good, or no correction is left. Texts generated before are kept.
    """
    path = Path(output)
    failures = path.with_name(f"{path.stem}.failed.jsonl")
    with exclusive(lock_of(path)):
        if not rows:
            raise InputError(f"{rows.source}: no rows in it")
        check_new_file(path, ".jsonl", overwrite)
        # With a journal beside it, the file of failures is that of a run that was killed before it wrote the output.
        if keep_going and not reply_journal(path).path.exists():
            check_new_file(failures, ".jsonl", overwrite)
        if reviser is None and answerer is not None:
            raise InputError(f"nothing would correct the answers of {answerer.name}: name a stronger model")
        if reviser is None and keep_going:
            raise InputError("keep going: no model is asked, so no question can fail; leave it out")

        run = _Run(path, keep_going, log, progress)
        answered = run.own_answers(rows) if answerer is None else run.generate_answers(rows, answerer)
        corrected = run.own_corrections(rows) if reviser is None else run.generate_corrections(answered, reviser)
        kept = run.filter(corrected, rows.source, filters or Filters())
        if run.failed:
            log(f"  {len(run.failed)} questions failed for good: {failures}")
            write_text(failures, "".join(map(json_line, run.failed)))
        elif keep_going:
            failures.unlink(missing_ok=True)
        provenance = {
            "answer_model": None if answerer is None else answerer.name,
            "correction_model": None if reviser is None else reviser.name,
            "source": rows.source,
        }
        lines = [json_line({**row.to_json(), **provenance, "id": row.name or row.id}) for row in kept]
        write_text(path, "".join(lines))
        delete_journal(path)
    return CorrectionData(
        path,
        CorrectionSet(tuple(kept), str(path)),
        run.dropped,
        len(run.failed),
        failures if run.failed else None,
        tuple(run.usage),
    )


@dataclass
class _Run:
    """The steps of `make_corrections`, and a count of what they lose."""

    output: Path
    keep_going: bool
    log: Callable[[str], None]
    progress: Progress
    dropped: Counter[str] = field(default_factory=Counter)
    failed: list[dict[str, Any]] = field(default_factory=list)
    usage: list[ApiUsage] = field(default_factory=list)

    def own_answers(self, rows: CorrectionSet) -> Sequence[Correction]:
        """Return the rows, each of which must have an answer."""
        for number, row in zip(rows.row_numbers, rows, strict=True):
            if not row.has("answer"):
                raise InputError(
                    f"{rows.source}: row {number}: has no answer: add 'answer' to every row, or name a model that "
                    "answers",
                    where=f"{rows.source}: row {number}",
                    field="answer",
                )
        return rows

    def own_corrections(self, rows: CorrectionSet) -> list[Correction]:
        """Return the rows that have a correction; of completions, the worst has it for all."""
        edited = [row for row in rows if row.has("correction")]
        if not edited:
            raise InputError(f"{rows.source}: no row has a correction: name a stronger model that gives them")
        if unedited := rows.row_numbers[-1] - len(edited):
            self.dropped[UNEDITED] = unedited
        return edited

    def generate_answers(self, rows: CorrectionSet, answerer: AnswerSource) -> list[Correction]:
        """Return a row with the model's answer for each different question."""
        answered = {number for number, row in zip(rows.row_numbers, rows, strict=True) if row.has("answer")}
        if answered:
            self.log(f"  {len(answered)} rows have answers of their own, which are not used: a model writes new ones")
        first: dict[str, Correction] = {}
        for row in rows:
            question = Correction(row.question, weight=row.weight, name=row.name)
            first.setdefault(question.id, question)
        questions = list(first.values())
        count = rows.row_numbers[-1]
        if repeated := count - len(questions):
            self.log(f"  {repeated} of {count} questions are there more than once and asked once")
        self.log(f"answers of {answerer.name} to {len(questions)} questions")
        found = answerer.answer(
            [row.question for row in questions], self.output, keep_going=self.keep_going, progress=self.progress
        )
        return self._with_texts(questions, "answer", ANSWERS, found)

    def generate_corrections(self, rows: Sequence[Correction], reviser: LlmReviser) -> list[Correction]:
        """Return the rows with the model's corrections."""
        if unused := sum(row.has("correction") for row in rows):
            self.log(f"  {unused} rows have corrections of their own, which are not used: a model writes new ones")
        answers = [Correction(row.question, row.answer, weight=row.weight, name=row.name) for row in rows]
        self.log(f"corrections of {reviser.name} of {len(answers)} answers")
        found = reviser.correct(
            [(row.question, row.answer) for row in answers],
            self.output,
            keep_going=self.keep_going,
            progress=self.progress,
        )
        return self._with_texts(answers, "correction", CORRECTIONS, found)

    def _with_texts(self, rows: Sequence[Correction], column: str, stage: str, found: Generations) -> list[Correction]:
        """Fill a column of the rows that got a text, and record why the others got none."""
        self.usage.append(found.usage)
        if found.usage.earlier:
            self.log(f"  {found.usage.earlier} of {found.usage.replies} {stage} were made by an earlier run")
        remedy = "raise --max-new-tokens, or take a model that answers shorter"
        what = f"{stage} are unfinished or empty, and left out"
        for warning in check_shortfall(len(found.lost), len(rows), what, remedy, refuse=False):
            self.log(f"  warning: {warning}")
        self.dropped.update(f"{reason} {column}" for reason in found.lost.values())
        for i, message in found.failures.items():
            name = {} if rows[i].name is None else {"id": rows[i].name}
            self.failed.append({**rows[i].to_json(), **name, "stage": stage, "error": message})
        texts = zip(rows, found.texts, strict=True)
        return [replace(row, **{column: text}) for row, text in texts if text is not None]  # type: ignore[arg-type]

    def filter(self, rows: Sequence[Correction], source: str, filters: Filters) -> Sequence[Correction]:
        """Return the rows that the filters keep, at least one."""
        found = filter_corrections(
            CorrectionSet(tuple(rows), source), template=filters.template, longest=filters.longest, near=filters.near
        )
        self.dropped.update(found.dropped)
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.dropped.items() if count)
        what = f"corrections are left out by the filters ({reasons})"
        for warning in check_shortfall(found.dropped.total(), len(rows), what, "look at the rows", refuse=False):
            self.log(f"  warning: {warning}")
        if not found.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "all failed"
            raise EveralignError(f"{source}: no correction is left ({reasons}); what was answered is kept")
        return found.rows
