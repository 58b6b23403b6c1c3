"""What a preference accepts, refuses and is called."""

import dataclasses
import hashlib
import json
import math
import pickle

import pytest

from everalign.data.records import Preference
from everalign.errors import InputError

USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Yes"}


def read(**row):
    return Preference.from_json(row, "f.jsonl:3")


def problem(**row):
    with pytest.raises(InputError) as caught:
        read(**row)
    assert str(caught.value).startswith("f.jsonl:3: ")
    return str(caught.value).removeprefix("f.jsonl:3: ")


def test_text_row_is_kept_character_for_character():
    row = read(prompt="  Once\n", chosen=" upon ", rejected="a\ttime\n")
    assert (row.prompt, row.chosen, row.rejected, row.weight) == ("  Once\n", " upon ", "a\ttime\n", 1.0)


def test_chat_row_takes_answers_as_text_or_as_one_message():
    text = read(prompt=[USER], chosen="Yes", rejected="No")
    messages = read(prompt=[USER], chosen=[ANSWER], rejected=[{"role": "assistant", "content": "No"}])
    assert text == messages
    assert text.prompt == (USER,)


def test_id_is_the_hash_of_canonical_json_without_the_weight():
    canonical = '{"chosen":"é","prompt":[{"content":"Hello?","role":"user"}],"rejected":"b"}'
    expected = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    assert read(prompt=[USER], chosen="é", rejected="b").id == expected
    assert read(prompt=[dict(reversed(USER.items()))], chosen="é", rejected="b", weight=3).id == expected
    assert read(prompt=[USER], chosen="b", rejected="é").id != expected


def test_text_prompt_and_one_message_prompt_have_different_ids():
    assert read(prompt="Hello?", chosen="a", rejected="b").id != read(prompt=[USER], chosen="a", rejected="b").id


@pytest.mark.parametrize("prompt", ["text", [USER, ANSWER, USER]])
@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_json_round_trip(prompt, weight):
    row = read(prompt=prompt, chosen="a", rejected="b", weight=weight)
    again = Preference.from_json(json.loads(json.dumps(row.to_json())), "again")
    assert again == row
    assert again.id == row.id
    assert ("weight" in row.to_json()) == (weight != 1.0)


def test_equal_rows_are_one_in_a_set_and_survive_pickling():
    row = read(prompt=[USER], chosen="a", rejected="b")
    assert len({row, read(prompt=[USER], chosen="a", rejected="b"), dataclasses.replace(row, weight=2.0)}) == 2
    assert pickle.loads(pickle.dumps(row)) == row


def test_changing_the_callers_message_does_not_change_the_row():
    message = dict(USER)
    row = read(prompt=[message], chosen="a", rejected="b")
    row.to_json()["prompt"][0]["content"] = message["content"] = "changed"
    assert row.prompt == (USER,)


def test_other_columns_and_null_weight_are_ignored():
    assert read(prompt="p", chosen="a", rejected="b", weight=None, source="x") == Preference("p", "a", "b")


def test_message_keys_of_no_meaning_are_ignored():
    extra = {**USER, "id": 3, "tool_calls": None, "name": None, "images": []}
    assert read(prompt=[extra], chosen="a", rejected="b").prompt == (USER,)


def test_whole_conversations_share_their_prompt():
    system = {"role": "system", "content": "Be kind."}
    row = read(chosen=[system, USER, ANSWER], rejected=[system, USER, {"role": "assistant", "content": "No"}])
    assert row == Preference((system, USER), "Yes", "No")


def test_whole_conversations_with_the_prompt_repeated_as_text():
    other = [USER, {"role": "assistant", "content": "No"}]
    assert read(prompt="Hello?", chosen=[USER, ANSWER], rejected=other) == Preference((USER,), "Yes", "No")
    assert problem(prompt="Other", chosen=[USER, ANSWER], rejected=other).startswith("field 'prompt': its text")


