"""Open the feedback store's database (SQLite or PostgreSQL): check its URL, create or upgrade its tables, set it up."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import (
    JSON,
    URL,
    Column,
    Connection,
    DateTime,
    Dialect,
    Engine,
    ForeignKey,
    Index,
    MetaData,
    Row,
    SmallInteger,
    String,
    Table,
    Text,
    TypeDecorator,
    create_engine,
    event,
    insert,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from everalign.errors import EveralignError, InputError, not_installed
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
        return None if value is None else value.astimezone(timezone.utc)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
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


_EXAMPLES = "such as sqlite:///feedback.db or postgresql://user@host/database"
_WAIT = 60  # seconds for another process that upgrades or writes
_ADVISORY_LOCK = 0x45766572  # "Ever"; held in PostgreSQL during an upgrade
READ_ONLY = "everalign_read_only"
"""The execution option of connections that only read, and so do not wait for a writer."""

_POOL = 10


@contextmanager
def translate_errors(name: str, doing: str) -> Iterator[None]:
    """Turn errors of the database, which failed at `doing` something, into ours: InputError if the file is damaged."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        # The first line only: the others repeat what was to be written.
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        if "not a database" in reason or "malformed" in reason:
            damage = f"{name}: no SQLite database, or a damaged one ({reason}); restore it or name another file"
            raise InputError(damage) from error
        advice = "check that its folder is writable, has space and is on a disk of this machine"
        if name.startswith("postgresql://"):
            advice = "check that the server runs and that this user may use the database"
        raise EveralignError(f"{name}: {doing} failed: {reason}; {advice}, then try again") from error


def parse_url(text: str) -> URL:
    """Return a store's URL as SQLAlchemy takes it.

    Args:
        text: `sqlite:///path` (relative; absolute with four slashes) or `postgresql://user:password@host/name`.

    Raises:
        InputError: it is neither, or names no file or database; the message never shows a password.
    """
    if "://" not in text:
        # Not repeated: without a scheme, the password could be anywhere.
        raise InputError(f"the store's address has no '://': write {_EXAMPLES}")
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise InputError(f"the store's address cannot be read: write {_EXAMPLES}") from error
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        if url.host or url.username or url.query:
            raise InputError(f"the address of a SQLite file is only its path behind three slashes: write {_EXAMPLES}")
        if not url.database or url.database == ":memory:":
            raise InputError(
                "sqlite://: a store in memory is lost with the process; name a file, sqlite:///feedback.db"
            )
        return url.set(drivername="sqlite", database=str(Path(url.database).expanduser()))
    if url.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise InputError(f"{url.drivername}://: the store is kept by SQLite or PostgreSQL: write {_EXAMPLES}")
    if not url.database:
        raise InputError(f"{safe_url(url)}: names no database; add it behind the host, {_EXAMPLES}")
    return url.set(drivername="postgresql+psycopg")


def safe_url(url: URL) -> str:
    """Return a URL for messages: a file's path, or a server's address without user, password and query."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    port = f":{url.port}" if url.port else ""
    return f"postgresql://{url.host or ''}{port}/{url.database or ''}"


def open_database(address: str, wait: float | None = None) -> tuple[Engine, str]:
    """Open a database; create or upgrade its tables where needed, in one process at a time.

    Args:
        address: of `FeedbackStore.open`.
        wait: seconds for a lock that another process holds, and for a connection; a minute when None.

    Returns:
        The engine, and the database's name for messages.

    Raises:
        InputError: the address is wrong, the file is damaged or something else, or the database has a newer version.
        EveralignError: the database cannot be reached or written to.
    """
    url = parse_url(address)
    name = safe_url(url)
    engine = make_engine(url, wait or _WAIT)
    try:
        with translate_errors(name, "opening"), _exclusive(engine, url) as connection:
            _upgrade(connection, name)
    except EveralignError:
        engine.dispose()
        raise
    return engine, name


def make_engine(url: URL, wait: float = _WAIT) -> Engine:
    """Return the engine of a URL of `parse_url`; a missing SQLite file is created."""
    if url.get_backend_name() != "sqlite":
        try:
            import psycopg  # noqa: F401
        except ModuleNotFoundError as error:
            raise not_installed("a store in PostgreSQL", "psycopg", "serve,postgres") from error
        # Notice a server that is gone in seconds; the kernel alone takes a quarter of an hour.
        alive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}
        limits = {"connect_timeout": max(2, round(wait)), **alive}
        return create_engine(
            url, pool_pre_ping=True, hide_parameters=True, pool_size=_POOL, pool_timeout=wait, connect_args=limits
        )
    path = Path(str(url.database))
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file in it for the store")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Readable by its owner alone; SQLite gives the files beside it the same mode.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written to ({error.strerror}); name a file in a folder of your own"
        ) from error
    engine = create_engine(
        url, hide_parameters=True, pool_size=_POOL, connect_args={"timeout": wait}, pool_timeout=wait
    )

    @event.listens_for(engine, "connect")
    def _set_up(connection: sqlite3.Connection, _: Any) -> None:
        # No transactions by the driver: they begin too late to lock.
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer locks at once: a reader that turns into a writer can fail without waiting.
        kind = "" if connection.get_execution_options().get(READ_ONLY) else " IMMEDIATE"
        connection.exec_driver_sql(f"BEGIN{kind}")

    return engine


@contextmanager
def _exclusive(engine: Engine, url: URL) -> Iterator[Connection]:
    """Yield a connection in a transaction that excludes every other process that opens the same database."""
    if url.get_backend_name() != "sqlite":
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
            yield connection
        return
    path = Path(str(url.database))
    lock = path.with_name(f"{path.name}.lock")
    try:
        # Without locks it would take the mere presence of the file for one, which a kill leaves behind.
        with FileLock(lock, timeout=_WAIT, mode=0o600, fallback_to_soft=False):
            with engine.connect() as connection:
                # Stored in the file; can only be set outside a transaction.
                connection.connection.cursor().execute("PRAGMA journal_mode = WAL")
            with engine.begin() as connection:
                yield connection
    except Timeout as error:
        raise EveralignError(f"{path}: another process has been opening it for {_WAIT} s; stop that one") from error
    except (OSError, NotImplementedError) as error:  # also for want of locks in the file system
        raise InputError(f"{lock}: cannot be locked ({error}); name a file in a folder of this machine") from error


def _upgrade(connection: Connection, name: str) -> None:
    """Create what is missing and record the version.

    Version 0002 only added a table, so that creating the missing tables upgrades version 0001 too.
    """
    tables = inspect(connection).get_table_names()
    found = connection.execute(select(version.c.version_num)).scalar() if version.name in tables else None
    if found == VERSION:
        return
    if found is not None and found > VERSION:
        raise InputError(
            f"{name}: was written by a newer Everalign (its version is {found}, this one knows {VERSION}): "
            "upgrade Everalign, or name another database"
        )
    if version.name not in tables and tables and connection.dialect.name == "sqlite":
        raise InputError(f"{name}: is another program's database (it has {tables[0]!r}); name another file")
    metadata.create_all(connection)
    connection.execute((insert if found is None else update)(version).values(version_num=VERSION))
