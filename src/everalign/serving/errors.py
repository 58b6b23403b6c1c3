"""Errors in the shape that OpenAI's clients read: the gateway's own, and those that upstreams report.

The official clients repeat requests that failed with 408, 409, 429 or from 500 on, unless `x-should-retry: false` says
that it is of no use.

An upstream's error keeps its status, all fields of its JSON, and the headers that say when to come again. The
upstream's key is masked, and what the upstream says about that key is left out.
"""

from collections.abc import Mapping
from typing import Any

from everalign.errors import EveralignError
from everalign.serving.sse import strict_json

INVALID, FAILED, OVERLOADED = "invalid_request_error", "api_error", "rate_limit_error"
INTERNAL = "the gateway failed; its log says more"
_FINAL = {"x-should-retry": "false"}


class GatewayError(EveralignError):
    """A request that ends without an answer.

    Args:
        status: HTTP status.
        message: what is wrong, and what to do.
        type: kind of error, as OpenAI's.
        code: name of the error for programs.
        param: the request's field that is wrong.
        headers: to add to the reply.
        content: the upstream's own JSON, returned instead; its `error` gets at least the fields above.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = FAILED,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        content: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.code, self.param = status, message, type, code, param
        self.headers, self.content = dict(headers or {}), content or {}

    def body(self) -> dict[str, Any]:
        """The reply's JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        own = self.content.get("error")
        return {**self.content, "error": {**error, **own} if isinstance(own, Mapping) else error}


class UsageRefused(GatewayError):  # noqa: N818 (the name says what is wrong)
    """The upstream refuses `stream_options`, and so cannot report the usage of a stream."""


def refused(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> GatewayError:
    """The client's mistake; to repeat the request is of no use."""
    return GatewayError(status, message, INVALID, code, param, _FINAL)


class ClientGone(GatewayError):  # noqa: N818 (the name says what is wrong)
    """The client closed its connection."""

    def __init__(self) -> None:
        super().__init__(499, "the client disconnected", code="client_gone")


def overloaded(message: str, code: str, wait: float = 1.0, status: int = 429) -> GatewayError:
    """Too many requests; advises to come again in `wait` seconds."""
    return GatewayError(status, message, OVERLOADED, code, headers={"retry-after": f"{max(1, round(wait))}"})


def bad_upstream(message: str, code: str = "upstream_error", status: int = 502, again: bool = True) -> GatewayError:
    """The upstream's failure; `again` is whether the same request may succeed later."""
    return GatewayError(status, message, FAILED, code, headers=None if again else _FINAL)


def uncorrected(reason: str, status: int, again: bool) -> GatewayError:
    """An answer that is withheld because it could not be corrected."""
    message = f"the answer could not be corrected ({reason}), and this request allows no uncorrected answer"
    kind = FAILED if status >= 500 else INVALID
    return GatewayError(status, message, kind, f"uncorrected_{reason}", headers=None if again else _FINAL)


_LONGEST_MESSAGE = 1000
_LONGEST_WORD = 100
_DEEPEST = 20
_ADVICE = ("retry-after", "retry-after-ms", "x-should-retry")


def upstream_failure(
    status: int, headers: Mapping[str, str], body: bytes, key: str, quoted: bool = True
) -> GatewayError:
    """Return the error that an upstream's unsuccessful reply becomes.

    `headers` are those that may be passed on, `body` is the reply's or its beginning, `key` the upstream's, and
    `quoted` whether what the upstream wrote may be passed on.
    """
    if status < 400:
        return bad_upstream(f"the upstream redirects (status {status}), which is not followed", again=False)
    try:
        content = strict_json(body)
    except ValueError:
        content = None
    passed = dict(headers)
    if not quoted:
        passed = {name: headers[name] for name in _ADVICE if 0 < len(headers.get(name, "")) < _LONGEST_WORD}
    about_usage = status in (400, 422) and b"stream_options" in body
    error = _as_error(status, content, key, quoted, UsageRefused if about_usage else GatewayError)
    if error.status < 500 and error.status not in (408, 409, 425, 429):
        passed |= _FINAL
    error.headers = {**passed, **error.headers}
    return error


def check_answer(content: dict[str, Any], key: str, quoted: bool) -> dict[str, Any]:
    """Return an answer's JSON, whole or an event's; raises the upstream's error if it is one, whatever its status."""
    # A response that failed is an answer all the same: its own fields say what happened.
    if content.get("object") == "error" or (content.get("error") and content.get("object") != "response"):
        error = content.get("error", content)
        code = error.get("code") if isinstance(error, Mapping) else None
        if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) == 3:
            code = int(code)
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
        raise _as_error(status, content, key, quoted, GatewayError)
    return content


def _as_error(status: int, content: Any, key: str, quoted: bool, family: type[GatewayError]) -> GatewayError:
    error = content.get("error") if isinstance(content, Mapping) else None
    # A moderation is about what was asked; any other 403 is about the gateway's key.
    moderated = status == 403 and isinstance(error, Mapping) and isinstance(error.get("metadata"), Mapping)
    if status in (401, 407) or (status == 403 and not moderated):
        # The key is the operator's: clients can do nothing about it, and must not learn what the upstream says of it.
        message = "the upstream refuses the gateway's own key; tell the gateway's operator"
        return bad_upstream(message, "upstream_auth", again=False)
    from everalign.llm_reply import shortened  # loads httpx, which the command line's help does not need

    fields: dict[str, str] = {}
    if quoted and isinstance(content, Mapping):
        # Servers without an error object have the same fields beside it, or in a `detail`.
        error = error or (content if "message" in content else content.get("detail"))
        error = {"message": error} if isinstance(error, str) else error
        longest = {"message": _LONGEST_MESSAGE, "type": _LONGEST_WORD, "code": _LONGEST_WORD, "param": 200}
        for name, most in longest.items():
            value = error.get(name) if isinstance(error, Mapping) else None
            if isinstance(value, str | int) and not isinstance(value, bool):
                fields[name] = shortened(_masked(str(value), key), most)
    return family(
        status,
        fields.get("message") or f"the upstream answered with status {status} and no message that can be passed on",
        fields.get("type") or (OVERLOADED if status == 429 else INVALID if status < 500 else FAILED),
        fields.get("code") or ("upstream_error" if status >= 500 else None),
        fields.get("param"),
        content=_masked(content, key) if quoted and isinstance(content, Mapping) else None,
    )


def _masked(value: Any, key: str, depth: int = 0) -> Any:
    """Return JSON without the upstream's key, which servers like to quote; what is nested too deeply is left out."""
    if isinstance(value, str):
        return value.replace(key, "***") if key else value
    if not isinstance(value, Mapping | list):
        return value
    if depth == _DEEPEST:
        return None
    if isinstance(value, list):
        return [_masked(one, key, depth + 1) for one in value]
    return {_masked(name, key): _masked(one, key, depth + 1) for name, one in value.items()}
