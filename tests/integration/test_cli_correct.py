"""`everalign correct train`: what it prints, writes and refuses."""

import json
import re

import pytest

from cli_for_tests import run, write_rows
from corrections_for_tests import corrections
from everalign.correction import load_corrector_files, training
from everalign.data import CorrectionSet
from models_for_tests import saved_model

FAST = ["--learning-rate", "3e-3", "--epochs", "1", "--batch-size", "8"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working directory with a model, corrections to learn, held-out ones, and preferences."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(saved_model())
    write_rows(tmp_path / "edits.jsonl", corrections(16))
    write_rows(tmp_path / "test.jsonl", corrections(8, 100))
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"q{i}?", "chosen": "yes", "rejected": "no"} for i in range(8)])
    return tmp_path


def train(*arguments, model="model"):
    return ["correct", "train", "--model", model, "--output", "out", *FAST, *arguments]


def test_a_corrector_is_trained_and_reported(work, capsys):
    arguments = ["--data", "edits.jsonl", "--test", "test.jsonl", "--objectives", "helpful, kind", "--identity", "0.5"]
    code, out, err = run(capsys, *train(*arguments))
    assert code == 0, err
    assert "8 held-out rows" in out
    for label in ("perplexity", "copying", "starts by copying", "copies", "keeps"):
        assert label in out
    assert out.splitlines()[-1].split() == ["model", "out"]
    assert re.search(
        r"data\n  16 training rows\n  8 held-out rows\n  template everalign-1, objectives helpful, kind\n"
        r"  trains all weights in fp32 on the CPU\n  identity: 8 rows\n  identity: 1/1 steps, loss [\d.]+\n"
        r"  correction: 16 rows\n  correction: 1/2 steps, loss [\d.]+\n  correction: 2/2 steps, loss [\d.]+\n",
        err,
    )
    assert load_corrector_files("out").objectives == ("helpful", "kind")


def test_json_is_one_object(work, capsys):
    arguments = ["--data", "edits.jsonl", "--test", "test.jsonl", "--template", "aligner-1", "--lora-rank", "2"]
    code, out, err = run(capsys, *train(*arguments, "--max-length", "200", "--precision", "bf16", "--json"))
    assert code == 0, err
    result = json.loads(out)
    assert (result["output"], result["rows"], result["template"], result["objectives"]) == ("out", 16, "aligner-1", [])
    assert result["max_length"] == 200
    assert result["held_out"].keys() >= {"rows", "perplexity", "copy_log_likelihood", "starts_by_copying"}
    assert {name: stage["steps"] for name, stage in result["stages"].items()} == {"identity": 1, "correction": 2}
    settings = load_corrector_files("out").facts.settings
    assert (settings["lora_rank"], settings["precision"]) == (2, "bf16")


def test_preferences_are_corrections_and_it_is_said(work, capsys):
    code, out, err = run(capsys, *train("--data", "pairs.jsonl", "--identity", "0"))
    assert code == 0, err
    assert "note: pairs.jsonl holds preferences: each rejected answer is corrected into the chosen one" in err
    assert "8 training rows" in err
    assert "identity:" not in err
    assert "No held-out rows" in out


def test_filtered_rows_are_counted(work, capsys):
    write_rows(work / "mixed.jsonl", [*corrections(8), {"question": "q", "answer": "a", "correction": "..."}])
    code, _, err = run(capsys, *train("--data", "mixed.jsonl", "--filter"))
    assert code == 0, err
    assert "  8 corrections kept, 1 left out (1 empty)\n  8 training rows" in err


def test_bad_rows_left_out_on_request_are_counted(work, capsys):
    write_rows(work / "mixed.jsonl", [*corrections(8), {"question": "q", "answer": "a"}])
    code, _, err = run(capsys, *train("--data", "mixed.jsonl", "--skip-bad-rows"))
    assert code == 0
    assert "warning: mixed.jsonl: 1 bad rows left out; the first: mixed.jsonl:9: field 'correction'" in err


def test_an_interrupted_training_exits_130_and_goes_on(work, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "corrector_report", interrupt)
        code, out, err = run(capsys, *train("--data", "edits.jsonl", "--test", "test.jsonl"))
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted: the same command continues from here"
    code, _, err = run(capsys, *train("--data", "edits.jsonl", "--test", "test.jsonl"))
    assert code == 0
    assert "correction: was finished by an earlier call" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (train("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (train("--data", "empty.jsonl"), "empty.jsonl: no rows in it"),
        (train("--data", "empty.jsonl", "--filter"), "empty.jsonl: no rows in it"),
        (train("--data", "poor.jsonl", "--filter"), "poor.jsonl: no rows in it"),
        (train("--data", "prompts.jsonl"), "prompts.jsonl:1: field 'question': no such column; rename 'prompt'?"),
        (train("--data", "edits.jsonl", "--test", "edits.jsonl"), "in both the training and the test set"),
        (train("--data", "edits.jsonl", "--output", "."), "exists and is not empty"),
        (train("--data", "edits.jsonl", "--identity", "2"), "identity must be a number from 0 to 1"),
        (train("--data", "edits.jsonl", "--precision", "int8"), "precision must be one of auto, fp32, bf16"),
        (train("--data", "edits.jsonl", "--checkpointing", "yes"), "checkpointing must be one of auto, on, off"),
        (train("--data", "edits.jsonl", "--template", "mine"), "unknown template 'mine'"),
        (train("--data", "edits.jsonl", "--objectives", "kind,,safe"), "objectives[1]: must be one line of words"),
        (train("--data", "edits.jsonl", "--max-length", "100"), "no correction fits max_length"),
        (train("--data", "edits.jsonl", model="./nowhere"), "there is no model folder ./nowhere"),
        (train(), "Missing option '--data'"),
    ],
)
def test_bad_input_exits_2_and_says_what_is_wrong(arguments, message, work, capsys):
    (work / "empty.jsonl").write_text("")
    write_rows(work / "poor.jsonl", CorrectionSet.of([{"question": "q", "answer": "a", "correction": "."}]))
    write_rows(work / "prompts.jsonl", [{"prompt": "q", "answer": "a", "correction": "b"}])
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert message in err


def test_it_explains_itself_with_an_example(capsys):
    code, out, _ = run(capsys, "correct", "train", "--help")
    assert code == 0
    assert "Example: everalign correct train " in out
    assert "--json" in out
