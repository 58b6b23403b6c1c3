"""HTTP to upstreams: bounded reading, the connection pool, and circuit breakers."""

import ssl
import time
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import anyio
import httpx

from everalign.serving.errors import GatewayError, bad_upstream
from everalign.serving.limits import MOST_VALUES, aside, too_many_values
from everalign.serving.sse import strict_json

State = Literal["closed", "open", "half-open"]

_STATES: tuple[State, ...] = ("closed", "half-open", "open")
# While trials run, others follow: one that takes minutes must not hold up everybody.
_BETWEEN_TRIALS = 1.0  # seconds
_OF_OTHERS = 2  # failures of other keys than the one that fails most, from which on the server is to blame
_MOST_CIRCUITS = 1000


@dataclass(eq=False)
class CircuitBreaker:
    """Counts consecutive failures, by key; used in one event loop.

    Closed, it admits everything. After so many `failures` it opens and admits nothing for some `seconds`. Then it
    admits trials, at most one a second: the first that is answered closes it, one that fails opens it again. Failures
    of a single key open it for that key only: what one client sends may be why.
    """

    failures: int = 5
    seconds: float = 30.0
    clock: Callable[[], float] = time.monotonic
    _failing: Counter[str] = field(default_factory=Counter, init=False)  # consecutive failures, by key
    _everybody: bool = field(default=False, init=False)
    _opened: float | None = field(default=None, init=False)
    _tried: float | None = field(default=None, init=False)
    _era: int = field(default=0, init=False)  # what was sent before a circuit closed says nothing about the time after

    @property
    def state(self) -> State:
        if self._opened is None:
            return "closed"
        return "half-open" if self.wait == 0 else "open"

    @property
    def wait(self) -> float:
        """Seconds until a trial is admitted."""
        return 0.0 if self._opened is None else max(0.0, self._opened + self.seconds - self.clock())

    @property
    def idle(self) -> bool:
        return self._opened is None and not self._failing

    def enter(self, key: str = "") -> "Permit | None":
        """Return leave to send a request of a key; None while the server is left alone."""
        if self._opened is None or not (self._everybody or self._failing[key] >= self.failures):
            return Permit(self, key, self._era, trial=False)
        now = self.clock()
        if self.wait > 0 or (self._tried is not None and now < self._tried + _BETWEEN_TRIALS):
            return None
        self._tried = now
        return Permit(self, key, self._era, trial=True)


@dataclass(eq=False)
class Permit:
    """Leave to send one request of a key; its first outcome counts, later ones are ignored.

    Args:
        breaker: counts the outcome.
        key: whose request it is.
        era: the breaker's, when the request was admitted.
        trial: whether its outcome decides if the circuit closes.
        over: whether an outcome has counted.
    """

    breaker: CircuitBreaker
    key: str
    era: int
    trial: bool
    over: bool = False

    def answered(self) -> None:
        """The server has begun to answer with success."""
        breaker = self.breaker
        if self.over or breaker._opened is None or not (self.trial or self.era == breaker._era):
            return
        # Failures still count, one short of opening: a server may always begin well and break off.
        most = breaker.failures - 1
        breaker._failing = Counter({key: min(count, most) for key, count in breaker._failing.items()})
        breaker._opened, breaker._tried, breaker._everybody = None, None, False
        breaker._era += 1
        self.era = breaker._era

    def succeeded(self) -> None:
        """The answer is whole; or a server that works refused the request."""
        if not self.over:
            self.answered()
            self.over = True
            self.breaker._everybody = False
            self.breaker._failing.clear()

    def failed(self, everybody: bool = False) -> None:
        """The server failed; `everybody` is whether any request would have failed."""
        breaker = self.breaker
        over, self.over = self.over, True
        if over or self.era != breaker._era:
            return
        breaker._failing[self.key] += 1
        total, most_of_one = breaker._failing.total(), max(breaker._failing.values())
        if total >= breaker.failures and (everybody or total - most_of_one >= min(_OF_OTHERS, breaker.failures)):
            breaker._everybody = True
        if (breaker._everybody or most_of_one >= breaker.failures) and (breaker._opened is None or self.trial):
            breaker._opened, breaker._tried = breaker.clock(), None

    def abandoned(self) -> None:
        """The request was given up on this side, which says nothing about the server."""
        if not self.over and self.trial and self.era == self.breaker._era:
            self.breaker._tried = None


@dataclass(eq=False)
class Circuits:
    """The circuit breakers of one server's models, each of which `make` makes."""

    make: Callable[[], CircuitBreaker]
    known: OrderedDict[str, CircuitBreaker] = field(default_factory=OrderedDict)

    def of(self, model: str) -> CircuitBreaker:
        """Return a model's circuit breaker. Clients can name any number of models: the least used are forgotten."""
        if model not in self.known:
            self.known[model] = self.make()
        self.known.move_to_end(model)
        if len(self.known) > _MOST_CIRCUITS:
            unused = (name for name, one in self.known.items() if one.idle and name != model)
            del self.known[next(unused, next(iter(self.known)))]
        return self.known[model]

    @property
    def state(self) -> State:
        """The worst state of any model."""
        return max((one.state for one in self.known.values()), key=_STATES.index, default="closed")


_QUOTED_BYTES = 64 << 10  # of an error's body
_END_SECONDS = 0.1  # between a stream's last event and the end of its body; the client waits as long


