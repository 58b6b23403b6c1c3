"""`everalign estimate`: what it prints and writes, that it loads nothing, and every kind of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli_for_tests import FAST, learn, make_workspace, run, task, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("estimate"))


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def estimate(*arguments: str) -> list[str]:
    return ["estimate", "--model", "model", *FAST, *arguments]


def as_json(capsys, *arguments: str) -> dict:
    code, out, error = run(capsys, *estimate(*arguments, "--json", "-"))
    assert code == 0, error
    return json.loads(out)


TASKS = [*task("warm"), *task("brief")]
EVALUATED = {
    "results": [{"version": "001-a", "task": "a", "prompts": 90, "metrics": {"judge_win_rate": [0.4, 0.3, 0.5]}}]
}


def test_a_run_is_estimated_on_a_gpu_that_is_not_there(capsys, folder):
    code, out, error = run(capsys, *estimate(*TASKS, "--gpu", "h100", "--price", "2.5", "--json", "found.json"))
    assert code == 0, error
    for word in (
        "steps",
        "time",
        "peak memory",
        "disk",
        "cost",
        "retrain on all tasks together",
        "DPO with TRL",
        "GRPO",
    ):
        assert word in out
    assert "NVIDIA" in error
    found = json.loads((folder / "found.json").read_text())
    # 10 rows, then 10 and 2 replayed ones, in batches of 4.
    assert found["steps"] == 6
    assert {name: one["steps"] for name, one in found["tasks"].items()} == {"warm": 3, "brief": 3}
    assert found["seconds"]["low"] < found["seconds"]["expected"] < found["seconds"]["high"]
    assert found["cost"]["high"] == pytest.approx(found["seconds"]["high"] / 3600 * 2.5)
    assert found["memory"]["fits"] is True
    assert found["memory"]["peak"] == pytest.approx(sum(found["memory"]["parts"].values()))
    assert found["machine"]["name"] == "h100"
    assert len(found["alternatives"]) == 5


def test_no_weights_are_read(capsys, folder, tmp_path):
    """A folder without them will do."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (folder / "model").iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    code, out, error = run(capsys, "estimate", "--model", str(bare), *FAST, *TASKS, "--json", "-")
    assert code == 0, error
    assert json.loads(out)["steps"] == 6


def test_a_recipe_says_the_same_as_flags(capsys, folder):
    (folder / "recipe.yaml").write_text(
        "model: model\nmethod: er\nobjective: dpo\ntraining: {batch_size: 4, max_length: 64}\n"
        "adapter: {rank: 4, targets: 'q_proj,v_proj'}\n"
        "tasks:\n  - {name: warm, train: warm.jsonl, test: warm.test.jsonl}\n"
    )
    code, out, error = run(capsys, "estimate", "recipe.yaml", "--gpu", "l4", "--json", "-")
    assert code == 0, error
    one = json.loads(out)
    other = as_json(capsys, *task("warm"), "--method", "er", "--objective", "dpo", "--gpu", "l4")
    assert one["flops"] == other["flops"]
    assert one["memory"] == other["memory"]


@pytest.mark.parametrize("objective", ["sft", "snkl", "hypo"])
def test_objectives_of_pairs_are_estimated(capsys, objective):
    found = as_json(capsys, *task("warm"), "--objective", objective, "--gpu", "h100")
    assert found["parts"]["training"][0] > 0
    assert (found["parts"]["reference"][1] > 0) == (objective != "sft")


def test_methods_differ_in_what_they_replay_and_pool(capsys):
    steps = {name: as_json(capsys, *TASKS, "--method", name, "--gpu", "h100") for name in ("er", "seqft", "mtl")}
    assert [steps[name]["steps"] for name in ("er", "seqft", "mtl")] == [6, 6, 5]
    assert steps["er"]["flops"] > steps["seqft"]["flops"]
    assert list(steps["mtl"]["tasks"]) == ["all-tasks"]


def test_what_methods_compute_besides_is_counted(capsys):
    names = ("seqft", "gem", "ogpsa", "ewc")
    found = {name: as_json(capsys, *TASKS, "--method", name, "--gpu", "h100") for name in names}
    assert {one["steps"] for one in found.values()} == {6}  # earlier rows are not learned
    assert all(found[name]["flops"] > found["seqft"]["flops"] for name in names[1:])
    often = as_json(capsys, *TASKS, "--method", "gem", "--refresh", "1", "--gpu", "h100")
    assert often["flops"] > found["gem"]["flops"]


