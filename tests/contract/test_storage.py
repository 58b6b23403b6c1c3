"""What is kept of unfinished work, by key; and one process at a time on an output."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from everalign.errors import EveralignError, InputError
from everalign.modeling.sampling import sample_journalled
from everalign.options import SamplingOptions
from everalign.storage import Journal, exclusive, lock_of

# ---- the journal ----


def test_values_are_kept_by_key(tmp_path):
    journal = Journal(tmp_path / "folder" / "kept")
    assert journal.read(["a"]) == {}
    assert not journal.path.parent.exists()
    journal.put({"a": 1, "b": [{"½\n\ud800": None}, 0.1]})
    journal.put({"a": "two", 3: 4, "3": 5})
    assert journal.read(["b", "a", "c"]) == {"b": [{"½\n\ud800": None}, 0.1], "a": "two"}
    assert (journal.read([3, 4]), journal.read(["3"])) == ({3: 4}, {"3": 5})
    assert list(journal.read(iter("cba"))) == ["b", "a"]
    journal.remove()
    assert journal.read(["a"]) == {}


def test_more_keys_than_a_query_takes(tmp_path):
    journal = Journal(tmp_path / "kept")
    journal.put({number: number / 7 for number in range(1700)})
    assert journal.read(range(2000)) == {number: number / 7 for number in range(1700)}


def test_all_of_a_put_is_kept_or_nothing(tmp_path):
    journal = Journal(tmp_path / "kept")
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.put({1: 1.0, 2: float("nan")})
    assert journal.read([1]) == {}
    assert list(tmp_path.iterdir()) == []


def test_other_facts_have_another_journal(tmp_path):
    Journal.beside(tmp_path / "out.jsonl", "model", "rows").put({1: 1})
    assert Journal.beside(tmp_path / "out.jsonl", "model", "rows").read([1]) == {1: 1}
    assert Journal.beside(tmp_path / "out.jsonl", "model", "others").read([1]) == {}
    assert Journal.within(tmp_path, "out", "model", "rows").read([1]) == {}


def _execute(path, statement):
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)


DAMAGE = {
    "a value": lambda path: _execute(path, "UPDATE entries SET value = '7' WHERE key = 2"),
    "another key's value": lambda path: _execute(
        path,
        "UPDATE entries SET (value, checksum) = (SELECT value, checksum FROM entries WHERE key = 3) WHERE key = 2",
    ),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no table": lambda path: _execute(path, "DROP TABLE entries"),
    "lines of an earlier format": lambda path: path.write_text("[1.0, 2.0]\n" * 400),
    "a table of an earlier format": lambda path: (
        path.unlink(),
        _execute(path, "CREATE TABLE rewards (key TEXT PRIMARY KEY, reward REAL NOT NULL)"),
    ),
    "a later format": lambda path: _execute(path, "PRAGMA user_version = 2"),
}


@pytest.mark.parametrize("spoil", DAMAGE.values(), ids=DAMAGE)
def test_what_was_not_put_is_refused(tmp_path, spoil):
    journal = Journal(tmp_path / "kept")
    journal.put({number: [number] for number in range(200)})
    spoil(journal.path)
    with pytest.raises(InputError, match=r"kept.*delete this file"):
        journal.read(range(200))


def test_a_file_of_something_else_is_not_written_into(tmp_path):
    _execute(tmp_path / "feedback.db", "CREATE TABLE feedback (id)")
    with pytest.raises(InputError, match="not written by this version of Everalign"):
        Journal(tmp_path / "feedback.db").put({1: 1})
    (tmp_path / "folder").mkdir()
    with pytest.raises(EveralignError, match="folder: cannot be written"):
        Journal(tmp_path / "folder").put({1: 1})


@pytest.mark.parametrize("chunk", [3, [3], [[[], 0], [[], 0]]])
def test_samples_that_are_none_are_refused(chunk, tmp_path):
    journal = Journal(tmp_path / "samples")
    journal.put({0: chunk})
    with pytest.raises(InputError, match="samples: the results kept by an earlier run are damaged"):
        sample_journalled(None, None, ["p"], SamplingOptions(), journal, seed=0)


WRITERS = """
import sys
from pathlib import Path
from everalign.storage import Journal
journal, name = Journal(Path(sys.argv[1])), sys.argv[2]
print("begun", flush=True)
for number in range(40):
    journal.put({f"{name}-{number}": number, number: number})
