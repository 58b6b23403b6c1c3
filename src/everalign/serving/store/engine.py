"""From an address to a database of this version: checked, created, migrated under a lock, or refused."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from everalign.errors import EveralignError, InputError
from everalign.serving.store.records import VERSION, VERSION_TABLE


def not_installed(what: str, package: str, extras: str) -> InputError:
    """Return the error for a package that an extra of ours would have brought."""
    return InputError(f"{what} needs {package}, which is not installed: pip install 'everalign[{extras}]'")


_DAMAGED = ("not a database", "malformed")


@contextmanager
def told(name: str, doing: str) -> Iterator[None]:
    """Turn errors of the database into ours.

    Args:
        name: the store, as messages show it.
        doing: what could not be done.

    Raises:
        InputError: the file is damaged, or no database.
        EveralignError: everything else.
    """
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise told_error(error, name, doing) from error


def told_error(error: SQLAlchemyError | sqlite3.Error, name: str, doing: str) -> EveralignError:
    """Return the error for what a database reported."""
    reason = _reason(error)
    if any(sign in reason for sign in _DAMAGED):
        return InputError(f"{name}: no SQLite database, or a damaged one ({reason}); restore it or name another file")
    advice = "see that its folder can be written to and has space"
    if name.startswith("postgresql://"):
        advice = "see that the server runs and that this user may use the database"
    return EveralignError(f"{name}: {doing} failed: {reason}; {advice}, then try again")


def _reason(error: SQLAlchemyError | sqlite3.Error) -> str:
    """The first line of what the driver says; further ones repeat what was written."""
    cause: BaseException = error
    if isinstance(error, DBAPIError) and error.orig is not None:
        cause = error.orig
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


_EXAMPLES = "such as sqlite:///feedback.db or postgresql://user@host/database"
_POSTGRESQL = ("postgresql", "postgres", "postgresql+psycopg")
_SQLITE = ("sqlite", "sqlite+pysqlite")


def checked_address(text: str) -> URL:
    """Return an address as SQLAlchemy takes it; no error repeats a password.

    Args:
        text: `sqlite:///path` (a relative one; absolute with four slashes) or `postgresql://user:password@host/name`.

    Raises:
        InputError: it is neither, or names no file or database.
    """
    if "://" not in text:
        # Not repeated: without its beginning, nobody knows where a password may stand.
        raise InputError(f"the store's address has no '://': write {_EXAMPLES}")
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise InputError(f"the store's address cannot be read: write {_EXAMPLES}") from error
    if url.drivername in _SQLITE:
        return _file(url)
    if url.drivername not in _POSTGRESQL:
        raise InputError(f"{url.drivername}://: the store is kept by SQLite or PostgreSQL: write {_EXAMPLES}")
    if not url.database:
        raise InputError(f"{shown(url)}: names no database; add it behind the host, {_EXAMPLES}")
    return url.set(drivername="postgresql+psycopg")


def shown(url: URL) -> str:
    """Return an address for messages: without user, password and what follows a question mark."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    port = f":{url.port}" if url.port else ""
    return f"postgresql://{url.host or ''}{port}/{url.database or ''}"


def _file(url: URL) -> URL:
    if url.host or url.username or url.query:
        raise InputError(f"the address of a SQLite file is only its path behind three slashes: write {_EXAMPLES}")
    if not url.database or url.database == ":memory:":
        raise InputError("sqlite://: a store in memory is lost with the process; name a file, sqlite:///feedback.db")
    return url.set(drivername="sqlite", database=str(Path(url.database).expanduser()))


MIGRATIONS = Path(__file__).parent / "migrations"

_WAIT = 60  # seconds for another process that migrates or writes
_LOCK = 0x45766572  # "Ever": the advisory lock of PostgreSQL that migrations hold
_READING = "everalign_reading"
_POOL = 10


def open_database(address: str, wait: float | None = None) -> tuple[Engine, str]:
    """Open the database of an address, made or migrated where needed.

    Two processes may open the same one at once: one of them migrates, the other waits.

    Args:
        address: of `FeedbackStore.open`.
        wait: seconds for a lock that another process holds, and for a connection; a minute when None.

    Returns:
        The engine, and the database's name for messages.

    Raises:
        InputError: the address is none, the file is damaged or something else, or the database is of a newer version.
        EveralignError: the database cannot be reached or written to.
    """
    url = checked_address(address)
    name = shown(url)
    engine = (_sqlite if url.get_backend_name() == "sqlite" else _postgresql)(url, wait or _WAIT)
    try:
        with told(name, "opening"), _one_at_a_time(engine, url) as connection:
            _migrate(connection, name)
    except EveralignError:
        engine.dispose()
        raise
    return engine, name


def reading(engine: Engine) -> Engine:
    """Return the engine for connections that only read: these do not wait for who writes."""
    return engine.execution_options(**{_READING: True})


def _postgresql(url: URL, wait: float = _WAIT) -> Engine:
    try:
        import psycopg  # noqa: F401
    except ModuleNotFoundError as error:
        raise not_installed("a store in PostgreSQL", "psycopg", "serve,postgres") from error
    # A machine that is gone is found out by who waits for it, and not by the kernel in a quarter of an hour.
    alive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}
    limits = {"connect_timeout": max(2, round(wait)), **alive}
    return create_engine(
        url, pool_pre_ping=True, hide_parameters=True, pool_size=_POOL, pool_timeout=wait, connect_args=limits
    )


def _sqlite(url: URL, wait: float = _WAIT) -> Engine:
    _make_file(Path(str(url.database)))
    engine = create_engine(
        url, hide_parameters=True, pool_size=_POOL, connect_args={"timeout": wait}, pool_timeout=wait
    )

    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _: Any) -> None:
        # The driver's own transactions begin too late for a lock, so it makes none.
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        # Who will write takes the lock at once: a reader that turns into a writer may fail without waiting.
        kind = "" if connection.get_execution_options().get(_READING) else " IMMEDIATE"
        connection.exec_driver_sql(f"BEGIN{kind}")

    return engine


def _make_file(path: Path) -> None:
    """Make a missing file, readable by its owner alone; the files that SQLite puts beside it get the same mode."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file in it for the store")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written to ({error.strerror}); name a file in a folder of your own"
        ) from error


@contextmanager
def _one_at_a_time(engine: Engine, url: URL) -> Iterator[Connection]:
    """Yield a connection in a transaction that no other process's opening can overlap."""
    if url.get_backend_name() != "sqlite":
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            yield connection
        return
    path = Path(str(url.database))
    try:
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=_WAIT, mode=0o600):
            with engine.connect() as connection:
                # It is kept in the file; outside of a transaction, where alone it can be set.
                connection.connection.cursor().execute("PRAGMA journal_mode = WAL")
            with engine.begin() as connection:
                yield connection
    except Timeout as error:
        raise EveralignError(f"{path}: another process has been opening it for {_WAIT} s; stop that one") from error


def _migrate(connection: Connection, name: str) -> None:
    found = inspect(connection).get_table_names()
    if VERSION_TABLE in found:
        version = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
        if version == VERSION:
            return
        if version is not None and version > VERSION:
            raise InputError(
                f"{name}: was written by a newer Everalign (its version is {version}, this one knows {VERSION}): "
                "upgrade Everalign, or name another database"
            )
    elif found and connection.dialect.name == "sqlite":
        raise InputError(f"{name}: is another program's database (it has {found[0]!r}); name another file")
    try:
        from alembic import command
        from alembic.config import Config
    except ModuleNotFoundError as error:
        raise not_installed("a new feedback store", "alembic", "serve") from error
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    command.upgrade(config, "head")
