"""How much a store holds, of what kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, exists, func, select

from everalign.serving.store.tables import exchanges, feedback, learned


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
