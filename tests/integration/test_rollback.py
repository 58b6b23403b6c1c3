"""Going back to an earlier version, and learning on from there."""

import json
import os
import shutil
from functools import partial

import pytest
from filelock import FileLock
from safetensors.torch import load_file

from cli_for_tests import run as cli
from everalign.errors import InputError
from everalign.learning.promotion import Rollback, rollback
from everalign.learning.run_data import load_run
from everalign.methods import ExperienceReplay, LifeAlign, SequentialFineTuning
from learner_for_tests import held_out, make_learner, same_weights, save_model, task_rows, tasks
from runs_for_tests import write_run
from tiers_for_tests import slow_but

METHODS = {"lifealign": partial(LifeAlign, space="product"), "er": ExperienceReplay, "seqft": SequentialFineTuning}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    make_learner(model, output, LifeAlign(space="product")).learn_all(tasks("warm", "brief"))
    return output


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run of two tasks."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def written(tmp_path):
    """A run of three versions that nobody has learned."""
    return write_run(tmp_path / "written")


def resume(model, run, method=None):
    return make_learner(model, run, method or LifeAlign(space="product"), resume=True)


def weights(run, version):
    return load_file(run / "versions" / version / "adapter" / "adapter_model.safetensors")


def refuse(run, version):
    """Let the manifest say that the gate has refused a version."""
    path = run / "versions" / version / "manifest.json"
    verdict = {"tolerance": 0.02, "promoted": False, "fell": {"harmless": [0.8, 0.4]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gate": verdict}))


# ---- on disk ----


def test_without_a_version_the_parent_becomes_current(written):
    assert rollback(written) == Rollback("003-3", "002-2", ("003-3",), ())
    assert (written / "current").read_text() == "002-2\n"
    read = load_run(written)
    ids = [[one.id for one in part] for part in (read.versions, read.off_lineage)]
    assert ids == [["001-1", "002-2"], ["003-3"]]
    assert read.scores().learned == ["harmless", "helpful"]
    assert [rollback(written).current for _ in range(2)] == ["001-1", "000"]
    with pytest.raises(InputError, match="the base model is current: there is nothing to roll back"):
        rollback(written)


@pytest.mark.parametrize("name", ["001-1", "001"])
def test_a_version_is_named_by_its_folder_or_its_number(written, name):
    assert rollback(written, name) == Rollback("003-3", "001-1", ("002-2", "003-3"), ())


def test_a_version_that_was_rolled_back_can_be_taken_back(written):
    rollback(written, "000")
    assert rollback(written, "002-2") == Rollback("000", "002-2", (), ("001-1", "002-2"))
    assert rollback(written, "002-2") == Rollback("002-2", "002-2", (), ())
    assert [load_run(written).status(version) for version in load_run(written).all_versions] == [
        "",
        "promoted",
        "rolled back",
    ]


def test_a_version_beside_the_line_can_be_gone_over_to(tmp_path):
    path = write_run(tmp_path / "run", parents=["000", "001-1", "001-1"])
    assert rollback(path, "002-2") == Rollback("003-3", "002-2", ("003-3",), ("002-2",))


def test_what_the_gate_has_refused_is_taken_by_force_only(written):
    rollback(written, "002-2")
    refuse(written, "003-3")
    with pytest.raises(InputError, match=r"003-3 was refused by the gate \(harmless fell from 80\.0% to 40\.0%\)"):
        rollback(written, "003-3")
    assert load_run(written).status(load_run(written).all_versions[2]) == "refused by the gate"
    assert rollback(written, "003-3", force=True).current == "003-3"
    assert load_run(written).status(load_run(written).all_versions[2]) == "promoted"


@pytest.mark.parametrize("name", ["004-4", "1", "", "003", "../run"])
def test_a_version_that_does_not_exist_is_refused(tmp_path, name):
    path = write_run(tmp_path / "run", {"a": [0.5, [0.8, 0.8]], "b": [0.5, [0.6, 0.7]]})
    with pytest.raises(InputError, match=f"has no version {name!r}: choose one of 000, 001-1, 002-2"):
        rollback(path, name)
    assert (path / "current").read_text() == "002-2\n"


@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_damaged_version_is_refused_by_the_name_of_the_file(run, how):
    path = run / "versions" / "001-warm" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(b"x") if how == "changed" else path.unlink()
    with pytest.raises(InputError, match=r"001-warm/adapter/adapter_model\.safetensors: missing or changed since"):
        rollback(run)
    assert load_run(run).current == "002-brief"


@pytest.mark.parametrize("method", ["mtl", "stl"])
def test_versions_that_do_not_build_on_each_other_are_not_gone_back_to(tmp_path, method):
    path = write_run(tmp_path / "run", method=method, parents=["000"] * 3 if method == "stl" else None)
    with pytest.raises(InputError, match=f"the versions of {method} do not build on each other.*export the one"):
        rollback(path, "001-1")


def test_a_folder_that_is_no_run_is_left_as_it_is(tmp_path):
    with pytest.raises(InputError, match="is not a run directory"):
        rollback(tmp_path)
    with pytest.raises(InputError, match="is not a run directory"):
        rollback(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_process_learns_into_is_left_alone(written):
    with FileLock(written / ".lock"), pytest.raises(InputError, match="another process is learning into this run"):
        rollback(written)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_in_the_middle_the_one_or_the_other_version_is_current(run, monkeypatch, moment):
    """An interrupted task's checkpoints go first: they go on from the version that is left."""
    (run / "work" / "003-calm").mkdir(parents=True)
    replace = os.replace

    def kill(source, target):
        if moment == "after":
            replace(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            rollback(run)
    assert load_run(run).current == ("002-brief" if moment == "before" else "001-warm")
    assert not (run / "work").exists()
    assert rollback(run, "001").current == "001-warm"


def test_checkpoints_of_what_is_left_out_are_not_gone_on_with(run):
    """Else the next resume would take a version for one that a kill kept from being promoted."""
    (run / "current").write_text("001-warm\n")
    (run / "work" / "002-brief").mkdir(parents=True)
    assert load_run(run).current == "002-brief"
    assert rollback(run).current == "001-warm"
    assert load_run(run).current == "001-warm"


# ---- learning on ----


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory):
    """Runs that learn warm, then calm, by the name of their method."""
    runs = {}

    def make(name):
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("straight") / "run"
            make_learner(model, runs[name], METHODS[name]()).learn_all(tasks("warm", "calm"))
        return runs[name]

    return make


@pytest.mark.parametrize(
    ("name", "where"),
    slow_but(
        [("lifealign", "memory"), ("lifealign", "disk"), ("er", "disk")],
        [(name, where) for name in METHODS for where in ("memory", "disk")],
    ),
)
def test_learning_goes_on_as_if_what_was_rolled_back_had_never_been(model, tmp_path, straight, name, where):
    run = tmp_path / "run"
    learner = make_learner(model, run, METHODS[name]())
    learner.learn_all(tasks("warm", "brief"))
    if where == "memory":
        assert learner.rollback().left_out == ("002-brief",)
    else:
        rollback(run)
        learner = resume(model, run, METHODS[name]())
    learner.learn(task_rows("calm"), "calm", held_out("calm"))
    read = load_run(run)
    ids = [[one.id for one in part] for part in (read.versions, read.off_lineage)]
    assert ids == [["001-warm", "003-calm"], ["002-brief"]]
    assert same_weights(weights(run, "003-calm"), weights(straight(name), "002-calm"))
    for file in ("method.safetensors", "replay.jsonl"):
        ours, theirs = run / "versions" / "003-calm" / file, straight(name) / "versions" / "002-calm" / file
        assert ours.exists() == theirs.exists()
        assert not ours.exists() or ours.read_bytes() == theirs.read_bytes()
    # Forward again: what lies beside the line is whole.
    learner.rollback("002-brief")
    assert [version.task for version in learner.run.versions] == ["warm", "brief"]


@pytest.mark.parametrize("name", slow_but(["lifealign", "stl"], METHODS))
def test_back_at_the_base_model_a_run_begins_anew(model, run, tmp_path, straight, name):
    fresh = tmp_path / "fresh"
    learner = make_learner(model, fresh, METHODS[name]())
    learner.learn(task_rows("brief"), "brief", held_out("brief"))
    learner.rollback("000")
    assert learner.scores.learned == []
    learner.learn_all(tasks("warm", "calm"))
    assert same_weights(weights(fresh, "003-calm"), weights(straight(name), "002-calm"))


def test_a_rolled_back_task_can_be_learned_again_from_other_rows(model, run):
    learner = resume(model, run)
    learner.rollback()
    learner.learn(task_rows("brief", 12), "brief", held_out("brief"))
    assert [version.id for version in learner.run.versions] == ["001-warm", "003-brief"]
    with pytest.raises(InputError, match="'brief' was learned from other rows already"):
        learner.learn(task_rows("brief"), "brief", held_out("brief"))


def test_a_test_set_that_came_while_a_version_was_left_out_does_not_count_for_it(model, tmp_path):
    """Its score right after learning is not known."""
    learner = make_learner(model, tmp_path / "run", LifeAlign(space="product"))
    learner.learn(task_rows("warm"), "warm")
    learner.rollback()
    learner.learn(task_rows("warm"), "warm", held_out("warm"))
    learner.rollback("001-warm")
    learner.learn(task_rows("calm"), "calm", held_out("calm"))
    scores = learner.scores
    assert [version.id for version in learner.run.versions] == ["001-warm", "003-calm"]
    assert [row[0] for row in scores.matrix] == [None, None]
    assert scores.matrix[1][1] is not None


def test_a_version_that_a_kill_left_unpromoted_is_not_touched_while_another_process_learns(model, run):
    (run / "current").write_text("001-warm\n")
    (run / "work" / "002-brief").mkdir(parents=True)
    with FileLock(run / ".lock"), pytest.raises(InputError, match="another process is learning into this run"):
        resume(model, run)
    assert (run / "current").read_text() == "001-warm\n"


def test_a_learner_whose_run_was_rolled_back_by_another_is_refused(model, run):
    learner = resume(model, run)
    rollback(run)
    for call in (lambda: learner.learn(task_rows("calm"), "calm"), learner.rollback):
        with pytest.raises(InputError, match="was continued by another learner: open it again"):
            call()


# ---- on the command line ----


def test_the_verb_says_what_became_current_and_what_was_left_out(written, capsys):
    code, out, _ = cli(capsys, "rollback", str(written), "001-1")
    assert (code, [line.split() for line in out.splitlines()]) == (
        0,
        [["current", "001-1"], ["rolled", "back", "002-2,", "003-3"]],
    )
    code, out, _ = cli(capsys, "rollback", str(written), "--json")
    assert (code, json.loads(out)) == (
        0,
        {"run": str(written), "before": "001-1", "current": "000", "left_out": ["001-1"], "taken_back": []},
    )
    assert "000 (the base model)" in cli(capsys, "rollback", str(written), "000")[1]
    out = cli(capsys, "versions", str(written), "--json")[1]
    assert [row["status"] for row in json.loads(out)["versions"]] == ["rolled back"] * 3
    assert cli(capsys, "report", str(written), "--output", str(written / "report.html"))[0] == 0


def test_the_verb_refuses_in_one_line(written, capsys):
    refuse(written, "002-2")
    code, out, err = cli(capsys, "rollback", str(written))
    assert (code, out) == (2, "")
    assert err.startswith("error: 002-2 was refused by the gate")
    assert cli(capsys, "rollback", str(written), "--force")[0] == 0
    assert cli(capsys, "rollback", str(written), "009")[0] == 2
    assert cli(capsys, "rollback", str(written / "nowhere"))[0] == 2
