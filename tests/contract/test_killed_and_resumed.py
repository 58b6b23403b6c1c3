"""Every verb that takes long: killed and resumed it ends as if undisturbed, and two on one output never mix.

Real processes: the first stands in the middle of its work, some of which is on disk; a second is turned away at once
(or waits, where both share a cache); the first is killed by SIGKILL; a third goes on.
"""

import hashlib
import json
import os
import shutil

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
    scored = [{**row, "rewards": [1.0, 0.1 * i]} for i, row in enumerate(answered)]
    write_rows(folder / "scored.jsonl", scored)
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


TASK = "--task warm=warm.jsonl,warm.test.jsonl"
QUICK = " ".join([*FAST, "--no-report"])
STEPS = f"{QUICK} --epochs 2 --checkpoint-steps 1 --sample-answers 0"
CORRECTOR = "--corrector model --template aligner-1"
# By what each writes: a file, a model's folder, a run.
VERBS = {
    "out.jsonl": {
        "reward score": "--model rewards:length --data answers.jsonl --batch-size 4 --window 5",
        "correct run": f"{CORRECTOR} --data edits.jsonl --batch-size 4 --window 5 --max-new-tokens 6 --no-guards",
        "correct data": "--data questions.jsonl --answers-from answering --max-new-tokens 24 "
        "--corrections-from SERVER#large",
    },
    "model": {
        "correct train": "--model roomy --data edits.jsonl --batch-size 2 --epochs 2 --checkpoint-steps 1",
        "reward train": "--model model --data warm.jsonl --batch-size 2 --checkpoint-steps 1",
        "correct train --quantize nf4": "--lora-rank 4 --model roomy --data edits.jsonl --batch-size 2 "
        "--checkpoint-steps 1",
        "reward train --quantize nf4": "--lora-rank 4 --model model --data warm.jsonl --batch-size 2 "
        "--checkpoint-steps 1",
    },
    "run": {
        "learn": f"--model model {TASK} {STEPS}",
        "learn --objective var": f"--model model --task a=scored.jsonl {STEPS}",
        "learn --objective snkl": f"--model model --task a=scored.jsonl {STEPS}",
        "learn --objective correction": f"--model roomy --task a=edits.jsonl {STEPS} --max-length 200",
        "learn --objective var --reward rewards:length": "--model answering --task long=prompts.jsonl --samples 6 "
        f"--max-new-tokens 30 {QUICK}",
        "learn --objective var --reward rewards:length --first-samples 2": "--model answering "
        f"--task long=prompts.jsonl --samples 6 --max-new-tokens 30 {QUICK}",
        "correct distill": f"--model answering {CORRECTOR} --data prompts.jsonl --max-new-tokens 30 {' '.join(FAST)}",
    },
}
# The other objectives are learned by the same loop.
SLOW = {
    "learn --objective var",
    "learn --objective snkl",
    "learn --objective correction",
    "learn --objective var --reward rewards:length --first-samples 2",
}
CASES = [
    pytest.param(kind, verb, id=verb, marks=[pytest.mark.slow] * (verb in SLOW))
    for kind, verbs in VERBS.items()
    for verb in verbs
]


@pytest.mark.parametrize(("kind", "verb"), CASES)
def test_a_verb_that_is_killed_in_the_middle_ends_as_one_that_is_not(kind, verb, here, tmp_path, capsys, monkeypatch):
    """Start, turn a second one away, kill the first, finish with a third, and compare with one that ran alone."""
    if "--quantize" in verb:
        pytest.importorskip("bitsandbytes", reason="quantises: pip install everalign[quantize]")
    # What a random model writes passes no guard.
    if verb == "correct distill":
        monkeypatch.setattr(Corrector, "correct_batch", lambda _, pairs: [Rewritten(answer) for _, answer in pairs])
        monkeypatch.setattr(distill, "_PER_BATCH", 4)
    resume = ["--resume"] if kind == "run" else []
    with ChatServer(editor) as server:
        arguments = f"{verb} {VERBS[kind][verb]}".replace("SERVER", server.url).split()
        first = Verb([*arguments, "--output", tmp_path / kind], tmp_path / "first", gated=True)
        first.wait_until_inside()
        second = Verb([*arguments, *resume, "--output", tmp_path / kind], tmp_path / "second")
        assert second.wait() == 2, second.output()
        assert f"process {first.pid} on {os.uname().nodename} is " in second.output()
        assert kind in second.output()
        assert first.kill() < 0
        third = Verb([*arguments, *resume, "--output", tmp_path / kind], tmp_path / "third")
        assert third.wait() == 0, third.output()
        alone(arguments, tmp_path / f"whole-{kind}", capsys)
    found, whole = tmp_path / kind, tmp_path / f"whole-{kind}"
    if kind == "out.jsonl":
        assert any(f"{done} of {ROWS} " in third.output() for done in (2, 4))
        assert found.read_text() == whole.read_text()
    elif kind == "model":
        assert (found / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    else:
        assert same_weights(adapter_weights(found), adapter_weights(whole))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(kind)] == [kind]


def alone(arguments, output, capsys):
    code, _, err = run(capsys, *map(str, arguments), "--output", str(output))
    assert code == 0, err


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
    both_tasks = [*TASK.split(), "--task", "brief=brief.jsonl,brief.test.jsonl"]
    arguments = ["learn", "--model", "model", *both_tasks, *FAST, "--no-report"]
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
