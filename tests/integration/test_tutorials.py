"""The tutorials in docs/tutorials, carried out as a reader would; shortened here, whole where the test is slow."""

import json
from pathlib import Path

import pytest

from docs_for_tests import ROOT, Reader
from everalign.learning.run_data import load_run
from everalign.serving.store import FeedbackStore

# What is replaced in a page, so that it takes seconds: fewer rows, fewer steps.
SHORTER = {
    "policy-change": {
        "train=160, test=60": "train=16, test=4",
        "--sft-epochs 1 --sft-learning-rate 2e-3 --epochs 2": "--sample-answers 0 --epochs 1",
    },
    "corrector": {'(("train", 240), ("test", 60))': '(("train", 16), ("test", 4))', "--epochs 4": "--epochs 1"},
    "feedback": {
        '"train", 40': '"train", 8',
        "PEOPLE = 260": "PEOPLE = 24",
        "--key-share 1 --held-out 0.25 --gate 0.05": "--key-share 1 --held-out 0.25 --gate 1 --minimum 4",
        "--epochs 2 --learning-rate 4e-3": "--epochs 1 --learning-rate 4e-3",
    },
    "rewards": {
        "train=120, test=40": "train=12, test=4",
        "--samples 4": "--samples 2 --sample-answers 0",
        "--learning-rate 2e-3 --epochs 2": "--learning-rate 2e-3 --sample-answers 0",
    },
    "compare": {
        "limit: 120}": "limit: 16}",
        "tune: {learning_rate: [1e-3, 3e-3]}": "tune: {learning_rate: [3e-3]}",
        "seeds: [0, 1]": "seeds: [0]",
    },
}


# A bench is many processes, each of which imports torch; what it does is tested in test_bench.py.
LONG = ("compare",)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in SHORTER])
def tutorial(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return request.param


def reader(name, shorter=None):
    # Few rows show nothing: there may be too little evidence.
    return Reader(f"docs/tutorials/{name}.md", shorter, codes={"--gate 1": (0, 4)})


def check(name):
    """What the page says that there is in the end."""
    if name == "policy-change":
        assert load_run("runs/assistant").current == "003-frank"
        assert json.loads(Path("assistant-model/config.json").read_text())["architectures"]
    if name == "corrector":
        assert {"correction", "changed"} <= json.loads(Path("corrected.jsonl").read_text().splitlines()[0]).keys()
    if name == "feedback":
        assert load_run("runs/loop").current == "001-feedback-1"
        with FeedbackStore.open("sqlite:///feedback.db") as store:
            assert not store.stats().waiting
    if name == "rewards":
        assert load_run("runs/courteous").current == load_run("runs/scored").current == "001-courteous"
    if name == "compare":
        assert Path("runs/compare/test.html").exists()


def test_a_tutorial_works_shortened(tutorial):
    reader(tutorial, SHORTER[tutorial]).run()
    check(tutorial)


@pytest.mark.slow
def test_a_tutorial_works_as_it_is_written(tutorial):
    reader(tutorial).run()
    check(tutorial)


def test_the_notebook_works_shortened_and_has_its_outputs(tmp_path, monkeypatch):
    notebook = json.loads((ROOT / "examples" / "policy_change" / "policy_change.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] and cell["outputs"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    assert "TRAIN, TEST = 160, 60" in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("TRAIN, TEST = 160, 60", "TRAIN, TEST = 16, 4"), "notebook", "exec"), {})
    assert load_run("runs/notebook").current == "003-frank"
    assert Path("runs/notebook-model/config.json").exists()
