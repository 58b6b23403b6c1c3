"""Records of the store, and the tables that hold them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
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

from everalign.data.rows import content_id, kind
from everalign.errors import InputError

OUTCOMES = ("applied", "unchanged", "skipped")
MODES = ("off", "shadow", "correct", "strict")
RATINGS = (-1, 0, 1)
SIDES = ("original", "corrected", "neither")

# Names stand in an index, whose entries databases bound.
LONGEST_NAME = 256
LONGEST_COMMENT = 10_000
LONGEST_TAG = 64
MOST_TAGS = 16


class UnknownExchange(InputError):  # noqa: N818  # a name that the gateway's answer to it goes by
    """Feedback on an answer that is not kept, or that another key asked for: which of the two is not told."""


@dataclass(frozen=True)
class Exchange:
    """One answered request.

    Args:
        id: the completion's id, as the client saw it.
        created: when it was answered; has a time zone, and is kept in UTC.
        key_id: who asked: the first 12 hexadecimal digits of the sha256 of the client's key, or "local".
        upstream: name of the server that answered.
        model: its model.
        messages: the conversation as it was sent, at least one message.
        original: the upstream's answer; may be empty.
        returned: what the client got; may be empty.
        outcome: one of `OUTCOMES`.
        reason: why the correction was skipped or refused, None where there is nothing to say.
        mode: one of `MODES`.
        corrector: the corrector's version, None where none was asked.
        template: what it reads, None where none was asked.
        usage: tokens by whatever names.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    id: str
    created: datetime
    key_id: str
    upstream: str
    model: str
    messages: tuple[dict[str, Any], ...]
    original: str
    returned: str
    outcome: str
    reason: str | None
    mode: str
    corrector: str | None
    template: str | None
    usage: dict[str, Any]

    def __post_init__(self) -> None:
        for field in ("id", "key_id", "upstream", "model"):
            _check_name(getattr(self, field), field)
        for field in ("reason", "corrector", "template"):
            if getattr(self, field) is not None:
                _check_name(getattr(self, field), field)
        for field in ("original", "returned"):
            _check_text(getattr(self, field), field)
        _check_one_of(self.outcome, OUTCOMES, "outcome")
        _check_one_of(self.mode, MODES, "mode")
        object.__setattr__(self, "created", _utc(self.created))
        object.__setattr__(self, "messages", _checked_messages(self.messages))
        if not isinstance(self.usage, dict):
            raise InputError(f"field 'usage': must be an object, found {kind(self.usage)}")
        _check_json(self.usage, "usage")


