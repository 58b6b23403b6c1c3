"""The feedback store: durable, idempotent, shared by as many replicas as the database serves.

with FeedbackStore.open("sqlite:///feedback.db", retention_days=90) as store:
    store.add_exchange(exchange)
    store.add_feedback(feedback)
"""

import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from time import monotonic
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Engine, delete, exists, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from everalign.errors import EveralignError, InputError
from everalign.serving.store.engine import (
    NOBODY,
    READ_ONLY,
    exchange_of,
    exchanges,
    feedback,
    feedback_of,
    learned,
    open_database,
    translate_errors,
)
from everalign.serving.store.records import (
    Exchange,
    Feedback,
    Redact,
    UnknownExchange,
    redact_exchange,
    redact_feedback,
)

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

    `daily` is called once a day in the writing thread, opens its own transactions, and raises EveralignError. A write
    has `wait` seconds, queueing included; None for no limit.
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
            raise EveralignError(f"{self._name}: not written within {self._wait:g} seconds; check that it responds")
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
                except EveralignError as error:
                    _log.error("%s; will retry in a day", error)
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
            with translate_errors(self._name, "writing"), self._engine.begin() as connection:
                for write in writes:
                    savepoint = connection.begin_nested()
                    try:
                        with translate_errors(self._name, "writing"):
                            result = write.work(connection)
                    except Exception as error:
                        # A full disk or a lost server ends the whole transaction, and with it what the others wrote.
                        driver = None if connection.invalidated else connection.connection.driver_connection
                        if driver is None or (isinstance(driver, sqlite3.Connection) and not driver.in_transaction):
                            raise
                        savepoint.rollback()
                        write.done.set_exception(error)
                    else:
                        savepoint.commit()
                        results.append((write, result))
        except Exception as error:  # noqa: BLE001  # raised in the threads that wait
            for write in writes:
                if not write.done.done():
                    write.done.set_exception(error)
            return
        for write, result in results:
            write.done.set_result(result)


_BATCH = 500  # rows deleted in one transaction, looked up by id, or fetched


@dataclass(frozen=True)
class StoreStats:
    """Counts of a store.

    Args:
        exchanges: answered requests.
        outcomes: exchanges by outcome.
        correctors: exchanges by the corrector's version, those without a corrector left out.
        keys: keys that gave feedback.
        feedback: judgements, replaced ones left out.
        waiting: judgements that were not learned yet.
        ratings: feedback by rating.
        preferred: feedback by preferred side.
        edits: feedback with an edited text.
        oldest: when the oldest exchange was answered; None in an empty store.
        newest: when the newest one was.
    """

    exchanges: int
    outcomes: Mapping[str, int]
    correctors: Mapping[str, int]
    keys: int
    feedback: int
    waiting: int
    ratings: Mapping[int, int]
    preferred: Mapping[str, int]
    edits: int
    oldest: datetime | None
    newest: datetime | None


