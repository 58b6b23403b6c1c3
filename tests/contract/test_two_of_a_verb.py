"""Every verb started twice on one output: one works, the other is told who does; killed and resumed, nothing is mixed.

Each test starts real processes: the first stands in the middle of its work, something of which is on disk; the second
is turned away at once (or waits, where both share a cache); the first is killed the hard way; the third goes on. What
comes out is what a single undisturbed process makes.
"""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from chat_server_for_tests import ChatServer
from cli_for_tests import FAST, make_workspace, run, write_rows
from corrections_for_tests import corrections
from everalign.correction.batch import ROWS_PER_BATCH
from everalign.correction.corrector import Corrector
from everalign.learning import self_training as distill
from everalign.modeling import sampling as kept_samples
from learner_for_tests import adapter_weights, same_weights, save_answering_model
from models_for_tests import saved_model
from verbs_for_tests import Verb

ROWS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models and rows, made once."""
    folder = make_workspace(tmp_path_factory.mktemp("workspace"))
    save_answering_model(folder / "answering")
    answered = [{"prompt": f"q{i}?", "completions": [f"{i}", "x" * (i + 1)]} for i in range(ROWS)]
    write_rows(folder / "answers.jsonl", answered)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"q{i}?"} for i in range(ROWS)])
    write_rows(folder / "questions.jsonl", [{"question": f"q{i}?"} for i in range(ROWS)])
    write_rows(folder / "edits.jsonl", corrections(ROWS))
    write_rows(folder / "many.jsonl", corrections(ROWS_PER_BATCH + 4))
    shutil.copytree(saved_model(), folder / "roomy")
    (folder / "rewards.py").write_text(
        "def length(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
    )
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(str(made))
    monkeypatch.setattr(kept_samples, "_CHUNK", 4)
    yield made
    Verb.end_all()


def editor(messages):
    """Corrects an answer by what it was given."""
    return "better: " + hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:8]


class Rewritten:
    changed = True

    def __init__(self, answer):
        self.text = f"yes {len(answer)}"


def started_twice(arguments, output, tmp_path, resume=()):
    """Start, be turned away, kill, be turned away no more, and finish."""
    first = Verb([*arguments, "--output", output], tmp_path / "first", gated=True)
    first.wait_until_inside()
    started = time.monotonic()
    second = Verb([*arguments, *resume, "--output", output], tmp_path / "second")
    assert second.wait() == 2, second.output()
    assert time.monotonic() - started < 20
    told = second.output()
    assert f"process {first.pid} on {os.uname().nodename} is " in told
    assert Path(output).name in told
    assert first.kill() < 0
    third = Verb([*arguments, *resume, "--output", output], tmp_path / "third")
    assert third.wait() == 0, third.output()
    return third.output()


def alone(arguments, output, capsys):
    code, _, err = run(capsys, *map(str, arguments), "--output", str(output))
    assert code == 0, err


FILES = {
    "reward score": ["reward", "score", "--model", "rewards:length", "--data", "answers.jsonl", "--batch-size", "4"],
    "correct run": [
        *("correct", "run", "--corrector", "model", "--template", "aligner-1", "--data", "edits.jsonl"),
        *("--batch-size", "4", "--max-new-tokens", "6", "--no-guards"),
    ],
}


@pytest.mark.parametrize("arguments", FILES.values(), ids=FILES)
def test_a_file_that_two_write(arguments, here, tmp_path, capsys):
    told = started_twice(arguments, tmp_path / "out.jsonl", tmp_path)
    assert f"4 of {ROWS} rows were" in told or f"2 of {ROWS} rows were" in told
    alone(arguments, tmp_path / "whole.jsonl", capsys)
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith("out.jsonl")}
    assert left == {"out.jsonl"}


def test_correction_data_that_two_make(here, tmp_path, capsys):
    with ChatServer(editor) as server:
        arguments = [
            *("correct", "data", "--data", "questions.jsonl", "--answers-from", "answering", "--max-new-tokens", "24"),
            *("--corrections-from", f"{server.url}#large"),
        ]
        told = started_twice(arguments, tmp_path / "out.jsonl", tmp_path)
        assert f"4 of {ROWS} answers were had by an earlier run" in told
        alone(arguments, tmp_path / "whole.jsonl", capsys)
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


TASKS = ["--task", "warm=warm.jsonl,warm.test.jsonl", "--task", "brief=brief.jsonl,brief.test.jsonl"]
LEARNING = {
    "learn": [
        *("learn", "--model", "model", *TASKS[:2], *FAST, "--epochs", "2", "--checkpoint-steps", "2"),
        *("--no-report", "--sample-answers", "0"),
    ],
    "learn from sampled answers": [
        *("learn", "--model", "answering", "--task", "long=prompts.jsonl", "--objective", "var", "--reward"),
        *("rewards:length", "--samples", "6", "--max-new-tokens", "30", *FAST, "--no-report"),
    ],
    "correct distill": [
        *("correct", "distill", "--model", "answering", "--corrector", "model", "--template", "aligner-1"),
        *("--data", "prompts.jsonl", "--max-new-tokens", "30", *FAST),
    ],
}


@pytest.mark.parametrize("arguments", LEARNING.values(), ids=LEARNING)
def test_a_run_that_two_learn_into(arguments, here, tmp_path, capsys, monkeypatch):
    # What a random model writes passes no guard.
    monkeypatch.setattr(Corrector, "correct_batch", lambda _, pairs: [Rewritten(answer) for _, answer in pairs])
    monkeypatch.setattr(distill, "_PER_BATCH", 4)
    started_twice(arguments, tmp_path / "run", tmp_path, resume=["--resume"])
    alone(arguments, tmp_path / "whole", capsys)
    assert same_weights(adapter_weights(tmp_path / "run"), adapter_weights(tmp_path / "whole"))


MODELS = {
    "correct train": [
        *("correct", "train", "--model", "roomy", "--data", "edits.jsonl", "--batch-size", "2", "--epochs", "2"),
        *(
            "--checkpoint-steps",
            "1",
        ),
    ],
    "reward train": ["reward", "train", "--model", "model", "--data", "warm.jsonl", "--batch-size", "2"],
}


@pytest.mark.parametrize("arguments", MODELS.values(), ids=MODELS)
def test_a_model_that_two_train(arguments, here, tmp_path, capsys):
    started_twice(arguments, tmp_path / "out", tmp_path)
    alone(arguments, tmp_path / "whole", capsys)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]


def test_an_evaluation_waits_for_another_that_fills_the_same_cache(here, tmp_path, capsys):
    arguments = [
        *("correct", "evaluate", "--corrector", "model", "--template", "aligner-1", "--data", "many.jsonl"),
        *("--max-new-tokens", "3", "--no-guards", "--json"),
    ]
    first = Verb([*arguments, "--cache", tmp_path / "cache"], tmp_path / "first", gated=True)
    first.wait_until_inside()
    second = Verb([*arguments, "--cache", tmp_path / "cache"], tmp_path / "second")
    second.wait_until_it_says(f"process {first.pid} on {os.uname().nodename} is correcting the same answers")
    first.kill()
    assert second.wait() == 0, second.output()
    assert f"{ROWS_PER_BATCH} of {ROWS_PER_BATCH + 4} rows were corrected by an earlier run" in second.output()
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    found = json.loads(second.output()[second.output().index("{") :])
    assert {**found, "seconds": 0} == {**json.loads(out), "seconds": 0}


def test_runs_that_learn_at_the_same_time_share_a_cache(here, tmp_path, capsys):
    arguments = ["learn", "--model", "model", *TASKS, *FAST, "--no-report"]
    arguments += ["--sample-answers", "0", "--cache", str(tmp_path / "cache")]
    both = [Verb([*arguments, "--output", tmp_path / name], tmp_path / name) for name in ("one", "two")]
    assert [verb.wait() for verb in both] == [0, 0], [verb.output() for verb in both]
    alone(arguments[:-2], tmp_path / "whole", capsys)
    for name in ("one", "two"):
        assert same_weights(adapter_weights(tmp_path / name), adapter_weights(tmp_path / "whole"))


def test_scorings_at_the_same_time_share_a_judge_s_cache(here, tmp_path, capsys):
    def by_length(messages):
        return str(1 + len(messages[-1]["content"]) % 9)

    with ChatServer(by_length, seconds=0.02) as server:
        arguments = ["reward", "score", "--model", f"{server.url}#judge", "--data", "answers.jsonl"]
        shared = [*arguments, "--cache", tmp_path / "cache"]
        both = [Verb([*shared, "--output", tmp_path / f"{name}.jsonl"], tmp_path / name) for name in ("one", "two")]
        assert [verb.wait() for verb in both] == [0, 0], [verb.output() for verb in both]
        asked = len(server.requests)
        alone(shared, tmp_path / "third.jsonl", capsys)
        assert len(server.requests) == asked
        alone(arguments, tmp_path / "whole.jsonl", capsys)
    texts = {(tmp_path / f"{name}.jsonl").read_text() for name in ("one", "two", "third", "whole")}
    assert len(texts) == 1
