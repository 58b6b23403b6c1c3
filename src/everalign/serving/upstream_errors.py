"""What an upstream's failures mean to the gateway's client; pure functions over status, headers and body.

An error keeps what it carries: its status, all fields of its JSON, and the headers that say when to come again. Only
the upstream's key is taken out, and what it says of that key.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

from everalign.llm_client import shortened
from everalign.serving.errors import FAILED, INVALID, OVERLOADED, GatewayError, UsageRefused, bad_upstream
from everalign.serving.limits import MOST_VALUES, aside, too_many_values
from everalign.serving.sse import BrokenEvents, EventParser

_LONGEST_MESSAGE = 1000
_LONGEST_WORD = 100
_DEEPEST = 20
_ADVICE = ("retry-after", "retry-after-ms", "x-should-retry")
_ABOUT_KEY = (401, 407)


def failure(status: int, headers: Mapping[str, str], body: bytes, key: str, quoted: bool = True) -> GatewayError:
    """Return what a reply other than success comes to.

    Args:
        status: of HTTP.
        headers: of the reply, as they may be passed on.
        body: its content, or as much of it as was read.
        key: the upstream's.
        quoted: whether anything that the upstream wrote may be passed on.
    """
    if status < 400:
        return bad_upstream(f"the upstream redirects (status {status}), which is not followed", again=False)
    content = _json(body)
    passed = dict(headers)
    if not quoted:
        passed = {name: headers[name] for name in _ADVICE if 0 < len(headers.get(name, "")) < _LONGEST_WORD}
    about_usage = status in (400, 422) and b"stream_options" in body
    found = _error(status, content, key, quoted, UsageRefused if about_usage else GatewayError)
    if found.status < 500 and found.status not in (408, 409, 425, 429):
        passed["x-should-retry"] = "false"
    found.headers = {**passed, **found.headers}
    return found


def told_failure(content: Mapping[str, Any], key: str, quoted: bool) -> GatewayError:
    """Return what an error comes to that is told with the status of success, whole or in a stream."""
    error = content.get("error", content)
    code = error.get("code") if isinstance(error, Mapping) else None
    number = int(code) if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) == 3 else code
    status = number if isinstance(number, int) and 400 <= number < 600 else 502
    return _error(status, content, key, quoted, GatewayError)


def _error(status: int, content: Any, key: str, quoted: bool, family: type[GatewayError]) -> GatewayError:
    error = content.get("error") if isinstance(content, Mapping) else None
    # A moderation is about what was asked; any other refusal of this kind is about the gateway's key.
    moderated = status == 403 and isinstance(error, Mapping) and isinstance(error.get("metadata"), Mapping)
    if status in _ABOUT_KEY or (status == 403 and not moderated):
        # Its key is the operator's: the client can do nothing about it, and is not to learn what the upstream says.
        message = "the upstream refuses the gateway's own key; tell the gateway's operator"
        return bad_upstream(message, "upstream_auth", again=False)
    said = error_of(content, key) if quoted else {}
    message = said.get("message") or f"the upstream answered with status {status} and no message that can be passed on"
    kind = said.get("type") or (OVERLOADED if status == 429 else INVALID if status < 500 else FAILED)
    code = said.get("code") or ("upstream_error" if status >= 500 else None)
    whole = scrubbed_json(content, key) if quoted and isinstance(content, Mapping) else None
    return family(status, message, kind, code, said.get("param"), content=whole)


def error_of(content: Any, key: str) -> dict[str, str]:
    """Return what is said in an error object: `message`, `type`, `code`, `param`, as far as they are there.

    Servers that have no such object say the same beside it, or in a `detail`.
    """
    error = content.get("error") if isinstance(content, Mapping) else None
    if isinstance(content, Mapping) and not error:
        error = content if "message" in content else content.get("detail")
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, Mapping):
        return {}
    found = {}
    for name, most in (("message", _LONGEST_MESSAGE), ("type", _LONGEST_WORD), ("code", 100), ("param", 200)):
        value = error.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
            found[name] = shortened(scrubbed(str(value), key), most)
    return found


def scrubbed(text: str, key: str) -> str:
    """Return a text without the upstream's key, which servers like to repeat."""
    return text.replace(key, "***") if key else text


def scrubbed_json(value: Any, key: str, depth: int = 0) -> Any:
    """Return JSON without the upstream's key; what is nested too deeply is left out."""
    if isinstance(value, str):
        return scrubbed(value, key)
    if not isinstance(value, Mapping | list):
        return value
    if depth == _DEEPEST:
        return None
    if isinstance(value, list):
        return [scrubbed_json(one, key, depth + 1) for one in value]
    return {scrubbed(name, key): scrubbed_json(one, key, depth + 1) for name, one in value.items()}


def _json(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None


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
