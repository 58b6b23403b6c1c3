"""Questions with whatever is known of their answers: which columns are read, and what is wrong with a row."""

import json

import pytest

from everalign.data.readers import load_drafts, load_questions, read_draft
from everalign.errors import InputError

USER = {"role": "user", "content": "hello"}


def load(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_drafts(path)


def test_questions_alone(tmp_path):
    rows = load(tmp_path, {"question": "q", "id": 7}, {"prompt": "p", "answer": None}, {"prompt": [USER], "weight": 2})
    assert [row.question for row in rows] == ["q", "p", (USER,)]
    assert [(row.answer, row.correction, row.name) for row in rows] == [(None, None, "7"), *[(None, None, None)] * 2]
    assert rows[2].weight == 2.0


def test_answers_and_edits(tmp_path):
    rows = load(
        tmp_path,
        {"question": "q", "answer": "a"},
        {"prompt": "q", "answer": [{"role": "assistant", "content": "a"}], "correction": "c"},
        {"prompt": "q", "answer": "a", "edited_text": "e", "correction": None, "weight": 3},
    )
    assert [(row.answer, row.correction) for row in rows] == [("a", None), ("a", "c"), ("a", "e")]
    assert rows[2].weight == 3.0


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
    assert [(row.answer, row.correction) for row in rows[:3]] == [
        ("bad", "good"), ("bad", "good"), ("rejected", "chosen"),
    ]  # fmt: skip
    assert [row.question for row in rows] == ["p", "q", (USER,), *"sss", *"tt", *"uu"]
    # Each completion is an answer; the best is the correction of the worst.
    assert [(row.answer, row.correction) for row in rows[3:6]] == [("a", "b"), ("b", None), ("c", None)]
    assert [(row.answer, row.correction) for row in rows[6:]] == [("a", None), ("b", None)] * 2


def test_questions_are_one_a_row_whatever_their_answers(tmp_path):
    rows = [
        {"prompt": "s", "completions": ["a", "b", "c"], "rewards": [1, 3, 2], "weight": 2},
        {"question": "q", "answer": "a"},
        {"question": "q", "answer": "b", "note": "x"},
    ]
    load(tmp_path, *rows)
    found = load_questions(tmp_path / "rows.jsonl")
    assert [(row.prompt, row.weight, row.completions) for row in found] == [
        ("s", 2.0, ()),
        ("q", 1.0, ()),
        ("q", 1.0, ()),
    ]
    assert (found.prompts_alone, found.ignored) == (True, ("note",))


def test_csv_holds_completions_as_json(tmp_path):
    (tmp_path / "rows.csv").write_text('question,completions\nq,"[""a"", ""b""]"\n')
    assert [row.answer for row in load_drafts(tmp_path / "rows.csv")] == ["a", "b"]


def test_ids_name_the_content():
    rows = [{"question": "q"}, {"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "correction": "b"}]
    found = [row for given in rows for row in read_draft(given, "here")]
    assert len({row.id for row in found}) == 3
    assert read_draft({"prompt": "q", "id": "x"}, "here")[0].id == found[0].id


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
