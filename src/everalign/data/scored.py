"""Answers with rewards: a prompt, its completions and what each of them is worth.

On disk a row has the columns `prompt` (text, or chat messages), `completions` (a list of texts, or of message lists
with one assistant message), `rewards` (as many numbers); and optionally `weights` (as many again, what each completion
counts), `reference_rewards` (any number of them, what other answers to the prompt are worth) and `weight` (what the row
counts).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

from everalign.data.fields import checked_weight, content_id, is_finite, kind, shown
from everalign.data.messages import (
    PROMPT_COLUMNS,
    Completion,
    Prompt,
    checked_completion,
    checked_prompt,
    completion_column,
    is_same,
    prompt_columns,
    prompt_of,
)
from everalign.data.readers import PreferenceSet, first_columns, load_preferences, load_rows
from everalign.data.records import Preference
from everalign.data.row_set import RowSet
from everalign.data.schema import Schema
from everalign.errors import InputError

# Far above any weight that means something, and far from the end of fp32.
_LARGEST_WEIGHT = 1e20

SCORED_SCHEMA = Schema(
    columns=("prompt", "completions", "rewards", "weight", "weights", "reference_rewards", *PROMPT_COLUMNS),
    required=("prompt", "completions", "rewards"),
    expected="expected 'prompt', 'completions', 'rewards' and optionally 'weight', 'weights' and 'reference_rewards'",
    other_names={
        "prompt": ("instruction", "question", "query", "input", "messages", "conversations"),
        "completions": ("responses", "answers", "outputs", "candidates", "completion"),
        "rewards": ("scores", "ratings", "labels", "reward", "score"),
    },
    lists=frozenset({"completions", "rewards", "weights", "reference_rewards"}),
)


@dataclass(frozen=True)
class Scored:
    """A prompt and what each of its completions is worth.

    Args:
        prompt: plain text that the answers continue, or chat messages that end before the assistant speaks.
        completions: the answers, at least one; the same answer sampled twice stands there twice. Never altered.
        rewards: one finite number for each completion; larger is better.
        weight: how much this row counts in a mean loss; positive and finite.
        weights: how much each completion counts, at least 0 and not all 0; None where it is yet to be computed.
        reference_rewards: finite rewards of independent answers of the reference policy to the same prompt, at least
            one, on the scale of `rewards`; not those of the completions. None where there are none.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float, ...]
    weight: float = 1.0
    weights: tuple[float, ...] | None = None
    reference_rewards: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt(self.prompt))
        object.__setattr__(self, "completions", checked_completions(self.completions, self.prompt))
        each = len(self.completions)
        for field, count in (("rewards", each), ("weights", each), ("reference_rewards", None)):
            if getattr(self, field) is not None or field == "rewards":
                object.__setattr__(self, field, _numbers(getattr(self, field), field, count))
        if self.weights is not None and not (min(self.weights) >= 0 and 0 < max(self.weights) <= _LARGEST_WEIGHT):
            raise InputError(
                f"field 'weights': must be from 0 to {_LARGEST_WEIGHT:g} and not all 0; remove rows of no weight"
            )
        object.__setattr__(self, "weight", checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash((self.id, self.weight, self.weights, self.reference_rewards))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content (prompt, completions, rewards; no weights, nothing beside)."""
        return content_id({"prompt": self.prompt, "completions": self.completions, "rewards": self.rewards})

    def to_json(self) -> dict[str, Any]:
        """The row as its columns; `weight` only where it is not 1, what may be missing only where it is there."""
        completions = [completion_column(completion) for completion in self.completions]
        row = {**prompt_columns(self.prompt), "completions": completions, "rewards": list(self.rewards)}
        for field in ("weights", "reference_rewards"):
            if getattr(self, field) is not None:
                row[field] = list(getattr(self, field))
        return row if self.weight == 1.0 else {**row, "weight": self.weight}

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Scored":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping.
            where: place of the row (such as `scored.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'rewards': what is wrong; what to do`.
        """
        try:
            row = SCORED_SCHEMA.row(obj)
            SCORED_SCHEMA.check(row.keys())
            weight = row.get("weight")
            fields = (
                prompt_of(row, row["prompt"]),
                row["completions"],
                row["rewards"],
                1.0 if weight is None else weight,
            )
            return cls(*fields, weights=row.get("weights"), reference_rewards=row.get("reference_rewards"))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def only(self, indices: Sequence[int]) -> "Scored":
        """The row with some of its completions, at least one of which has to count."""
        parts = (self.completions, self.rewards, self.weights)
        kept = [None if part is None else tuple(part[i] for i in indices) for part in parts]
        return Scored(self.prompt, kept[0], kept[1], self.weight, kept[2], self.reference_rewards)  # type: ignore[arg-type]

    @cached_property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again: its own, and that of the preference in it, if any."""
        pair = self.preference()
        return (self.id,) if pair is None else (self.id, pair.id)

    @classmethod
    def from_preference(cls, pair: Preference) -> "Scored":
        """Two completions: the chosen one, with reward 1, and the rejected one, with reward 0."""
        return cls(pair.prompt, (pair.chosen, pair.rejected), (1.0, 0.0), pair.weight)

    def preference(self) -> Preference | None:
        """The best completion over the worst one; None where all rewards, or these two texts, are equal."""
        best, worst = (self.rewards.index(pick(self.rewards)) for pick in (max, min))
        chosen, rejected = self.completions[best], self.completions[worst]
        if self.rewards[best] == self.rewards[worst] or is_same(chosen, rejected):
            return None
        return Preference(self.prompt, chosen, rejected, self.weight)


@dataclass(frozen=True, repr=False)
class ScoredSet(RowSet[Scored]):
    """An immutable sequence of scored rows; a slice is a `ScoredSet` too."""

    record = Scored

    @staticmethod
    def _line(row: Scored) -> str:
        beside = "" if row.reference_rewards is None else f" {row.reference_rewards!r}"
        return f"{row.id} {row.weight!r} {row.weights!r}{beside}"


def load_scored(source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False) -> ScoredSet:
    """Reads scored rows from a file or from the Hub; arguments and errors as in `load_preferences`."""
    return load_rows(ScoredSet, SCORED_SCHEMA, source, split, skip_bad_rows)


def load_judged(
    source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False
) -> ScoredSet | PreferenceSet:
    """Reads scored rows, or preferences where the first row has `chosen` or `rejected` and no `completions`.

    Arguments and errors as in `load_preferences`; all rows must be of one kind.
    """
    first = first_columns(source, split, ("completions", "chosen", "rejected"))
    if first and "completions" not in first:
        return load_preferences(source, split=split, skip_bad_rows=skip_bad_rows)
    return load_scored(source, split=split, skip_bad_rows=skip_bad_rows)


def checked_completions(value: Any, prompt: Prompt | None = None) -> tuple[Completion, ...]:
    """Return completions as records hold them, at least one; see `checked_completion`."""
    if not isinstance(value, list | tuple):
        raise InputError(f"field 'completions': must be a list of texts, found {kind(value)}")
    if not value:
        raise InputError("field 'completions': the list is empty; give at least one completion or remove the row")
    return tuple(checked_completion(item, f"completions[{i}]", prompt) for i, item in enumerate(value))


def _numbers(value: Any, field: str, count: int | None) -> tuple[float, ...]:
    """Return finite numbers, as many as there are completions; with None for `count`, at least one."""
    if not isinstance(value, list | tuple):
        raise InputError(f"field {field!r}: must be a list of numbers, found {kind(value)}")
    for i, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, Real):
            raise InputError(f"field '{field}[{i}]': must be a number, found {kind(item)}")
        if not is_finite(item):
            raise InputError(f"field '{field}[{i}]': must be finite, found {shown(item)}; score it again or remove it")
    if count is None and not value:
        raise InputError(f"field {field!r}: the list is empty; give at least one, or leave the column out of the row")
    if count is not None and len(value) != count:
        raise InputError(f"field {field!r}: {len(value)} numbers for {count} completions; give one for each")
    return tuple(float(item) for item in value)
