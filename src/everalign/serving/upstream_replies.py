"""What an upstream's failures mean to the gateway's client; pure functions over status, headers and body."""

import json
from collections.abc import Mapping
from typing import Any

from everalign.chat_reply import shortened
from everalign.serving.errors import FAILED, INVALID, OVERLOADED, GatewayError, UsageRefused, bad_upstream

_LONGEST_MESSAGE = 1000
_LONGEST_WORD = 100
_PASSED = (500, 502, 503, 504)
_ADVICE = ("retry-after", "retry-after-ms", "x-should-retry")


def failure(status: int, headers: Mapping[str, str], body: bytes, key: str, quoted: bool = True) -> GatewayError:
    """Return what a reply other than success comes to.

    The message is passed on only if it stands in an error object as OpenAI's; shortened, and without the key.

    Args:
        status: of HTTP.
        headers: of the reply.
        body: its content, or as much of it as was read.
        key: the upstream's.
        quoted: whether anything that the upstream wrote may be passed on.
    """
    advice = {name: headers[name] for name in _ADVICE if name in headers and len(headers[name]) < _LONGEST_WORD}
    if 300 <= status < 400 or status < 200:
        return bad_upstream(f"the upstream redirects (status {status}), which is not followed", again=False)
    if status in (401, 403, 407):
        # Its key is the operator's: the client can do nothing about it, and is not to learn what the upstream says.
        message = "the upstream refuses the gateway's own key; tell the gateway's operator"
        return bad_upstream(message, "upstream_auth", again=False)
    said = error_of(_json(body), key) if quoted else {}
    message = said.get("message") or f"the upstream answered with status {status} and no message that can be passed on"
    kind = OVERLOADED if status == 429 else INVALID if status < 500 else FAILED
    passed = status if status < 500 or status in _PASSED else 502
    about_usage = status in (400, 422) and b"stream_options" in body
    family = UsageRefused if about_usage else GatewayError
    found = family(passed, message, said.get("type") or kind, said.get("code"), said.get("param"), advice)
    if passed < 500 and passed not in (408, 409, 425, 429):
        found.headers["x-should-retry"] = "false"
    return found


def error_of(content: Any, key: str) -> dict[str, str]:
    """Return what is said in an error object: `message`, `type`, `code`, `param`, as far as they are there."""
    error = content.get("error") if isinstance(content, Mapping) else None
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


def stream_failure(content: Any, key: str, quoted: bool) -> GatewayError:
    """Return what an error inside of a stream comes to."""
    said = error_of(content, key) if quoted else {}
    message = said.get("message") or "the upstream failed in the middle of its answer"
    return GatewayError(
        502, message, said.get("type") or FAILED, said.get("code") or "upstream_error", said.get("param")
    )


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
