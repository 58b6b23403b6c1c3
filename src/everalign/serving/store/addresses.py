"""A store's address, checked: a file of SQLite's, or a database of a PostgreSQL server."""

from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from everalign.errors import InputError

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
