"""Rows with what TRL's have beside their texts: tools, template variables, calls, reasoning, parts; whole texts."""

import json
from dataclasses import replace

import pytest

from everalign.data.messages import ChatPrompt, completion_text
from everalign.data.readers import load_preferences, load_scored
from everalign.data.records import Correction, CorrectionSet, Preference, Scored
from everalign.data.replay import ReplayBuffer
from everalign.data.tokenization import tokenize_preferences
from everalign.errors import InputError
from tables_for_tests import write_table
from tokenizers_for_tests import byte_tokenizer

USER = {"role": "user", "content": "Hello?"}
YES, NO = {"role": "assistant", "content": "Yes"}, {"role": "assistant", "content": "No"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "1", "content": ""}
BESIDE = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
PROMPT = ChatPrompt((USER,), tuple(TOOLS), {"enable_thinking": False})


def read(**row):
    return Preference.from_json(row, "f.jsonl:3")


def problem(**row):
    with pytest.raises(InputError) as caught:
        read(**row)
    assert str(caught.value).startswith("f.jsonl:3: field ")
    return str(caught.value).removeprefix("f.jsonl:3: field ")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": "Yes", "rejected": "No", **BESIDE},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO], **{name: json.dumps(v) for name, v in BESIDE.items()}},
        {"chosen": [USER, YES], "rejected": [USER, NO], **BESIDE, "images": None, "audio": []},
    ],
)
def test_what_stands_beside_a_prompt_belongs_to_it(row):
    found = read(**row)
    assert found == Preference(PROMPT, "Yes", "No")
    assert found.to_json() == {"prompt": [USER], **BESIDE, "chosen": "Yes", "rejected": "No"}
    assert read(**found.to_json()) == found
    assert found.id not in (
        read(prompt=[USER], chosen="Yes", rejected="No").id,
        Preference(ChatPrompt((USER,), tuple(TOOLS)), "Yes", "No").id,
    )


def test_an_empty_column_changes_nothing():
    plain = Preference((USER,), "Yes", "No")
    empty = read(prompt=[USER], chosen="Yes", rejected="No", tools=[], chat_template_kwargs={"a": None}, images="")
    assert (empty, empty.id, empty.prompt) == (plain, plain.id, (USER,))
    assert Preference(ChatPrompt((USER,)), "Yes", "No").prompt == (USER,)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_all_kinds_of_file(tmp_path, name):
    rows = [
        {"prompt": [USER], "chosen": [CALL, RESULT, YES], "rejected": [NO], **BESIDE},
        {"prompt": [USER], "chosen": [YES], "rejected": [{**NO, "reasoning_content": "because"}], **BESIDE},
    ]
    if name.endswith(("csv", "parquet")):
        rows = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    found = list(load_preferences(write_table(tmp_path / name, rows)))
    assert found == [
        Preference(PROMPT, (CALL, RESULT, YES), "No"),
        Preference(PROMPT, "Yes", ({**NO, "reasoning_content": "because"},)),
    ]


def test_parquet_with_columns_of_its_own(tmp_path):
    row = {"prompt": [{**USER, "name": None}, {**USER, "name": "ann"}], "chosen": "Yes", "rejected": "No", **BESIDE}
    (found,) = load_preferences(write_table(tmp_path / "a.parquet", [row]))
    assert found.prompt == ChatPrompt((USER, {**USER, "name": "ann"}), tuple(TOOLS), {"enable_thinking": False})


def test_all_kinds_of_row_keep_it(tmp_path):
    pair = Preference(PROMPT, (CALL, RESULT, YES), "No", 0.5)
    scored = Scored.from_preference(pair)
    assert scored.preference() == pair
    path = write_table(tmp_path / "s.jsonl", [scored.to_json()])
    assert list(load_scored(path)) == [scored]
    unscored = Scored.from_preference(pair, rewards=None)
    assert replace(unscored, rewards=(1.0, 0.0)) == scored
    again = Scored.from_json({"prompt": [USER], "completions": ["Yes"], **BESIDE}, "x")
    assert again == replace(Scored.from_json({"prompt": [USER], **BESIDE}, "x"), completions=("Yes",))
    assert again.id != Scored((USER,), ("Yes",)).id
    correction = Correction(PROMPT, "No", "Yes")
    assert Correction.from_json(correction.to_json(), "x") == correction
    assert correction.preference() == Preference(PROMPT, "Yes", "No")
    buffer = ReplayBuffer()
    buffer.add("task", [pair, scored], fraction=1.0)
    buffer.to_jsonl(tmp_path / "replay.jsonl")
    assert ReplayBuffer.from_jsonl(tmp_path / "replay.jsonl").ids() == buffer.ids() != []


