"""`everalign correct data`: what it prints, writes and refuses."""

import json

import pytest
from test_correction_data import Ill, large, small

from chat_server_for_tests import ChatServer, answer, refused
from cli_for_tests import run, write_rows
from everalign.data import load_corrections

KEY = "sk-secret"


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_rows(tmp_path / "questions.jsonl", [{"question": f"{word}?"} for word in ("one", "two", "three")])
    write_rows(tmp_path / "answers.jsonl", [{"prompt": f"{i}?", "answer": f"bad {i}"} for i in range(3)])
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "good", "rejected": "bad"}])
    return tmp_path


def data(source, *arguments):
    return ["correct", "data", "--data", source, "--output", "out.jsonl", *arguments]


def test_two_servers_make_data_and_their_cost_is_told(work, capsys):
    with ChatServer(small) as first, ChatServer(large) as second:
        asked = ("--answers-from", f"{first.url}#small", "--corrections-from", f"{second.url}#large")
        code, out, err = run(capsys, *data("questions.jsonl", *asked, "--price-in", "1,100", "--price-out", "3"))
    assert code == 0, err
    assert "answers of small to 3 questions\ncorrections of large of 3 answers\n" in err
    assert out.splitlines() == [
        "rows    3 corrections, 1 of them the answer unchanged",
        "answers 3 of small: 3 requests, 21 + 6 tokens read and written, cost 3.9e-05",
        "edits   3 of large: 3 requests, 21 + 6 tokens read and written, cost 0.002118",
        "cost    0.002157",
        "output  out.jsonl",
    ]
    assert first.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert "authorization" not in second.requests[0].headers
    assert not any(KEY in path.read_text() for path in work.iterdir())
    assert len(load_corrections("out.jsonl")) == 3


def test_a_second_server_is_sent_its_own_key_and_one_server_only_one(work, capsys, monkeypatch):
    monkeypatch.setenv("CORRECTIONS_API_KEY", "sk-other")
    with ChatServer(small) as first, ChatServer(large) as second:
        asked = ("--answers-from", f"{first.url}#small", "--corrections-from", f"{second.url}#large")
        assert run(capsys, *data("questions.jsonl", *asked))[0] == 0
        asked = ("--corrections-from", f"{second.url}#large", "--overwrite")
        assert run(capsys, *data("answers.jsonl", *asked))[0] == 0
    assert {seen.headers["authorization"] for seen in first.requests} == {f"Bearer {KEY}"}
    found = [seen.headers["authorization"] for seen in second.requests]
    assert (found[0], found[-1]) == ("Bearer sk-other", f"Bearer {KEY}")


def test_json_is_one_object(work, capsys):
    with ChatServer(lambda messages: answer(large(messages), usage=None)) as server:
        asked = ("--corrections-from", f"{server.url}#large", "--price-in", "1", "--price-out", "2", "--json")
        code, out, _ = run(capsys, *data("answers.jsonl", *asked))
    assert code == 0
    found = json.loads(out)
    assert (found["output"], found["rows"], found["identities"], found["failed"]) == ("out.jsonl", 3, 0, 0)
    (stage,) = found["stages"]
    assert (stage["stage"], stage["untold"], stage["cost"], found["cost"]) == ("corrections", 3, 0.0, 0.0)


def test_costs_that_are_not_whole_say_so(work, capsys):
    with ChatServer(lambda messages: answer(large(messages), usage=None)) as server:
        asked = ("--corrections-from", f"{server.url}#large", "--price-in", "1", "--price-out", "2")
        _, out, _ = run(capsys, *data("answers.jsonl", *asked))
    assert "3 replies did not report theirs" in out
    assert "cost    0 at least: not every reply reported its tokens" in out


def test_preferences_need_no_model(work, capsys):
    code, out, err = run(capsys, *data("pairs.jsonl"))
    assert code == 0, err
    assert out.splitlines() == ["rows    1 corrections, 0 of them the answer unchanged", "output  out.jsonl"]


def test_instructions_and_limits_reach_the_server(work, capsys):
    (work / "rules.txt").write_text("Mend rhymes.")
    with ChatServer(large, seconds=0.05) as server:
        asked = ("--corrections-from", f"{server.url}#m", "--instructions", "rules.txt", "--concurrency", "2")
        code, _, err = run(capsys, *data("answers.jsonl", *asked, "--requests-per-minute", "6000", "--timeout", "5"))
    assert code == 0, err
    assert server.requests[0].messages[0]["content"].startswith("Mend rhymes.\n")
    assert server.most_at_once == 2


