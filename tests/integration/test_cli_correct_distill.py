"""`everalign correct distill`: what it prints, writes and refuses."""

import json

import pytest
from test_distill import Fake

from cli_for_tests import run, settings, write_rows
from everalign.cli import correct_data as correct_distill
from everalign.errors import InputError
from learner_for_tests import held_out, save_answering_model

FAST = ["--learning-rate", "2e-2", "--batch-size", "4", "--max-length", "120", "--rank", "4", "--targets", "q_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_answering_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def work(tmp_path, monkeypatch, model):
    """A working directory with a model, prompts and held-out pairs; a fake corrector goes by the name `corrector`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    write_rows(tmp_path / "prompts.jsonl", [{"question": f"q{i}?", "answer": "not looked at"} for i in range(6)])
    write_rows(tmp_path / "test.jsonl", held_out("warm"))
    load = correct_distill.load_corrector
    fake = lambda name, *rest: Fake() if name == "corrector" else load(name, *rest)  # noqa: E731
    monkeypatch.setattr(correct_distill, "load_corrector", fake)
    return tmp_path


def distill(*arguments, corrector="corrector", data="prompts.jsonl"):
    return [
        *["correct", "distill", "--model", "model", "--corrector", corrector, "--data", data, "--output", "run"],
        *["--max-new-tokens", "24", *FAST, *arguments],
    ]


def test_rounds_are_learned_and_told(work, capsys):
    code, out, err = run(capsys, *distill("--rounds", "2", "--test", "test.jsonl", "--method", "seqft"))
    assert code == 0, err
    lines = out.splitlines()
    assert "of their words" in out
    assert "held-out" in out
    assert lines[-1].split() == ["run", "run"]
    assert "6 prompts\n" in err
    assert "round-1\n  " in err
    assert (work / "run/distill/round-2.jsonl").exists()


def test_json_is_one_object_and_resuming_learns_nothing_anew(work, capsys):
    code, out, err = run(capsys, *distill("--json", "--as", "dpo", "--beta", "0.2"))
    assert code == 0, err
    found = json.loads(out)
    assert found["output"] == "run"
    assert found["rounds"][0]["rows"] == found["rounds"][0]["changed"] > 0
    assert run(capsys, *distill("--as", "dpo", "--beta", "0.2"))[0] == 2
    code, out, err = run(capsys, *distill("--as", "dpo", "--beta", "0.2", "--resume", "--json"))
    assert code == 0, err
    assert "round-1 (learned already)" in err
    assert json.loads(out)["rounds"] == found["rounds"]


def test_weighting_flags_reach_the_learner(work, capsys):
    given = ["--as", "var", "--estimator", "group_loo", "--temperature", "0.4", "--no-scale-rewards"]
    code, _, err = run(capsys, *distill(*given, "--weight-cap", "3", "--weight-floor", "0.01"))
    assert code == 0, err
    weighting = settings(work / "run")
    assert (weighting["estimator"], weighting["temperature"], weighting["scale_rewards"]) == ("group_loo", 0.4, False)
    assert (weighting["weight_cap"], weighting["weight_floor"]) == (3, 0.01)
    code, _, err = run(capsys, *distill("--as", "var", "--resume"))
    assert code == 2
    assert "was started with different settings" in err


def test_an_interruption_exits_130(work, capsys, monkeypatch):
    monkeypatch.setattr(correct_distill, "load_corrector", lambda *_: Fake(1))
    code, out, err = run(capsys, *distill())
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted: the same command with --resume continues from here"


def test_bad_rows_left_out_on_request_are_counted(work, capsys):
    write_rows(work / "mixed.jsonl", [{"prompt": "q1?"}, {"prompt": "q2?"}, {"prompt": "q3?"}, {"prompt": ""}])
    _, _, err = run(capsys, *distill("--skip-bad-rows", data="mixed.jsonl"))
    assert "warning: mixed.jsonl: 1 bad rows left out; the first: mixed.jsonl:4: field 'question'" in err


def test_a_corrector_that_fails_exits_with_its_code(work, capsys, monkeypatch):
    class Ill(Fake):
        def correct_batch(self, pairs):
            raise InputError("the corrector is ill")

    monkeypatch.setattr(correct_distill, "load_corrector", lambda *_: Ill())
    code, out, err = run(capsys, *distill())
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "error: the corrector is ill"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (distill(data="nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (distill("--as", "ppo"), "labels must be one of sft, dpo, fpo, var"),
        (distill("--rounds", "0"), "rounds must be a whole number of at least 1"),
        (distill("--beta", "0.2"), "the objective sft has no margin and would ignore beta"),
        (distill("--as", "var", "--reference", "base"), "the objective var has no margin and would ignore reference"),
        (distill("--temperature", "0.5"), "temperature is for rewards, which only var and snkl learn from: leave it"),
        (distill("--as", "dpo", "--drop-constant"), "drop_constant is for rewards, which only var and snkl"),
        (distill("--as", "var", "--estimator", "best"), "estimator"),
        (distill("--as", "var", "--target-ess", "1"), "--target-ess must be a number from 0 to below 1"),
        (distill("--as", "var", "--length-normalize"), "the estimator group would ignore length_normalize"),
        (distill("--as", "var", "--estimator", "quantile"), "needs reference_rewards, which corrections do not have"),
        (distill("--objectives", "kind", corrector="./nowhere"), "--objectives: is for a corrector on a server"),
        (distill("--method", "mtl"), "mtl does not go on from round to round"),
        (distill("--method", "magic"), "unknown method 'magic'"),
        (distill("--max-length", "24"), "leaves no room for a prompt"),
        (distill("--learning-rate", "0"), "--learning-rate must be"),
        (distill("--test", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (distill("--test", "prompts.jsonl"), "prompts.jsonl:1: field 'chosen'"),
        (distill(corrector="./nowhere"), "not a corrector (it has no corrector.json)"),
        (distill(corrector="http://127.0.0.1:1#m"), "name it with --template"),
        (distill("--output", "."), "is not empty and holds no run"),
    ],
)
def test_bad_input_exits_2_and_says_what_is_wrong(arguments, message, work, capsys):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert message in err


def test_the_verb_explains_itself_with_an_example(capsys):
    code, out, _ = run(capsys, "correct", "distill", "--help")
    assert code == 0
    assert "Example: everalign correct distill " in out
    assert "--resume" in out
