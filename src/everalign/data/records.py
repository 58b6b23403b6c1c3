"""One preference as everything here knows it: a prompt, the better answer and the worse one.

A `Preference` that exists is valid: its constructor checks every field, wherever the row came from.
On disk a row has the columns of TRL: `prompt` (text, or chat messages), `chosen`, `rejected`; and optionally
`weight`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from everalign.data.fields import (
    Message,
    answer,
    check_text,
    checked_prompt,
    checked_weight,
    content_id,
    messages,
    only_answer,
)
from everalign.data.schema import Schema
from everalign.errors import InputError

PREFERENCE_SCHEMA = Schema(
    columns=("prompt", "chosen", "rejected", "weight"),
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
        prompt: plain text that the answer continues, or chat messages that end before the assistant speaks.
        chosen: the better answer. Never altered, not even its white space.
        rejected: the worse answer; differs from `chosen` by more than white space at its ends.
        weight: how much this row counts in a mean loss; positive and finite.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    prompt: str | tuple[Message, ...]
    chosen: str
    rejected: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt(self.prompt))
        check_text(self.chosen, "chosen")
        check_text(self.rejected, "rejected")
        if self.chosen.strip() == self.rejected.strip():
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
        """The row as its columns; `weight` only where it is not 1, so that the file reads as TRL's."""
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(message) for message in self.prompt]
        row: dict[str, Any] = {"prompt": prompt, "chosen": self.chosen, "rejected": self.rejected}
        return row if self.weight == 1.0 else {**row, "weight": self.weight}

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Preference":
        """Reads one row of columns; other columns are ignored.

        Args:
            obj: a mapping. `chosen` and `rejected` are text or a list with one assistant message. Where the
                prompt is missing (or repeated as text) and both are whole conversations, the messages that
                they share are the prompt.
            where: place of the row (such as `pairs.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'chosen': what is wrong; what to do`.
        """
        try:
            row = PREFERENCE_SCHEMA.row(obj)
            PREFERENCE_SCHEMA.check(row.keys())
            weight = row.get("weight")
            return cls(*_parts(row), weight=1.0 if weight is None else weight)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def _parts(row: Mapping[Any, Any]) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected as the constructor takes them."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    conversations = isinstance(chosen, list) and isinstance(rejected, list)
    if conversations and (prompt is None or isinstance(prompt, str)):
        return _split_conversations(prompt, chosen, rejected)
    if prompt is None:
        if "prompt" not in row:
            raise PREFERENCE_SCHEMA.missing("prompt", row.keys())
        raise InputError("field 'prompt': is null; it must be text or a list of chat messages")
    return prompt, answer(chosen, "chosen"), answer(rejected, "rejected")


def _split_conversations(prompt: str | None, chosen: list[Any], rejected: list[Any]) -> tuple[Any, str, str]:
    """Two conversations that differ in their last message only: the shared messages are the prompt."""
    better, worse = messages(chosen, "chosen"), messages(rejected, "rejected")
    shared = 0
    while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
        shared += 1
    if shared == 0:
        raise InputError(
            "field 'prompt': none found; 'chosen' and 'rejected' are message lists that do not begin alike: "
            'give the prompt as messages too, such as [{"role": "user", "content": "..."}]'
        )
    context = better[:shared]
    if prompt is not None and prompt.strip() not in {message["content"].strip() for message in context}:
        raise InputError(
            "field 'prompt': its text is no message of the conversations in 'chosen' and 'rejected'; "
            "leave the column out, or give the answers alone"
        )
    return context, only_answer(better[shared:], "chosen"), only_answer(worse[shared:], "rejected")
