"""Scored rows: what is read from every kind of file, and what is refused with the field's name."""

import json
from dataclasses import replace
from hashlib import sha256

import pytest

from everalign.data import Preference, Scored, ScoredSet, load_scored
from everalign.data.rows import content_id
from everalign.errors import InputError
from tables_for_tests import write_table

CHAT = [{"role": "user", "content": "Hello?"}]
ROWS = [
    {"prompt": "Once", "completions": [" upon", " more", " upon"], "rewards": [1.5, -2, 1.5], "source": "x"},
    {"prompt": "Twice", "completions": ["[one]", "two"], "rewards": [0, 1], "weight": 2.5},
]
CHATS = [{"prompt": CHAT, "completions": [[{"role": "assistant", "content": "Hi"}], "No"], "rewards": [3, 3.0]}]
EXPECTED = [
    Scored("Once", (" upon", " more", " upon"), (1.5, -2.0, 1.5)),
    Scored("Twice", ("[one]", "two"), (0.0, 1.0), 2.5),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    rows = load_scored(write_table(tmp_path / name, ROWS))
    assert isinstance(rows, ScoredSet)
    assert list(rows) == EXPECTED
    assert rows.fingerprint == ScoredSet.of(EXPECTED).fingerprint
    assert isinstance(rows[:1], ScoredSet)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_chat_prompts_and_completions_as_messages(tmp_path, name):
    (row,) = load_scored(write_table(tmp_path / name, CHATS))
    assert row == Scored(tuple(CHAT), ("Hi", "No"), (3.0, 3.0))


def test_what_is_written_is_read_again():
    for row in [*EXPECTED, Scored(tuple(CHAT), ("Hi", "No"), (0.1, 1e-300))]:
        assert Scored.from_json(json.loads(json.dumps(row.to_json())), "here") == row


def test_the_id_names_the_content_without_the_weight():
    row = EXPECTED[0]
    others = [
        Scored("once", row.completions, row.rewards),
        Scored(row.prompt, (" upon", " upon", " more"), row.rewards),
        Scored(row.prompt, row.completions, (1.5, -2.0, 1.6)),
    ]
    assert len({row.id, *(other.id for other in others)}) == 4
    heavy = Scored(row.prompt, row.completions, row.rewards, 7.0)
    assert (heavy.id, heavy == row, len(heavy.id)) == (row.id, False, 16)
    assert ScoredSet.of([heavy]).fingerprint != ScoredSet.of([row]).fingerprint


def test_the_preference_in_it():
    assert EXPECTED[0].preference() == Preference("Once", " upon", " more")
    assert EXPECTED[1].preference() == Preference("Twice", "two", "[one]", 2.5)
    assert Scored("p", ("a", "b"), (1.0, 1.0)).preference() is None
    assert Scored("p", ("a", "a "), (1.0, 0.0)).preference() is None
    assert Scored("p", ("a",), (1.0,)).preference() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1.0]}, "field 'rewards': 1 numbers for 2 completions; give one for each"),
        ({"rewards": [1.0, float("nan")]}, "field 'rewards[1]': must be finite, found nan"),
        ({"rewards": [float("-inf"), 1]}, "field 'rewards[0]': must be finite, found -inf"),
        ({"rewards": [1.0, None]}, "field 'rewards[1]': must be a number, found null"),
        ({"rewards": [10**400, 1]}, "field 'rewards[0]': must be finite, found a whole number of over 300 digits"),
        ({"weight": 10**400}, "field 'weight': must be positive and finite, found a whole number of over 300 digits"),
        ({"weights": [1e39, 1]}, "field 'weights': must be from 0 to 1e+20 and not all 0"),
        ({"weights": [0, 0]}, "field 'weights': must be from 0 to 1e+20 and not all 0"),
        ({"weights": [-1, 2]}, "field 'weights': must be from 0 to 1e+20 and not all 0"),
        ({"weights": [1]}, "field 'weights': 1 numbers for 2 completions"),
        ({"rewards": [True, 1]}, "field 'rewards[0]': must be a number, found a boolean"),
        ({"rewards": 3.0}, "field 'rewards': must be a list of numbers, found a number"),
        ({"rewards": None}, "field 'rewards': must be a list of numbers, found null"),
        ({"completions": None}, "field 'completions': must be a list of texts, found null"),
        ({"completions": []}, "field 'completions': the list is empty"),
        ({"completions": "one"}, "field 'completions': must be a list of texts, found text"),
        ({"completions": ["one", ""]}, "field 'completions[1]': is empty"),
        ({"completions": ["one", 2]}, "field 'completions[1]': must be text, found a number"),
        (
            {"completions": [CHAT, "x"]},
            "field 'completions[0]': after the prompt there must be the assistant's message",
        ),
        ({"prompt": ""}, "field 'prompt': is empty"),
        ({"prompt": None}, "field 'prompt': must be text or a list of chat messages, found null"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "field 'prompt': ends in an assistant message"),
        ({"weight": -1}, "field 'weight': must be positive and finite, found -1.0"),
    ],
)
def test_a_bad_field_is_named_with_its_file_and_line(tmp_path, change, message):
    path = write_table(tmp_path / "a.jsonl", [ROWS[1], {**ROWS[1], **change}])
    with pytest.raises(InputError) as caught:
        load_scored(path)
    assert str(caught.value).startswith(f"{path}:2: {message}")
    assert len(load_scored(path, skip_bad_rows=True).skipped) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_missing_columns_name_the_nearest(tmp_path, name):
    rows = [{"prompt": "p", "responses": ["a", "b"], "reward": [1, 2]}]
    if name.endswith("csv"):
        (tmp_path / name).write_text('prompt,responses,reward\np,"[""a"",""b""]","[1,2]"\n')
    else:
        write_table(tmp_path / name, rows)
    with pytest.raises(InputError, match=r"field 'completions': no such column; rename 'responses'\? .*'rewards'"):
        load_scored(tmp_path / name)


