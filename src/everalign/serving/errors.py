"""What the gateway refuses and what fails in it, in the shape that OpenAI's clients read.

The official clients repeat requests that failed with 408, 409, 429 or from 500 on, unless `x-should-retry: false` says
that it is of no use.
"""

from collections.abc import Mapping
from typing import Any

from everalign.errors import EveralignError
from everalign.serving.sse import data_frame

INVALID, FAILED, OVERLOADED = "invalid_request_error", "api_error", "rate_limit_error"
_FINAL = {"x-should-retry": "false"}


class GatewayError(EveralignError):
    """A request that ends without an answer.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
        type: what kind of error it is, as OpenAI's.
        code: names it for programs.
        param: the field of the request that it is about.
        headers: besides the usual ones.
        content: the upstream's own JSON, which is given instead; its `error` has at least the fields above.
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
        said = self.content.get("error")
        return {**self.content, "error": {**error, **said} if isinstance(said, Mapping) else error}

    def frame(self) -> bytes:
        """The same as an event, for streams that have begun."""
        return data_frame(self.body())


class UsageRefused(GatewayError):  # noqa: N818 (what is wrong is in the name)
    """An upstream that cannot be asked for the usage of a stream."""


def refused(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> GatewayError:
    """The client's mistake, which it would make again."""
    return GatewayError(status, message, INVALID, code, param, _FINAL)


def not_found(message: str, code: str, param: str | None = None) -> GatewayError:
    """Something that is not there."""
    return refused(message, param, code, 404)


def overloaded(message: str, code: str, wait: float = 1.0, status: int = 429) -> GatewayError:
    """Too much at once; `wait` seconds are advised."""
    return GatewayError(status, message, OVERLOADED, code, headers={"retry-after": f"{max(1, round(wait))}"})


def bad_upstream(message: str, code: str = "upstream_error", status: int = 502, again: bool = True) -> GatewayError:
    """The upstream's failure; `again` is whether the same request may succeed later."""
    return GatewayError(status, message, FAILED, code, headers=None if again else _FINAL)


def uncorrected(reason: str, status: int, again: bool) -> GatewayError:
    """An answer that may not leave because it could not be corrected."""
    message = f"the answer could not be corrected ({reason}), and nothing uncorrected is given here"
    kind = FAILED if status >= 500 else INVALID
    return GatewayError(status, message, kind, f"uncorrected_{reason}", headers=None if again else _FINAL)
