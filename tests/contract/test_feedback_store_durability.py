"""What the store has acknowledged is there, whenever its process is killed."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from sqlalchemy import event

from everalign.errors import EveralignError
from everalign.serving.store import FeedbackStore
from stores_for_tests import exchange, feedback

KILLS = 20
WRITERS = 3


def write_for_ever(address, round_number, acknowledged):
    """Write from several threads; send the id of each record once the store says that it has it."""
    sending = threading.Lock()

    def write(store, thread):
        for i in count():
            id = f"c-{round_number}-{thread}-{i}"
            store.add_exchange(exchange(id))
            store.add_feedback(feedback(id, comment="x" * random.randrange(3000)))
            with sending:
                acknowledged.send_bytes(id.encode())

    with FeedbackStore.open(address) as store:
        for thread in range(1, WRITERS):
            threading.Thread(target=write, args=(store, thread), daemon=True).start()
        write(store, 0)


def kill_while_writing(context, address, round_number, after):
    """Return the ids that a process had acknowledged until it was killed, some time after its first."""
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=write_for_ever, args=(address, round_number, sending))
    child.start()
    sending.close()
    found = [receiving.recv_bytes().decode()]
    time.sleep(after)
    child.kill()
    child.join(10)
    assert child.exitcode == -9
    try:
        while True:
            found.append(receiving.recv_bytes().decode())
    except (EOFError, OSError):
        return found


def test_no_acknowledged_feedback_is_lost_when_its_process_is_killed(address, quick_processes):
    chance = random.Random(0)
    acknowledged = []
    for round_number in range(KILLS):
        acknowledged += kill_while_writing(quick_processes, address, round_number, chance.uniform(0, 0.15))
    with FeedbackStore.open(address) as store:
        there = {found.exchange for _, found in store.feedback()}
        assert set(acknowledged) <= there
        # What was on its way may be there too: at most one record of each thread at each kill.
        assert len(there) - len(acknowledged) <= KILLS * WRITERS
        assert store.stats().exchanges - len(there) <= KILLS * WRITERS
    assert len(acknowledged) > KILLS


def test_what_a_full_disk_took_back_was_not_acknowledged(tmp_path):
    """A failing write ends the whole transaction of SQLite; those that shared it must hear of it."""
    with FeedbackStore.open(f"sqlite:///{tmp_path}/x.db") as store:
        store.add_exchange(exchange("there"))
        pages = Path(tmp_path / "x.db").stat().st_size // 4096
        event.listen(
            store._engine, "begin", lambda found: found.exec_driver_sql(f"PRAGMA max_page_count = {pages + 10}")
        )
        held, go = threading.Event(), threading.Event()
        with ThreadPoolExecutor(8) as threads:
            threads.submit(store._writer.write, "", lambda _: (held.set(), go.wait(10)))
            assert held.wait(10)
            small = [threads.submit(store.add_exchange, exchange(f"a{i}")) for i in range(3)]
            large = threads.submit(store.add_exchange, exchange("b", original="x" * 100_000))
            last = threads.submit(store.add_exchange, exchange("c"))
            while store._writer._waiting.qsize() < 5:
                time.sleep(0.001)
            go.set()
        assert isinstance(large.exception(), EveralignError)
        for id, done in [*((f"a{i}", done) for i, done in enumerate(small)), ("c", last)]:
            assert (done.exception() is None) == (store.exchange(id) is not None)
        store.add_exchange(exchange("after"))
