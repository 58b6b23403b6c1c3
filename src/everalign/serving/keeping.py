"""What the gateway needs of a store; `everalign.serving.store` has one."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar

from everalign.serving.store.records import Exchange, Feedback

if TYPE_CHECKING:
    from everalign.serving.store.statistics import StoreStats

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

# A store's writers wait for a common commit: more of them than this make it no faster.
_THREADS = 16


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


class Keeper:
    """A store, used from an event loop.

    Args:
        store: what it writes to.
        failed: called once for each exchange that could not be kept.
    """

    def __init__(self, store: Store, failed: Callable[[], None] = lambda: None) -> None:
        self._store, self._failed = store, failed
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="everalign-store")

    async def add_exchange(self, exchange: Exchange) -> bool:
        """Return whether an exchange is kept: the client's answer does not depend on it."""
        try:
            await self._run(self._store.add_exchange, exchange)
        except Exception as error:  # noqa: BLE001 (whatever a database raises, the answer is there and is delivered)
            _log.error("exchange %s could not be kept: %s", exchange.id, type(error).__name__)
            self._failed()
            return False
        return True

    async def add_feedback(self, feedback: Feedback) -> bool:
        """Keep feedback; errors as the store's."""
        return await self._run(self._store.add_feedback, feedback)

    async def exchange(self, id: str, key_id: str) -> Exchange | None:
        """Return an exchange of a key; None where that key has none of this id. Errors as the store's."""
        return await self._run(self._store.exchange, id, key_id)

    async def stats(self) -> "StoreStats":
        """Return the store's counts; errors as the store's."""
        return await self._run(self._store.stats)

    async def close(self) -> None:
        """Finish what is being written, and close the store."""
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._store.close)

    async def _run(self, call: Callable[..., _Result], *arguments: object) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)
