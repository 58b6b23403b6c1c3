"""Corrections: a question, somebody's answer to it, and the answer as it should be.

On disk a row has the columns `question` (text, or chat messages), `answer`, `correction`; and optionally `weight`. An
answer that is good already is its own correction. One edit of an answer is a preference and a scored row too; the
conversions are pure.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from everalign.data.fields import checked_weight, content_id
from everalign.data.messages import (
    PROMPT_COLUMNS,
    Prompt,
    checked_answer,
    checked_prompt,
    prompt_columns,
    prompt_of,
)
from everalign.data.readers import PreferenceSet, first_columns, load_preferences, load_rows
from everalign.data.records import Preference
from everalign.data.row_set import RowSet
from everalign.data.schema import Schema
from everalign.data.scored import Scored
from everalign.errors import InputError

CORRECTION_SCHEMA = Schema(
    columns=("question", "answer", "correction", "weight", *PROMPT_COLUMNS),
    required=("question", "answer", "correction"),
    expected="expected 'question', 'answer', 'correction' and optionally 'weight'",
    other_names={
        "question": ("prompt", "instruction", "query", "input", "messages", "conversations"),
        "answer": ("original", "response", "completion", "draft", "output", "rejected"),
        "correction": ("corrected", "revision", "revised", "edit", "edited", "rewrite", "improved", "chosen"),
    },
)


@dataclass(frozen=True)
class Correction:
    """A question, an answer, and what the answer should have been.

    Args:
        question: plain text, or chat messages that end before the assistant speaks.
        answer: the answer that somebody gave. Never altered, not even its white space.
        correction: the better answer; equal to `answer` where nothing has to change. Never altered.
        weight: how much this row counts in a mean loss; positive and finite.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    question: Prompt
    answer: str
    correction: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", checked_prompt(self.question, "question", "answer"))
        for name in ("answer", "correction"):
            object.__setattr__(self, name, checked_answer(getattr(self, name), name))
        object.__setattr__(self, "weight", checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash((self.id, self.weight))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content (question, answer, correction; not the weight)."""
        return content_id({"question": self.question, "answer": self.answer, "correction": self.correction})

    @cached_property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again: its own, and that of the preference in it, if any."""
        pair = self.preference()
        return (self.id,) if pair is None else (self.id, pair.id)

    @property
    def is_identity(self) -> bool:
        """Whether the answer is its own correction, letter by letter."""
        return self.answer == self.correction

    def to_json(self) -> dict[str, Any]:
        """The row as its columns; `weight` only where it is not 1."""
        row = {**prompt_columns(self.question, "question"), "answer": self.answer, "correction": self.correction}
        return row if self.weight == 1.0 else {**row, "weight": self.weight}

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Correction":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping. `answer` and `correction` are text or a list with one assistant message.
            where: place of the row (such as `edits.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'correction': what is wrong; what to do`.
        """
        try:
            row = CORRECTION_SCHEMA.row(obj)
            CORRECTION_SCHEMA.check(row.keys())
            weight = row.get("weight")
            question = prompt_of(row, row["question"], "question")
            return cls(question, row["answer"], row["correction"], 1.0 if weight is None else weight)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def preference(self) -> Preference | None:
        """The correction over the answer; None where they differ by no more than white space at their ends."""
        if self.answer.strip() == self.correction.strip():
            return None
        return Preference(self.question, self.correction, self.answer, self.weight)

    def scored(self) -> Scored | None:
        """The correction with reward 1 and the answer with reward 0; None where there is no preference."""
        pair = self.preference()
        return None if pair is None else Scored.from_preference(pair)


def correction_of(pair: Preference) -> Correction:
    """The rejected answer, corrected into the chosen one.

    Raises:
        InputError: one of them is more than a text.
    """
    rejected, chosen = checked_answer(pair.rejected, "rejected"), checked_answer(pair.chosen, "chosen")
    return Correction(pair.prompt, rejected, chosen, pair.weight)


@dataclass(frozen=True, repr=False)
class CorrectionSet(RowSet[Correction]):
    """An immutable sequence of corrections; a slice is a `CorrectionSet` too."""

    record = Correction

    @classmethod
    def of_preferences(cls, pairs: Iterable[Preference]) -> "CorrectionSet":
        """Every pair as the correction of its rejected answer; a `PreferenceSet` keeps its source."""
        found = {name: getattr(pairs, name) for name in ("source", "skipped") if isinstance(pairs, PreferenceSet)}
        return cls(tuple(correction_of(pair) for pair in pairs), **found)


def load_corrections(
    source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False
) -> CorrectionSet:
    """Reads corrections from a file or from the Hub; arguments and errors as in `load_preferences`."""
    return load_rows(CorrectionSet, CORRECTION_SCHEMA, source, split, skip_bad_rows)


def load_edits(
    source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False
) -> CorrectionSet | PreferenceSet:
    """Reads corrections, or preferences where the first row has `chosen` or `rejected` and no `correction`.

    Arguments and errors as in `load_preferences`; all rows must be of one kind. `CorrectionSet.of_preferences` makes
    the one of the other.
    """
    first = first_columns(source, split, ("correction", "chosen", "rejected"))
    if first and "correction" not in first:
        return load_preferences(source, split=split, skip_bad_rows=skip_bad_rows)
    return load_corrections(source, split=split, skip_bad_rows=skip_bad_rows)