"""


def python(code, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, **options)


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "kept"
    writers = [python(WRITERS, path, name) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    keys = [f"{name}-{number}" for name in "abc" for number in range(40)]
    assert Journal(path).read(keys) == {key: int(key[2:]) for key in keys}


@pytest.mark.parametrize("number", range(1, 5))
def test_whoever_reads_while_another_puts_for_the_first_time_sees_nothing_or_all(number, tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.touch()
    writer = threading.Thread(target=lambda: Journal(path).put({1: "one"}))

    class Interrupted(sqlite3.Connection):
        statements = 0

        def execute(self, *arguments):
            cursor = super().execute(*arguments)
            self.statements += 1
            if self.statements == number and writer.ident is None:
                writer.start()
                writer.join(0.3)  # it waits for a reader that has begun
            return cursor

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **more: connect(*given, factory=Interrupted, **more))
    assert Journal(path).read([1]) in ({}, {1: "one"})
    writer.join()
    assert Journal(path).read([1]) == {1: "one"}
    assert Journal(path).count() == 1


def test_a_writer_that_is_killed_leaves_whole_values(tmp_path):
    path = tmp_path / "kept"
    for attempt in range(3):
        writer = python(WRITERS, path, attempt, stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(0.03 * (attempt + 1))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        found = list(Journal(path).read([f"{attempt}-{number}" for number in range(40)]).values())
        assert found == list(range(len(found)))
    Journal(path).put({"after": 1})
    assert Journal(path).read(["after"]) == {"after": 1}


# ---- the lock ----

HOLD = """
import sys
from pathlib import Path
from everalign.storage import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = python(HOLD, lock_of(tmp_path / "out.jsonl"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    with process:
        yield process
        process.kill()


def test_a_second_process_is_told_at_once_who_holds_it(tmp_path, holder):
    lock, started = lock_of(tmp_path / "out.jsonl"), time.perf_counter()
    message = rf"out\.jsonl\.lock: process {holder.pid} on {os.uname().nodename} is writing this output: wait for it"
    for _ in range(2):
        with pytest.raises(InputError, match=message), exclusive(lock):
            pass
    assert time.perf_counter() - started < 0.5
    holder.stdin.close()
    holder.wait()
    with exclusive(lock):
        assert lock.read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_lock_ends_with_its_process_and_not_before(tmp_path, holder, sign):
    holder.send_signal(sign)
    if sign == signal.SIGSTOP:
        with pytest.raises(InputError, match=f"process {holder.pid} "), exclusive(lock_of(tmp_path / "out.jsonl")):
            pass
        holder.kill()
    holder.wait()
    with exclusive(lock_of(tmp_path / "out.jsonl")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_whoever_waits_goes_on_when_the_other_is_done(tmp_path, holder):
    waited = []

    def end(who):
        waited.append(who)
        threading.Timer(0.2, holder.stdin.close).start()

    started = time.perf_counter()
    with exclusive(lock_of(tmp_path / "out.jsonl"), wait=end):
        assert time.perf_counter() - started > 0.15
    assert waited == [f"process {holder.pid} on {os.uname().nodename}"]


def test_the_same_thread_may_enter_again_and_another_may_not(tmp_path):
    lock, found = tmp_path / "folder" / ".lock", []

    def other():
        try:
            with exclusive(lock, "at work"):
                found.append("in")
        except InputError as error:
            found.append(str(error))

    def meanwhile():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with exclusive(lock):
        with exclusive(lock):
            meanwhile()
        meanwhile()
    meanwhile()
    assert (
        found[:2] == [f"{lock}: process {os.getpid()} on {os.uname().nodename} is at work: wait for it, or stop it"] * 2
    )
    assert found[2] == "in"
    # A folder that was made for it, and in which nothing came to be, is gone too.
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_fails_lets_the_next_one_in(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), exclusive(tmp_path / "lock"):
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_an_error(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    message = r"lock: cannot be locked \(Function not implemented\)"
    with pytest.raises(EveralignError, match=message), exclusive(tmp_path / "lock"):
        pass


COUNT = """
import sys
from pathlib import Path
from everalign.storage import exclusive
lock, counter = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(60):
    with exclusive(lock, wait=lambda holder: None):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_nobody_gets_in_beside_another_while_locks_come_and_go(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [python(COUNT, tmp_path / "lock", counter) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert counter.read_text() == str(4 * 60)


def test_a_journal_holds_what_json_holds(tmp_path):
    journal, value = Journal(tmp_path / "kept"), {"a": [1, 2.5, None, True, "ü"], "b": {}}
    journal.put({"k": value})
    assert journal.read(["k"])["k"] == json.loads(json.dumps(value))


@pytest.mark.parametrize("output", [".", ".."])
def test_the_folder_one_stands_in_has_a_lock_beside_it(output, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    folder = Path(output).resolve()
    assert lock_of(Path(output)) == folder.with_name(f"{folder.name}.lock")
