"""Limits: sizes of bodies, concurrent requests, quotas of keys, and a queue that is fair between keys."""

import re
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import anyio.to_thread
from starlette.requests import ClientDisconnect, Request

from everalign.serving.errors import ClientGone, GatewayError, overloaded, refused
from everalign.serving.security import Allowance

JSON, FORM = "application/json", "application/x-www-form-urlencoded"
MOST_VALUES = 500_000
"""Most JSON values of one body: a fifth of a second to parse, for the slowest kind."""

AT_ONCE = 64 << 10
"""Largest body, in bytes, that is parsed in the event loop; larger ones are parsed in a thread."""

BODY_SECONDS = 60.0

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_SIGNS = (b",", b"[", b"{")

Result = TypeVar("Result")


def too_many_values(content: bytes) -> bool:
    """Whether JSON in UTF-8 has more than `MOST_VALUES` values; found in linear time without parsing."""
    if sum(map(content.count, _SIGNS)) <= MOST_VALUES:
        return False
    # Most signs may be inside strings: only those between them count.
    values = end = 0
    for string in _STRING.finditer(content):
        values += sum(content.count(sign, end, string.start()) for sign in _SIGNS)
        end = string.end()
        if values > MOST_VALUES:
            return True
    return values + sum(content.count(sign, end) for sign in _SIGNS) > MOST_VALUES


async def aside(content: bytes, parse: Callable[[], Result]) -> Result:
    """Return the result of parsing a body, in a thread if the body is large."""
    return parse() if len(content) <= AT_ONCE else await anyio.to_thread.run_sync(parse)


