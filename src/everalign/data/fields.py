"""Fields of a record: text, chat messages, weights; every check names the field and says what to do."""

import hashlib
import json
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from everalign.errors import InputError

Message = dict[str, str]
"""A chat message: `role` (one of `ROLES`) and `content`."""

ROLES = ("system", "user", "assistant")
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
# Keys that a chat template may print: dropping them would change what the model is trained on.
_UNSUPPORTED_KEYS = ("tool_calls", "tool_call_id", "images", "audio", "thinking", "reasoning_content")


def checked_prompt(value: Any, field: str = "prompt", follows: str = "chosen") -> str | tuple[Message, ...]:
    """Return a prompt as records hold it: text, or messages that end before the assistant speaks.

    Args:
        value: what a row has.
        field: what the row calls it.
        follows: the field where an answer belongs.
    """
    if isinstance(value, str):
        check_text(value, field)
        return value
    return _prompt_messages(value, field, follows)


def answer(value: Any, field: str) -> Any:
    """The text of an answer given as text or as a list with one assistant message."""
    return only_answer(messages(value, field), field) if isinstance(value, list) else value


def only_answer(found: tuple[Message, ...], field: str) -> str:
    """Return the text of the one assistant message that follows the prompt."""
    if len(found) != 1 or found[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in found)
        raise InputError(
            f"field {field!r}: after the prompt there must be exactly one message, the assistant's; "
            f"found {len(found)} ({roles}); leave out what repeats the prompt or follows the answer"
        )
    return found[0]["content"]


def _prompt_messages(value: Any, field: str, follows: str) -> tuple[Message, ...]:
    found = messages(value, field)
    if found[-1]["role"] == "assistant":
        raise InputError(
            f"field {field!r}: ends in an assistant message; the {field} must end before the answer, "
            f"so move that message to {follows!r} or drop it"
        )
    return found


def messages(value: Any, field: str) -> tuple[Message, ...]:
    """Return chat messages as records hold them."""
    if not isinstance(value, list | tuple):
        raise InputError(f"field {field!r}: must be text or a list of chat messages, found {kind(value)}")
    if not value:
        raise InputError(f"field {field!r}: the list of messages is empty; give at least one message")
    return tuple(_message(item, f"{field}[{i}]") for i, item in enumerate(value))


def _message(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping) or "role" not in value or "content" not in value:
        keys = f"keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else kind(value)
        raise InputError(f"field {field!r}: a message is an object with 'role' and 'content', found {keys}")
    role = value["role"]
    if role not in ROLES:
        hint = f"; use {_OTHER_ROLES[role]!r}" if isinstance(role, str) and role in _OTHER_ROLES else ""
        raise InputError(f"field {field!r}: role {role!r} is not one of {', '.join(ROLES)}{hint}")
    for key in _UNSUPPORTED_KEYS:
        if value.get(key):
            raise InputError(f"field {field!r}: {key!r} is not supported; use messages of plain text only")
    check_text(value["content"], field)
    return {"role": role, "content": value["content"]}


def check_text(value: Any, field: str) -> None:
    """Refuse what is no text, empty, or not encodable."""
    if not isinstance(value, str):
        raise InputError(f"field {field!r}: must be text, found {kind(value)}")
    if not value.strip():
        raise InputError(f"field {field!r}: is empty; fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"field {field!r}: half a surrogate pair at character {error.start + 1}; repair the text's encoding"
        ) from None


def checked_weight(value: Any) -> float:
    """Return a row's weight: a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"field 'weight': must be a number, found {kind(value)}")
    if not is_finite(value) or value <= 0:
        raise InputError(f"field 'weight': must be positive and finite, found {shown(value)}; remove rows of no weight")
    return float(value)


def is_finite(value: Real) -> bool:
    """Whether a number is one that a float holds; JSON knows whole numbers of any size."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Real) -> str:
    """Return a number for a message, in a few digits."""
    try:
        return str(float(value))
    except OverflowError:
        return "a whole number of over 300 digits"


def kind(value: object) -> str:
    """What a JSON value is called, for messages."""
    names: dict[type, str] = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def content_id(content: Any) -> str:
    """Name what a record holds by 16 hexadecimal digits; the same content has the same name in every kind of file."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
