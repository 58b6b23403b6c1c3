"""The feedback store: what is added is there, once, and as it was; on SQLite and on PostgreSQL."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import event

from everalign.errors import EveralignError, InputError
from everalign.serving.store import FeedbackStore, Redaction, UnknownExchange
from stores_for_tests import KEY, NOW, OTHER_KEY, exchange, feedback, later


@pytest.fixture
def store(address):
    with FeedbackStore.open(address) as opened:
        yield opened


def test_an_exchange_comes_back_as_it_was(store):
    parts = [{"type": "text", "text": "½ \U0001f600 \x00"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    given = exchange(
        messages=({"role": "system", "content": "s"}, {"role": "user", "content": parts, "name": "n"}),
        original="",
        returned="line\n\u2028 ½ \U0001f600 '\"; --",
        created=datetime(2026, 1, 1, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=-7))),
        reason="too long",
        corrector=None,
        template=None,
        usage={"details": {"accepted": 3, "ratio": 0.5}, "none": None},
    )
    store.add_exchange(given)
    assert store.exchange("chatcmpl-1") == given
    assert store.exchange("chatcmpl-1").created.tzinfo is timezone.utc
    assert store.exchange("chatcmpl-1", KEY) == given
    assert store.exchange("chatcmpl-1", OTHER_KEY) is None
    assert store.exchange("chatcmpl-2") is None


def test_feedback_comes_back_with_its_exchange(store):
    given = feedback(
        user="ann", rating=-1, preferred="neither", edited_text="Yes.\n", tags=["tone", "fact"], comment="½ \u2028"
    )
    store.add_exchange(exchange())
    assert store.add_feedback(given)
    assert list(store.feedback()) == [(exchange(), given)]
    assert given.tags == ("tone", "fact")


def test_an_id_names_one_exchange(store):
    store.add_exchange(exchange())
    with pytest.raises(InputError, match=r"exchange 'chatcmpl-1': is in the store already; an id names one answer"):
        store.add_exchange(exchange(original="Maybe."))
    assert store.exchange("chatcmpl-1") == exchange()


def test_the_last_feedback_of_a_user_stands(store):
    store.add_exchange(exchange())
    assert store.add_feedback(feedback(rating=1, comment="good"))
    assert not store.add_feedback(feedback(rating=-1))
    assert not store.add_feedback(feedback(rating=-1))
    assert store.add_feedback(feedback(user="ann"))
    assert [(found.user, found.rating, found.comment) for _, found in store.feedback()] == (
        [(None, -1, None), ("ann", 1, None)]
        if feedback(rating=-1).id < feedback(user="ann").id
        else [("ann", 1, None), (None, -1, None)]
    )


@pytest.mark.parametrize("given", [{"exchange": "chatcmpl-2"}, {"key_id": OTHER_KEY}])
def test_only_the_key_that_asked_may_judge(store, given):
    store.add_exchange(exchange())
    with pytest.raises(UnknownExchange, match=r"exchange 'chatcmpl-\d': is not stored for this key"):
        store.add_feedback(feedback(**given))
    assert list(store.feedback()) == []
    assert issubclass(UnknownExchange, InputError)


def test_feedback_comes_in_the_order_of_time(store):
    for i in range(5):
        store.add_exchange(exchange(f"c{i}"))
        store.add_feedback(feedback(f"c{i}", created=later(-i)))
    assert [found.exchange for _, found in store.feedback()] == ["c4", "c3", "c2", "c1", "c0"]
    assert [found.exchange for _, found in store.feedback(since=later(-2))] == ["c2", "c1", "c0"]
    with pytest.raises(InputError, match="since: has no time zone"):
        next(store.feedback(since=datetime(2026, 1, 1)))


def test_more_rows_than_are_fetched_at_once_all_come(store, monkeypatch):
    monkeypatch.setattr("everalign.serving.store.database._BATCH", 7)
    for i in range(20):
        store.add_exchange(exchange(f"c{i:02}"))
        store.add_feedback(feedback(f"c{i:02}", created=later(i)))
    assert [found.exchange for _, found in store.feedback()] == [f"c{i:02}" for i in range(20)]
    store.mark_learned([found.id for _, found in store.feedback()], "first")
    assert list(store.feedback(unlearned=True)) == []


def test_what_is_said_while_feedback_is_read_waits_for_the_next_reading(store):
    for i in range(3):
        store.add_exchange(exchange(f"c{i}"))
        store.add_feedback(feedback(f"c{i}", created=later(i)))
    reading = store.feedback()
    next(reading)
    store.add_feedback(feedback("c0", rating=-1, created=later(9)))
    assert [found.exchange for _, found in reading] == ["c1", "c2"]


def test_learned_feedback_is_marked_and_stays_so_when_it_is_replaced(store):
    store.add_exchange(exchange())
    store.add_feedback(feedback(rating=1))
    ((_, first),) = store.feedback()
    store.mark_learned([first.id, "0" * 16], "first")
    assert list(store.feedback(unlearned=True)) == []
    store.add_feedback(feedback(rating=1, comment="the same judgement"))
    assert list(store.feedback(unlearned=True)) == []
    store.add_feedback(feedback(rating=-1))
    assert [found.rating for _, found in store.feedback(unlearned=True)] == [-1]
    store.add_feedback(feedback(rating=1))
    assert list(store.feedback(unlearned=True)) == []
    store.mark_learned([first.id], "second")
    with pytest.raises(InputError, match="task: is empty"):
        store.mark_learned([first.id], " ")


def test_stats_count(store):
    assert store.stats().exchanges == 0
    assert store.stats().oldest is None
    store.add_exchange(exchange("a", created=later(-5)))
    store.add_exchange(exchange("b", outcome="skipped", corrector=None))
    store.add_exchange(exchange("c", key_id=OTHER_KEY))
    store.add_feedback(feedback("a", rating=1, preferred="original"))
    store.add_feedback(feedback("a", rating=-1, user="ann"))
    store.add_feedback(feedback("c", edited_text="x", key_id=OTHER_KEY))
    store.mark_learned([feedback("a", rating=-1, user="ann").id], "first")
    stats = store.stats()
    assert (stats.exchanges, stats.outcomes, stats.correctors) == (3, {"applied": 2, "skipped": 1}, {"0003": 2})
    assert (stats.feedback, stats.waiting, stats.keys, stats.edits) == (3, 2, 2, 1)
    assert (stats.ratings, stats.preferred) == ({-1: 1, 1: 1}, {"original": 1})
    assert (stats.oldest, stats.newest) == (later(-5), NOW)


def test_what_is_older_than_the_retention_is_removed_with_all_feedback(address, monkeypatch):
    monkeypatch.setattr("everalign.serving.store.database._BATCH", 2)
    now = datetime.now(timezone.utc)
    with FeedbackStore.open(address) as store:
        for i in range(5):
            store.add_exchange(exchange(f"old{i}", created=now - timedelta(days=31)))
            store.add_feedback(feedback(f"old{i}", created=now))
        store.add_exchange(exchange("new", created=now - timedelta(days=29)))
        store.add_feedback(feedback("new"))
        store.mark_learned([feedback(f"old{i}").id for i in range(3)], "first")
        assert store.purge() == 0
    with FeedbackStore.open(address, retention_days=30) as store:
        assert [found.id for found, _ in store.feedback()] == ["new"]
        assert store.stats().exchanges == 1
        store.add_exchange(exchange("old", created=now - timedelta(days=40)))
        assert store.purge() == 1
    # Marks of what is gone are gone too: an exchange with the same id would begin anew.
    with FeedbackStore.open(address) as store:
        store.add_exchange(exchange("old0", created=now))
        store.add_feedback(feedback("old0"))
        assert store.stats().waiting == 2


def test_what_is_old_is_removed_every_day(address, monkeypatch):
    monkeypatch.setattr("everalign.serving.store.database._DAY", 0.1)
    removed = threading.Event()
    purge = FeedbackStore.purge
    monkeypatch.setattr(FeedbackStore, "purge", lambda store: purge(store) and removed.set())
    with FeedbackStore.open(address, retention_days=1) as store:
        store.add_exchange(exchange(created=NOW - timedelta(days=400)))
        assert removed.wait(10)
        assert store.exchange("chatcmpl-1") is None
        store.add_exchange(exchange("after"))


def test_a_retention_of_no_days_is_refused(tmp_path):
    with pytest.raises(InputError, match="retention: must be at least 1 day, found 0"):
        FeedbackStore.open(f"sqlite:///{tmp_path}/x.db", retention_days=0)


def test_texts_are_redacted_before_they_are_written(address):
    with FeedbackStore.open(address, redaction=Redaction()) as store:
        store.add_exchange(exchange(question="I am ann@example.org", original="ann@example.org?", returned="ann!"))
        store.add_feedback(
            feedback(user="ann@example.org", edited_text="Not ann@example.org", comment="+49 30 1234567")
        )
        assert not store.add_feedback(feedback(user="ann@example.org", edited_text="No"))
        assert store.add_feedback(feedback(user="bob@example.org", comment="call me: (030) 1234-5678"))
        found = dict(enumerate(store.feedback()))
    assert {len(found), found[0][0].messages[0]["content"], found[0][0].original} == {2, "I am [email]", "[email]?"}
    assert all(given.user.startswith("user-") for _, given in found.values())
    assert {given.comment for _, given in found.values()} == {None, "call me: [phone]"}
    if address.startswith("sqlite"):
        folder = address.removeprefix("sqlite:///").rpartition("/")[0]
        assert b"example.org" not in b"".join(path.read_bytes() for path in Path(folder).iterdir())


def test_threads_write_at_once_and_share_commits(store):
    commits = []
    event.listen(store._engine, "commit", commits.append)
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda i: store.add_exchange(exchange(f"c{i}")), range(200)))
        news = list(threads.map(lambda i: store.add_feedback(feedback(f"c{i % 50}", rating=1)), range(200)))
    assert sum(news) == 50
    assert store.stats().exchanges == 200
    assert store.stats().feedback == 50
    assert len(commits) < 300


def test_an_error_of_one_write_does_not_harm_those_of_its_transaction(store):
    """Everything that waits while the first write is held up is one transaction."""
    store.add_exchange(exchange("there"))
    held, go = threading.Event(), threading.Event()
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(store._writer.write, "", lambda _: (held.set(), go.wait(10)))
        assert held.wait(10)
        good = [threads.submit(store.add_exchange, exchange(f"c{i}")) for i in range(3)]
        twice = threads.submit(store.add_exchange, exchange("there"))
        unknown = threads.submit(store.add_feedback, feedback("nowhere"))
        broken = threads.submit(store._writer.write, "d", lambda _: [][0])
        while store._writer._waiting.qsize() < 6:
            pass
        go.set()
    assert [done.exception() for done in [first, *good]] == [None] * 4
    assert isinstance(twice.exception(), InputError)
    assert isinstance(unknown.exception(), UnknownExchange)
    assert isinstance(broken.exception(), IndexError)
    assert store.stats().exchanges == 4
    store.add_exchange(exchange("after"))


def test_a_closed_store_refuses_writes(address):
    store = FeedbackStore.open(address)
    store.add_exchange(exchange())
    store.close()
    store.close()
    with pytest.raises(EveralignError, match="the store is closed; open it again"):
        store.add_exchange(exchange("c2"))


def test_replicas_never_wait_for_one_another_in_a_circle(address):
    """Both judge the same exchanges, in one transaction each and in opposite orders."""
    ids = [f"c{i:02}" for i in range(30)]
    with FeedbackStore.open(address) as first, FeedbackStore.open(address) as second, ThreadPoolExecutor(64) as threads:
        for id in ids:
            first.add_exchange(exchange(id))
        go = threading.Event()
        done = []
        for store, order in ((first, ids), (second, ids[::-1])):
            held = threading.Event()
            threads.submit(store._writer.write, "", lambda _, held=held: (held.set(), go.wait(10)))
            # SQLite lets one of them write at a time: the other has not begun.
            held.wait(10 if address.startswith("postgresql") or store is first else 0.1)
            for place, id in enumerate(order, start=1):
                done.append(threads.submit(store.add_feedback, feedback(id, user=store.name)))
                while store._writer._waiting.qsize() < place:
                    pass
        go.set()
        assert Counter(one.result() for one in done) == {True: 30, False: 30}
        assert first.stats().feedback == 30
