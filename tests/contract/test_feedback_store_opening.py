"""Opening a feedback store: new, of an earlier version, by two at once; and everything that is refused, with advice."""

import os
import sqlite3
import stat
import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    ForeignKey,
    Index,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    event,
    select,
    text,
)

from everalign.errors import EveralignError, InputError
from everalign.serving.store import FeedbackStore
from everalign.serving.store.engine import VERSION, make_engine, metadata, parse_url, version
from stores_for_tests import exchange, feedback


def engine_of(address):
    return make_engine(parse_url(address))


def make_first_version(connection):
    """The tables of version 0001, as it made them; written out, for what was deployed does not change."""
    name, time = String(256), DateTime(timezone=True)
    tables = MetaData()
    Table("everalign_version", tables, Column("version_num", String(32), primary_key=True))
    Table(
        "everalign_exchanges",
        tables,
        Column("id", name, primary_key=True),
        Column("created", time, nullable=False),
        *(Column(field, name, nullable=False) for field in ("key_id", "upstream", "model")),
        Column("messages", JSON, nullable=False),
        *(Column(field, Text, nullable=False) for field in ("original", "returned")),
        Column("outcome", name, nullable=False),
        Column("reason", name),
        Column("mode", name, nullable=False),
        *(Column(field, name) for field in ("corrector", "template")),
        Column("usage", JSON, nullable=False),
        Index("everalign_exchanges_created", "created"),
    )
    Table(
        "everalign_feedback",
        tables,
        Column("exchange", name, ForeignKey("everalign_exchanges.id", ondelete="CASCADE"), primary_key=True),
        *(Column(field, name, primary_key=True) for field in ("key_id", "user")),
        Column("id", String(16), nullable=False),
        Column("rating", SmallInteger),
        Column("preferred", name),
        Column("edited_text", Text),
        Column("tags", JSON, nullable=False),
        Column("comment", Text),
        Column("created", time, nullable=False),
        Index("everalign_feedback_id", "id"),
        Index("everalign_feedback_created", "created"),
    )
    tables.create_all(connection)
    connection.execute(text("INSERT INTO everalign_version VALUES ('0001')"))


def open_and_add(address, id, together):
    together.wait(60)
    with FeedbackStore.open(address) as store:
        store.add_exchange(exchange(id))


def read_all(address):
    with FeedbackStore.open(address) as store:
        return list(store.feedback())


@pytest.mark.parametrize("start", ["new", "first version"])
def test_a_new_or_upgraded_database_has_the_tables_that_the_store_knows(address, start):
    if start != "new":
        with engine_of(address).begin() as connection:
            make_first_version(connection)
    FeedbackStore.open(address).close()
    with engine_of(address).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.execute(select(version.c.version_num)).scalars().all() == [VERSION]


def test_a_store_of_the_first_version_keeps_its_rows(address):
    with engine_of(address).begin() as connection:
        make_first_version(connection)
        connection.execute(
            text(
                "INSERT INTO everalign_exchanges VALUES ('chatcmpl-1', '2026-03-01 12:00:00+00:00', '0123456789ab', "
                "'main', 'small', '[{\"role\": \"user\", \"content\": \"Is the sea salty?\"}]', 'No.', 'Yes, it is.', "
                "'applied', NULL, 'correct', '0003', 'everalign-1', '{\"total_tokens\": 12}')"
            )
        )
    with FeedbackStore.open(address) as store:
        assert store.exchange("chatcmpl-1") == exchange()
        assert store.add_feedback(feedback())
        store.mark_learned([feedback().id], "first")
        assert store.stats().waiting == 0


def test_a_newer_version_is_refused(address):
    FeedbackStore.open(address).close()
    with engine_of(address).begin() as connection:
        connection.execute(text("UPDATE everalign_version SET version_num = '9999'"))
    with pytest.raises(InputError, match=r"written by a newer Everalign \(its version is 9999.*upgrade Everalign"):
        FeedbackStore.open(address)


def test_processes_open_a_new_store_at_once(address, quick_processes):
    together = quick_processes.Barrier(4)
    children = [quick_processes.Process(target=open_and_add, args=(address, f"c{i}", together)) for i in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    with FeedbackStore.open(address) as store:
        assert store.stats().exchanges == 4


def test_two_open_stores_write_to_one_database(address):
    with FeedbackStore.open(address) as first, FeedbackStore.open(address) as second:
        first.add_exchange(exchange())
        assert second.add_feedback(feedback(rating=1))
        assert not first.add_feedback(feedback(rating=-1))
        assert [found.rating for _, found in second.feedback()] == [-1]


def test_a_new_file_is_its_owners_alone_and_safe_against_loss_of_power(tmp_path):
    before = os.umask(0o022)
    with FeedbackStore.open(f"sqlite:///{tmp_path}/new/folder/feedback.db") as store:
        store.add_exchange(exchange())
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new" / "folder").iterdir()}
        with store._engine.connect() as connection:
            asked = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
    os.umask(before)
    assert set(modes.values()) == {0o600}
    assert {"feedback.db", "feedback.db-wal"} <= set(modes)
    assert asked == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 60_000}


