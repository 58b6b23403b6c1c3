"""What an OpenAI-compatible server's replies mean: a completion, a reason to try again, or what went wrong.

Pure functions over status, headers and body; `everalign.chat_client` sends the requests.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from everalign.errors import EveralignError

LONGEST_WAIT = 120.0
"""Seconds: a server that asks for a longer pause is asked again after this."""

_SHOWN = 300
_RETRIED = (408, 409, 429)


@dataclass(frozen=True)
class Completion:
    """What a model answered.

    Args:
        text: the answer; may be empty.
        prompt_tokens: tokens of the conversation sent, None where the server does not tell.
        completion_tokens: tokens of the answer, None where the server does not tell.
        finish_reason: why the answer ended: `stop`, or `length` for one that was cut; None where the server does
            not tell.
    """

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None


class Refused(EveralignError):  # noqa: N818 (what is wrong is in the name)
    """A request that its server refused, with a status from 400 to 499: it is there, and it is not its fault."""


class TryAgain(Exception):  # noqa: N818 (no error as long as attempts are left)
    """An attempt failed in a way that may pass.

    Args:
        message: how.
        wait: the pause in seconds that the server asked for, if any.
        refused: whether the server refused, as in `Refused`.
    """

    def __init__(self, message: str, wait: float | None = None, refused: bool = False) -> None:
        super().__init__(message)
        self.wait, self.refused = wait, refused


def read_completion(body: bytes, content_type: str, chat: bool = True) -> Completion:
    """Return the first choice of a successful reply.

    Args:
        body: the reply.
        content_type: its `content-type` header, for messages.
        chat: whether a conversation was sent; else a text, and the choice has its continuation without a message.

    Raises:
        EveralignError: the reply is no JSON, or holds no text; says what it holds instead.
    """
    content = _json(body)
    if not isinstance(content, Mapping):
        given = content_type or "no content type"
        raise EveralignError(f"the reply is no JSON object ({given}): {_said(body)}; is this the address of an API?")
    choices = content.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise EveralignError(f"the reply has no choices: {_said(body)}")
    usage = content.get("usage")
    counts = usage if isinstance(usage, Mapping) else {}
    reason = choices[0].get("finish_reason")
    return Completion(
        _text(choices[0]) if chat else _continuation(choices[0]),
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
        reason if isinstance(reason, str) else None,
    )


def failure(status: int, headers: Mapping[str, str], body: bytes) -> TryAgain | EveralignError:
    """What a reply with a status other than success comes to: `TryAgain` where the request may succeed later."""
    if 300 <= status < 400:
        target = shortened(headers.get("location", "nowhere"))
        return EveralignError(f"status {status} leads to {target}, which is not followed; give the final address")
    message = f"status {status}: {_said(body)}"
    if _may_retry(status, headers):
        return TryAgain(message, asked_wait(headers), refused=status < 500)
    return Refused(message) if status < 500 else EveralignError(message)


def asked_wait(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that a server asks to wait for, at most `LONGEST_WAIT`; None where it asks for nothing.

    Args:
        headers: of the reply: `retry-after-ms` (milliseconds), or `retry-after` (seconds, or a date).
        now: the time, for dates.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        seconds = _number(headers.get(name)) * unit
        if seconds >= 0:
            return min(seconds, LONGEST_WAIT)
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
        seconds = (date - (now or datetime.now(timezone.utc))).total_seconds()
    except (ValueError, TypeError):
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)


def shortened(text: str, most: int = _SHOWN) -> str:
    """Return text for one line of a message: at most so many characters, none that would move a terminal's cursor."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line if len(line) <= most else f"{line[:most]}…"


def _may_retry(status: int, headers: Mapping[str, str]) -> bool:
    """Whether a failed request may succeed later: the server's own word, or what its status says."""
    asked = headers.get("x-should-retry", "").lower()
    if asked in ("true", "false"):
        return asked == "true"
    return status in _RETRIED or status >= 500


def _said(body: bytes) -> str:
    """What a reply says in words, shortened: its error message, or the text as it is."""
    content = _json(body)
    for name in ("error", "detail", "message"):
        if isinstance(content, Mapping) and content.get(name):
            content = content[name]
    text = content if isinstance(content, str) else body.decode(errors="replace")
    return shortened(text) or "(nothing)"


def _json(body: bytes) -> Any:
    """The value that JSON text holds, None where it is none; deep nesting is damage too."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _continuation(choice: Mapping[str, Any]) -> str:
    text = choice.get("text")
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        raise EveralignError(f"the reply's first choice must have a text, found {found}")
    return text


def _text(choice: Mapping[str, Any]) -> str:
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise EveralignError("the reply's first choice has no message")
    text = message.get("content")
    if isinstance(text, str):
        return text
    ended = f"finish_reason {shortened(str(choice.get('finish_reason')), 40)}"
    if message.get("tool_calls") or message.get("function_call"):
        raise EveralignError(f"the model calls a tool instead of answering with text ({ended}); ask without tools")
    if message.get("refusal"):
        raise EveralignError(f"the model refused to answer: {shortened(str(message['refusal']))}")
    found = "null" if text is None else type(text).__name__
    raise EveralignError(f"the answer must be text, found {found} ({ended})")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _number(text: str | None) -> float:
    """A header's number, NaN where it has none."""
    try:
        return float(text) if text is not None else math.nan
    except ValueError:
        return math.nan
