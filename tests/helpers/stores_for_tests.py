"""Records for tests, and a new address of a database of each kind."""

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from itertools import count

import pytest

from everalign.serving.store import Exchange, Feedback
from postgres_for_tests import Cluster, binaries, running_cluster

NOW = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
KEY, OTHER_KEY = "0123456789ab", "ba9876543210"

_numbers = count()


def exchange(id: str = "chatcmpl-1", **given) -> Exchange:
    """A corrected answer; any field may be given."""
    question = given.pop("question", "Is the sea salty?")
    fields = {
        "created": NOW,
        "key_id": KEY,
        "upstream": "main",
        "model": "small",
        "messages": ({"role": "user", "content": question},),
        "original": "No.",
        "returned": "Yes, it is.",
        "outcome": "applied",
        "reason": None,
        "mode": "correct",
        "corrector": "0003",
        "template": "everalign-1",
        "usage": {"total_tokens": 12},
    }
    return Exchange(**{"id": id, **fields, **given})


def feedback(exchange: str = "chatcmpl-1", **given) -> Feedback:
    """Feedback; a rating of 1 where nothing else is said."""
    said = {"rating", "preferred", "edited_text", "comment"} & given.keys()
    fields = {
        "key_id": KEY,
        "user": None,
        "rating": None if said else 1,
        "preferred": None,
        "edited_text": None,
        "tags": (),
        "comment": None,
        "created": NOW,
    }
    return Feedback(**{"exchange": exchange, **fields, **given})


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL server for all tests of this process."""
    if binaries() is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
    pytest.importorskip("psycopg")
    with running_cluster() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request, tmp_path) -> str:
    """An address that nobody has opened yet, of each kind of database."""
    return new_address(request.param, tmp_path, lambda: request.getfixturevalue("cluster"))


def new_address(kind: str, folder, cluster: Callable[[], Cluster]) -> str:
    if kind == "sqlite":
        return f"sqlite:///{folder}/store/feedback.db"
    return cluster().make_database(f"feedback_{next(_numbers)}")
