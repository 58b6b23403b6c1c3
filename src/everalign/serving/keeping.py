"""What the gateway needs of a store; `everalign.serving.store` has one.

A store that hangs must hang nobody: what is asked of it has a deadline and a bounded queue, and while it does not
answer, nothing more is asked of it for a few seconds.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio

from everalign.errors import EveralignError
from everalign.serving.circuit import CircuitBreaker
from everalign.serving.store.records import Exchange, Feedback
from everalign.serving.threads import call_in_thread

if TYPE_CHECKING:
    from everalign.serving.store.statistics import StoreStats

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

# A store's writers wait for a common commit: more of them than this make it no faster.
_WRITERS, _READERS = 16, 4
_MOST_WAITING = 1000
_FAILURES = 3  # that were too late, one after the other, before it is left alone


class Store(Protocol):
    """Keeps exchanges and feedback; blocking, and used by several threads."""

    def add_exchange(self, exchange: Exchange) -> None:
        """Keep an exchange; durable when it returns."""
        ...

    def add_feedback(self, feedback: Feedback) -> bool:
        """Keep feedback, durable when it returns; False if it replaces earlier one, UnknownExchange if on none."""
        ...

    def exchange(self, id: str, key_id: str | None = None) -> Exchange | None:
        """Return an exchange; of one key only, if it is given."""
        ...

    def stats(self) -> "StoreStats":
        """Count what there is."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


class StoreLate(EveralignError):  # noqa: N818 (what is wrong is in the name)
    """A store that did not do something in time, or that has too much to do."""


class _Lane:
    """Calls of a store, a few at once; those whose turn does not come in time are not made."""

    def __init__(self, threads: int, seconds: float) -> None:
        self._places, self._seconds = asyncio.Semaphore(threads), seconds
        self._breaker = CircuitBreaker(_FAILURES, seconds)
        self.waiting = 0

    async def run(self, call: Callable[[], _Result]) -> _Result:
        """Return what a call of the store returns; raises what it raises, and StoreLate."""
        permit = self._breaker.enter()
        if permit is None:
            raise StoreLate("the store did not answer in time again and again, and is left alone for a few seconds")
        if self.waiting >= _MOST_WAITING:
            permit.abandoned()
            raise StoreLate(f"{_MOST_WAITING} calls wait for the store already")
        self.waiting += 1
        try:
            with anyio.fail_after(self._seconds):
                await self._places.acquire()
                working = call_in_thread(call, "everalign-store")
                working.add_done_callback(self._ended)
                # Whoever gives up leaves the call at work, in its place.
                result = await asyncio.shield(working)
        except TimeoutError:
            permit.failed()
            raise StoreLate(f"the store did not answer within {self._seconds:g} seconds") from None
        except asyncio.CancelledError:
            permit.abandoned()
            raise
        except BaseException:
            permit.succeeded()  # it answers
            raise
        finally:
            self.waiting -= 1
        permit.succeeded()
        return result

    def _ended(self, working: "asyncio.Future[Any]") -> None:
        self._places.release()
        if not working.cancelled():
            working.exception()  # who gave up does not ask for it


class Keeper:
    """A store, used from an event loop.

    Args:
        store: what it writes to.
        failed: called once for each exchange that could not be kept.
        seconds: within which something is kept or read; else StoreLate is raised.
    """

    def __init__(self, store: Store, failed: Callable[[], None] = lambda: None, seconds: float = 5.0) -> None:
        self._store, self._failed, self._seconds = store, failed, seconds
        self._writes, self._reads = _Lane(_WRITERS, seconds), _Lane(_READERS, seconds)

    @property
    def waiting(self) -> int:
        """How many writes wait or are under way."""
        return self._writes.waiting

    async def add_exchange(self, exchange: Exchange) -> bool:
        """Return whether an exchange is kept: the client's answer does not depend on it."""
        try:
            await self._writes.run(lambda: self._store.add_exchange(exchange))
        except Exception as error:  # noqa: BLE001 (whatever a database raises, the answer is there and is delivered)
            _log.error("exchange %s could not be kept: %s", exchange.id, type(error).__name__)
            self._failed()
            return False
        return True

    async def add_feedback(self, feedback: Feedback) -> bool:
        """Keep feedback; errors as the store's, and StoreLate."""
        return await self._writes.run(lambda: self._store.add_feedback(feedback))

    async def exchange(self, id: str, key_id: str) -> Exchange | None:
        """Return an exchange of a key; None where that key has none of this id. Errors as in `add_feedback`."""
        return await self._reads.run(lambda: self._store.exchange(id, key_id))

    async def stats(self) -> "StoreStats":
        """Return the store's counts; errors as in `add_feedback`."""
        return await self._reads.run(self._store.stats)

    async def close(self) -> None:
        """Finish what is being written, and close the store; one that hangs is left."""
        closing = call_in_thread(self._store.close, "everalign-store")
        await asyncio.wait({closing}, timeout=2 * self._seconds)
        if closing.done():
            closing.result()
        else:
            _log.error(
                "the store could not be closed within %g seconds; what waited may not be kept", 2 * self._seconds
            )
