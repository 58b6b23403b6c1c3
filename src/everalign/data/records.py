"""One preference as everything here knows it: a prompt, the better answer and the worse one.

A `Preference` that exists is valid: its constructor checks every field, wherever the row came from.
On disk a row has the columns of TRL: `prompt` (text, or chat messages), `chosen`, `rejected`; and optionally `tools`,
`chat_template_kwargs` and `weight`. Without a prompt, `chosen` and `rejected` are whole texts or conversations, and
what they begin with alike is the prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from everalign.data.fields import checked_weight, content_id
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
from everalign.data.schema import Schema
from everalign.data.shared_prompt import split_conversations, split_texts
from everalign.errors import InputError

PREFERENCE_SCHEMA = Schema(
    columns=("prompt", "chosen", "rejected", "weight", *PROMPT_COLUMNS),
    required=("chosen", "rejected"),
    expected="expected 'prompt', 'chosen', 'rejected' and optionally 'weight'",
    other_names={
        "prompt": ("instruction", "question", "query", "input", "messages", "conversations"),
        "chosen": ("preferred", "accepted", "better", "winner", "positive", "output"),
        "rejected": ("dispreferred", "refused", "worse", "loser", "negative"),
    },
)


@dataclass(frozen=True)
class Preference:
    """A prompt, the answer that was preferred and the one that was not.

    Args:
        prompt: plain text that the answer continues, or chat messages that end before the assistant speaks; as a
            `ChatPrompt` where tools or variables of the template belong to them.
        chosen: the better answer: a text, or the assistant's messages where there is more to it. Never altered, not
            even its white space.
        rejected: the worse answer; differs from `chosen` by more than white space at its ends.
        weight: how much this row counts in a mean loss; positive and finite.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt(self.prompt))
        for name in ("chosen", "rejected"):
            object.__setattr__(self, name, checked_completion(getattr(self, name), name, self.prompt))
        if is_same(self.chosen, self.rejected):
            raise InputError("field 'rejected': equal to 'chosen'; a pair needs two different answers")
        object.__setattr__(self, "weight", checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash((self.id, self.weight))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content (prompt, chosen, rejected; not the weight)."""
        return content_id({"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected})

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again."""
        return (self.id,)

    def to_json(self) -> dict[str, Any]:
        """The row as its columns, which are TRL's; those that may be missing only where they say something."""
        answers = {name: completion_column(getattr(self, name)) for name in ("chosen", "rejected")}
        row = {**prompt_columns(self.prompt), **answers}
        return row if self.weight == 1.0 else {**row, "weight": self.weight}

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Preference":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping. `chosen` and `rejected` are text, or a list of messages that begins and ends with one of the
                assistant's. Where the prompt is missing they are whole texts, or whole conversations (which may repeat
                a prompt that is text): see `split_texts` and `split_conversations`.
            where: place of the row (such as `pairs.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'chosen': what is wrong; what to do`.
        """
        try:
            row = PREFERENCE_SCHEMA.row(obj)
            PREFERENCE_SCHEMA.check(row.keys())
            weight = row.get("weight")
            prompt, chosen, rejected = _parts(row)
            return cls(prompt_of(row, prompt), chosen, rejected, 1.0 if weight is None else weight)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def _parts(row: Mapping[Any, Any]) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected as the constructor takes them."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    conversations = isinstance(chosen, list) and isinstance(rejected, list)
    if conversations and (prompt is None or isinstance(prompt, str)):
        return split_conversations(prompt, chosen, rejected)
    if prompt is None:
        if "prompt" in row:
            raise InputError("field 'prompt': is null; it must be text or a list of chat messages")
        missing = PREFERENCE_SCHEMA.missing("prompt", row.keys())
        # Two texts without a prompt may be whole ones, or their prompt's column has another name.
        if not isinstance(chosen, str) or not isinstance(rejected, str) or "; rename " in str(missing):
            raise missing
        return split_texts(chosen, rejected, missing)
    return prompt, chosen, rejected
