"""The feedback store: durable, idempotent, shared by as many replicas as the database serves.

with FeedbackStore.open("sqlite:///feedback.db", retention_days=90) as store:
    store.add_exchange(exchange)
    store.add_feedback(feedback)
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, Engine, delete, exists, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from everalign.errors import InputError
from everalign.serving.store.engine import open_database, reading, told
from everalign.serving.store.records import (
    NOBODY,
    Exchange,
    Feedback,
    UnknownExchange,
    exchange_of,
    exchange_values,
    exchanges,
    feedback,
    feedback_of,
    feedback_values,
    learned,
)
from everalign.serving.store.redaction import Redaction
from everalign.serving.store.writer import Writer

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class StoreStats:
    """Counts of a store.

    Args:
        exchanges: answered requests.
        outcomes: exchanges by what became of their answer.
        correctors: exchanges by the corrector's version; those without one are not in it.
        keys: how many keys gave feedback.
        feedback: judgements that stand.
        waiting: those of them that were not learned yet.
        ratings: feedback by rating.
        preferred: feedback by preferred side.
        edits: feedback with an edited text.
        oldest: when the oldest exchange was answered; None where there is none.
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


def not_learned() -> ColumnElement[bool]:
    """The condition that feedback was not learned yet."""
    return ~exists().where(learned.c.id == feedback.c.id)


def read_stats(connection: Connection) -> StoreStats:
    """Count."""
    total, oldest, newest = connection.execute(
        select(func.count(), func.min(exchanges.c.created), func.max(exchanges.c.created)).select_from(exchanges)
    ).one()
    given = select(func.count(), func.count(feedback.c.edited_text), func.count(feedback.c.key_id.distinct()))
    judged, edits, keys = connection.execute(given.select_from(feedback)).one()
    waiting = connection.execute(select(func.count()).select_from(feedback).where(not_learned())).scalar_one()
    return StoreStats(
        exchanges=total,
        outcomes=_counts(connection, exchanges.c.outcome),
        correctors=_counts(connection, exchanges.c.corrector),
        keys=keys,
        feedback=judged,
        waiting=waiting,
        ratings=_counts(connection, feedback.c.rating),
        preferred=_counts(connection, feedback.c.preferred),
        edits=edits,
        oldest=oldest,
        newest=newest,
    )


def _counts(connection: Connection, column: ColumnElement[Any]) -> dict[Any, int]:
    """How often each value of a column is there, but for NULL."""
    query = select(column, func.count()).where(column.is_not(None)).group_by(column).order_by(column)
    return {row[0]: row[1] for row in connection.execute(query)}


_ROWS_AT_ONCE = 500  # of what is deleted in one transaction, looked up by id, or fetched


