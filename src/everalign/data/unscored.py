"""Answers that are yet to get their rewards: a prompt and its completions.

On disk a row has the columns `prompt` and `completions`, as scored rows have them; or it is a preference, whose
`chosen` and `rejected` become the two completions, in this order.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from everalign.data.fields import checked_weight, content_id
from everalign.data.messages import PROMPT_COLUMNS, Completion, Prompt, checked_prompt, prompt_of
from everalign.data.readers import load_rows
from everalign.data.records import Preference
from everalign.data.row_set import RowSet
from everalign.data.schema import Schema
from everalign.data.scored import Scored, checked_completions
from everalign.errors import InputError

UNSCORED_SCHEMA = Schema(
    columns=("prompt", "completions", "chosen", "rejected", "rewards", "weight", *PROMPT_COLUMNS),
    required=(),
    expected="expected 'prompt' and 'completions', or 'prompt', 'chosen' and 'rejected'",
    other_names={
        "prompt": ("instruction", "question", "query", "input", "messages", "conversations"),
        "completions": ("responses", "answers", "outputs", "candidates", "completion"),
    },
    lists=frozenset({"completions", "rewards"}),
)


@dataclass(frozen=True)
class Unscored:
    """A prompt and the completions that are to be scored.

    Args:
        prompt: plain text that the answers continue, or chat messages that end before the assistant speaks.
        completions: the answers, at least one; never altered.
        weight: how much the row counts in a mean loss; positive and finite. Scoring carries it along.
        rewarded: whether the row came with rewards.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    weight: float = 1.0
    rewarded: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt(self.prompt))
        object.__setattr__(self, "completions", checked_completions(self.completions, self.prompt))
        object.__setattr__(self, "weight", checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash((self.id, self.weight))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content (prompt and completions; not the weight)."""
        return content_id({"prompt": self.prompt, "completions": self.completions})

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again."""
        return (self.id,)

    def scored(self, rewards: Sequence[float]) -> Scored:
        """The row with its rewards, one for each completion."""
        return Scored(self.prompt, self.completions, tuple(rewards), self.weight)

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Unscored":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping with completions, or a preference as `Preference.from_json` reads it.
            where: place of the row (such as `answers.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'completions': what is wrong; what to do`.
        """
        try:
            row = UNSCORED_SCHEMA.row(obj)
            rewarded = row.get("rewards") is not None
            if not _is_preference(row):
                missing = [name for name in ("completions", "prompt") if name not in row]
                if missing:
                    raise UNSCORED_SCHEMA.missing(missing[0], row.keys())
                weight = row.get("weight")
                prompt = prompt_of(row, row["prompt"])
                return cls(prompt, row["completions"], 1.0 if weight is None else weight, rewarded)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return replace(cls.of_pair(Preference.from_json(obj, where)), rewarded=rewarded)

    @classmethod
    def of_pair(cls, pair: Preference) -> "Unscored":
        """The two answers of a preference, the better one first."""
        return cls(pair.prompt, (pair.chosen, pair.rejected), pair.weight)


@dataclass(frozen=True, repr=False)
class UnscoredSet(RowSet[Unscored]):
    """An immutable sequence of rows to be scored; a slice is an `UnscoredSet` too."""

    record = Unscored


def load_unscored(
    source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False, overwrite: bool = False
) -> UnscoredSet:
    """Reads answers to be scored from a file or from the Hub; arguments and errors as in `load_preferences`.

    Args:
        source: a file, or a name on the Hub.
        split: which split of a Hub dataset.
        skip_bad_rows: leave bad rows out and keep one message for each in `.skipped`.
        overwrite: take rows that have rewards already, which are then ignored.

    Raises:
        InputError: also where a row has rewards and `overwrite` is not set; names the first such row.
    """
    rows = load_rows(UnscoredSet, UNSCORED_SCHEMA, source, split, skip_bad_rows)
    rewarded = [number for number, row in enumerate(rows, start=1) if row.rewarded]
    if rewarded and not overwrite:
        raise InputError(
            f"{rows.source}: row {rewarded[0]}: field 'rewards': {len(rewarded)} rows have rewards already; "
            "ask for --overwrite to score them anew, or remove the column"
        )
    return rows


def _is_preference(row: Mapping[Any, Any]) -> bool:
    """Whether a row is a pair; a table's row may have the columns of both kinds, one of them null."""
    pair = [name for name in ("chosen", "rejected") if row.get(name) is not None]
    if pair and row.get("completions") is not None:
        raise InputError(f"field 'completions': the row has {pair[0]!r} too, which is a completion itself; keep one")
    return bool(pair)