def test_a_relative_path_and_a_home_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for url in ("sqlite:///a.db", "sqlite+pysqlite:///b%20c.db", "sqlite:///~/d.db"):
        FeedbackStore.open(url).close()
    assert {path.name for path in tmp_path.glob("**/*.db")} >= {"a.db", "d.db"}
    assert (tmp_path / "home" / "d.db").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("feedback.db", r"has no '://': write such as sqlite:///feedback.db or postgresql://"),
        ("user:secret@host/db", r"has no '://'"),
        ("://secret", "cannot be read"),
        ("postgresql://u:secret@h:port/d", "cannot be read"),
        ("mysql://u:secret@h/d", r"^mysql://: the store is kept by SQLite or PostgreSQL"),
        ("postgresql+psycopg2://u:secret@h/d", r"^postgresql\+psycopg2://: the store is kept"),
        ("sqlite+aiosqlite:///x.db", r"^sqlite\+aiosqlite://: the store is kept"),
        ("sqlite://", "a store in memory is lost"),
        ("sqlite:///:memory:", "a store in memory is lost"),
        ("sqlite://x.db", "only its path behind three slashes"),
        ("sqlite:///x.db?mode=ro", "only its path behind three slashes"),
        ("postgresql://u:secret@h:5432", r"^postgresql://h:5432/: names no database"),
    ],
)
def test_an_address_that_is_none_is_refused_without_its_password(url, message):
    with pytest.raises(InputError, match=message) as caught:
        FeedbackStore.open(url)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_told_without_the_password():
    url = "postgresql://me:secret1@127.0.0.1:1/db?password=secret2"
    with pytest.raises(
        EveralignError, match=r"^postgresql://127.0.0.1:1/db: opening failed: .*check that the server"
    ) as e:
        FeedbackStore.open(url)
    assert "secret" not in str(e.value)


def test_a_driver_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InputError, match=r"needs psycopg.*pip install 'everalign\[serve,postgres\]'"):
        FeedbackStore.open("postgres://h/d")


def test_a_missing_extra_is_named(tmp_path):
    code = (
        "import sys\nsys.modules['sqlalchemy'] = None\nfrom everalign.errors import InputError\n"
        f"try:\n    from everalign.serving.store import FeedbackStore\n    FeedbackStore.open('sqlite:///{tmp_path}/y.db')\n"
        "except InputError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "the feedback store needs sqlalchemy, which is not installed: pip install 'everalign[serve]'\n"


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes\n" * 500)
    with pytest.raises(InputError, match=r"notes.txt: no SQLite database, or a damaged one \(.*\); restore it or name"):
        FeedbackStore.open(f"sqlite:///{path}")
    assert path.read_text() == "these are my notes\n" * 500


def test_another_programs_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE bookmarks (x)")
    with pytest.raises(InputError, match=r"other.db: is another program's database \(it has 'bookmarks'\)"):
        FeedbackStore.open(f"sqlite:///{path}")
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("bookmarks",)]


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "feedback.db"
    with FeedbackStore.open(f"sqlite:///{path}") as store:
        for i in range(50):
            store.add_exchange(exchange(f"c{i}", original="x" * 2000))
            store.add_feedback(feedback(f"c{i}"))
    content = bytearray(path.read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"feedback.db: no SQLite database, or a damaged one"):
        read_all(f"sqlite:///{path}")


def test_a_folder_is_no_store(tmp_path):
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        FeedbackStore.open(f"sqlite:///{tmp_path}")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"file/x.db: cannot be written to \(.*\); name a file in a folder of your own"
    ):
        FeedbackStore.open(f"sqlite:///{tmp_path}/file/x.db")


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/usr/bin/setpriv"), reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path):
    code = (
        "from everalign.errors import InputError\nfrom everalign.serving.store import FeedbackStore\n"
        f"try:\n    FeedbackStore.open('sqlite:///{tmp_path}/x.db')\nexcept InputError as error:\n    print(error)"
    )
    tmp_path.chmod(0o555)
    # Root without its capabilities is stopped by a folder's mode like anybody else.
    without = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    out = subprocess.run([*without, sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "x.db: cannot be written to (Permission denied); name a file in a folder of your own" in out


def test_a_full_disk_is_told_and_nothing_acknowledged_is_lost(tmp_path):
    with FeedbackStore.open(f"sqlite:///{tmp_path}/x.db") as store:
        event.listen(store._engine, "begin", lambda found: found.exec_driver_sql("PRAGMA max_page_count = 60"))
        added = []

        def fill():
            for i in range(100):
                store.add_exchange(exchange(f"c{i}", original="x" * 9000))
                added.append(f"c{i}")

        with pytest.raises(EveralignError, match=r"x.db: writing failed: .*full; check that its folder .* has space"):
            fill()
        assert added
        assert all(store.exchange(id) is not None for id in added)
        assert store.stats().exchanges == len(added)
        store.add_feedback(feedback("c0"))


def test_a_connection_that_was_cut_is_made_anew(cluster):
    with FeedbackStore.open(cluster.make_database("cut")) as store:
        store.add_exchange(exchange())
        cluster.stop("immediate")
        with pytest.raises(EveralignError, match=r"^postgresql://127.0.0.1:\d+/cut: writing failed: .*then try again"):
            store.add_feedback(feedback())
        with pytest.raises(EveralignError, match="reading failed"):
            store.stats()
        cluster.start()
        assert store.exchange("chatcmpl-1") == exchange()
        assert store.add_feedback(feedback())