def test_accelerators_share_a_run(capsys):
    one = as_json(capsys, *TASKS, "--gpu", "h100", "--price", "2")
    two = as_json(capsys, *TASKS, "--gpu", "h100", "--price", "2", "--processes", "2", "--fsdp")
    assert (two["processes"], two["fsdp"], two["steps"]) == (2, True, one["steps"])
    assert two["memory"]["parts"]["weights"] < one["memory"]["parts"]["weights"]
    assert two["memory"]["parts"]["gathered layers"] > 0
    assert two["cost"]["high"] == pytest.approx(two["seconds"]["high"] / 3600 * 2 * 2)
    code, out, error = run(capsys, *estimate(*TASKS, "--gpu", "h100", "--processes", "2", "--fsdp"))
    assert code == 0, error
    assert "2 x h100, FSDP" in out


def test_a_corrector_is_set_against_its_upstream(capsys, folder):
    rows = [{"question": f"q{i}?", "answer": f"no {i}", "correction": f"yes {i}"} for i in range(12)]
    write_rows(folder / "corrections.jsonl", rows)
    arguments = ["--task", "a=corrections.jsonl", "--objective", "correction", "--gpu", "h100", "--max-length", "512"]
    without = as_json(capsys, *arguments)["alternatives"]
    assert "--upstream" in next(one["note"] for one in without if one["name"].startswith("train the upstream"))
    found = as_json(capsys, *arguments, "--upstream", "tiny")["alternatives"]
    upstream = next(one for one in found if one["name"].startswith("train the upstream"))
    assert upstream["seconds"][0] > 0
    assert next(one for one in found if one["name"] == "DPO with TRL")["seconds"] is None


def test_prompts_alone_are_sampled_first(capsys, folder):
    write_rows(folder / "prompts.jsonl", [{"prompt": f"q{i}?"} for i in range(9)])
    arguments = ["--task", "a=prompts.jsonl", "--objective", "var", "--reward", "nowhere:f", "--gpu", "h100"]
    found = as_json(capsys, *arguments, "--samples", "3", "--max-new-tokens", "16", "--rounds", "2")
    assert found["parts"]["rollouts"][0] > 0
    assert found["steps"] == 2 * 3


def test_calls_to_a_larger_model_have_a_price(capsys):
    found = as_json(capsys, *task("warm"), "--gpu", "h100", "--api-price", "2,8", "--answers", "1000")
    calls = found["alternatives"][-1]
    assert calls["cost"][0] > 0
    assert calls["cost"][0] == calls["cost"][1]


def test_worse_answers_have_a_negative_value(capsys, folder):
    (folder / "results.json").write_text(json.dumps(EVALUATED))
    arguments = [*task("warm"), "--gpu", "h100", "--price", "2", "--value-per-better-answer", "0.1"]
    worth = as_json(capsys, *arguments, "--evaluation", "results.json", "--answers", "1000")["value"]
    assert worth["net_value"][0] < -20
    assert worth["break_even_answers"] == [None, None, None]
    _, out, _ = run(capsys, *estimate(*arguments, "--evaluation", "results.json", "--answers", "1000"))
    assert "−$" in out
    assert "never" in out


def test_three_measured_steps_correct_the_estimate(capsys):
    found = as_json(capsys, *TASKS, "--measure")
    assert found["measured"]["seconds"] > 0
    assert found["calibrated"] == pytest.approx(found["measured"]["factor"])
    low, high = found["parts"]["training"]
    assert high / low == pytest.approx(1.25**2)


