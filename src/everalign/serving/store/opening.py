"""From an address to a database at this version: made, migrated under a lock, or refused."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, text

from everalign.errors import EveralignError, InputError
from everalign.serving.store.addresses import checked_address, shown
from everalign.serving.store.extras import not_installed
from everalign.serving.store.failures import told
from everalign.serving.store.tables import VERSION, VERSION_TABLE

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
