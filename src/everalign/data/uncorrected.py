"""Answers that are yet to be corrected: a question and somebody's answer.

On disk a row has the columns `question` (text, or chat messages) and `answer`, or `prompt` and `completion`.
"""

import os
from dataclasses import dataclass
from functools import cached_property

from everalign.data.fields import check_text, content_id
from everalign.data.messages import PROMPT_COLUMNS, Prompt, checked_prompt, prompt_of
from everalign.data.readers import load_rows
from everalign.data.row_set import RowSet
from everalign.data.schema import Schema
from everalign.errors import InputError

_COLUMNS = ("question", "answer", "prompt", "completion")

UNCORRECTED_SCHEMA = Schema(
    columns=(*_COLUMNS, *PROMPT_COLUMNS),
    required=(),
    expected="expected 'question' and 'answer', or 'prompt' and 'completion'",
    other_names={
        "question": ("instruction", "query", "input", "messages", "conversations"),
        "answer": ("original", "response", "draft", "output"),
        "completion": ("original", "response", "draft", "output"),
    },
)


@dataclass(frozen=True)
class Uncorrected:
    """A question and the answer that is to be corrected.

    Args:
        question: plain text, or chat messages that end before the assistant speaks.
        answer: the answer; never altered.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    question: Prompt
    answer: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", checked_prompt(self.question, "question", "answer"))
        check_text(self.answer, "answer")

    def __hash__(self) -> int:
        return hash(self.id)

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content."""
        return content_id({"question": self.question, "answer": self.answer})

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again."""
        return (self.id,)

    @property
    def weight(self) -> float:
        """Every row counts alike."""
        return 1.0

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Uncorrected":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping with `question` and `answer`, or `prompt` and `completion`.
            where: place of the row (such as `answers.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'answer': what is wrong; what to do`.
        """
        try:
            row = UNCORRECTED_SCHEMA.row(obj)
            given = {name for name in _COLUMNS if row.get(name) is not None}
            names = ("prompt", "completion") if given & {"prompt", "completion"} else ("question", "answer")
            if others := sorted(given - set(names)):
                raise InputError(f"field {others[0]!r}: the row has {names[0]!r} or {names[1]!r} too; keep one pair")
            for name in names:
                if name not in row:
                    raise UNCORRECTED_SCHEMA.missing(name, row.keys())
            return cls(prompt_of(row, row[names[0]], names[0]), row[names[1]])
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True, repr=False)
class UncorrectedSet(RowSet[Uncorrected]):
    """An immutable sequence of answers to be corrected; a slice is an `UncorrectedSet` too."""

    record = Uncorrected


def load_uncorrected(
    source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False
) -> UncorrectedSet:
    """Reads answers to be corrected from a file or from the Hub; arguments and errors as in `load_preferences`."""
    return load_rows(UncorrectedSet, UNCORRECTED_SCHEMA, source, split, skip_bad_rows)