def test_a_list_in_python_s_own_notation_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completions,rewards\np,\"['a', 'b']\",\"[1, 2]\"\n")
    with pytest.raises(InputError, match="field 'completions': looks like a list but is not JSON"):
        load_scored(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("row", "has", "lacks", "message"),
    [
        (Scored("p"), (), ("completions", "rewards"), "field 'completions': must be a list of texts, found null"),
        (Scored("p", ("a",)), ("completions",), ("rewards",), "field 'rewards': must be a list of numbers, found null"),
        (Scored("p", ("a",), (1.0,)), ("completions", "rewards"), ("weights",), "field 'weights'"),
    ],
)
def test_a_column_that_a_verb_needs_is_asked_for(row, has, lacks, message):
    assert row.require(*has) is row
    assert not any(row.has(name) for name in lacks)
    with pytest.raises(InputError, match=message) as caught:
        row.require(*has, *lacks)
    assert (caught.value.where, caught.value.field) == (f"row {row.id}", lacks[0])
    rows = ScoredSet((EXPECTED[0], row), "mine")
    with pytest.raises(InputError) as caught:
        rows.require(*lacks[:1])
    assert caught.value.where == ("mine: row 1" if lacks == ("weights",) else "mine: row 2")
    assert (rows.has("completions"), rows.prompts_alone) == ("completions" in has, False)


def test_prompts_unscored_and_scored_rows_have_ids_of_what_they_hold():
    prompt, unscored = Scored("p", weight=2.0), Scored("p", ("a", "b"))
    assert prompt.id == content_id({"prompt": "p"})
    assert unscored.id == content_id({"prompt": "p", "completions": ["a", "b"]})
    assert replace(unscored, rewards=(1.0, 2.0)).id == Scored("p", ("a", "b"), (1.0, 2.0)).id
    for row in (prompt, unscored):
        assert Scored.from_json(row.to_json(), "here") == row
        assert row.preference() is None
    assert ScoredSet((prompt,)).prompts_alone
    # Without rewards a row counts in the fingerprint as every other kind of row does.
    assert ScoredSet((unscored, prompt)).fingerprint == sha256(f"{unscored.id}\n{prompt.id} 2.0".encode()).hexdigest()


def test_an_error_has_its_place_field_and_hint_apart(tmp_path):
    path = write_table(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[1], "rewards": [1]}])
    with pytest.raises(InputError) as caught:
        load_scored(path)
    error = caught.value
    assert (error.where, error.field, error.hint) == (f"{path}:2", "rewards", "give one for each")
    assert str(error) == f"{path}:2: field 'rewards': 1 numbers for 2 completions; give one for each"
