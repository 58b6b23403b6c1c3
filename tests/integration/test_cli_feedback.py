"""The verbs `feedback stats` and `feedback export`, on both databases."""

import json

import pytest

from cli_for_tests import run
from everalign import load_corrections, load_preferences
from everalign.data import load_scored
from everalign.serving.feedback.task import rows_of
from everalign.serving.store import FeedbackStore
from stores_for_tests import OTHER_KEY, exchange, feedback, later


@pytest.fixture
def filled(address):
    with FeedbackStore.open(address) as store:
        store.add_exchange(exchange("a", created=later(-3600)))
        store.add_exchange(exchange("b", question="½ \u2028?", outcome="unchanged", returned="No."))
        store.add_exchange(exchange("c", question="Why?", key_id=OTHER_KEY))
        store.add_feedback(feedback("a", edited_text='Yes: "35 ‰".\n', tags=("fact",)))
        store.add_feedback(feedback("b", rating=1))
        store.add_feedback(feedback("c", preferred="original", key_id=OTHER_KEY))
    return address


def test_stats_tell_what_there_is(filled, capsys):
    code, out, _ = run(capsys, "feedback", "stats", "--store", filled)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["answers"] == "3 (2 applied, 1 unchanged)"
    assert lines["from"] == "2026-03-01T11:00:00+00:00 to 2026-03-01T12:00:00+00:00"
    assert lines["judged"] == "3 of 2 keys, 3 not learned yet"
    assert (lines["ratings"], lines["sides"], lines["edits"]) == ("1 (1 good)", "1 (1 original)", "1")


def test_stats_as_json(filled, capsys, monkeypatch):
    monkeypatch.setenv("EVERALIGN_STORE", filled)
    code, out, err = run(capsys, "feedback", "stats", "--json")
    facts = json.loads(out)
    assert (code, err, facts.pop("store").startswith(("postgresql://127", "/"))) == (0, "", True)
    assert facts == {
        "exchanges": 3,
        "outcomes": {"applied": 2, "unchanged": 1},
        "correctors": {"0003": 3},
        "keys": 2,
        "feedback": 3,
        "waiting": 3,
        "ratings": {"1": 1},
        "preferred": {"original": 1},
        "edits": 1,
        "oldest": "2026-03-01T11:00:00+00:00",
        "newest": "2026-03-01T12:00:00+00:00",
    }


def test_stats_of_an_empty_store(address, capsys):
    FeedbackStore.open(address).close()
    code, out, _ = run(capsys, "feedback", "stats", "--store", address)
    assert (code, "0 of 0 keys, 0 not learned yet" in out) == (0, True)


@pytest.mark.parametrize(
    ("kind", "load", "rows"),
    [("preferences", load_preferences, 2), ("corrections", load_corrections, 3), ("scored", load_scored, 2)],
)
def test_what_is_exported_is_what_the_trainers_load(filled, kind, load, rows, tmp_path, capsys):
    output = tmp_path / "out" / "rows.jsonl"
    arguments = ("feedback", "export", "--store", filled, "--as", kind, "--output", str(output))
    code, out, _ = run(capsys, *arguments, "--json")
    left = {"nothing to learn": 1} if kind == "preferences" else {"one answer alone": 1} if kind == "scored" else {}
    assert json.loads(out) == {"output": str(output), "as": kind, "rows": rows, "left_out": left}
    assert code == 0
    with FeedbackStore.open(filled) as store:
        expected, _ = rows_of(store.feedback(), kind)
    assert list(load(output)) == list(expected)
    assert len(expected) == rows
    assert run(capsys, *arguments)[0] == 2
    code, out, _ = run(capsys, *arguments, "--overwrite")
    assert (code, dict(line.split(maxsplit=1) for line in out.splitlines())["rows"]) == (0, str(rows))


def test_only_what_was_not_learned_is_exported_on_request(filled, tmp_path, capsys):
    arguments = ("feedback", "export", "--store", filled, "--as", "corrections", "--unlearned")
    with FeedbackStore.open(filled) as store:
        store.mark_learned([found.id for _, found in store.feedback() if found.exchange != "b"], "first")
    assert run(capsys, *arguments, "--output", str(tmp_path / "rows.jsonl"))[0] == 0
    assert [row.is_identity for row in load_corrections(tmp_path / "rows.jsonl")] == [True]
    with FeedbackStore.open(filled) as store:
        store.mark_learned([found.id for _, found in store.feedback()], "second")
    code, _, err = run(capsys, *arguments, "--output", str(tmp_path / "none.jsonl"))
    assert (code, "no feedback gives corrections; see everalign feedback stats" in err) == (2, True)
    assert not (tmp_path / "none.jsonl").exists()


def test_what_gives_no_rows_is_told_with_the_reasons(filled, tmp_path, capsys):
    with FeedbackStore.open(filled) as store:
        store.mark_learned([found.id for _, found in store.feedback() if found.exchange != "b"], "first")
    arguments = ("--store", filled, "--as", "preferences", "--unlearned", "--output", str(tmp_path / "x.jsonl"))
    code, _, err = run(capsys, "feedback", "export", *arguments)
    assert code == 2
    assert "no feedback gives preferences (1 nothing to learn left out)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "--store", "sqlite:///nothing.db"], "nothing.db: no such store; everalign serve --store makes one"),
        (["stats", "--store", "nothing.db"], "has no '://'"),
        (["stats"], "Missing option '--store'"),
        (["export", "--store", "sqlite:///x.db", "--as", "preferences", "--output", "rows.csv"], "must end in .jsonl"),
        (["export", "--store", "sqlite:///x.db", "--as", "preferences", "--output", "r.jsonl"], "no such store"),
        (["export", "--store", "sqlite:///there.db", "--as", "pairs", "--output", "r.jsonl"], "kind: must be one of"),
    ],
)
def test_bad_input_makes_no_store_and_no_output(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVERALIGN_STORE", raising=False)
    FeedbackStore.open("sqlite:///there.db").close()
    code, out, err = run(capsys, "feedback", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert {path.suffix for path in tmp_path.iterdir()} <= {".db", ".lock"}
    assert not (tmp_path / "nothing.db").exists()
