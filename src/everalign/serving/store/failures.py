"""What a database reports, as errors that say which store and what to do; never with the texts in it."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from everalign.errors import EveralignError, InputError

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
