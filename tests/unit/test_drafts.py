"""Questions with whatever is known of their answers: which columns are read, and what is wrong with a row."""

import json

import pytest

from everalign.data.readers import load_drafts
from everalign.data.records import DraftSet
from everalign.errors import InputError

USER = {"role": "user", "content": "hello"}


def load(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_drafts(path)


def test_questions_alone(tmp_path):
    rows = load(tmp_path, {"question": "q", "id": 7}, {"prompt": "p", "answer": None}, {"prompt": [USER], "weight": 2})
    assert [row.question for row in rows] == ["q", "p", (USER,)]
    assert [(row.answers, row.edit, row.name) for row in rows] == [((), None, "7"), ((), None, None), ((), None, None)]
    assert rows[2].weight == 2.0


def test_answers_and_edits(tmp_path):
    rows = load(
        tmp_path,
        {"question": "q", "answer": "a"},
        {"prompt": "q", "answer": [{"role": "assistant", "content": "a"}], "correction": "c"},
        {"prompt": "q", "answer": "a", "edited_text": "e", "correction": None, "weight": 3},
    )
    assert [row.answers for row in rows] == [("a",)] * 3
    assert [row.edit and row.edit.correction for row in rows] == [None, "c", "e"]
    assert rows[2].edit.weight == 3.0


def test_preferences_and_scored_rows(tmp_path):
    conversation = {name: [USER, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    rows = load(
        tmp_path,
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"question": "q", "chosen": "good", "rejected": "bad", "weight": 2},
        conversation,
        {"prompt": "s", "completions": ["a", "b", "c"], "rewards": [1, 3, 2]},
        {"prompt": "t", "completions": ["a", "b"], "rewards": [1, 1]},
        {"prompt": "u", "completions": ["a", "b"]},
    )
    assert [row.answers for row in rows[:3]] == [("bad",), ("bad",), ("rejected",)]
    assert [row.edit.correction for row in rows[:3]] == ["good", "good", "chosen"]
    assert [row.question for row in rows] == ["p", "q", (USER,), "s", "t", "u"]
    assert (rows[3].answers, rows[3].edit.answer, rows[3].edit.correction) == (("a", "b", "c"), "a", "b")
    assert [row.edit for row in rows[4:]] == [None, None]


def test_csv_holds_completions_as_json(tmp_path):
    (tmp_path / "rows.csv").write_text('question,completions\nq,"[""a"", ""b""]"\n')
    assert load_drafts(tmp_path / "rows.csv")[0].answers == ("a", "b")


def test_ids_name_the_content():
    rows = [{"question": "q"}, {"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "correction": "b"}]
    assert len({row.id for row in DraftSet.of(rows)}) == 3
    assert DraftSet.of([{"prompt": "q", "id": "x"}])[0].id == DraftSet.of(rows)[0].id


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "a row must be an object"),
        ({"query": "q"}, ":1: field 'question': no such column; rename 'query'"),
        ({"question": "q", "prompt": "p"}, "field 'question': the row has 'prompt' too, which is another name"),
        ({"question": " "}, "field 'question': is empty"),
        ({"question": 3}, "field 'question': must be text or a list"),
        ({"question": [{"role": "assistant", "content": "a"}]}, "field 'question': ends in an assistant message"),
        ({"question": "q", "answer": ""}, "field 'answer': is empty"),
        ({"question": "q", "correction": "c"}, "field 'answer': no such column, though there is an edit"),
        ({"question": "q", "answer": "a", "correction": "c", "edited_text": "e"}, "the row has 'edited_text' too"),
        ({"question": "q", "answer": "a", "correction": ""}, "field 'correction': is empty"),
        ({"question": "q", "answer": "a", "chosen": "c", "rejected": "r"}, "the row has 'rejected' too"),
        ({"question": "q", "chosen": "c"}, "field 'rejected'"),
        ({"question": "q", "completions": []}, "field 'completions': the list is empty"),
        ({"question": "q", "completions": ["a"], "rewards": [1, 2]}, "field 'rewards': 2 numbers for 1"),
        ({"question": "q", "weight": 0}, "field 'weight': must be positive"),
        ({"question": "q", "id": [1]}, "field 'id': must be text or a whole number, found a list"),
    ],
)
def test_a_bad_row_names_line_and_field(row, message, tmp_path):
    with pytest.raises(InputError, match=r"rows\.jsonl:1: ") as caught:
        load(tmp_path, row)
    assert message in str(caught.value)
