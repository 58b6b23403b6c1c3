"""Replies of OpenAI-compatible servers: completions, streams and errors, read from bytes that may be anything."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

LARGEST_REPLY = 16 << 20  # bytes
LARGEST_STREAM = 64 << 20  # each token comes with its own JSON
LONGEST_WAIT = 120.0
"""Seconds: a server that asks for a longer pause is asked again after this."""

_EXCERPT = 300  # characters of a reply that an error quotes


@dataclass(frozen=True)
class Completion:
    """A model's reply.

    Args:
        text: the reply; may be empty.
        prompt_tokens: tokens of the request, None if the server does not report them.
        completion_tokens: tokens of the reply, None if the server does not report them.
        finish_reason: why the reply ended: `stop`, or `length` if it was cut; None if the server does not say.
    """

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None


class AttemptFailed(Exception):  # noqa: N818 (not an error while retries are left)
    """A request that got no completion.

    Args:
        message: why.
        retry: whether the same request may succeed later.
        wait: seconds that the server asks to wait before.
        refused: whether the server refused the request, with a status from 400 to 499.
    """

    def __init__(self, message: str, retry: bool = False, wait: float | None = None, refused: bool = False) -> None:
        super().__init__(message)
        self.retry, self.wait, self.refused = retry, wait, refused


async def stream_events(response: httpx.Response) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the JSON of server-sent events until [DONE]; each is one line, as all these servers write them."""
    rest = b""
    async for part in bounded(response, LARGEST_STREAM, "stream"):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if line.startswith(b"data:") and data:
                event = _json(data)
                if not isinstance(event, Mapping):
                    raise AttemptFailed("the stream has an event that is not a JSON object")
                yield event


async def bounded(response: httpx.Response, most: int, what: str) -> AsyncIterator[bytes]:
    """Yield the parts of a reply's body; raises AttemptFailed if it has more than `most` bytes."""
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > most:
            raise AttemptFailed(f"the {what} is larger than {most >> 20} MiB; ask for fewer tokens")
        yield part


def status_failure(status: int, headers: Mapping[str, str], body: bytes) -> AttemptFailed:
    """Return the failure of a reply with a status other than success, and whether and when to retry."""
    if 300 <= status < 400:
        target = shortened(headers.get("location", "nowhere"))
        return AttemptFailed(f"status {status} leads to {target}, which is not followed; give the final address")
    # The server's own word, or what its status says.
    asked = headers.get("x-should-retry", "").lower()
    retry = asked == "true" if asked in ("true", "false") else status in (408, 409, 429) or status >= 500
    wait = retry_after(headers) if retry else None
    return AttemptFailed(f"status {status}: {_quote(body)}", retry, wait, refused=status < 500)


def read_completion(body: bytes, content_type: str, chat: bool) -> Completion:
    """Return the first choice of a successful reply; raises AttemptFailed that says what it holds instead of text."""
    content = _json(body)
    if not isinstance(content, Mapping):
        given = content_type or "no content type"
        raise AttemptFailed(f"the reply is not a JSON object ({given}): {_quote(body)}; is this the address of an API?")
    choices = content.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise AttemptFailed(f"the reply has no choices: {_quote(body)}")
    choice = choices[0]
    message = choice.get("message") if chat else {"content": choice.get("text")}
    if not isinstance(message, Mapping):
        raise AttemptFailed("the reply's first choice has no message")
    text, reason = message.get("content"), choice.get("finish_reason")
    if not isinstance(text, str):
        ended = f"finish_reason {shortened(str(reason), 40)}"
        if message.get("tool_calls") or message.get("function_call"):
            raise AttemptFailed(f"the model calls a tool instead of answering with text ({ended}); ask without tools")
        if message.get("refusal"):
            raise AttemptFailed(f"the model refused to answer: {shortened(str(message['refusal']))}")
        found = "null" if text is None else type(text).__name__
        raise AttemptFailed(f"the answer must be text, found {found} ({ended})")
    return make_completion(text, content.get("usage"), reason)


def make_completion(text: str, usage: Any, reason: Any) -> Completion:
    """Return a completion; usage and finish reason may be any JSON."""
    counts = usage if isinstance(usage, Mapping) else {}
    prompt, written = (
        n if isinstance(n, int) and not isinstance(n, bool) and n >= 0 else None
        for n in (counts.get("prompt_tokens"), counts.get("completion_tokens"))
    )
    return Completion(text, prompt, written, reason if isinstance(reason, str) else None)


def _quote(body: bytes) -> str:
    """Return an excerpt of a reply: its error message, or else its text."""
    content = _json(body)
    for name in ("error", "detail", "message"):
        if isinstance(content, Mapping) and content.get(name):
            content = content[name]
    return shortened(content if isinstance(content, str) else body.decode(errors="replace")) or "(nothing)"


def _json(body: bytes) -> Any:
    """Return the value of JSON text, None if it is none; deep nesting counts as damage."""
    with suppress(ValueError, RecursionError):
        return json.loads(body)
    return None


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return the seconds that a reply asks to wait, at most `LONGEST_WAIT`; None if it does not ask.

    Args:
        headers: of the reply: `retry-after-ms` (milliseconds), or `retry-after` (seconds, or a date).
        now: the current time, for dates.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with suppress(ValueError):
            seconds = float(headers.get(name, "nan")) * unit
            if seconds >= 0:
                return min(seconds, LONGEST_WAIT)
    with suppress(ValueError, TypeError):
        date = parsedate_to_datetime(headers.get("retry-after", ""))
        seconds = (date - (now or datetime.now(timezone.utc))).total_seconds()
        return min(max(seconds, 0.0), LONGEST_WAIT)
    return None


def shortened(text: str, most: int = _EXCERPT) -> str:
    """Return text as one printable line of at most `most` characters, without control characters for the terminal."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= most else f"{line[:most]}…"
