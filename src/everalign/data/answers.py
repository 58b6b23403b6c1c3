"""Answers that a corrector is evaluated on: a question, somebody's answer, and what is known of it.

On disk a row has the columns `question` (text, or chat messages) and `answer`; and optionally `correction`, the answer
as it should be, `good`, whether it is good as it is, and `kind`, by which results are told apart.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from everalign.data.fields import check_text, content_id
from everalign.data.fields import kind as kind_of
from everalign.data.messages import PROMPT_COLUMNS, Prompt, checked_prompt, prompt_of
from everalign.data.readers import load_rows
from everalign.data.row_set import RowSet
from everalign.data.schema import Schema
from everalign.errors import InputError

ANSWER_SCHEMA = Schema(
    columns=("question", "answer", "correction", "good", "kind", *PROMPT_COLUMNS),
    required=("question", "answer"),
    expected="expected 'question', 'answer' and optionally 'correction', 'good', 'kind'",
    other_names={
        "question": ("prompt", "instruction", "query", "input", "messages", "conversations"),
        "answer": ("original", "response", "completion", "draft", "output", "rejected"),
    },
)
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class Answer:
    """A question and an answer, and what is known of the answer.

    Args:
        question: plain text, or chat messages that end before the assistant speaks.
        answer: the answer; never altered.
        correction: the answer as it should be; None where nobody said so.
        good: whether the answer is good as it is; None where it is told by the correction, or not at all.
        kind: what kind of row it is, such as `medical`; None for none.

    Raises:
        InputError: a field is wrong, or contradicts another; the message names the field and says what to do.
    """

    question: Prompt
    answer: str
    correction: str | None = None
    good: bool | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", checked_prompt(self.question, "question", "answer"))
        check_text(self.answer, "answer")
        if self.correction is not None:
            check_text(self.correction, "correction")
        if self.kind is not None:
            check_text(self.kind, "kind")
        if self.good is not None and not isinstance(self.good, bool):
            raise InputError(f"field 'good': must be true or false, found {kind_of(self.good)}")
        if None not in (self.good, self.correction) and self.good != (self.answer == self.correction):
            told = "the correction is another text than the answer" if self.good else "the answer is its own correction"
            raise InputError(f"field 'good': is {str(self.good).lower()}, but {told}; leave one of them out")

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def is_good(self) -> bool:
        """Whether the answer is known to need no correction."""
        return self.answer == self.correction if self.good is None else self.good

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content."""
        names = ("question", "answer", "correction", "good", "kind")
        return content_id({name: getattr(self, name) for name in names})

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again."""
        return (self.id,)

    @property
    def weight(self) -> float:
        """Every row counts alike."""
        return 1.0

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Answer":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping. In a CSV file `good` is `true` or `false`, and empty cells of `good` and `kind` say nothing.
            where: place of the row (such as `answers.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'good': what is wrong; what to do`.
        """
        try:
            row = ANSWER_SCHEMA.row(obj)
            ANSWER_SCHEMA.check(row.keys())
            question = prompt_of(row, row["question"], "question")
            return cls(question, row["answer"], row.get("correction"), _flag(row.get("good")), _label(row))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def _flag(value: Any) -> Any:
    if isinstance(value, str):
        return None if not value.strip() else _WORDS.get(value.strip().lower(), value)
    return value


def _label(row: Any) -> Any:
    return row.get("kind") or None


@dataclass(frozen=True, repr=False)
class AnswerSet(RowSet[Answer]):
    """An immutable sequence of answers; a slice is an `AnswerSet` too."""

    record = Answer


def load_answers(source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False) -> AnswerSet:
    """Reads answers from a file or from the Hub; arguments and errors as in `load_preferences`."""
    return load_rows(AnswerSet, ANSWER_SCHEMA, source, split, skip_bad_rows)