def test_conversations_may_part_before_the_last_message():
    no = {"role": "assistant", "content": "No"}
    row = read(chosen=[USER, ANSWER, USER, ANSWER], rejected=[USER, no, USER, ANSWER])
    assert row == Preference((USER,), (ANSWER, USER, ANSWER), (no, USER, ANSWER))
    assert problem(chosen=[ANSWER], rejected=[ANSWER]).startswith("field 'prompt': none found")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"chosen": ""}, "field 'chosen': is empty"),
        ({"rejected": " \n"}, "field 'rejected': is empty"),
        ({"prompt": ""}, "field 'prompt': is empty"),
        ({"prompt": None}, "field 'prompt': is null"),
        ({"chosen": None}, "field 'chosen': must be text, found null"),
        ({"chosen": 3}, "field 'chosen': must be text, found a number"),
        ({"prompt": {"a": 1}}, "field 'prompt': must be text or a list of chat messages, found an object"),
        ({"prompt": []}, "field 'prompt': the list of messages is empty"),
        ({"prompt": ["hi"]}, "field 'prompt[0]': a message is an object"),
        ({"prompt": [{"from": "human", "value": "x"}]}, "found keys from, value"),
        (
            {"prompt": [{"role": "human", "content": "x"}]},
            "role 'human' is not one of system, developer, user, assistant, tool; use 'user'",
        ),
        ({"prompt": [{"role": ["user"], "content": "x"}]}, "is not one of"),
        ({"prompt": [{"role": "user", "content": None}]}, "field 'prompt[0]': must be text, found null"),
        ({"prompt": [USER, {"role": "user", "content": " "}]}, "field 'prompt[1]': is empty"),
        ({"prompt": [USER, ANSWER]}, "field 'prompt': ends in an assistant message"),
        (
            {"prompt": [USER], "chosen": [USER]},
            "field 'chosen': after the prompt there must be the assistant's message",
        ),
        ({"prompt": [USER], "chosen": [USER, ANSWER]}, "found 2 (user, assistant)"),
        ({"chosen": " b\n"}, "field 'rejected': equal to 'chosen'"),
        ({"chosen": "\ud83d"}, "field 'chosen': half a surrogate pair at character 1"),
        ({"weight": 0}, "field 'weight': must be positive and finite, found 0.0"),
        ({"weight": -1.5}, "found -1.5"),
        ({"weight": math.nan}, "found nan"),
        ({"weight": math.inf}, "found inf"),
        ({"weight": "1"}, "field 'weight': must be a number, found text"),
        ({"weight": True}, "field 'weight': must be a number, found a boolean"),
    ],
)
def test_bad_fields_are_named(change, expected):
    assert expected in problem(**{"prompt": "p", "chosen": "a", "rejected": "b", **change})


def test_the_constructor_checks_what_files_are_checked_for():
    with pytest.raises(InputError, match="field 'weight'"):
        Preference("p", "a", "b", weight=math.nan)
    with pytest.raises(InputError, match=r"field 'prompt\[0\]'"):
        Preference(({"role": "robot", "content": "x"},), "a", "b")


def test_missing_columns_name_what_was_found_and_the_nearest():
    message = problem(prompt="p", choosen="a", rejected="b")
    assert "field 'chosen': no such column; rename 'choosen'?" in message
    assert "found: 'prompt', 'choosen', 'rejected'; expected 'prompt', 'chosen', 'rejected'" in message
    assert "rename 'question'?" in problem(question="p", chosen="a", rejected="b")
    assert "rename" not in problem(prompt="p", rejected="b")


@pytest.mark.parametrize(("row", "kind"), [([1], "a list"), ("x", "text"), (None, "null"), (2.0, "a number")])
def test_rows_must_be_objects(row, kind):
    with pytest.raises(InputError, match=f"^here: a row must be an object with columns, found {kind}"):
        Preference.from_json(row, "here")
