"""How much at once, and how large."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
from starlette.requests import ClientDisconnect, Request

from everalign.serving.allowances import Allowances
from everalign.serving.errors import GatewayError, overloaded, refused

BODY_SECONDS = 60.0


class Ticket:
    """A place among the requests under way; given back once, however often `release` is called."""

    def __init__(self, limiter: "Limiter", key_id: str) -> None:
        self._limiter, self._key_id, self._held = limiter, key_id, True

    def release(self) -> None:
        """Give the place back."""
        if self._held:
            self._held = False
            self._limiter.leave(self._key_id)


class Limiter:
    """Counts requests under way, streams until they end.

    Shared, a key has no more places than are free: alone it gets half of them, two that want all a third each, and so
    on. Whoever comes finds some, without anybody knowing how many will.

    Args:
        concurrency: most of them.
        per_key: most of them with the same key.
        shared: whether several keys share them.
        allowances: what each key may use besides; None for as much as there is.
    """

    def __init__(
        self, concurrency: int, per_key: int, shared: bool = False, allowances: Allowances | None = None
    ) -> None:
        self._allowances = allowances
        self._most, self._per_key, self._shared = concurrency, per_key, shared
        self._held: Counter[str] = Counter()
        self.in_flight = 0

    def enter(self, key_id: str) -> Ticket:
        """Return a place; raises GatewayError 429 for a key that has too many, 503 where all have."""
        if self.in_flight >= self._most:
            raise overloaded(f"{self._most} requests are under way already", "overloaded", status=503)
        held = self._held[key_id]
        if held >= self._per_key or (self._shared and held >= self._most - self.in_flight):
            raise overloaded(f"{held} requests with this key are under way already", "too_many_requests")
        if self._allowances is not None:
            self._allowances.enter(key_id)
        self._held[key_id] += 1
        self.in_flight += 1
        return Ticket(self, key_id)

    def leave(self, key_id: str) -> None:
        """One request less."""
        self.in_flight -= 1
        self._held[key_id] -= 1
        if not self._held[key_id]:
            del self._held[key_id]


JSON, FORM = "application/json", "application/x-www-form-urlencoded"


async def read_body(request: Request, most: int, expected: str = JSON, seconds: float = BODY_SECONDS) -> bytes:
    """Return a request's body.

    Args:
        request: whose body has not been read.
        most: bytes.
        expected: its content type. Web pages may send any but JSON to other servers without asking, so that a form
            needs a token that they do not know.
        seconds: within which it has to be there.

    Raises:
        GatewayError: it is something else by its header (415), compressed (415), too large (413) or too slow (408), or
            its sender is gone (499).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != expected:
        raise refused(f"the content-type must be {expected}", code="unsupported_media_type", status=415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise refused("a compressed body is not read; send it as it is", code="unsupported_encoding", status=415)
    try:
        with body_deadline(seconds):
            return await _read(request, most)
    except ClientDisconnect:
        raise GatewayError(499, "the client is gone", code="client_gone") from None


@contextmanager
def body_deadline(seconds: float = BODY_SECONDS) -> Iterator[None]:
    """Bound how long a body, or a piece of a large one, is waited for; raises GatewayError 408."""
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError:
        message = f"the body did not come within {seconds:g} seconds"
        raise GatewayError(408, message, "invalid_request_error", "body_timeout") from None


async def _read(request: Request, most: int) -> bytes:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise refused(f"the body is larger than {most} bytes", code="body_too_large", status=413)
    return bytes(content)