class FeedbackStore:
    """Exchanges and feedback in a database; threads may share it. Use `open`.

    What a method has added is on disk, or with PostgreSQL's server, when it returns. Every method raises EveralignError
    where the database fails, and InputError where it is damaged.

    Args:
        engine: a database at this version.
        name: what messages call it.
        retention_days: as in `open`.
        redaction: as in `open`.
        wait: as in `open`.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        retention_days: int | None,
        redaction: Redaction | None,
        wait: float | None = None,
    ) -> None:
        self.name = name
        self._engine, self._reading = engine, reading(engine)
        self._retention_days, self._redaction = retention_days, redaction
        self._writer = Writer(engine, name, daily=self._purge, wait=wait)

    @classmethod
    def open(
        cls,
        url: str,
        *,
        retention_days: int | None = None,
        redaction: Redaction | None = None,
        wait: float | None = None,
    ) -> "FeedbackStore":
        """Open a store, made where there is none, and remove what is too old, now and once a day.

        Args:
            url: `sqlite:///path` or `postgresql://user:password@host/database`.
            retention_days: exchanges are removed, with their feedback, when they are older; None keeps them.
            redaction: what is taken out of texts before they are written; None writes them as they are.
            wait: seconds for one write; what cannot be written by then fails, and is not written later unless that has
                begun. None waits a minute for a database that is locked, and for ever for one that does not answer.

        Raises:
            InputError: the address or the number of days is none, the file is damaged or of something else, or the
                database was written by a newer version.
            EveralignError: it cannot be reached.
        """
        if retention_days is not None and retention_days < 1:
            raise InputError(f"retention: must be at least 1 day, found {retention_days}; leave it out to keep all")
        store = cls(*open_database(url, wait), retention_days, redaction, wait)
        store.purge()
        return store

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_exchange(self, exchange: Exchange) -> None:
        """Keep an answered request.

        Raises:
            InputError: there is one with this id.
        """
        kept = exchange if self._redaction is None else self._redaction.exchange(exchange)
        self._writer.write(kept.id, lambda connection: _insert_exchange(connection, kept))

    def add_feedback(self, given: Feedback) -> bool:
        """Keep feedback; it replaces what the same user of the same key said of the same exchange.

        Returns:
            Whether it is new, and replaced nothing.

        Raises:
            UnknownExchange: there is no such exchange, or another key asked for it.
        """
        kept = given if self._redaction is None else self._redaction.feedback(given)
        return self._writer.write(kept.exchange, lambda connection: _put_feedback(connection, kept))

    def exchange(self, id: str, key_id: str | None = None) -> Exchange | None:
        """Return an exchange; None where there is none, or another key than the given one asked for it."""
        query = select(exchanges).where(exchanges.c.id == id)
        if key_id is not None:
            query = query.where(exchanges.c.key_id == key_id)
        with told(self.name, "reading"), self._reading.connect() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else exchange_of(row)

    def feedback(
        self, *, unlearned: bool = False, since: datetime | None = None
    ) -> Iterator[tuple[Exchange, Feedback]]:
        """Yield feedback with its exchange, the oldest first, as it stood when the first was asked for.

        Args:
            unlearned: leave out what was learned.
            since: leave out what was said before; has a time zone.

        Raises:
            InputError: `since` has no time zone.
        """
        if since is not None and since.utcoffset() is None:
            raise InputError("since: has no time zone; give it in UTC, as datetime.now(timezone.utc)")
        query = select(exchanges, feedback).join(feedback, feedback.c.exchange == exchanges.c.id)
        if unlearned:
            query = query.where(not_learned())
        if since is not None:
            query = query.where(feedback.c.created >= since)
        query = query.order_by(feedback.c.created, feedback.c.id)
        with told(self.name, "reading"), self._reading.connect() as connection:
            for row in connection.execution_options(yield_per=_ROWS_AT_ONCE).execute(query):
                yield exchange_of(row), feedback_of(row)

    def mark_learned(self, feedback_ids: Iterable[str], task: str) -> None:
        """Say that feedback was learned.

        What was replaced in the meantime is passed over: what stands instead was not learned. What is marked already
        keeps its task.

        Args:
            feedback_ids: of `Feedback.id`.
            task: the task that it was learned in.

        Raises:
            InputError: the task has no name.
        """
        if not task.strip():
            raise InputError("task: is empty; name the task that the feedback was learned in")
        ids = sorted(set(feedback_ids))
        self._writer.write("", lambda connection: _mark(connection, ids, task))

    def stats(self) -> StoreStats:
        """Count what there is."""
        with told(self.name, "reading"), self._reading.connect() as connection:
            return read_stats(connection)

    def purge(self) -> int:
        """Remove exchanges that are older than the store's retention, with all feedback; return how many."""
        with told(self.name, "removing what is old"):
            return self._purge()

    def _purge(self) -> int:
        if self._retention_days is None:
            return 0
        before = datetime.now(timezone.utc) - timedelta(days=self._retention_days)
        removed = 0
        # In many small transactions, so that nobody who writes waits long.
        while count := self._writer.in_transaction(lambda connection: _remove_some(connection, before)):
            removed += count
        return removed

    def close(self) -> None:
        """Write what waits, and let the database go; further writes are refused."""
        self._writer.close()
        self._engine.dispose()


def _insert_exchange(connection: Connection, exchange: Exchange) -> None:
    try:
        connection.execute(insert(exchanges).values(exchange_values(exchange)))
    except IntegrityError:
        raise InputError(f"exchange {exchange.id!r}: is in the store already; an id names one answer") from None


def _put_feedback(connection: Connection, given: Feedback) -> bool:
    """Insert or replace; whoever judges the same exchange in another replica waits for this transaction."""
    asked = select(exchanges.c.key_id).where(exchanges.c.id == given.exchange).with_for_update(key_share=True)
    if connection.execute(asked).scalar_one_or_none() != given.key_id:
        raise UnknownExchange(
            f"exchange {given.exchange!r}: is not kept for this key; "
            "feedback takes the id of an answer that this key asked for and that was stored"
        )
    same = (
        (feedback.c.exchange == given.exchange)
        & (feedback.c.key_id == given.key_id)
        & (feedback.c.user == (given.user or NOBODY))
    )
    values = feedback_values(given)
    if connection.execute(update(feedback).where(same).values(values)).rowcount:
        return False
    connection.execute(insert(feedback).values(values))
    return True


def _mark(connection: Connection, ids: list[str], task: str) -> None:
    now = datetime.now(timezone.utc)
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        some = ids[start : start + _ROWS_AT_ONCE]
        query = select(feedback.c.id, feedback.c.exchange).where(feedback.c.id.in_(some), not_learned())
        found = connection.execute(query.order_by(feedback.c.exchange).distinct()).all()
        if found:
            connection.execute(
                insert(learned), [{"id": id, "exchange": exchange, "task": task, "at": now} for id, exchange in found]
            )


def _remove_some(connection: Connection, before: datetime) -> int:
    old = select(exchanges.c.id).where(exchanges.c.created < before).limit(_ROWS_AT_ONCE)
    # What a replica is just judging or removing itself is left to it.
    ids = connection.execute(old.with_for_update(skip_locked=True)).scalars().all()
    if ids:
        connection.execute(delete(exchanges).where(exchanges.c.id.in_(ids)))
    return len(ids)
