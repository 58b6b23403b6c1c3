"""One thread that writes for all: what waits is written in one transaction, so that many writes cost one sync."""

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
from everalign.serving.store.engine import told_error

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_AT_ONCE = 256
_DAY = 24 * 60 * 60.0


@dataclass
class _Write:
    """What is to be done in a transaction, and who waits for it."""

    order: str
    work: Callable[[Connection], Any]
    done: Future[Any] = field(default_factory=Future)
    result: Any = None


class Writer:
    """Commits writes in groups.

    Args:
        engine: whose connections begin transactions that may write.
        name: the store, for messages.
        daily: called in the writing thread once a day, in transactions of its own; None for nothing.
        wait: seconds for a write, waiting included; None for any time.
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

    def write(self, order: str, work: Callable[[Connection], Result]) -> Result:
        """Do something in a transaction, and return its result once that is committed.

        Args:
            order: what it locks; writes of one transaction are done in this order, so that replicas that share a
                database never wait for one another in a circle.
            work: is given the connection; where it raises, only what it did itself is undone.

        Raises:
            EveralignError: it could not be written, or not in time; what else waited is not affected.
        """
        write = _Write(order, work)
        with self._closing:
            if self._closed:
                raise EveralignError(f"{self._name}: the store is closed; open it again")
            self._waiting.put(write)
        # To cancel it fails where it is being written already; then it may yet be kept.
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

    def in_transaction(self, work: Callable[[Connection], Result]) -> Result:
        """Do something in a transaction of its own, in this thread."""
        with self._engine.begin() as connection:
            return work(connection)

    def _run(self) -> None:
        next_day = monotonic() + _DAY
        while True:
            try:
                first = self._waiting.get(timeout=max(0.0, next_day - monotonic()))
            except queue.Empty:
                self._do_daily()
                next_day = monotonic() + _DAY
                continue
            writes, ended = self._group(first)
            if writes:
                self._commit(writes)
            if ended:
                return

    def _group(self, first: _Write | None) -> tuple[list[_Write], bool]:
        """Return what waits, in the order of its locks, and whether nothing comes after it."""
        found, item = [], first
        while item is not None:
            if item.done.set_running_or_notify_cancel():
                found.append(item)
            if len(found) == _AT_ONCE:
                break
            try:
                item = self._waiting.get_nowait()
            except queue.Empty:
                break
        return sorted(found, key=lambda write: write.order), item is None

    def _commit(self, writes: list[_Write]) -> None:
        try:
            with self._engine.begin() as connection:
                done = [write for write in writes if self._do(write, connection)]
        except Exception as error:  # noqa: BLE001  # it is given to those who wait
            for write in writes:
                if not write.done.done():
                    write.done.set_exception(self._told(error))
            return
        for write in done:
            write.done.set_result(write.result)

    def _do(self, write: _Write, connection: Connection) -> bool:
        """Do one write; return whether it waits for the commit. One that fails takes only its own changes back."""
        savepoint = connection.begin_nested()
        try:
            write.result = write.work(connection)
        except Exception as error:
            if not _in_transaction(connection):
                raise  # the whole transaction is gone, and with it what the others wrote
            savepoint.rollback()
            write.done.set_exception(self._told(error))
            return False
        savepoint.commit()
        return True

    def _told(self, error: Exception) -> Exception:
        ours = isinstance(error, SQLAlchemyError | sqlite3.Error)
        return told_error(error, self._name, "writing") if ours else error  # type: ignore[arg-type]  # just checked

    def _do_daily(self) -> None:
        if self._daily is not None:
            try:
                self._daily()
            except (SQLAlchemyError, sqlite3.Error) as error:
                _log.error("%s; it is tried again in a day", told_error(error, self._name, "removing what is old"))


def _in_transaction(connection: Connection) -> bool:
    """Whether there still is a transaction: a full disk or a lost server ends it."""
    if connection.invalidated:
        return False
    driver = connection.connection.driver_connection
    return driver.in_transaction if isinstance(driver, sqlite3.Connection) else True
