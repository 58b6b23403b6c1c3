"""Group commit: one thread writes for all others, many writes in one transaction, so that they share one disk sync."""

import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from everalign.errors import EveralignError
from everalign.serving.store.engine import translated_error

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_MOST_WRITES = 256  # in one transaction
_DAY = 24 * 60 * 60.0


@dataclass
class _Write:
    lock_order: str
    work: Callable[[Connection], Any]
    done: Future[Any] = field(default_factory=Future)


class Writer:
    """Commits writes in groups.

    Args:
        engine: its connections begin transactions that may write.
        name: of the store, for messages.
        daily: called once a day in the writing thread, and opens its own transactions; None for nothing.
        wait: seconds for a write, queueing included; None for no limit.
    """

    def __init__(
        self, engine: Engine, name: str, daily: Callable[[], object] | None = None, wait: float | None = None
    ) -> None:
        self._engine, self._name, self._daily, self._wait = engine, name, daily, wait
        self._waiting: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="everalign-store", daemon=True)
        self._thread.start()

    def write(self, lock_order: str, work: Callable[[Connection], Result]) -> Result:
        """Run `work` in a transaction and return its result once that is committed.

        Args:
            lock_order: names what it locks. The writes of one transaction run in this order, so that replicas with the
                same database cannot deadlock.
            work: is called with the connection; if it raises, only its own changes are rolled back.

        Raises:
            EveralignError: it could not be written, or not in time; other waiting writes are not affected.
        """
        write = _Write(lock_order, work)
        with self._closing:
            if self._closed:
                raise EveralignError(f"{self._name}: the store is closed; open it again")
            self._waiting.put(write)
        # A write that has begun cannot be cancelled: it may still be committed after this error.
        if not wait([write.done], self._wait).done and (write.done.cancel() or not write.done.done()):
            raise EveralignError(f"{self._name}: not written within {self._wait:g} seconds; see that it answers")
        result: Result = write.done.result()
        return result

    def close(self) -> None:
        """Commit what waits, and end the thread."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        next_day = monotonic() + _DAY
        while True:
            try:
                group = [self._waiting.get(timeout=max(0.0, next_day - monotonic()))]
            except queue.Empty:
                try:
                    if self._daily is not None:
                        self._daily()
                except (SQLAlchemyError, sqlite3.Error) as error:
                    _log.error("%s; will retry in a day", translated_error(error, self._name, "removing what is old"))
                next_day = monotonic() + _DAY
                continue
            while len(group) < _MOST_WRITES and not self._waiting.empty():
                group.append(self._waiting.get())
            # From here on a write cannot be cancelled.
            writes = [write for write in group if write is not None and write.done.set_running_or_notify_cancel()]
            if writes:
                self._commit(sorted(writes, key=lambda write: write.lock_order))
            if group[-1] is None:
                return

    def _commit(self, writes: list[_Write]) -> None:
        """Run writes in one transaction with a savepoint each; callers get their results after the commit."""
        results = []
        try:
            with self._engine.begin() as connection:
                for write in writes:
                    savepoint = connection.begin_nested()
                    try:
                        result = write.work(connection)
                    except Exception as error:
                        if not _in_transaction(connection):
                            raise  # the whole transaction is gone, and with it what the others wrote
                        savepoint.rollback()
                        write.done.set_exception(self._translated(error))
                    else:
                        savepoint.commit()
                        results.append((write, result))
        except Exception as error:  # noqa: BLE001  # raised in the threads that wait
            for write in writes:
                if not write.done.done():
                    write.done.set_exception(self._translated(error))
            return
        for write, result in results:
            write.done.set_result(result)

    def _translated(self, error: Exception) -> Exception:
        if isinstance(error, SQLAlchemyError | sqlite3.Error):
            return translated_error(error, self._name, "writing")
        return error


def _in_transaction(connection: Connection) -> bool:
    """Whether the transaction is still open: a full disk or a lost server ends it."""
    if connection.invalidated:
        return False
    driver = connection.connection.driver_connection
    return driver.in_transaction if isinstance(driver, sqlite3.Connection) else True
