"""Connection pool and circuit breakers of upstreams."""

import ssl
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from functools import cache
from types import TracebackType
from typing import Literal

import httpx

State = Literal["closed", "open", "half-open"]

_STATES: tuple[State, ...] = ("closed", "half-open", "open")
# While trials run, others follow: one that takes minutes must not hold up everybody.
_BETWEEN_TRIALS = 1.0  # seconds
_OF_OTHERS = 2  # failures besides those of the key that has most, from which on it is no single key's doing
_MOST_CIRCUITS = 1000


class Permit:
    """Leave to send one request; what becomes of it is told once, and more than that is not heard."""

    def __init__(self, breaker: "CircuitBreaker", key: str, era: int, trial: bool) -> None:
        self._breaker, self.key, self.era, self.trial = breaker, key, era, trial
        self._over = False

    def answered(self) -> None:
        """The server has begun to answer, with success."""
        if not self._over:
            self._breaker._close(self)

    def succeeded(self) -> None:
        """The answer is whole; or it was refused by somebody who is there."""
        if not self._over:
            self._over = True
            self._breaker._succeed(self)

    def failed(self, everybody: bool = False) -> None:
        """The server failed; `everybody` is whether that had nothing to do with what was asked."""
        if not self._over:
            self._over = True
            self._breaker._fail(self, everybody)

    def abandoned(self) -> None:
        """The request was given up by its own side, which says nothing about the other one."""
        if not self._over:
            self._breaker._abandon(self)


class CircuitBreaker:
    """Counts requests that failed one after the other; for use in one event loop.

    Closed, everything is admitted. After so many failures it opens and admits nothing. When the pause is over, trials
    are admitted, at most one a second: the first that is answered closes it, one that fails opens it again.

    Args:
        failures: how many in a row open it.
        seconds: how long it stays open.
        clock: seconds that only grow.
    """

    def __init__(self, failures: int = 5, seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._clock = failures, seconds, clock
        self._failing: Counter[str] = Counter()  # failures in a row, by key
        self._everybody = False
        self._opened: float | None = None
        self._tried: float | None = None
        self._era = 0  # what was sent before a circuit closed says nothing about the time after

    @property
    def state(self) -> State:
        """What it is at the moment."""
        if self._opened is None:
            return "closed"
        return "half-open" if self.wait == 0 else "open"

    @property
    def wait(self) -> float:
        """Seconds until it may be tried again."""
        return 0.0 if self._opened is None else max(0.0, self._opened + self._seconds - self._clock())

    @property
    def idle(self) -> bool:
        """Whether there is nothing to remember."""
        return self._opened is None and not self._failing

    def enter(self, key: str = "") -> Permit | None:
        """Return leave to send a request of a key; None while it has to be left alone."""
        if self._opened is None or not (self._everybody or self._failing[key] >= self._most):
            return Permit(self, key, self._era, trial=False)
        now = self._clock()
        if self.wait > 0 or (self._tried is not None and now < self._tried + _BETWEEN_TRIALS):
            return None
        self._tried = now
        return Permit(self, key, self._era, trial=True)

    def _close(self, permit: Permit) -> None:
        # Failures are still counted: a server may always begin well and break off.
        if self._opened is not None and (permit.trial or permit.era == self._era):
            self._opened, self._tried = None, None
            self._failing = Counter({key: min(count, self._most - 1) for key, count in self._failing.items()})
            self._everybody = False
            self._era += 1
            permit.era = self._era

    def _succeed(self, permit: Permit) -> None:
        self._close(permit)
        self._everybody = False
        self._failing.clear()

    def _fail(self, permit: Permit, everybody: bool) -> None:
        if permit.era != self._era:
            return
        self._failing[permit.key] += 1
        total, most_of_one = self._failing.total(), max(self._failing.values())
        if total >= self._most and (everybody or total - most_of_one >= min(_OF_OTHERS, self._most)):
            self._everybody = True
        if (self._everybody or most_of_one >= self._most) and (self._opened is None or permit.trial):
            self._opened, self._tried = self._clock(), None

    def _abandon(self, permit: Permit) -> None:
        if permit.trial and permit.era == self._era:
            self._tried = None


class Circuits:
    """The circuits of one server, by model.

    Args:
        make: makes one.
    """

    def __init__(self, make: Callable[[], CircuitBreaker]) -> None:
        self._make = make
        self._known: OrderedDict[str, CircuitBreaker] = OrderedDict()

    def of(self, model: str) -> CircuitBreaker:
        """Return a model's circuit. Clients can name any number of models: the longest unused are forgotten."""
        if model not in self._known:
            self._known[model] = self._make()
        self._known.move_to_end(model)
        if len(self._known) > _MOST_CIRCUITS:
            unused = (name for name, one in self._known.items() if one.idle and name != model)
            del self._known[next(unused, next(iter(self._known)))]
        return self._known[model]

    @property
    def state(self) -> State:
        """The worst of them."""
        return max((one.state for one in self._known.values()), key=_STATES.index, default="closed")


_KEEP_SECONDS = 4.0  # uvicorn, and so vLLM, closes idle connections after 5
_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_KEEP_SECONDS)


@cache
def _certificates() -> ssl.SSLContext:
    """Return those of all connections: reading them takes longer than a request. None from the environment."""
    return httpx.create_ssl_context(trust_env=False)


class Connections(httpx.AsyncBaseTransport):
    """A transport that sends every request through a free connection, or a new one. Used in one event loop."""

    def __init__(self) -> None:
        self._certificates = _certificates()
        self._free: deque[tuple[float, httpx.AsyncHTTPTransport]] = deque()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; its connection is free again when the response is closed."""
        if self._free:
            _, transport = self._free.pop()
        else:
            transport = httpx.AsyncHTTPTransport(verify=self._certificates, limits=_ONE, trust_env=False)
        try:
            response = await transport.handle_async_request(request)
        except BaseException:
            self.release(transport)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Released(response.stream, transport, self)
        await self._forget()
        return response

    def release(self, transport: httpx.AsyncHTTPTransport) -> None:
        """Take a connection back."""
        self._free.append((time.monotonic(), transport))

    async def _forget(self) -> None:
        """Close those that have lain there longest, and that their servers have closed by now."""
        while self._free and self._free[0][0] < time.monotonic() - _KEEP_SECONDS:
            await self._free.popleft()[1].aclose()

    async def aclose(self) -> None:
        """Close those that are free; the others close with their responses."""
        while self._free:
            await self._free.popleft()[1].aclose()

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        await self.aclose()


class _Released(httpx.AsyncByteStream):
    """A response's bytes, behind which its connection is free."""

    def __init__(
        self, stream: httpx.AsyncByteStream, transport: httpx.AsyncHTTPTransport, connections: Connections
    ) -> None:
        self._stream, self._transport, self._connections = stream, transport, connections
        self._held = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            if self._held:
                self._held = False
                self._connections.release(self._transport)