async def read_body(request: Request, most: int, expected: str = JSON, seconds: float = BODY_SECONDS) -> bytes:
    """Return a request's body, of at most so many bytes.

    Web pages may send any content type but JSON to other sites without asking, so a form needs a token that other sites
    do not know.

    Raises:
        GatewayError: its type differs (415), it is compressed (415), too large (413) or too slow (408), or the client
            disconnected (499).
    """
    if content_type(request) != expected:
        raise refused(f"the content-type must be {expected}", code="unsupported_media_type", status=415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise refused("a compressed body is not read; send it as it is", code="unsupported_encoding", status=415)
    content = bytearray()
    try:
        with body_deadline(seconds):
            async for part in request.stream():
                content += part
                if len(content) > most:
                    raise refused(f"the body is larger than {most} bytes", code="body_too_large", status=413)
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(content)


def content_type(request: Request) -> str:
    """Return a request's content type without its parameters; empty for none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


@contextmanager
def body_deadline(seconds: float = BODY_SECONDS) -> Iterator[None]:
    """Bound the time for a body, or a piece of a large one; raises GatewayError 408."""
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError:
        message = f"the body did not arrive within {seconds:g} seconds"
        raise GatewayError(408, message, "invalid_request_error", "body_timeout") from None


class Queued(Protocol):
    """An item of a fair queue: `key` owns it, and nobody waits for it any more when it is `gone`."""

    key: str
    gone: bool


_Item = TypeVar("_Item", bound=Queued)


@dataclass(eq=False)
class FairQueue(Generic[_Item]):
    """First in, first out within a key; round robin between keys. Holds `most` items."""

    most: int
    _size: int = field(default=0, init=False)
    _keys: OrderedDict[str, deque[_Item]] = field(default_factory=OrderedDict, init=False)

    def __len__(self) -> int:
        return self._size

    def put(self, item: _Item) -> _Item | None:
        """Add an item; returns the one that has no place, if any: the newest of the greediest key, or the item."""
        if self._size >= self.most:
            for key, waiting in tuple(self._keys.items()):
                self._keys[key] = deque(one for one in waiting if not one.gone)
                if not self._keys[key]:
                    del self._keys[key]
            self._size = sum(map(len, self._keys.values()))
        displaced = None
        if self._size >= self.most:
            longest = max(self._keys.values(), key=len)
            if len(longest) <= len(self._keys.get(item.key, ())) + 1:
                return item
            displaced = longest.pop()
            self._size -= 1
        self._keys.setdefault(item.key, deque()).append(item)
        self._size += 1
        return displaced

    def put_back(self, item: _Item) -> None:
        """Put an item that was taken first in the queue again."""
        self._keys.setdefault(item.key, deque()).appendleft(item)
        self._keys.move_to_end(item.key, last=False)
        self._size += 1

    def take(self, may: Callable[[_Item], bool]) -> _Item | None:
        """Take the first item of the next key whose first item may be taken; None if there is none."""
        for key in tuple(self._keys):
            waiting = self._keys[key]
            while waiting and waiting[0].gone:
                waiting.popleft()
                self._size -= 1
            if not waiting:
                del self._keys[key]
            elif may(waiting[0]):
                self._size -= 1
                item = waiting.popleft()
                self._keys.move_to_end(key)
                return item
        return None


_DAY = 86400
_BYTES_PER_TOKEN = 4
_TAIL = 64 << 10  # bytes at the end of a reply, where its usage stands
_TOTAL_TOKENS = re.compile(rb'(?<!\\)"total_tokens"\s{0,9}:\s{0,9}(\d{1,12})')


@dataclass
class _Used:
    """A key's usage: a token bucket of requests, filled until `since`, and the model's tokens of a day."""

    left: float
    since: float
    day: int = 0
    tokens: int = 0


class Allowances:
    """Counts what keys use, and refuses those that have used their allowance. Used in one event loop.

    `of_key` returns a key's own allowance, if it has one; the others have the `usual` one.
    """

    def __init__(
        self,
        of_key: Callable[[str], Allowance | None],
        usual: Allowance,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._of_key, self._usual, self._clock, self._now = of_key, usual, clock, now
        self._used: dict[str, _Used] = {}

    def of(self, key_id: str) -> Allowance:
        return self._of_key(key_id) or self._usual

    def enter(self, key_id: str) -> None:
        """Count a request; raises GatewayError 429 if the key has used its allowance."""
        allowance = self.of(key_id)
        if allowance.requests_per_minute is None and allowance.tokens_per_day is None:
            return
        used = self._of_today(key_id, allowance)
        if allowance.tokens_per_day is not None and used.tokens >= allowance.tokens_per_day:
            message = (
                f"this key has used its {allowance.tokens_per_day} tokens of today; there are more after midnight UTC"
            )
            wait = _DAY - self._now() % _DAY
            advice = {"retry-after": f"{round(wait) + 1}", "x-should-retry": "false"}
            raise GatewayError(429, message, "insufficient_quota", "insufficient_quota", headers=advice)
        if allowance.requests_per_minute is None:
            return
        now, most = self._clock(), float(allowance.requests_per_minute)
        used.left, used.since = min(most, used.left + (now - used.since) * most / 60), now
        if used.left < 1:
            message = f"this key may begin {allowance.requests_per_minute} requests a minute"
            raise overloaded(message, "rate_limit_exceeded", (1 - used.left) * 60 / most)
        used.left -= 1

    def counts_tokens(self, key_id: str) -> bool:
        return self.of(key_id).tokens_per_day is not None

    def spend(self, key_id: str, tokens: int) -> None:
        if self.counts_tokens(key_id):
            self._of_today(key_id, self.of(key_id)).tokens += tokens

    async def metered(self, key_id: str, parts: AsyncIterator[bytes], sent: int) -> AsyncIterator[bytes]:
        """Yield a reply that is passed through, and count the tokens it reports; if none, by its and the sent bytes."""
        tail, size = b"", sent
        try:
            async for part in parts:
                tail, size = (tail + part)[-_TAIL:], size + len(part)
                yield part
        finally:
            reported = _TOTAL_TOKENS.findall(tail)
            self.spend(key_id, int(reported[-1]) if reported else size // _BYTES_PER_TOKEN)

    def _of_today(self, key_id: str, allowance: Allowance) -> _Used:
        used = self._used.get(key_id)
        if used is None:
            used = self._used[key_id] = _Used(float(allowance.requests_per_minute or 0), self._clock())
        day = int(self._now() // _DAY)
        # A clock that goes back over midnight gives no second allowance for the same day.
        if day not in (used.day, used.day - 1):
            used.day, used.tokens = day, 0
        return used


def tokens_of(usage: Any, characters: int) -> int:
    """Return the tokens that a usage reports; if none, an estimate by the number of characters."""
    total = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    return total if isinstance(total, int) and total >= 0 else characters // _BYTES_PER_TOKEN


@dataclass(eq=False)
class Limiter:
    """Limits concurrent requests; streams count until they end.

    If several keys share the server, a key gets no more places than are free: alone it gets half of them, two that want
    all get a third each, and so on. A newcomer always finds some, however many keys there are.
    """

    concurrency: int
    per_key: int
    shared: bool = False
    allowances: Allowances | None = None
    in_flight: int = field(default=0, init=False)
    _held: Counter[str] = field(default_factory=Counter, init=False)

    def enter(self, key_id: str) -> ExitStack:
        """Return a place, to be closed; raises GatewayError 429 if the key has too many, 503 if the server has."""
        if self.in_flight >= self.concurrency:
            raise overloaded(f"{self.concurrency} requests are under way already", "overloaded", status=503)
        held = self._held[key_id]
        if held >= self.per_key or (self.shared and held >= self.concurrency - self.in_flight):
            raise overloaded(f"{held} requests with this key are under way already", "too_many_requests")
        if self.allowances is not None:
            self.allowances.enter(key_id)
        self._held[key_id] += 1
        self.in_flight += 1
        place = ExitStack()
        place.callback(self._leave, key_id)
        return place

    def _leave(self, key_id: str) -> None:
        self.in_flight -= 1
        self._held[key_id] -= 1
        if not self._held[key_id]:
            del self._held[key_id]