class FeedbackStore(AbstractContextManager["FeedbackStore"]):
    """Exchanges and feedback in a database; threads may share it. Use `open`.

    Whatever a method added is on disk, or with PostgreSQL's server, when it returns. Every method raises EveralignError
    if the database fails, and InputError if it is damaged.
    """

    def __init__(
        self, engine: Engine, name: str, retention_days: int | None, redaction: Redact | None, wait: float | None = None
    ) -> None:
        self.name = name
        self._engine, self._read_only = engine, engine.execution_options(**{READ_ONLY: True})
        self._retention_days, self._redaction = retention_days, redaction
        self._writer = Writer(engine, name, daily=self.purge, wait=wait)

    @classmethod
    def open(
        cls, url: str, *, retention_days: int | None = None, redaction: Redact | None = None, wait: float | None = None
    ) -> "FeedbackStore":
        """Open or create a store, and remove old exchanges now and once a day.

        Args:
            url: `sqlite:///path` or `postgresql://user:password@host/database`.
            retention_days: exchanges older than this are removed with their feedback; None keeps them.
            redaction: applied to every text before it is written, such as `Redaction()`; None writes texts as they are.
            wait: seconds for one write; one that fails for lack of time is not written later, unless it had begun. None
                waits a minute for a locked database, and without limit for one that does not answer.

        Raises:
            InputError: the address or the number of days is wrong, the file is damaged or something else, or the
                database was written by a newer version.
            EveralignError: the database cannot be reached.
        """
        if retention_days is not None and retention_days < 1:
            raise InputError(f"retention: must be at least 1 day, found {retention_days}; leave it out to keep all")
        store = cls(*open_database(url, wait), retention_days, redaction, wait)
        store.purge()
        return store

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits, and disconnect; further writes are refused."""
        self._writer.close()
        self._engine.dispose()

    def add_exchange(self, exchange: Exchange) -> None:
        """Add an answered request; raises InputError if its id is in the store already."""
        stored = exchange if self._redaction is None else redact_exchange(exchange, self._redaction)

        def add(connection: Connection) -> None:
            try:
                connection.execute(insert(exchanges).values({**vars(stored), "messages": list(stored.messages)}))
            except IntegrityError:
                raise InputError(f"exchange {stored.id!r}: is in the store already; an id names one answer") from None

        self._writer.write(stored.id, add)

    def add_feedback(self, given: Feedback) -> bool:
        """Add feedback; it replaces earlier feedback of the same user of the same key on the same exchange.

        Returns:
            Whether it is new, that is, replaced nothing.

        Raises:
            UnknownExchange: there is no such exchange, or another key asked for it.
        """
        stored = given if self._redaction is None else redact_feedback(given, self._redaction)

        def add(connection: Connection) -> bool:
            # Locks the exchange: feedback on it in another replica waits for this transaction.
            owner = select(exchanges.c.key_id).where(exchanges.c.id == stored.exchange).with_for_update(key_share=True)
            if connection.execute(owner).scalar_one_or_none() != stored.key_id:
                raise UnknownExchange(
                    f"exchange {stored.exchange!r}: is not stored for this key; "
                    "feedback takes the id of an answer that this key asked for and that was stored"
                )
            same = (
                (feedback.c.exchange == stored.exchange)
                & (feedback.c.key_id == stored.key_id)
                & (feedback.c.user == (stored.user or NOBODY))
            )
            values = {**vars(stored), "id": stored.id, "user": stored.user or NOBODY, "tags": list(stored.tags)}
            if connection.execute(update(feedback).where(same).values(values)).rowcount:
                return False
            connection.execute(insert(feedback).values(values))
            return True

        return self._writer.write(stored.exchange, add)

    def exchange(self, id: str, key_id: str | None = None) -> Exchange | None:
        """Return an exchange; None if there is none, or another key than `key_id` asked for it."""
        query = select(exchanges).where(exchanges.c.id == id)
        if key_id is not None:
            query = query.where(exchanges.c.key_id == key_id)
        with translate_errors(self.name, "reading"), self._read_only.connect() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else exchange_of(row)

    def feedback(
        self, *, unlearned: bool = False, since: datetime | None = None
    ) -> Iterator[tuple[Exchange, Feedback]]:
        """Yield feedback with its exchange, the oldest first, as it stood when iteration began.

        Args:
            unlearned: leave out what was learned.
            since: leave out what was given before; needs a time zone, else InputError.
        """
        if since is not None and since.utcoffset() is None:
            raise InputError("since: has no time zone; give it in UTC, as datetime.now(timezone.utc)")
        query = select(exchanges, feedback).join(feedback, feedback.c.exchange == exchanges.c.id)
        if unlearned:
            query = query.where(_not_learned())
        if since is not None:
            query = query.where(feedback.c.created >= since)
        query = query.order_by(feedback.c.created, feedback.c.id)
        with translate_errors(self.name, "reading"), self._read_only.connect() as connection:
            for row in connection.execution_options(yield_per=_BATCH).execute(query):
                yield exchange_of(row), feedback_of(row)

    def recent_feedback(self, key_id: str, count: int) -> list[tuple[Exchange, Feedback, bool]]:
        """Return a key's newest feedback, the newest first: its exchange, itself, and whether it was learned."""
        known = exists().where(learned.c.id == feedback.c.id).label("is_learned")
        query = (
            select(exchanges, known, feedback)
            .join(feedback, feedback.c.exchange == exchanges.c.id)
            .where(feedback.c.key_id == key_id)
            .order_by(feedback.c.created.desc(), feedback.c.id)
            .limit(count)
        )
        with translate_errors(self.name, "reading"), self._read_only.connect() as connection:
            return [
                (exchange_of(row), feedback_of(row), bool(row.is_learned)) for row in connection.execute(query).all()
            ]

    def mark_learned(self, feedback_ids: Iterable[str], task: str) -> None:
        """Record that feedback was learned.

        Feedback that was replaced in the meantime is skipped, because its replacement was not learned. Feedback that is
        marked already keeps its task.

        Args:
            feedback_ids: of `Feedback.id`.
            task: the task that it was learned in; InputError if empty.
        """
        if not task.strip():
            raise InputError("task: is empty; name the task that the feedback was learned in")
        ids = sorted(set(feedback_ids))

        def mark(connection: Connection) -> None:
            now = datetime.now(timezone.utc)
            for start in range(0, len(ids), _BATCH):
                chosen = feedback.c.id.in_(ids[start : start + _BATCH])
                query = select(feedback.c.id, feedback.c.exchange).where(chosen, _not_learned()).distinct()
                found = connection.execute(query.order_by(feedback.c.exchange)).all()
                rows = [{"id": id, "exchange": exchange, "task": task, "at": now} for id, exchange in found]
                if rows:
                    connection.execute(insert(learned), rows)

        self._writer.write("", mark)

    def stats(self) -> StoreStats:
        with translate_errors(self.name, "reading"), self._read_only.connect() as connection:

            def counts(column: ColumnElement[Any]) -> dict[Any, int]:
                query = select(column, func.count()).where(column.is_not(None)).group_by(column).order_by(column)
                return {row[0]: row[1] for row in connection.execute(query)}

            total, oldest, newest = connection.execute(
                select(func.count(), func.min(exchanges.c.created), func.max(exchanges.c.created)).select_from(
                    exchanges
                )
            ).one()
            judged, edits, keys = connection.execute(
                select(
                    func.count(), func.count(feedback.c.edited_text), func.count(feedback.c.key_id.distinct())
                ).select_from(feedback)
            ).one()
            waiting = select(func.count()).select_from(feedback).where(_not_learned())
            return StoreStats(
                exchanges=total,
                outcomes=counts(exchanges.c.outcome),
                correctors=counts(exchanges.c.corrector),
                keys=keys,
                feedback=judged,
                waiting=connection.execute(waiting).scalar_one(),
                ratings=counts(feedback.c.rating),
                preferred=counts(feedback.c.preferred),
                edits=edits,
                oldest=oldest,
                newest=newest,
            )

    def purge(self) -> int:
        """Remove exchanges that are older than the retention, with their feedback; return how many."""
        if self._retention_days is None:
            return 0
        before = datetime.now(timezone.utc) - timedelta(days=self._retention_days)
        # Rows that another replica is changing or removing right now are left to it.
        old = select(exchanges.c.id).where(exchanges.c.created < before).limit(_BATCH).with_for_update(skip_locked=True)
        removed = 0
        while True:
            # Small transactions, so that no writer waits long.
            with translate_errors(self.name, "removing what is old"), self._engine.begin() as connection:
                ids = connection.execute(old).scalars().all()
                if not ids:
                    return removed
                connection.execute(delete(exchanges).where(exchanges.c.id.in_(ids)))
            removed += len(ids)


def _not_learned() -> ColumnElement[bool]:
    return ~exists().where(learned.c.id == feedback.c.id)