class UpstreamTransport:
    """Sends requests to one server, whose replies have at most `largest` bytes, decompressed."""

    def __init__(self, url: str, key: str, connect_seconds: float, read_seconds: float, largest: int) -> None:
        self._url, self._largest, self._connect_seconds = url, largest, connect_seconds
        self._own = {**({"authorization": f"Bearer {key}"} if key else {}), "accept-encoding": "identity"}
        self._timeouts = httpx.Timeout(read_seconds, connect=connect_seconds).as_dict()
        # Not an httpx client: that would keep one user's cookies for the next, follow redirects, and read proxies and
        # passwords from the environment.
        self._connections = ConnectionPool()
        self.aclose = self._connections.aclose

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], content: bytes | AsyncIterator[bytes]
    ) -> httpx.Response:
        """Return the reply, its body unread; raises httpx's errors."""
        every = {**headers, **self._own}
        request = httpx.Request(
            method,
            f"{self._url}/{path}",
            content=content,
            # Bytes as they came: HTTP headers have no encoding, and ASGI hands them over as latin-1.
            headers=[(name.encode("latin-1"), value.encode("latin-1")) for name, value in every.items()],
            extensions={"timeout": self._timeouts},
        )
        response = await self._connections.handle_async_request(request)
        response.headers.encoding = "latin-1"  # as ASGI wants them back
        return response

    async def beginning(self, response: httpx.Response) -> bytes:
        """Return the first bytes of an error's body that arrive soon."""
        content = bytearray()
        try:
            with anyio.move_on_after(self._connect_seconds):
                async for part in self.parts(response):
                    content += part
                    if len(content) > _QUOTED_BYTES:
                        break
        except (httpx.HTTPError, GatewayError):
            pass  # the status says enough
        finally:
            await response.aclose()
        return bytes(content[:_QUOTED_BYTES])

    async def read_json(self, response: httpx.Response) -> dict[str, Any]:
        """Return the JSON object that a reply is; raises GatewayError."""
        content = b"".join([part async for part in self.parts(response)])
        return await aside(content, partial(json_object, content))

    async def parts(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """Yield the body, decompressed; raises GatewayError if it is too large: a small body can hold gigabytes."""
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "gzip", "deflate", ""):
            raise bad_upstream(f"the upstream's reply is compressed by {encoding[:20]!r}, which was not asked for")
        inflater = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding in ("gzip", "deflate") else None
        left = self._largest
        async for part in response.aiter_raw():
            try:
                plain = part if inflater is None else inflater.decompress(part, left + 1)
            except zlib.error:
                raise bad_upstream("the upstream's reply is badly compressed", "upstream_malformed") from None
            left -= len(plain)
            if left < 0:
                message = f"the upstream's answer is larger than {self._largest} bytes"
                raise bad_upstream(message, "upstream_too_large", again=False)
            yield plain


async def read_to_end(parts: AsyncIterator[bytes]) -> None:
    """Read what follows a stream's last event, mostly nothing: only a body that was read frees its connection."""
    with suppress(httpx.HTTPError, GatewayError), anyio.move_on_after(_END_SECONDS):
        async for _ in parts:
            pass


def json_object(content: bytes | str) -> dict[str, Any]:
    """Return the JSON object that a reply or an event is; raises GatewayError for anything else."""
    if too_many_values(content.encode(errors="replace") if isinstance(content, str) else content):
        raise bad_upstream(f"the upstream's reply has more than {MOST_VALUES} values", "upstream_too_large")
    try:
        found = strict_json(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise bad_upstream("the upstream's reply is not a JSON object", "upstream_malformed")
    return found


_KEEP_SECONDS = 4.0  # uvicorn, and so vLLM, closes idle connections after 5
_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_KEEP_SECONDS)


@cache
def _certificates() -> ssl.SSLContext:
    """Trusted certificates, none from the environment; shared because reading them takes longer than a request."""
    return httpx.create_ssl_context(trust_env=False)


class ConnectionPool(httpx.AsyncBaseTransport):
    """A transport that sends each request over a free connection, or a new one. Used in one event loop.

    httpcore's own pool looks through all its connections for each request, which hundreds of streams feel.
    """

    def __init__(self) -> None:
        self._free: deque[tuple[float, httpx.AsyncHTTPTransport]] = deque()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; its connection is free again when the response is closed."""
        if self._free:
            _, transport = self._free.pop()
        else:
            transport = httpx.AsyncHTTPTransport(verify=_certificates(), limits=_ONE, trust_env=False)
        try:
            response = await transport.handle_async_request(request)
        except BaseException:
            self._free.append((time.monotonic(), transport))
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _PooledStream(response.stream, lambda: self._free.append((time.monotonic(), transport)))
        # Servers have closed by now what lay here longest.
        while self._free and self._free[0][0] < time.monotonic() - _KEEP_SECONDS:
            await self._free.popleft()[1].aclose()
        return response

    async def aclose(self) -> None:
        """Close the free connections; the others close with their responses."""
        while self._free:
            await self._free.popleft()[1].aclose()


@dataclass(eq=False)
class _PooledStream(httpx.AsyncByteStream):
    """A response's bytes; its connection is released when they are closed."""

    stream: httpx.AsyncByteStream
    release: Callable[[], None]
    closed: bool = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self.stream:
            yield part

    async def aclose(self) -> None:
        try:
            await self.stream.aclose()
        finally:
            if not self.closed:
                self.closed = True
                self.release()
