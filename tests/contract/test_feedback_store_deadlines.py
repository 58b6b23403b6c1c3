"""A store that is locked or stopped: who waits is told in time, nothing is written later, and it comes back."""

import asyncio
import os
import signal
import sqlite3
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from everalign.errors import EveralignError
from everalign.serving.request_log import AsyncStore, StoreLate
from everalign.serving.store import FeedbackStore
from stores_for_tests import KEY, cluster, exchange, feedback, new_address  # noqa: F401 (a fixture)


@contextmanager
def locked(path):
    """A database that another process writes to, and does not come to an end."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


@contextmanager
def stopped(running):
    """A PostgreSQL server whose processes stand still."""
    server = int((running.folder / "data" / "postmaster.pid").read_text().splitlines()[0])
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    processes = [server, *(int(child) for child in children)]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_store_that_hangs_is_waited_for_so_long_and_comes_back(kind, tmp_path, request):
    address = new_address(kind, tmp_path, lambda: request.getfixturevalue("cluster"))
    hung = locked(tmp_path / "store/feedback.db") if kind == "sqlite" else None

    async def work():
        store = FeedbackStore.open(address, wait=0.4)
        keeper = AsyncStore(store, seconds=0.4)
        assert await keeper.add_exchange(exchange("before"))
        with hung or stopped(request.getfixturevalue("cluster")):
            started = time.monotonic()
            found = await asyncio.gather(*(keeper.add_exchange(exchange(f"during-{n}")) for n in range(40)))
            assert found == [False] * 40
            with pytest.raises(EveralignError):
                await keeper.add_feedback(feedback("before"))
            assert time.monotonic() - started < 1.5
        await asyncio.sleep(0.6)
        assert await keeper.add_exchange(exchange("after"))
        assert await keeper.add_feedback(feedback("before"))
        await keeper.close()

    asyncio.run(work())
    with FeedbackStore.open(address) as store:
        assert store.exchange("before", KEY)
        assert store.exchange("after", KEY)
        assert sum(store.exchange(f"during-{n}", KEY) is not None for n in range(40)) < 40


def test_what_waits_behind_a_write_that_hangs_is_not_written_later(tmp_path):
    address = f"sqlite:///{tmp_path}/feedback.db"
    with FeedbackStore.open(address, wait=0.3) as store:
        begun, release = threading.Event(), threading.Event()

        def hang(_):
            begun.set()
            release.wait(5)

        hanging = threading.Thread(target=lambda: _quietly(lambda: store._writer.write("", hang)))
        hanging.start()
        begun.wait(5)
        with pytest.raises(EveralignError, match="not written within"):
            store.add_exchange(exchange("late"))
        release.set()
        hanging.join()
        store.add_exchange(exchange("after"))
        assert store.exchange("late") is None


def _quietly(work):
    with suppress(EveralignError):
        work()


class Hanging:
    """A store of which no call ends until it is let go."""

    def __init__(self):
        self.release, self.calls = threading.Event(), 0

    def add_exchange(self, _):
        self.calls += 1
        self.release.wait(10)

    def close(self):
        self.release.wait(10)


def test_what_waits_for_a_store_is_bounded_and_ends_with_the_gateway(monkeypatch):
    monkeypatch.setattr("everalign.serving.request_log._MOST_WAITING", 20)
    store = Hanging()

    async def work():
        keeper = AsyncStore(store, seconds=0.2)
        many = [asyncio.ensure_future(keeper.add_exchange(exchange(str(n)))) for n in range(50)]
        await asyncio.sleep(0.05)
        assert sum(one.done() for one in many) == 30
        assert await asyncio.gather(*many) == [False] * 50
        assert store.calls == 16
        with pytest.raises(StoreLate, match="not called for a few seconds"):
            await keeper.writes.run(lambda: None)
        started = time.monotonic()
        await keeper.close()
        assert time.monotonic() - started < 1

    asyncio.run(work())
    store.release.set()
