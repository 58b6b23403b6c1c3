"""One preference as everything here knows it: a prompt, the better answer and the worse one.

A `Preference` that exists is valid: its constructor checks every field, wherever the row came from.
On disk a row has the columns of TRL: `prompt` (text, or chat messages), `chosen`, `rejected`; and optionally
`weight`.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

from everalign.errors import InputError

Message = dict[str, str]
"""A chat message: `role` (one of `ROLES`) and `content`."""

ROLES = ("system", "user", "assistant")
COLUMNS = ("prompt", "chosen", "rejected", "weight")

_EXPECTED = "expected 'prompt', 'chosen', 'rejected' and optionally 'weight'"
_OTHER_NAMES = {
    "prompt": ("instruction", "question", "query", "input", "messages", "conversations"),
    "chosen": ("preferred", "accepted", "better", "winner", "positive", "output"),
    "rejected": ("dispreferred", "refused", "worse", "loser", "negative"),
}
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
# Keys that a chat template may print: dropping them would change what the model is trained on.
_UNSUPPORTED_KEYS = ("tool_calls", "tool_call_id", "images", "audio", "thinking", "reasoning_content")


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
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            _check_text(prompt, "prompt")
        else:
            object.__setattr__(self, "prompt", _prompt_messages(prompt))
        _check_text(self.chosen, "chosen")
        _check_text(self.rejected, "rejected")
        if self.chosen.strip() == self.rejected.strip():
            raise InputError("field 'rejected': equal to 'chosen'; a pair needs two different answers")
        object.__setattr__(self, "weight", _checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash((self.id, self.weight))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content (prompt, chosen, rejected; not the weight)."""
        content = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

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
            if not isinstance(obj, Mapping):
                raise InputError(f"a row must be an object with columns, found {_kind(obj)}; {_EXPECTED}")
            check_columns(obj.keys())
            weight = obj.get("weight")
            return cls(*_parts(obj), weight=1.0 if weight is None else weight)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def check_columns(found: Collection[Any]) -> None:
    """Refuses columns without `chosen` or `rejected`, naming those found and the nearest ones."""
    missing = [name for name in ("chosen", "rejected") if name not in found]
    if missing:
        raise _missing_column(missing[0], found)


def _missing_column(name: str, found: Collection[Any]) -> InputError:
    names = [column for column in found if isinstance(column, str)]
    free = [column for column in names if column not in COLUMNS]
    near = difflib.get_close_matches(name, free, n=1) or [n for n in _OTHER_NAMES[name] if n in free]
    hint = f"; rename {near[0]!r}?" if near else ""
    listed = ", ".join(repr(column) for column in names) or "none"
    return InputError(f"field {name!r}: no such column{hint} (found: {listed}; {_EXPECTED})")


def _parts(row: Mapping[Any, Any]) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected as the constructor takes them."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    conversations = isinstance(chosen, list) and isinstance(rejected, list)
    if conversations and (prompt is None or isinstance(prompt, str)):
        return _split_conversations(prompt, chosen, rejected)
    if prompt is None:
        if "prompt" not in row:
            raise _missing_column("prompt", row.keys())
        raise InputError("field 'prompt': is null; it must be text or a list of chat messages")
    return prompt, _answer(chosen, "chosen"), _answer(rejected, "rejected")


def _split_conversations(prompt: str | None, chosen: list[Any], rejected: list[Any]) -> tuple[Any, str, str]:
    """Two conversations that differ in their last message only: the shared messages are the prompt."""
    better, worse = _messages(chosen, "chosen"), _messages(rejected, "rejected")
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
    return context, _only_answer(better[shared:], "chosen"), _only_answer(worse[shared:], "rejected")


def _answer(value: Any, field: str) -> Any:
    """The text of an answer given as text or as a list with one assistant message."""
    return _only_answer(_messages(value, field), field) if isinstance(value, list) else value


def _only_answer(messages: tuple[Message, ...], field: str) -> str:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"field {field!r}: after the prompt there must be exactly one message, the assistant's; "
            f"found {len(messages)} ({roles}); leave out what repeats the prompt or follows the answer"
        )
    return messages[0]["content"]


def _prompt_messages(value: Any) -> tuple[Message, ...]:
    messages = _messages(value, "prompt")
    if messages[-1]["role"] == "assistant":
        raise InputError(
            "field 'prompt': ends in an assistant message; the prompt must end before the answer, "
            "so move that message to 'chosen' or drop it"
        )
    return messages


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"field {field!r}: must be text or a list of chat messages, found {_kind(value)}")
    if not value:
        raise InputError(f"field {field!r}: the list of messages is empty; give at least one message")
    return tuple(_message(item, f"{field}[{i}]") for i, item in enumerate(value))


def _message(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping) or "role" not in value or "content" not in value:
        keys = f"keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else _kind(value)
        raise InputError(f"field {field!r}: a message is an object with 'role' and 'content', found {keys}")
    role = value["role"]
    if role not in ROLES:
        hint = f"; use {_OTHER_ROLES[role]!r}" if isinstance(role, str) and role in _OTHER_ROLES else ""
        raise InputError(f"field {field!r}: role {role!r} is not one of {', '.join(ROLES)}{hint}")
    for key in _UNSUPPORTED_KEYS:
        if value.get(key):
            raise InputError(f"field {field!r}: {key!r} is not supported; use messages of plain text only")
    _check_text(value["content"], field)
    return {"role": role, "content": value["content"]}


def _check_text(value: Any, field: str) -> None:
    if not isinstance(value, str):
        raise InputError(f"field {field!r}: must be text, found {_kind(value)}")
    if not value.strip():
        raise InputError(f"field {field!r}: is empty; fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"field {field!r}: half a surrogate pair at character {error.start + 1}; repair the text's encoding"
        ) from None


def _checked_weight(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"field 'weight': must be a number, found {_kind(value)}")
    weight = float(value)
    if not math.isfinite(weight) or weight <= 0:
        raise InputError(f"field 'weight': must be positive and finite, found {weight}; remove rows of no weight")
    return weight


def _kind(value: object) -> str:
    """What a JSON value is called, for messages."""
    names: dict[type, str] = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
