"""The gate: what made earlier tasks worse is refused and leaves no trace in what is learned afterwards."""

import json
import os

import pytest
from safetensors.torch import load_file

from everalign.errors import EveralignError, GateRefusedError, InputError
from everalign.learning.gate import judge
from everalign.learning.recipe import Recipe
from everalign.learning.run_data import load_run
from everalign.methods import METHODS, ExperienceReplay, LifeAlign, MultiTask, SequentialFineTuning, SingleTask
from learner_for_tests import adapter_weights, held_out, make_learner, same_weights, save_model, swapped, task_rows

SEQUENTIAL = {
    "lifealign": LifeAlign,
    "lifealign in factors": lambda: LifeAlign(space="factors"),
    "er": ExperienceReplay,
    "seqft": SequentialFineTuning,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"


def gated(model, output, method=None, **arguments):
    return make_learner(model, output, method or LifeAlign(), **{"gate": 0.25, **arguments})


def learn(learner, name):
    return learner.learn(task_rows(name), name, held_out(name))


def poison(learner, rows=None):
    """Give it the poisoned task; returns the refusal."""
    with pytest.raises(GateRefusedError, match="was refused by the gate") as caught:
        learner.learn(swapped("warm") if rows is None else rows, "poison")
    return caught.value


@pytest.fixture(scope="module")
def clean(model, tmp_path_factory):
    """Runs of two tasks that never saw the poisoned one, by the name of their method."""
    runs = {}

    def make(name):
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("clean") / "run"
            learner = make_learner(model, runs[name], SEQUENTIAL[name]())
            for task in ("warm", "calm"):
                learn(learner, task)
        return runs[name]

    return make


def check_as_if_never_seen(run, clean):
    """The newest version is that of the clean run in all but its number and parent."""
    found, expected = load_run(run), load_run(clean)
    assert [version.task for version in found.versions] == ["warm", "calm"]
    assert found.scores() == expected.scores()
    folders = [folder / "versions" / read.versions[-1].id for folder, read in ((run, found), (clean, expected))]
    assert same_weights(*(load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders))
    for name in ("method.safetensors", "replay.jsonl", "consolidation.json"):
        files = [folder / name for folder in folders]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()
    for name, key in (("scores.json", "scores"), ("manifest.json", "seed")):
        first, second = (json.loads((folder / name).read_text())[key] for folder in folders)
        assert first == second


# ---- the verdict ----


@pytest.mark.parametrize(
    ("tolerance", "before", "after", "fell"),
    [
        (0.02, {"a": 0.96}, {"a": 0.94}, {}),  # 0.02000000000000002 in binary
        (0.02, {"a": 0.96}, {"a": 0.93}, {"a": (0.96, 0.93)}),
        (0.0, {"a": 0.9, "b": 0.5}, {"a": 0.9, "b": 0.6}, {}),
        (0.0, {"a": 0.9, "b": 0.5}, {"a": 0.89, "b": 1.0}, {"a": (0.9, 0.89)}),
        (0.1, {"a": 0.9}, {"a": 0.9, "future": 0.0}, {}),
        (1.0, {"a": 1.0}, {"a": 0.0}, {}),
        (0.5, {}, {"a": 0.0}, {}),
    ],
)
def test_a_task_is_promoted_unless_something_fell_by_more_than_the_tolerance(tolerance, before, after, fell):
    verdict = judge(tolerance, before, after)
    assert (verdict.promoted, verdict.fell) == (not fell, fell)


@pytest.mark.parametrize("tolerance", [-0.1, 2, 1.5, float("nan"), float("inf"), True, "0.1"])
def test_a_tolerance_that_is_no_share_is_refused_before_the_model_is_loaded(output, tolerance):
    with pytest.raises(InputError, match=r"gate must be a share from 0 to 1, such as 0\.02 for two points, found"):
        make_learner("no/such/model", output, gate=tolerance)
    assert not output.exists()


@pytest.mark.parametrize("kind", [MultiTask, SingleTask])
def test_methods_whose_versions_do_not_build_on_each_other_have_no_gate(output, kind):
    with pytest.raises(InputError, match=f"gate: the versions of {kind.name} do not build .*leave the gate out"):
        make_learner("no/such/model", output, kind(), gate=0.1)
    assert METHODS[kind.name] is kind


def test_a_recipe_holds_the_tolerance():
    recipe = Recipe.from_flags({"model": "m", "output": "o", "tasks": [{"name": "a", "train": "b"}], "gate": 0.02})
    assert recipe.learner_arguments()["gate"] == 0.02
    with pytest.raises(InputError, match="gate"):
        Recipe.from_flags({"gate": "loose"})


# ---- refused ----


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_refused_task_leaves_no_trace_in_what_is_learned_next(model, output, clean, name, resumed):
    learner = gated(model, output, SEQUENTIAL[name]())
    learn(learner, "warm")
    refusal = poison(learner)
    assert (refusal.version, refusal.exit_code, refusal.fell.keys()) == ("002-poison", 3, {"warm"})
    if resumed:
        learner = gated(model, output, SEQUENTIAL[name](), resume=True)
    learn(learner, "calm")
    run = load_run(output)
    assert ([version.id for version in run.versions], run.left_out) == (["001-warm", "003-calm"], ["002-poison"])
    assert run.current == "003-calm"
    assert not (output / "work").exists()
    check_as_if_never_seen(output, clean(name))


def test_a_refused_first_task_leaves_the_base_model(model, output, clean):
    """The task's own accuracy counts: the base model prefers calm answers, and these rows teach the opposite."""
    learner = gated(model, output)
    with pytest.raises(GateRefusedError, match=r"001-panic was refused .*panic fell from 100\.0% .*000 stays current"):
        learner.learn(swapped("calm"), "panic", held_out("calm"))
    run = load_run(output)
    assert (run.current, run.versions, run.left_out) == ("000", [], ["001-panic"])
    assert run.scores().matrix == []
    assert all(update.norm() == 0 for update in learner.policy.total().values())
    for task in ("warm", "calm"):
        learn(learner, task)
    assert same_weights(adapter_weights(output), adapter_weights(clean("lifealign")))


def test_the_verdict_is_on_record_and_announced(model, output):
    lines = []
    learner = gated(model, output, lines=lines)
    learn(learner, "warm")
    refusal = poison(learner)
    first, second = load_run(output).everything
    assert first.manifest.gate.model_dump() == {"tolerance": 0.25, "promoted": True, "fell": {}}
    assert second.manifest.gate.promoted is False
    assert second.manifest.gate.fell == {"warm": (1.0, 0.0)} == refusal.fell
    assert [load_run(output).status(version) for version in (first, second)] == ["promoted", "refused by the gate"]
    assert "  gate: promoted, no held-out accuracy of 1 fell by more than 25.0%" in lines
    assert "  gate: refused, warm fell from 100.0% to 0.0%" in lines


def test_without_a_gate_everything_is_promoted(model, output):
    learner = make_learner(model, output, LifeAlign())
    learn(learner, "warm")
    learner.learn(swapped("warm"), "poison")
    run = load_run(output)
    assert (run.current, run.scores().matrix[1][0]) == ("002-poison", 0.0)
    assert [version.manifest.gate for version in run.versions] == [None, None]


def test_without_held_out_rows_the_gate_says_that_it_has_seen_nothing(model, output):
    lines = []
    gated(model, output, lines=lines).learn(task_rows("warm"), "warm")
    assert lines[-1] == "  gate: promoted unseen, because no task has held-out rows"
    assert load_run(output).current == "001-warm"


def test_a_task_that_is_new_to_the_tests_is_compared_with_the_policy_before_it(model, output):
    """Its parent was never scored on it: the base model's zero-shot score would not do."""
    learner = gated(model, output, gate=0.0)
    learn(learner, "warm")
    taught = [{**row.to_json(), "prompt": f"x{i}?"} for i, row in enumerate(held_out("warm"))]
    with pytest.raises(GateRefusedError, match=r"002-cold .*cold fell from 100\.0% to"):
        learner.learn(swapped("warm"), "cold", taught)
    assert load_run(output).zero_shot["cold"].accuracy < 0.5


def test_a_refused_task_can_be_learned_again_from_other_rows_or_without_a_gate(model, output):
    learner = gated(model, output)
    learn(learner, "warm")
    poison(learner)
    learner.learn(task_rows("calm"), "poison")
    assert [version.id for version in learner.run.versions] == ["001-warm", "003-poison"]
    again = make_learner(model, output.with_name("other"), LifeAlign(), gate=0.25)
    learn(again, "warm")
    poison(again)
    bold = make_learner(model, output.with_name("other"), LifeAlign(), resume=True)
    bold.learn(swapped("warm"), "poison")
    assert load_run(output.with_name("other")).current == "003-poison"


def test_learn_all_stops_at_a_refused_task(model, output):
    learner = gated(model, output)
    given = [
        ("warm", task_rows("warm"), held_out("warm")),
        ("poison", swapped("warm"), None),
        ("calm", task_rows("calm"), held_out("calm")),
    ]
    with pytest.raises(GateRefusedError):
        learner.learn_all(given)
    assert [version.id for version in load_run(output).everything] == ["001-warm", "002-poison"]
    learner.learn_all([given[0], given[2]])
    assert load_run(output).current == "003-calm"


def test_rows_of_a_refused_task_may_be_tested_on(model, output):
    """The policy that goes on has not learned them."""
    learner = gated(model, output)
    learn(learner, "warm")
    poison(learner)
    learner.learn(task_rows("calm"), "calm", swapped("warm", 3))
    with pytest.raises(InputError, match="in both the training and the test set"):
        learner.announce_test("brief", task_rows("calm"))


# ---- killed in between ----


class KilledError(BaseException):
    """Passes every handler, as far as this process is concerned a kill."""


def kill_at(patch, target, moment):
    """Break off before or after a file or folder whose path ends in `target` is put in its place."""
    replace = os.replace

    def killing(source, path):
        if moment == "before" and str(path).endswith(target):
            raise KilledError
        replace(source, path)
        if str(path).endswith(target):
            raise KilledError

    patch.setattr(os, "replace", killing)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("target", ["manifest.json", "versions/002-poison", "current"])
def test_a_kill_around_a_refusal_is_settled_as_the_gate_has_decided(model, output, clean, monkeypatch, target, moment):
    learner = gated(model, output)
    learn(learner, "warm")
    with monkeypatch.context() as patch:
        kill_at(patch, target, moment)
        with pytest.raises(KilledError):
            learner.learn(swapped("warm"), "poison")
    with pytest.raises(EveralignError, match="a task was broken off in the middle"):
        learn(learner, "calm")
    assert [version.id for version in load_run(output).versions] == ["001-warm"]
    again = make_learner(model, output, LifeAlign(), resume=True)
    assert load_run(output).current == "001-warm"
    assert (output / "work").exists() == (not (output / "versions" / "002-poison").exists())
    learn(again, "calm")
    check_as_if_never_seen(output, clean("lifealign"))


@pytest.mark.parametrize("tolerance", [None, 0.25])
def test_a_kill_before_a_promotion_is_settled_as_the_gate_has_decided(model, output, clean, monkeypatch, tolerance):
    learner = make_learner(model, output, LifeAlign(), gate=tolerance)
    learn(learner, "warm")
    with monkeypatch.context() as patch:
        kill_at(patch, "current", "before")
        with pytest.raises(KilledError):
            learn(learner, "calm")
    read = load_run(output)
    assert (read.current, read.left_out) == ("002-calm", [])
    make_learner(model, output, LifeAlign(), resume=True)
    assert (output / "current").read_text() == "002-calm\n"
    assert not (output / "work").exists()
    check_as_if_never_seen(output, clean("lifealign"))


def test_a_first_task_whose_refusal_was_killed_is_not_taken_for_current(model, output, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, "current", "before")
        with pytest.raises(KilledError):
            gated(model, output).learn(swapped("calm"), "panic", held_out("calm"))
    read = load_run(output)
    assert (read.current, read.versions, read.left_out) == (None, [], ["001-panic"])
    gated(model, output, resume=True)
    assert (output / "current").read_text() == "000\n"
