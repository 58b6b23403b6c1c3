"""What an upstream sends, taken apart; pure functions that raise GatewayError for what cannot be read."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

from everalign.serving.errors import bad_upstream
from everalign.serving.json_size import MOST_VALUES, aside, too_many_values
from everalign.serving.sse import BrokenEvents, EventParser
from everalign.serving.upstream_replies import told_failure

RESPONSE_ENDS = ("response.completed", "response.incomplete", "response.failed", "response.cancelled", "error")
"""The events that may be the last one of a streamed response."""


def inflated(inflater: Any, part: bytes, most: int) -> bytes:
    """Return at most so many bytes of what compressed ones hold."""
    try:
        return bytes(inflater.decompress(part, most))
    except zlib.error:
        raise bad_upstream("the upstream's reply is badly compressed", "upstream_malformed") from None


def parsed(parser: EventParser, part: bytes) -> list[str]:
    """Return the data of the events that end in these bytes."""
    try:
        return parser.feed(part)
    except BrokenEvents as error:
        raise bad_upstream(f"the upstream's stream cannot be read: {error}", "upstream_malformed") from None


def event_of(data: str, key: str, quoted: bool) -> dict[str, Any]:
    """Return an event's JSON; raises the upstream's own error where the event is one."""
    return answer_of(json_object(data), key, quoted)


def answer_of(content: dict[str, Any], key: str, quoted: bool) -> dict[str, Any]:
    """Return an answer's JSON; raises the upstream's own error where it is one, whatever the status says."""
    # A response that failed is an answer all the same: it says what it came to in its own fields.
    if content.get("object") == "error" or (content.get("error") and content.get("object") != "response"):
        raise told_failure(content, key, quoted)
    return content


def follow(event: Mapping[str, Any], finished: dict[Any, bool]) -> None:
    """Note which choices have ended, or whether a response has."""
    if str(event.get("type")).startswith("response.") or event.get("type") == "error":
        finished["response"] = finished.get("response", False) or event["type"] in RESPONSE_ENDS
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict) or not isinstance(choice.get("index", 0), int):
            raise bad_upstream("the upstream's stream has a choice that is none", "upstream_malformed")
        index = choice.get("index", 0)
        finished[index] = finished.get(index, False) or choice.get("finish_reason") is not None


async def whole_object(content: bytes) -> dict[str, Any]:
    """Return JSON that is an object, read beside the event loop where it is large."""
    return await aside(content, lambda: json_object(content))


def json_object(content: bytes | str) -> dict[str, Any]:
    """Return JSON that is an object."""
    encoded = content.encode(errors="replace") if isinstance(content, str) else content
    if too_many_values(encoded):
        raise bad_upstream(f"the upstream's reply has more than {MOST_VALUES} values", "upstream_too_large")
    try:
        found = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise bad_upstream("the upstream's reply is no JSON object", "upstream_malformed")
    return found


def _no_number(text: str) -> float:
    """Refuse NaN and infinities, which JSON does not have and other readers choke on."""
    raise ValueError(text)
