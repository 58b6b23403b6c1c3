"""`everalign reward train` and `everalign reward score`: what they print, write and refuse."""

import json
import sys
from pathlib import Path

import pytest

from cli_for_tests import run, write_rows
from everalign.data import load_scored
from everalign.evaluation import scorers as rewards
from models_for_tests import saved_model
from rewards_for_tests import pairs, reward_model

FAST = ["--learning-rate", "2e-3", "--epochs", "2", "--batch-size", "8", "--max-length", "64"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working directory with a model, a reward model, pairs to learn, held-out ones, and answers to score."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(saved_model())
    (tmp_path / "reward").symlink_to(reward_model().path)
    write_rows(tmp_path / "pairs.jsonl", pairs())
    write_rows(tmp_path / "test.jsonl", pairs(20, 100))
    write_rows(tmp_path / "answers.jsonl", [{"prompt": "q?", "completions": ["yes! 1", "no."]}] * 3)
    return tmp_path


def train(*arguments, model="model"):
    return ["reward", "train", "--model", model, "--output", "out", *FAST, *arguments]


def score(*arguments, model="reward"):
    return ["reward", "score", "--model", model, "--output", "scored.jsonl", *arguments]


def test_a_reward_model_is_trained_reported_and_used(work, capsys):
    code, out, err = run(capsys, *train("--data", "pairs.jsonl", "--test", "test.jsonl"))
    assert code == 0, err
    assert "20 held-out pairs" in out
    assert "accuracy" in out
    assert "length correlation" in out
    assert out.splitlines()[-1].split() == ["model", "out"]
    assert "  training pairs: 40\n  held-out pairs: 20\n" in err

    code, out, err = run(capsys, *score("--data", "answers.jsonl", model="out"))
    assert code == 0, err
    assert out.splitlines()[-1].split() == ["scored", "scored.jsonl"]
    assert all(row.rewards[0] > row.rewards[1] for row in load_scored("scored.jsonl"))


def test_json_is_one_object(work, capsys):
    code, out, _ = run(capsys, *train("--data", "pairs.jsonl", "--test", "test.jsonl", "--json"))
    assert code == 0
    result = json.loads(out)
    assert result["output"] == "out"
    assert result["held_out"]["accuracy"] > 0.9
    assert result["held_out"].keys() >= {"log_loss", "calibration_error", "temperature", "length_correlation"}
    assert result["steps"] == 10
    code, out, _ = run(capsys, *score("--data", "test.jsonl", "--json", model="out"))
    assert code == 0
    result = json.loads(out)
    assert (result["output"], result["rows"], result["answers"], result["resumed"]) == ("scored.jsonl", 20, 40, 0)


def test_without_held_out_pairs_the_report_says_so(work, capsys):
    code, out, _ = run(capsys, *train("--data", "pairs.jsonl"))
    assert code == 0
    assert "No held-out pairs" in out


def test_an_interrupted_scoring_exits_130_and_goes_on(work, capsys, monkeypatch):
    calls = []

    def lengths(prompts, completions):
        calls.append(completions)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [len(text) for text in completions]

    scorer = rewards.CallableScorer(lengths, "lengths")
    monkeypatch.setattr(rewards, "make_scorer", lambda *_: scorer)
    arguments = score("--data", "answers.jsonl", "--batch-size", "2")
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted: the same command continues from here"
    code, _, err = run(capsys, *arguments)
    assert code == 0
    assert "1 of 3 rows were scored by an earlier run" in err
    assert len(calls) == 4


def test_a_function_that_fails_exits_1_in_one_line(work, capsys, monkeypatch):
    (work / "failing_for_tests.py").write_text(
        "def f(prompts, completions):\n    return [float('nan')] * len(prompts)\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, out, err = run(capsys, *score("--data", "answers.jsonl", model="failing_for_tests:f"))
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "error: row 1, completions[0]: the reward must be finite, found nan"


def test_rows_that_have_rewards_need_overwrite(work, capsys):
    write_rows(work / "old.jsonl", [{"prompt": "q?", "completions": ["yes! 1"], "rewards": [9]}])
    assert run(capsys, *score("--data", "old.jsonl"))[0] == 2
    Path("scored.jsonl").write_text("mine")
    code, _, err = run(capsys, *score("--data", "old.jsonl", "--overwrite"))
    assert code == 0, err
    assert load_scored("scored.jsonl")[0].rewards != (9.0,)


def test_bad_rows_left_out_on_request_are_counted(work, capsys):
    write_rows(work / "mixed.jsonl", [*pairs(8), {"prompt": "p", "chosen": "a"}])
    code, _, err = run(capsys, *train("--data", "mixed.jsonl", "--skip-bad-rows"))
    assert code == 0
    assert "warning: mixed.jsonl: 1 bad rows left out; the first: mixed.jsonl:9: field 'rejected'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (train("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (train("--data", "empty.jsonl"), "empty.jsonl: no rows in it"),
        (train("--data", "answers.jsonl"), "answers.jsonl:1: field 'chosen': no such column"),
        (train("--data", "pairs.jsonl", "--test", "pairs.jsonl"), "in both the training and the test set"),
        (train("--data", "pairs.jsonl", "--output", "."), "exists and is not empty"),
        (train("--data", "pairs.jsonl", "--learning-rate", "0"), "--learning-rate must be"),
        (train("--data", "pairs.jsonl", model="./nowhere"), "there is no model folder ./nowhere"),
        (train(), "Missing option '--data'"),
        (score("--data", "empty.jsonl"), "empty.jsonl: no rows in it"),
        (score("--data", "answers.jsonl", model="nowhere"), "nowhere: not a reward model"),
        (score("--data", "answers.jsonl", "--output", "scored.csv"), "must end in .jsonl"),
        (score("--data", "answers.jsonl", "--output", "pairs.jsonl"), "pairs.jsonl exists"),
        (score("--data", "answers.jsonl", "--batch-size", "0"), "at least 1"),
    ],
)
def test_bad_input_exits_2_and_says_what_is_wrong(arguments, message, work, capsys):
    (work / "empty.jsonl").write_text("")
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert message in err


@pytest.mark.parametrize("verb", ["train", "score"])
def test_each_verb_explains_itself_with_an_example(verb, capsys):
    code, out, _ = run(capsys, "reward", verb, "--help")
    assert code == 0
    assert f"Example: everalign reward {verb} " in out
    assert "--json" in out