def test_what_is_more_than_a_text_cannot_be_corrected():
    with pytest.raises(InputError, match="field 'chosen': is more than one text"):
        CorrectionSet.of_preferences([Preference(PROMPT, (CALL, RESULT, YES), "No")])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images": ["a.png"]}, "'images': only text is learned here"),
        ({"videos": ["a.mp4"]}, "'videos': only text is learned here"),
        ({"audio": {"path": "a.wav"}}, "'audio': only text is learned here"),
        ({"prompt": [{**USER, "images": ["x"]}]}, "'prompt[0]': 'images' cannot be learned"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "'prompt[0]': a part of its content is 'image_url'; only parts of text",
        ),
        ({"prompt": [{"role": "user", "content": ["x"]}]}, "'prompt[0]': a part of its content is 'text'"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": " "}]}]}, "'prompt[0]': is empty"),
        ({"prompt": "text", **BESIDE}, "'tools': is rendered by a chat template, and the prompt is plain text"),
        ({"tools": {"name": "add"}}, "'tools': must be a list of objects"),
        ({"tools": "add"}, "'tools': is text that is not JSON"),
        ({"chat_template_kwargs": ["x"]}, "'chat_template_kwargs': must be an object, found a list"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'chat_template_kwargs': 'tokenize' is not a template variable"),
        ({"prompt": [{**USER, "name": 3}]}, "'prompt[0]': 'name' must be text, found a number"),
        ({"prompt": [{"role": "assistant", "tool_calls": ["x"]}, USER]}, "'prompt[0]': 'tool_calls' must be a list of"),
        ({"prompt": [{"role": "user", "tool_calls": [{}]}]}, "'prompt[0]': a message needs 'content'"),
        ({"prompt": [CALL]}, "'prompt': ends in an assistant message"),
        ({"chosen": [CALL, RESULT]}, "'chosen': after the prompt there must be the assistant's message, and no other"),
        ({"prompt": "text", "chosen": [CALL, RESULT, YES]}, "'chosen': its messages are rendered by a chat template"),
        ({"chosen": [{**NO, "name": "x"}], "rejected": [{**NO, "name": "x"}]}, "'rejected': equal to 'chosen'"),
    ],
)
def test_what_cannot_be_learned_is_named(change, expected):
    assert problem(**{"prompt": [USER], "chosen": "Yes", "rejected": "No", **change}).startswith(expected)


def test_an_answer_in_parts_is_a_text_and_a_prompt_keeps_its_parts():
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "text", "text": "b"}]
    row = read(prompt=[{"role": "user", "content": parts}], chosen=[{**YES, "content": parts}], rejected=[NO])
    assert row.chosen == "ab"
    assert row.prompt[0]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def test_a_system_message_and_a_tool_s_may_say_nothing():
    system = {"role": "system", "content": ""}
    assert read(prompt=[system, USER, CALL, RESULT], chosen="a", rejected="b").prompt == (system, USER, CALL, RESULT)
    assert (
        problem(prompt=[{"role": "user", "content": ""}], chosen="a", rejected="b")
        == "'prompt[0]': is empty; fill it in or remove the row"
    )


def test_roles_and_keys_of_a_message_are_kept_and_nulls_are_not():
    developer = {"role": "developer", "content": "Be kind."}
    row = read(prompt=[developer, {**USER, "channel": "x", "tool_calls": None, "id": 7}], chosen="a", rejected="b")
    assert row.prompt == (developer, {**USER, "channel": "x"})


def test_people_and_judges_read_an_answer_s_calls_as_text():
    said = completion_text((CALL, {**RESULT, "content": "2"}, YES))
    assert said == f"{json.dumps(CALL['tool_calls'][0])}\ntool: 2\nYes"


HH = "\n\nHuman: What is 2+2?\n\nAssistant: Which?\n\nHuman: The sum.\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (f"{HH} It is 4.", f"{HH} No idea.", HH),
        (f"{HH} It is 4.", f"{HH} It is 5.", HH),
        (f"{HH} It is 4, Assistant: said.", f"{HH} It is 4, Assistant: no.", HH),
        (HH, f"{HH} No idea.\n\nHuman: Well?", "\n\nHuman: What is 2+2?\n\nAssistant:"),
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue", "The sky is black", "The sky is"),
        ("The sky is blue today", "The sky is blue", "The sky is"),
        ("1. a\nx", "1. a\ny", "1. a\n"),
        ("今日は晴れです", "今日は雨です", "今日は"),
        ("é is e\u0301", "é is e\u0300", "é is"),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello there", None, None),
    ],
)
def test_whole_texts_are_cut_where_the_answer_or_the_word_begins(chosen, rejected, prompt):
    if rejected is None:
        rejected, prompt = chosen.replace("there", "thou"), chosen.removesuffix("Hello there")
    row = read(chosen=chosen, rejected=rejected)
    assert row == Preference(prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt))


def test_texts_that_share_nothing_have_no_prompt():
    assert problem(chosen="Yes", rejected="No").startswith("'prompt': no such column")
    assert "rename 'question'?" in problem(question="Is it?", chosen="It is.", rejected="It is not.")


def test_conversations_are_cut_before_an_assistant_speaks():
    more = {"role": "user", "content": "And?"}
    row = read(chosen=[USER, YES, more, YES], rejected=[USER, YES, {**more, "content": "Or?"}, NO])
    assert row == Preference((USER,), (YES, more, YES), (YES, {**more, "content": "Or?"}, NO))
    row = read(chosen=[USER, YES, more, YES], rejected=[USER, YES, more, NO])
    assert row == Preference((USER, YES, more), "Yes", "No")


def test_several_turns_are_learned_to_the_end_of_the_last():
    tokenizer = byte_tokenizer()
    more = {"role": "user", "content": "And?"}
    pair = tokenize_preferences([read(chosen=[USER, YES, more, YES], rejected=[USER, NO])], tokenizer, 1000)[0]
    assert tokenizer.decode(pair.prompt) == "User:\nHello?\n\nAssistant:\n"
    assert tokenizer.decode(pair.chosen) == "Yes</s>\n\nUser:\nAnd?\n\nAssistant:\nYes</s>"
    assert tokenizer.decode(pair.rejected) == "No</s>"