BAD = {
    "unknown machine": (["--gpu", "h10"], "did you mean h100"),
    "negative price": (["--price", "-1"], "--price"),
    "price that is no number": (["--price", "nan"], "--price"),
    "negative answers": (["--answers", "-5"], "--answers"),
    "one price": (["--api-price", "3"], "--api-price"),
    "value without evaluation": (["--value-per-better-answer", "1", "--price", "1"], "--evaluation"),
    "evaluation without value": (["--evaluation", "results.json"], "--value-per-better-answer"),
    "value without price": (["--value-per-better-answer", "1", "--evaluation", "results.json"], "--price"),
    "no evaluation there": (
        ["--value-per-better-answer", "1", "--price", "1", "--evaluation", "nowhere"],
        "everalign evaluate",
    ),
    "output in no folder": (["--json", "nowhere/found.json"], "--json"),
    "output is a folder": (["--json", "model"], "--json"),
    "another machine is measured": (["--gpu", "h100", "--measure"], "--measure"),
    "learned prompts": (["--method", "l2p"], "l2p"),
    "no processes": (["--processes", "0"], "--processes"),
    "processes of a processor": (["--processes", "2"], "--gpu"),
    "a shared base of one": (["--gpu", "h100", "--fsdp"], "--processes"),
    "several are measured": (["--gpu", "h100", "--processes", "2", "--measure"], "--measure"),
    "flex without a gpu": (["--attention", "flex"], "flex"),
    "no such method": (["--method", "lifealine"], "did you mean"),
    "an ignored option": (["--objective", "sft", "--beta", "0.3"], "beta"),
    "too few bytes": (["--max-length", "1"], "--max-length"),
    "no such module": (["--targets", "nothing"], "cannot adapt"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_is_refused(capsys, name):
    flags, what = BAD[name]
    arguments = ["estimate", "--model", "model", *task("warm"), *flags]
    code, out, error = run(capsys, *arguments)
    assert code == 2, (out, error)
    assert what in error
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--model", "model"], "--task"),
        (["--task", "a=warm.jsonl"], "--model"),
        (["--model", "model", "--task", "a"], "NAME=TRAIN"),
        (["--model", "model", "--task", "a=nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "./nowhere", "--task", "a=warm.jsonl"], "nowhere"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["--model", "model", "--task", "a=bad.jsonl"], "bad.jsonl:2"),
        (["--model", "broken", "--task", "a=warm.jsonl"], "broken"),
        (["--model", "model", "--task", "a=warm.jsonl,warm.jsonl"], "warm.jsonl"),
    ],
)
def test_what_cannot_be_read_is_refused(capsys, folder, arguments, what):
    write_rows(folder / "bad.jsonl", [{"prompt": "q?", "chosen": "a", "rejected": "b"}, {"prompt": "q?"}])
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "config.json").write_text("{")
    code, _, error = run(capsys, "estimate", *arguments, "--gpu", "h100")
    assert code == 2
    assert what in error


@pytest.mark.parametrize("flags", [["--gpu", "h10"], ["--price", "-1"], ["--api-price", "x"], ["--rank", "0"], []])
def test_flags_are_checked_before_torch_is_loaded(flags):
    arguments = ["estimate", "--task", "a=warm.jsonl", *flags]
    code = f"import sys\nfrom everalign.cli import main\nprint(main({arguments!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


def test_a_run_keeps_what_was_predicted_beside_what_it_took(capsys, folder):
    predicted = as_json(capsys, *TASKS)
    code, _, error = run(capsys, *learn(*TASKS))
    assert code == 0, error
    assert "predicted: 6 steps" in error
    kept = json.loads((folder / "run" / "run.json").read_text())["predicted"]
    assert {name: one["steps"] for name, one in kept.items()} == {"warm": 3, "brief": 3}
    assert kept["warm"]["memory"] == pytest.approx(predicted["memory"]["peak"], rel=0.05)
    versions = json.loads(run(capsys, "versions", "run", "--json")[1])["versions"]
    for version in versions:
        assert version["predicted"] == kept[version["task"]]
        assert version["actual"]["processor_seconds"] > 0
        assert version["actual"]["memory"] > 2**20
        manifest = json.loads((folder / "run" / "versions" / version["version"] / "manifest.json").read_text())
        assert manifest["stages"][0]["steps"] == version["predicted"]["steps"]
    assert "took" in run(capsys, "versions", "run")[1]
    # A later task joins them.
    code, _, error = run(capsys, *learn(*task("calm"), "--resume"))
    assert code == 0, error
    kept = json.loads((folder / "run" / "run.json").read_text())["predicted"]
    assert list(kept) == ["warm", "brief", "calm"]
    # 10 rows of its own, and 4 that the buffer holds of the others, in batches of 4.
    assert kept["calm"]["steps"] == 4
    manifest = json.loads((folder / "run" / "versions" / "003-calm" / "manifest.json").read_text())
    assert manifest["stages"][0]["steps"] == 4


def test_held_out_rows_that_say_nothing_are_left_to_the_learner(capsys, folder):
    same = [{"question": f"q{i}?", "answer": "yes", "correction": "yes"} for i in range(4)]
    write_rows(folder / "same.test.jsonl", same)
    rows = [{"question": f"q{i}!", "answer": f"no {i}", "correction": f"yes {i}"} for i in range(12)]
    write_rows(folder / "more.jsonl", rows)
    arguments = ["--task", "a=more.jsonl,same.test.jsonl", "--objective", "correction", "--max-length", "512"]
    assert as_json(capsys, *arguments, "--gpu", "h100")["parts"]["held-out rows"] == [0.0, 0.0]
    code, _, error = run(capsys, *learn(*arguments, "--output", "refused"))
    assert code == 2
    assert "has no rows" in error
