"""Circuit breakers: a server that keeps failing gets no requests for a while."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]

_STATES: tuple[State, ...] = ("closed", "half-open", "open")
# While trials run, others follow: one that takes minutes must not hold up everybody.
_BETWEEN_TRIALS = 1.0  # seconds
_OF_OTHERS = 2  # failures of other keys than the one that fails most, from which on the server is to blame
_MOST_CIRCUITS = 1000


class CircuitBreaker:
    """Counts consecutive failures, by key; used in one event loop.

    Closed, it admits everything. After so many failures it opens and admits nothing. After a pause it admits trials,
    at most one a second: the first that is answered closes it, one that fails opens it again. Failures of a single key
    open it for that key only: what one client sends may be why.

    Args:
        failures: consecutive failures that open it.
        seconds: how long it stays open.
        clock: monotonic seconds.
    """

    def __init__(self, failures: int = 5, seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._clock = failures, seconds, clock
        self._failing: Counter[str] = Counter()  # consecutive failures, by key
        self._everybody = False
        self._opened: float | None = None
        self._tried: float | None = None
        self._era = 0  # what was sent before a circuit closed says nothing about the time after

    @property
    def state(self) -> State:
        """The current state."""
        if self._opened is None:
            return "closed"
        return "half-open" if self.wait == 0 else "open"

    @property
    def wait(self) -> float:
        """Seconds until a trial is admitted."""
        return 0.0 if self._opened is None else max(0.0, self._opened + self._seconds - self._clock())

    @property
    def idle(self) -> bool:
        """Whether it has nothing to remember."""
        return self._opened is None and not self._failing

    def enter(self, key: str = "") -> "Permit | None":
        """Return leave to send a request of a key; None while the server is left alone."""
        if self._opened is None or not (self._everybody or self._failing[key] >= self._most):
            return Permit(self, key, self._era, trial=False)
        now = self._clock()
        if self.wait > 0 or (self._tried is not None and now < self._tried + _BETWEEN_TRIALS):
            return None
        self._tried = now
        return Permit(self, key, self._era, trial=True)


class Permit:
    """Leave to send one request; its first outcome counts, later ones are ignored."""

    def __init__(self, breaker: CircuitBreaker, key: str, era: int, trial: bool) -> None:
        self._breaker, self.key, self.era, self.trial = breaker, key, era, trial
        self._over = False

    def answered(self) -> None:
        """The server has begun to answer with success."""
        breaker = self._breaker
        if self._over or breaker._opened is None or not (self.trial or self.era == breaker._era):
            return
        # Failures still count, one short of opening: a server may always begin well and break off.
        most = breaker._most - 1
        breaker._failing = Counter({key: min(count, most) for key, count in breaker._failing.items()})
        breaker._opened, breaker._tried, breaker._everybody = None, None, False
        breaker._era += 1
        self.era = breaker._era

    def succeeded(self) -> None:
        """The answer is whole; or a server that works refused the request."""
        if not self._over:
            self.answered()
            self._over = True
            self._breaker._everybody = False
            self._breaker._failing.clear()

    def failed(self, everybody: bool = False) -> None:
        """The server failed; `everybody` is whether any request would have failed."""
        breaker = self._breaker
        over, self._over = self._over, True
        if over or self.era != breaker._era:
            return
        breaker._failing[self.key] += 1
        total, most_of_one = breaker._failing.total(), max(breaker._failing.values())
        if total >= breaker._most and (everybody or total - most_of_one >= min(_OF_OTHERS, breaker._most)):
            breaker._everybody = True
        if (breaker._everybody or most_of_one >= breaker._most) and (breaker._opened is None or self.trial):
            breaker._opened, breaker._tried = breaker._clock(), None

    def abandoned(self) -> None:
        """The request was given up on this side, which says nothing about the server."""
        if not self._over and self.trial and self.era == self._breaker._era:
            self._breaker._tried = None


class Circuits:
    """The circuit breakers of one server's models.

    Args:
        make: makes a circuit breaker.
    """

    def __init__(self, make: Callable[[], CircuitBreaker]) -> None:
        self._make = make
        self._known: OrderedDict[str, CircuitBreaker] = OrderedDict()

    def of(self, model: str) -> CircuitBreaker:
        """Return a model's circuit breaker. Clients can name any number of models: the least used are forgotten."""
        if model not in self._known:
            self._known[model] = self._make()
        self._known.move_to_end(model)
        if len(self._known) > _MOST_CIRCUITS:
            unused = (name for name, one in self._known.items() if one.idle and name != model)
            del self._known[next(unused, next(iter(self._known)))]
        return self._known[model]

    @property
    def state(self) -> State:
        """The worst state of any model."""
        return max((one.state for one in self._known.values()), key=_STATES.index, default="closed")
