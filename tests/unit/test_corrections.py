"""Corrections: what is read from every kind of file, what they turn into, and what is refused."""

import json

import pytest

import everalign
from everalign.data import (
    Correction,
    CorrectionSet,
    Preference,
    PreferenceSet,
    Scored,
    check_disjoint,
    correction_of,
    load_corrections,
    load_edits,
)
from everalign.data.rows import content_id
from everalign.errors import InputError
from tables_for_tests import write_table

CHAT = [{"role": "user", "content": "Hello?"}]
ROWS = [
    {"question": "Why?", "answer": "No idea.", "correction": "Because.", "source": "x"},
    {"question": CHAT, "answer": "Hi", "correction": "Hi", "weight": 2.5},
]
MESSAGES = [{"question": CHAT, "answer": [{"role": "assistant", "content": "Hi"}], "correction": "Hello"}]
EXPECTED = [Correction("Why?", "No idea.", "Because."), Correction(tuple(CHAT), "Hi", "Hi", 2.5)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    rows = load_corrections(write_table(tmp_path / name, ROWS))
    assert isinstance(rows, CorrectionSet)
    assert list(rows) == EXPECTED
    assert rows.fingerprint == CorrectionSet.of(EXPECTED).fingerprint
    assert isinstance(rows[:1], CorrectionSet)


def test_answers_may_be_messages(tmp_path):
    (row,) = load_corrections(write_table(tmp_path / "a.jsonl", MESSAGES))
    assert row == Correction(tuple(CHAT), "Hi", "Hello")


def test_what_is_written_is_read_again():
    for row in EXPECTED:
        assert Correction.from_json(json.loads(json.dumps(row.to_json())), "here") == row
    assert "weight" not in EXPECTED[0].to_json()


def test_the_id_names_the_content_without_the_weight():
    row = EXPECTED[0]
    others = [Correction("why?", "No idea.", "Because."), Correction("Why?", "Because.", "No idea.")]
    assert len({row.id, *(other.id for other in others)}) == 3
    heavy = Correction("Why?", "No idea.", "Because.", 7.0)
    assert (heavy.id, heavy == row, len(heavy.id)) == (row.id, False, 16)


def test_an_edit_is_a_preference_and_a_scored_row():
    row = Correction("Why?", "No idea.", "Because.", 3.0)
    assert row.preference() == Preference("Why?", "Because.", "No idea.", 3.0)
    assert row.scored() == Scored("Why?", ("Because.", "No idea."), (1.0, 0.0), 3.0)
    assert correction_of(row.preference()) == row
    assert not row.is_identity


@pytest.mark.parametrize("correction", ["Hi", " Hi\n"])
def test_an_unchanged_answer_is_neither(correction):
    row = Correction("Hello?", "Hi", correction)
    assert (row.preference(), row.scored(), row.dedup_keys) == (None, None, (row.id,))
    assert row.is_identity == (correction == "Hi")


def test_preferences_become_corrections(tmp_path):
    pairs = PreferenceSet.of([{"prompt": CHAT, "chosen": "Hello", "rejected": "Go away", "weight": 2}], "mine")
    rows = CorrectionSet.of_preferences(pairs)
    assert list(rows) == [Correction(tuple(CHAT), "Go away", "Hello", 2.0)]
    assert rows.source == "mine"
    with pytest.raises(InputError, match="1 rows are in both"):
        check_disjoint(pairs, rows)


def test_a_file_of_either_kind_is_told_by_its_columns(tmp_path):
    pairs = load_edits(write_table(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}]))
    assert isinstance(pairs, PreferenceSet)
    assert list(load_edits(write_table(tmp_path / "b.jsonl", ROWS))) == EXPECTED
    with pytest.raises(InputError, match=r"c.jsonl:1: field 'question': no such column; rename 'prompt'\?"):
        load_edits(write_table(tmp_path / "c.jsonl", [{"prompt": "p", "completions": ["a"]}]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ""}, "field 'question': is empty"),
        ({"question": None}, "field 'question': must be text or a list of chat messages, found null"),
        (
            {"question": [{"role": "assistant", "content": "x"}]},
            "field 'question': ends in an assistant message; the question must end before the answer, "
            "so move that message to 'answer' or drop it",
        ),
        ({"question": [{"role": "human", "content": "x"}]}, "field 'question[0]': role 'human' is not one of"),
        ({"answer": " "}, "field 'answer': is empty"),
        ({"answer": 3}, "field 'answer': must be text, found a number"),
        ({"answer": CHAT}, "field 'answer': after the prompt there must be the assistant's message"),
        ({"correction": None}, "field 'correction': must be text, found null"),
        ({"answer": None}, "field 'answer': must be text, found null"),
        ({"correction": "half \ud83d"}, "field 'correction': half a surrogate pair at character 6"),
        ({"weight": 0}, "field 'weight': must be positive and finite, found 0.0"),
        ({"weight": "2"}, "field 'weight': must be a number, found text"),
    ],
)
def test_a_bad_field_is_named_with_its_file_and_line(tmp_path, change, message):
    path = write_table(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[0], **change}])
    with pytest.raises(InputError) as caught:
        load_corrections(path)
    assert str(caught.value).startswith(f"{path}:2: {message}")
    assert len(load_corrections(path, skip_bad_rows=True).skipped) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_missing_columns_name_the_nearest(tmp_path, name):
    path = write_table(tmp_path / name, [{"question": "q", "answer": "a", "revision": "b"}])
    if name.endswith("csv"):
        path.write_text("question,answer,revision\nq,a,b\n")
    with pytest.raises(InputError, match=r"field 'correction': no such column; rename 'revision'\?"):
        load_corrections(path)


def test_questions_answers_and_labelled_answers_have_ids_of_what_they_hold():
    question, answer, labelled = Correction("q"), Correction("q", "a"), Correction("q", "a", good=True, kind="k")
    assert question.id == content_id({"question": "q"})
    assert answer.id == content_id({"question": "q", "answer": "a"})
    told = {"question": "q", "answer": "a", "correction": None, "good": True, "kind": "k"}
    assert labelled.id == content_id(told)
    for row in (question, answer, labelled):
        assert Correction.from_json(row.to_json(), "here") == row
        assert (row.preference(), row.is_good) == (None, row is labelled)
    with pytest.raises(InputError, match="field 'correction': must be text, found null") as caught:
        answer.require("answer", "correction")
    assert (caught.value.where, caught.value.field) == (f"row {answer.id}", "correction")
    with pytest.raises(InputError, match="field 'answer': no such column, though there is an edit of it"):
        Correction("q", correction="c")


def test_the_names_are_promised():
    assert everalign.load_corrections is load_corrections
    assert everalign.Correction is Correction