@dataclass(frozen=True)
class Feedback:
    """What somebody said of an answer. The last feedback of a (exchange, key_id, user) stands.

    Args:
        exchange: id of the exchange.
        key_id: as in `Exchange`; only the key that asked may judge.
        user: who said so among the key's users; None where the key has one user only.
        rating: of what the client got: 1 good, -1 bad, 0 neither; None where not given.
        preferred: one of `SIDES`; None where not given.
        edited_text: the answer as it should have been; None where not given.
        tags: what it is about, at most `MOST_TAGS`; the same tag twice counts once.
        comment: free text; None where not given.
        created: when it was said; has a time zone, and is kept in UTC.

    Raises:
        InputError: a field is wrong, or all are empty; the message names the field and says what to do.
    """

    exchange: str
    key_id: str
    user: str | None
    rating: int | None
    preferred: str | None
    edited_text: str | None
    tags: tuple[str, ...]
    comment: str | None
    created: datetime

    def __post_init__(self) -> None:
        _check_name(self.exchange, "exchange")
        _check_name(self.key_id, "key_id")
        if self.user is not None:
            _check_name(self.user, "user")
        if self.rating is not None and (isinstance(self.rating, bool) or self.rating not in RATINGS):
            raise InputError(f"field 'rating': must be -1, 0 or 1, found {self.rating!r}")
        if self.preferred is not None:
            _check_one_of(self.preferred, SIDES, "preferred")
        self._check_texts()
        object.__setattr__(self, "tags", _checked_tags(self.tags))
        object.__setattr__(self, "created", _utc(self.created))
        given = (self.rating, self.preferred, self.edited_text, self.comment, self.tags or None)
        if all(value is None for value in given):
            raise InputError("feedback says nothing: give rating, preferred, edited_text, tags or comment")

    def _check_texts(self) -> None:
        if self.edited_text is not None:
            _check_text(self.edited_text, "edited_text")
            if not self.edited_text.strip():
                raise InputError("field 'edited_text': is empty; give the answer as it should be, or leave it out")
        if self.comment is not None:
            _check_text(self.comment, "comment")
            if len(self.comment) > LONGEST_COMMENT:
                raise InputError(f"field 'comment': {len(self.comment)} characters; at most {LONGEST_COMMENT} are kept")

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name who judged what and how; tags, comment and time make no other judgement."""
        who = [self.exchange, self.key_id, self.user]
        return content_id([*who, self.rating, self.preferred, self.edited_text])


def _check_name(value: Any, field: str) -> None:
    _check_text(value, field)
    if not value.strip():
        raise InputError(f"field {field!r}: is empty; fill it in")
    if len(value) > LONGEST_NAME:
        raise InputError(f"field {field!r}: {len(value)} characters; at most {LONGEST_NAME} are kept")


def _check_text(value: Any, field: str) -> None:
    """Refuse what is no text, or text that a database or a trainer could not hold."""
    if not isinstance(value, str):
        raise InputError(f"field {field!r}: must be text, found {kind(value)}")
    _check_encodable(value, field)
    if "\0" in value:
        raise InputError(f"field {field!r}: has the character U+0000 at {value.index(chr(0)) + 1}; remove it")


def _check_encodable(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"field {field!r}: half a surrogate pair at character {error.start + 1}; repair the text's encoding"
        ) from None


def _check_one_of(value: Any, known: tuple[str, ...], field: str) -> None:
    if not isinstance(value, str) or value not in known:
        raise InputError(f"field {field!r}: must be one of {', '.join(known)}, found {value!r}")


def _utc(value: Any) -> datetime:
    if not isinstance(value, datetime):
        raise InputError(f"field 'created': must be a datetime, found {kind(value)}")
    if value.utcoffset() is None:
        raise InputError("field 'created': has no time zone; give it in UTC, as datetime.now(timezone.utc)")
    return value.astimezone(timezone.utc)


def _checked_messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"field 'messages': must be a list of messages, found {kind(value)}")
    if not value:
        raise InputError("field 'messages': the list is empty; give at least one message")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"field 'messages[{i}]': must be an object with 'role', found {kind(message)}")
        _check_json(message, f"messages[{i}]")
    return tuple(dict(message) for message in value)


def _check_json(value: Any, field: str) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"field {field!r}: is no JSON: {error}") from None
    _check_encodable(text, field)


def _checked_tags(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"field 'tags': must be a list of texts, found {kind(value)}")
    if len(value) > MOST_TAGS:
        raise InputError(f"field 'tags': {len(value)} tags; at most {MOST_TAGS} are kept")
    for i, tag in enumerate(value):
        _check_name(tag, f"tags[{i}]")
        if len(tag) > LONGEST_TAG:
            raise InputError(f"field 'tags[{i}]': {len(tag)} characters; at most {LONGEST_TAG} are kept")
    return tuple(dict.fromkeys(value))


VERSION = "0002"
"""The newest migration: what a database must be at for these tables."""

VERSION_TABLE = "everalign_version"
NOBODY = ""
"""What stands for no user: NULL would not count as equal in a key."""


class UtcTime(TypeDecorator[datetime]):
    """A time in UTC, also where the database keeps no time zones."""

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
    """An exchange as the columns of its row."""
    return {**{name: getattr(exchange, name) for name in _EXCHANGE}, "messages": list(exchange.messages)}


def feedback_values(given: Feedback) -> dict[str, Any]:
    """Feedback as the columns of its row."""
    values = {name: getattr(given, name) for name in _FEEDBACK}
    return {**values, "id": given.id, "user": given.user or NOBODY, "tags": list(given.tags)}


def exchange_of(row: Row[Any]) -> Exchange:
    """The exchange in a row that begins with the columns of `exchanges`."""
    values = dict(zip(_EXCHANGE, row, strict=False))
    return Exchange(**{**values, "messages": tuple(values["messages"])})


def feedback_of(row: Row[Any]) -> Feedback:
    """The feedback in a row that ends with the columns of `feedback`."""
    names = [column.name for column in feedback.columns]
    values = dict(zip(names, row[-len(names) :], strict=True))
    known = {name: values[name] for name in _FEEDBACK}
    return Feedback(**{**known, "user": known["user"] or None, "tags": tuple(known["tags"])})
