"""SQL tables of the feedback store, and how its records become rows."""

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    MetaData,
    Row,
    SmallInteger,
    String,
    Table,
    Text,
    TypeDecorator,
)

from everalign.serving.store.records import LONGEST_NAME, Exchange, Feedback

VERSION = "0002"
"""The schema version of these tables; the first version had no `everalign_learned`."""

NOBODY = ""
"""Stands for no user: two NULLs would not be equal in a key."""


class UtcTime(TypeDecorator[datetime]):
    """A time in UTC, also in databases without time zones (SQLite)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Write in UTC."""
        return None if value is None else value.astimezone(timezone.utc)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Read as UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value.astimezone(timezone.utc)


metadata = MetaData()
version = Table("everalign_version", metadata, Column("version_num", String(32), primary_key=True))

_Name = String(LONGEST_NAME)

exchanges = Table(
    "everalign_exchanges",
    metadata,
    Column("id", _Name, primary_key=True),
    Column("created", UtcTime, nullable=False),
    Column("key_id", _Name, nullable=False),
    Column("upstream", _Name, nullable=False),
    Column("model", _Name, nullable=False),
    Column("messages", JSON, nullable=False),
    Column("original", Text, nullable=False),
    Column("returned", Text, nullable=False),
    Column("outcome", _Name, nullable=False),
    Column("reason", _Name),
    Column("mode", _Name, nullable=False),
    Column("corrector", _Name),
    Column("template", _Name),
    Column("usage", JSON, nullable=False),
    Index("everalign_exchanges_created", "created"),
)

feedback = Table(
    "everalign_feedback",
    metadata,
    Column("exchange", _Name, ForeignKey(exchanges.c.id, ondelete="CASCADE"), primary_key=True),
    Column("key_id", _Name, primary_key=True),
    Column("user", _Name, primary_key=True),
    Column("id", String(16), nullable=False),
    Column("rating", SmallInteger),
    Column("preferred", _Name),
    Column("edited_text", Text),
    Column("tags", JSON, nullable=False),
    Column("comment", Text),
    Column("created", UtcTime, nullable=False),
    Index("everalign_feedback_id", "id"),
    Index("everalign_feedback_created", "created"),
)

learned = Table(
    "everalign_learned",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("exchange", _Name, ForeignKey(exchanges.c.id, ondelete="CASCADE"), nullable=False),
    Column("task", _Name, nullable=False),
    Column("at", UtcTime, nullable=False),
    Index("everalign_learned_exchange", "exchange"),
)

_EXCHANGE = tuple(column.name for column in exchanges.columns)
_FEEDBACK = ("exchange", "key_id", "user", "rating", "preferred", "edited_text", "tags", "comment", "created")


def exchange_values(exchange: Exchange) -> dict[str, Any]:
    """Return an exchange as the columns of its row."""
    return {**{name: getattr(exchange, name) for name in _EXCHANGE}, "messages": list(exchange.messages)}


def feedback_values(given: Feedback) -> dict[str, Any]:
    """Return feedback as the columns of its row."""
    values = {name: getattr(given, name) for name in _FEEDBACK}
    return {**values, "id": given.id, "user": given.user or NOBODY, "tags": list(given.tags)}


def exchange_of(row: Row[Any]) -> Exchange:
    """Return the exchange of a row that begins with the columns of `exchanges`."""
    values = dict(zip(_EXCHANGE, row, strict=False))
    return Exchange(**{**values, "messages": tuple(values["messages"])})


def feedback_of(row: Row[Any]) -> Feedback:
    """Return the feedback of a row that ends with the columns of `feedback`."""
    names = [column.name for column in feedback.columns]
    values = dict(zip(names, row[-len(names) :], strict=True))
    known = {name: values[name] for name in _FEEDBACK}
    return Feedback(**{**known, "user": known["user"] or None, "tags": tuple(known["tags"])})
