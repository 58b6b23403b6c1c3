"""Questions with whatever is known of their answers: what correction data is made from.

On disk a row has `question` or `prompt`, and beside it nothing; an `answer`, perhaps with its `correction` (or
`edited_text`, as people's edits are called); a preference's `chosen` and `rejected`; or a scored row's `completions`,
perhaps with `rewards`. An `id` and a `weight` are carried along.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from everalign.data.corrections import Correction, correction_of
from everalign.data.fields import check_text, checked_weight, content_id, kind
from everalign.data.messages import PROMPT_COLUMNS, Completion, Prompt, checked_answer, checked_prompt, prompt_of
from everalign.data.readers import load_rows
from everalign.data.records import Preference
from everalign.data.row_set import RowSet
from everalign.data.schema import Schema
from everalign.data.scored import Scored, checked_completions
from everalign.errors import InputError

_ANSWERED = ("answer", "chosen", "rejected", "completions")

DRAFT_SCHEMA = Schema(
    columns=(
        "question",
        "prompt",
        *_ANSWERED,
        "correction",
        "edited_text",
        "rewards",
        "weight",
        "id",
        *PROMPT_COLUMNS,
    ),
    required=(),
    expected="expected 'question' or 'prompt', alone or with 'answer' (and 'correction' or 'edited_text'), "
    "'chosen' and 'rejected', or 'completions' (and 'rewards')",
    other_names={"question": ("instruction", "query", "input", "messages", "conversations")},
    lists=frozenset({"completions", "rewards"}),
)


@dataclass(frozen=True)
class Draft:
    """A question on its way to a correction.

    Args:
        question: plain text, or chat messages that end before the assistant speaks.
        answers: those that the row has, which a better one may be asked for: an answer, a preference's rejected one,
            or a scored row's completions. Never altered.
        edit: the correction that the row has itself: an edit, a preference's chosen over its rejected answer, or a
            scored row's best over its worst completion. None where there is none.
        weight: how much the row counts in a mean loss; positive and finite.
        name: what the row itself calls its `id`; None where it does not.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    question: Prompt
    answers: tuple[str, ...] = ()
    edit: Correction | None = None
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", checked_prompt(self.question, "question", "answer"))
        for text in self.answers:
            check_text(text, "answer")
        object.__setattr__(self, "weight", checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash(self.id)

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content (question, answers and edit)."""
        return content_id([self.question, self.answers, None if self.edit is None else self.edit.id])

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again."""
        return (self.id,)

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Draft":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping. A preference is read as `Preference.from_json` reads it.
            where: place of the row (such as `questions.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'question': what is wrong; what to do`.
        """
        try:
            row = DRAFT_SCHEMA.row(obj)
            answered = _answered(row)
            name = _name(row.get("id"))
            if answered == "chosen":
                return _of_preference(row, name)
            question = _only(row, "question", "prompt")
            if question is None:
                raise DRAFT_SCHEMA.missing("question", row.keys())
            question = prompt_of(row, question, "question")
            weight = 1.0 if row.get("weight") is None else row["weight"]
            if answered == "completions":
                return _of_completions(row, question, weight, name)
            return _of_answer(row, question, weight, name)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True, repr=False)
class DraftSet(RowSet[Draft]):
    """An immutable sequence of drafts; a slice is a `DraftSet` too."""

    record = Draft


def load_drafts(source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False) -> DraftSet:
    """Reads drafts from a file or from the Hub; arguments and errors as in `load_preferences`."""
    return load_rows(DraftSet, DRAFT_SCHEMA, source, split, skip_bad_rows)


def _of_answer(row: Mapping[Any, Any], question: Any, weight: Any, name: str | None) -> Draft:
    original, better = row.get("answer"), _only(row, "correction", "edited_text")
    if original is None:
        if better is not None:
            raise InputError("field 'answer': no such column, though there is an edit of it; add it")
        return Draft(question, (), None, weight, name)
    text = checked_answer(original, "answer")
    if better is None:
        return Draft(question, (text,), None, weight, name)
    edit = Correction(question, text, checked_answer(better, "correction"), weight)
    return Draft(edit.question, (text,), edit, weight, name)


def _of_preference(row: Mapping[Any, Any], name: str | None) -> Draft:
    question = _only(row, "question", "prompt")
    asked = {} if question is None else {"prompt": question}
    pair = Preference.from_json({**row, **asked}, "as a preference")
    edit = correction_of(pair)
    return Draft(pair.prompt, (edit.answer,), edit, pair.weight, name)


def _of_completions(row: Mapping[Any, Any], question: Any, weight: Any, name: str | None) -> Draft:
    if row.get("rewards") is None:
        return Draft(question, _texts(checked_completions(row["completions"])), None, weight, name)
    scored = Scored(question, row["completions"], row["rewards"], weight)
    pair = scored.preference()
    edit = None if pair is None else correction_of(pair)
    return Draft(scored.prompt, _texts(scored.completions), edit, weight, name)


def _texts(completions: Sequence[Completion]) -> tuple[str, ...]:
    return tuple(checked_answer(text, f"completions[{i}]") for i, text in enumerate(completions))


def _answered(row: Mapping[Any, Any]) -> str | None:
    """Tell which columns hold the row's answers; a table's row may have those of all kinds, the others null."""
    found = [name for name in _ANSWERED if row.get(name) is not None]
    kinds = list(dict.fromkeys("chosen" if name == "rejected" else name for name in found))
    if len(kinds) > 1:
        raise InputError(
            f"field {found[0]!r}: the row has {found[-1]!r} too, which is another kind of answer; keep one"
        )
    return kinds[0] if kinds else None


def _only(row: Mapping[Any, Any], first: str, second: str) -> Any:
    """Return the one of two columns that is there, None where neither is."""
    if row.get(first) is not None and row.get(second) is not None:
        raise InputError(f"field {first!r}: the row has {second!r} too, which is another name of it; keep one")
    return row.get(second) if row.get(first) is None else row[first]


def _name(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"field 'id': must be text or a whole number, found {kind(value)}")
    return str(value)
