"""Rows as TRL's datasets have them, learned from the command line; what is not learned of them is said once a run."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cli_for_tests import learn, make_workspace, run, write_rows
from everalign import load_preferences
from everalign.data.chat_template import DEFAULT_CHAT_TEMPLATE
from everalign.data.tokenization import tokenize_preferences
from everalign.learning.run_data import load_run

SIDES = ("chosen", "rejected")
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | length ~ ' tools;' }}{% endif %}{% for m in messages %}"
    "{{ m['role'] + ':' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else ';' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}"
    "{% if short %}{{ 'short: ' }}{% endif %}{% endif %}"
)


@pytest.fixture
def work(tmp_path, monkeypatch):
    make_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chats(count=6, **beside):
    return [
        {"prompt": [{"role": "user", "content": f"{i}+{i}?"}], "chosen": f"{2 * i}.", "rejected": f"No {i}.", **beside}
        for i in range(count)
    ]


def test_whole_texts_and_conversations_without_a_prompt(work, capsys):
    hh = [
        {side: f"\n\nHuman: {i}+{i}?\n\nAssistant: {says}." for side, says in zip(SIDES, (2 * i, "No"), strict=True)}
        for i in range(6)
    ]
    turns = [{side: [*row["prompt"], {"role": "assistant", "content": row[side]}] for side in SIDES} for row in chats()]
    write_rows(work / "hh.jsonl", hh)
    write_rows(work / "turns.jsonl", turns)
    code, _, err = run(capsys, *learn("--task", "hh=hh.jsonl", "--task", "turns=turns.jsonl"))
    assert code == 0, err
    assert load_preferences("hh.jsonl")[1].prompt == "\n\nHuman: 1+1?\n\nAssistant:"
    assert load_preferences("turns.jsonl")[1].to_json() == chats()[1]


def test_tools_and_variables_of_the_template_are_in_the_prompt_that_is_learned(work, capsys):
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.save_pretrained("model")
    write_rows(work / "a.jsonl", chats(tools=TOOLS, chat_template_kwargs={"short": True}))
    code, _, err = run(capsys, *learn("--task", "a=a.jsonl"))
    assert code == 0, err
    assert "chat template" not in err
    pair = tokenize_preferences(list(load_preferences("a.jsonl")), tokenizer, 64)[1]
    assert tokenizer.decode(pair.prompt) == "1 tools;user:1+1?;assistant:short: "
    assert tokenizer.decode(pair.chosen) == "2.</s>"


def test_what_the_template_does_not_read_is_said_once_and_the_default_one_is_exported(work, capsys):
    write_rows(work / "a.jsonl", chats(tools=TOOLS))
    write_rows(work / "b.jsonl", chats(tools=TOOLS)[::-1])
    code, _, err = run(capsys, *learn("--task", "a=a.jsonl", "--task", "b=b.jsonl"))
    assert code == 0, err
    assert err.count("the tokenizer has no chat template: chats are learned in Everalign's own format") == 1
    assert err.count("the chat template does not read 'tools', which 6 rows have: it is not learned") == 1
    code, _, err = run(capsys, "export", "run", "exported")
    assert code == 0, err
    assert AutoTokenizer.from_pretrained("exported").chat_template == DEFAULT_CHAT_TEMPLATE


def test_texts_are_learned_without_a_word_about_templates(work, capsys):
    code, _, err = run(capsys, *learn("--task", "warm=warm.jsonl"))
    assert code == 0, err
    assert "template" not in err


def test_pictures_are_refused_by_name(work, capsys):
    write_rows(work / "a.jsonl", [*chats(1), *chats(1, images=["a.png"])])
    code, _, err = run(capsys, *learn("--task", "a=a.jsonl"))
    assert (code, Path("run").exists()) == (2, False)
    assert "error: a.jsonl:2: field 'images': only text is learned here" in err


def test_a_reward_model_carries_the_template_of_its_chats(work, capsys):
    write_rows(work / "a.jsonl", chats())
    flags = ["--data", "a.jsonl", "--output", "reward", "--max-length", "64", "--epochs", "1"]
    code, _, err = run(capsys, "reward", "train", "--model", "model", *flags)
    assert code == 0, err
    assert "the tokenizer has no chat template" in err
    assert AutoTokenizer.from_pretrained("reward").chat_template == DEFAULT_CHAT_TEMPLATE
    code, _, err = run(capsys, "reward", "score", "--model", "reward", "--data", "a.jsonl", "--output", "scored.jsonl")
    assert code == 0, err


def test_columns_that_nothing_is_learned_from_are_named(work, capsys):
    write_rows(work / "a.jsonl", chats(source="forum", score=3))
    code, _, err = run(capsys, *learn("--task", "a=a.jsonl"))
    assert code == 0, err
    assert err.count("note: a.jsonl: columns that are not read: source, score") == 1


def test_questions_of_a_table_are_learned_as_chats(work, capsys):
    table = "question,better,worse\n" + "".join(f"{i}+{i}?,{2 * i}.,No {i}.\n" for i in range(6))
    (work / "a.csv").write_text(table)
    columns = ("--columns", "prompt=question,chosen=better,rejected=worse", "--chat-prompts")
    code, _, err = run(capsys, *learn("--task", "a=a.csv", *columns))
    assert code == 0, err
    write_rows(work / "chats.jsonl", chats())
    manifest = load_run("run").versions[0].manifest
    assert manifest.train.fingerprint == load_preferences("chats.jsonl").fingerprint
    assert manifest.chats


def test_corrections_have_no_prompts_that_could_be_chats(work, capsys):
    write_rows(work / "a.jsonl", [{"question": "1+1?", "answer": "3", "correction": "2"}])
    code, _, err = run(capsys, *learn("--task", "a=a.jsonl", "--objective", "correction", "--chat-prompts"))
    assert code == 2
    assert "a.jsonl: chat_prompts is for prompts, and corrections have questions: leave it out" in err