def test_a_model_here_answers(work, capsys):
    chat = [{"question": [{"role": "user", "content": "How do I cook eggs?"}]}]
    write_rows(work / "chat.jsonl", chat)
    with ChatServer(large) as server:
        asked = ("--answers-from", "tiny", "--corrections-from", f"{server.url}#m")
        sampled = ("--temperature", "0.7", "--max-new-tokens", "60", "--seed", "3")
        code, out, err = run(capsys, *data("chat.jsonl", *asked, *sampled))
    assert code == 0, err
    assert "answers 1 of tiny\n" in out
    assert json.loads((work / "out.jsonl").read_text())["answer_model"] == "tiny"


def test_a_failure_exits_1_and_the_same_command_goes_on(work, capsys):
    ill = Ill(large, "bad 2", refused(400, f"the key {KEY} is no good"))
    with ChatServer(ill) as server:
        asked = data("answers.jsonl", "--corrections-from", f"{server.url}#m", "--concurrency", "1")
        code, out, err = run(capsys, *asked)
        assert (code, out) == (1, "")
        assert "error: '2?': " in err
        assert "what was answered before is kept" in err
        assert KEY not in err
        code, out, err = run(capsys, *asked, "--keep-going")
        assert code == 0, err
        assert "failed  1, in out.failed.jsonl" in out
        assert "  2 of 2 corrections were made by an earlier run" in err
        assert "edits   2 of m (2 by an earlier run): 1 requests" in out
    assert KEY not in (work / "out.failed.jsonl").read_text()


def test_an_interruption_exits_130(work, capsys, monkeypatch):
    from everalign.correction import make_data as pipeline

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "make_corrections", interrupted)
    code, out, err = run(capsys, *data("pairs.jsonl"))
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted: the same command continues from here"


def test_bad_rows_left_out_on_request_are_counted(work, capsys):
    write_rows(work / "mixed.jsonl", [{"prompt": "p", "chosen": "good", "rejected": "bad"}, {"prompt": ""}])
    code, _, err = run(capsys, *data("mixed.jsonl", "--skip-bad-rows"))
    assert code == 0
    assert "warning: mixed.jsonl: 1 bad rows left out; the first: mixed.jsonl:2: field 'question'" in err


SERVER = ("--corrections-from", "http://127.0.0.1:1#m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (data("nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (data("questions.jsonl"), "questions.jsonl: row 1: has no answer"),
        (data("answers.jsonl"), "answers.jsonl: no row has a correction"),
        (data("questions.jsonl", "--answers-from", "tiny"), "nothing would correct"),
        (data("answers.jsonl", "--corrections-from", "http://127.0.0.1:1"), "who corrects is named URL#MODEL"),
        (data("answers.jsonl", "--corrections-from", "tiny"), "who corrects is named URL#MODEL"),
        (data("questions.jsonl", "--answers-from", "http://h", *SERVER), "who answers is named URL#MODEL"),
        (data("questions.jsonl", "--answers-from", "./nowhere", *SERVER), "there is no model folder ./nowhere"),
        (data("pairs.jsonl", "--concurrency", "3"), "--concurrency would be ignored: only a server"),
        (data("answers.jsonl", *SERVER, "--concurrency", "0"), "concurrency: must be at least 1"),
        (data("answers.jsonl", *SERVER, "--temperature", "1"), "--temperature would be ignored"),
        (data("answers.jsonl", "--answers-from", "http://h#m", *SERVER, "--seed", "1"), "--seed would be ignored"),
        (data("pairs.jsonl", "--instructions", "x"), "--instructions would be ignored"),
        (data("answers.jsonl", *SERVER, "--instructions", "nowhere"), "nowhere: the instructions cannot be read"),
        (data("pairs.jsonl", "--keep-going"), "no question can fail"),
        (data("pairs.jsonl", "--price-in", "1", "--price-out", "1"), "--price-in would be ignored: no server"),
        (data("answers.jsonl", *SERVER, "--price-in", "1"), "--price-out is missing"),
        (data("answers.jsonl", *SERVER, "--price-in", "x", "--price-out", "1"), "--price-in x: must be a price"),
        (data("answers.jsonl", *SERVER, "--price-in", "-1", "--price-out", "1"), "--price-in -1: must be a price"),
        (data("answers.jsonl", *SERVER, "--price-in", "1,2", "--price-out", "1"), "2 prices for 1 models"),
        (data("pairs.jsonl", "--template", "mine"), "unknown template 'mine'"),
        (data("pairs.jsonl", "--longest", "0"), "longest: must be at least 1"),
        (data("pairs.jsonl", "--near", "2"), "near: must be above 0"),
        (data("pairs.jsonl", "--output", "pairs.jsonl"), "pairs.jsonl exists"),
        (data("pairs.jsonl", "--output", "out.csv"), "must end in .jsonl"),
    ],
)
def test_bad_input_exits_2_and_says_what_is_wrong(arguments, message, work, capsys):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert message in err


def test_the_verb_explains_itself_with_an_example(capsys):
    code, out, _ = run(capsys, "correct", "data", "--help")
    assert code == 0
    assert "Example: everalign correct data " in out
    assert "OPENAI_API_KEY" in out
