"""A circuit breaker: who failed again and again is left alone for a while."""

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]


class CircuitBreaker:
    """Counts failures that follow one another; for use in one event loop.

    Closed, everything is admitted. After so many failures it opens and admits nothing; when the pause is over, a single
    attempt is, and closes it or opens it again.

    Args:
        failures: how many in a row open it.
        seconds: how long it stays open.
        clock: seconds that only grow.
    """

    def __init__(self, failures: int = 5, seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._clock = failures, seconds, clock
        self._failed = 0
        self._opened: float | None = None
        self._trying = False

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

    def admits(self) -> bool:
        """Whether an attempt may be made; it has to end with `succeeded`, `failed` or `abandoned`."""
        if self._opened is None:
            return True
        if self._trying or self.wait > 0:
            return False
        self._trying = True
        return True

    def succeeded(self) -> None:
        """An attempt came to something."""
        self._failed, self._opened, self._trying = 0, None, False

    def failed(self) -> None:
        """An attempt came to nothing."""
        self._failed += 1
        if self._trying or self._failed >= self._most:
            self._opened = self._clock()
        self._trying = False

    def abandoned(self) -> None:
        """An attempt was given up by its own side, which says nothing about the other one."""
        self._trying = False
