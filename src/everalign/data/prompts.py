"""Prompts whose answers are yet to be sampled: the column `prompt`, and optionally `weight`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from everalign.data.fields import checked_weight, content_id
from everalign.data.messages import PROMPT_COLUMNS, Completion, Prompt, checked_prompt, prompt_of
from everalign.data.readers import load_rows
from everalign.data.row_set import RowSet
from everalign.data.schema import Schema
from everalign.data.unscored import Unscored
from everalign.errors import InputError

PROMPT_SCHEMA = Schema(
    columns=("prompt", "weight", *PROMPT_COLUMNS),
    required=("prompt",),
    expected="expected 'prompt' and optionally 'weight'",
    other_names={"prompt": ("instruction", "question", "query", "input", "messages", "conversations")},
)


@dataclass(frozen=True)
class PromptRow:
    """A prompt alone.

    Args:
        prompt: plain text that the answers continue, or chat messages that end before the assistant speaks.
        weight: how much the row counts in a mean loss; positive and finite.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    prompt: Prompt
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt(self.prompt))
        object.__setattr__(self, "weight", checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash((self.id, self.weight))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the prompt."""
        return content_id({"prompt": self.prompt})

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again."""
        return (self.id,)

    def answered(self, completions: Sequence[Completion]) -> Unscored:
        """The row with its answers."""
        return Unscored(self.prompt, tuple(completions), self.weight)

    @classmethod
    def from_json(cls, obj: object, where: str) -> "PromptRow":
        """Reads one row of columns; others are not looked at.

        Raises:
            InputError: `where: field 'prompt': what is wrong; what to do`.
        """
        try:
            row = PROMPT_SCHEMA.row(obj)
            PROMPT_SCHEMA.check(row.keys())
            weight = row.get("weight")
            return cls(prompt_of(row, row["prompt"]), 1.0 if weight is None else weight)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True, repr=False)
class PromptSet(RowSet[PromptRow]):
    """An immutable sequence of prompts; a slice is a `PromptSet` too."""

    record = PromptRow


def load_prompts(source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False) -> PromptSet:
    """Reads prompts from a file or from the Hub; arguments and errors as in `load_preferences`."""
    return load_rows(PromptSet, PROMPT_SCHEMA, source, split, skip_bad_rows)
