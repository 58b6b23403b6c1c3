"""Limits: concurrent requests, body sizes, quotas of each key, and the fair queue between keys."""

import re
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import anyio.to_thread
from starlette.requests import ClientDisconnect, Request

from everalign.serving.errors import GatewayError, overloaded, refused
from everalign.serving.security import Allowance

MOST_VALUES = 500_000
"""Values of one body: a fifth of a second for the slowest kind."""

AT_ONCE = 64 << 10
"""Bytes that are read in the event loop; more of them are read in a thread."""

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_SIGNS = (b",", b"[", b"{")

Result = TypeVar("Result")


def too_many_values(content: bytes) -> bool:
    """Whether JSON in UTF-8 has more than `MOST_VALUES` values; takes time that grows with its length and no faster."""
    if sum(map(content.count, _SIGNS)) <= MOST_VALUES:
        return False
    # Most may stand in texts: only what is between these counts.
    values = end = 0
    for string in _STRING.finditer(content):
        values += sum(content.count(sign, end, string.start()) for sign in _SIGNS)
        end = string.end()
        if values > MOST_VALUES:
            return True
    return values + sum(content.count(sign, end) for sign in _SIGNS) > MOST_VALUES


async def aside(content: bytes, read: Callable[[], Result]) -> Result:
    """Return what `read` makes of a body; in a thread where that may take long."""
    return read() if len(content) <= AT_ONCE else await anyio.to_thread.run_sync(read)


class Waiting(Protocol):
    """What waits."""

    @property
    def key(self) -> str:
        """Whose it is."""
        ...

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        ...


_Item = TypeVar("_Item", bound=Waiting)


class FairQueue(Generic[_Item]):
    """Items in order within a key, and keys in turn.

    Args:
        most: items that wait.
    """

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._keys: OrderedDict[str, deque[_Item]] = OrderedDict()

    def __len__(self) -> int:
        return self._size

    def put(self, item: _Item) -> _Item | None:
        """Add an item, and return the one that has no place: None, another key's newest, or the item itself."""
        if self._size >= self._most:
            self._forget()
        given_way = None
        if self._size >= self._most:
            most = max(self._keys.values(), key=len)
            if len(most) <= len(self._keys.get(item.key, ())) + 1:
                return item
            given_way = most.pop()
            self._size -= 1
        self._keys.setdefault(item.key, deque()).append(item)
        self._size += 1
        return given_way

    def put_back(self, item: _Item) -> None:
        """Put an item that was taken to the front of its key."""
        self._keys.setdefault(item.key, deque()).appendleft(item)
        self._keys.move_to_end(item.key, last=False)
        self._size += 1

    def take(self, may: Callable[[_Item], bool]) -> _Item | None:
        """Return the first item of the next key that may be taken; None where there is none."""
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

    def _forget(self) -> None:
        for key, waiting in tuple(self._keys.items()):
            self._keys[key] = deque(item for item in waiting if not item.gone)
            if not self._keys[key]:
                del self._keys[key]
        self._size = sum(len(waiting) for waiting in self._keys.values())


_DAY = 86400
_BYTES_PER_TOKEN = 4
_TAIL = 64 << 10  # bytes at the end of a reply, where its usage stands
_TOLD = re.compile(rb'(?<!\\)"total_tokens"\s{0,9}:\s{0,9}(\d{1,12})')


@dataclass
class _Used:
    """What a key has used: requests that it may begin now, since when, and the tokens of a day."""

    left: float
    since: float
    day: int = 0
    tokens: int = 0


class Allowances:
    """Counts what keys use, and turns away those that have used enough. Used in one event loop.

    Args:
        of_key: what one key may use, if anything is said of it.
        usual: what others may.
        clock: seconds that only grow.
        now: seconds since 1970.
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
        """Return what a key may use."""
        return self._of_key(key_id) or self._usual

    def enter(self, key_id: str) -> None:
        """Count a request; raises GatewayError 429 for a key that has used up what it may."""
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
        """Whether a key's tokens are limited."""
        return self.of(key_id).tokens_per_day is not None

    def spend(self, key_id: str, tokens: int) -> None:
        """Count tokens."""
        if self.counts_tokens(key_id):
            self._of_today(key_id, self.of(key_id)).tokens += tokens

    async def metered(self, key_id: str, parts: AsyncIterator[bytes], sent: int) -> AsyncIterator[bytes]:
        """Yield a reply that is passed on, and count the tokens that it tells of; else its bytes, and those `sent`."""
        tail, size = b"", sent
        try:
            async for part in parts:
                tail, size = (tail + part)[-_TAIL:], size + len(part)
                yield part
        finally:
            told = _TOLD.findall(tail)
            self.spend(key_id, int(told[-1]) if told else size // _BYTES_PER_TOKEN)

    def _of_today(self, key_id: str, allowance: Allowance) -> _Used:
        used = self._used.get(key_id)
        if used is None:
            used = self._used[key_id] = _Used(float(allowance.requests_per_minute or 0), self._clock())
        day = int(self._now() // _DAY)
        if used.day != day:
            used.day, used.tokens = day, 0
        return used


def tokens_of(usage: Any, characters: int) -> int:
    """Return the tokens of a usage; where none is told, what so many characters come to."""
    told = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    return told if isinstance(told, int) and told >= 0 else characters // _BYTES_PER_TOKEN


BODY_SECONDS = 60.0


class Slot:
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

    def enter(self, key_id: str) -> Slot:
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
        return Slot(self, key_id)

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
