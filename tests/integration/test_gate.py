"""The gate: what made earlier tasks worse is refused and leaves no trace in what is learned afterwards."""

import json
import math
import os
import random

import pytest
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar

from everalign.errors import EveralignError, GateRefusedError, InputError, NotEnoughEvidenceError
from everalign.learning.promotion import announcement, compare_shares, judge, rollback, rows_needed
from everalign.learning.recipe import Recipe
from everalign.learning.run_data import load_run
from everalign.methods import METHODS, ExperienceReplay, LifeAlign, MultiTask, SequentialFineTuning, SingleTask
from learner_for_tests import adapter_weights, held_out, make_learner, same_weights, save_model, swapped, task_rows
from tiers_for_tests import slow_but

PAIRS = 12
"""Held-out pairs of a task: with a tolerance of 0.25, the fewest that can show anything are 9."""

SEQUENTIAL = {
    "lifealign": lambda: LifeAlign(space="product"),
    "lifealign in factors": lambda: LifeAlign(space="factors"),
    "er": ExperienceReplay,
    "seqft": SequentialFineTuning,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"


def gated(model, output, method=None, **arguments):
    return make_learner(model, output, method or LifeAlign(space="product"), **{"gate": 0.25, **arguments})


def learn(learner, name):
    return learner.learn(task_rows(name), name, held_out(name, PAIRS))


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


def outcomes(right, wrong=0):
    return [1.0] * right + [0.0] * wrong


@pytest.mark.parametrize(
    ("tolerance", "before", "after", "outcome"),
    [
        (0.02, outcomes(200), outcomes(200), "promoted"),
        (0.02, outcomes(3), outcomes(3), "not enough evidence"),  # 100 % before and after say nothing
        (0.02, outcomes(132), outcomes(132), "not enough evidence"),
        (0.02, outcomes(133), outcomes(133), "promoted"),
        (0.02, outcomes(40), outcomes(38, 2), "not enough evidence"),  # 2 of 40 may be chance
        (0.02, outcomes(40), outcomes(20, 20), "refused"),
        (0.02, outcomes(400), outcomes(380, 20), "refused"),
        (0.02, outcomes(20, 20), outcomes(40), "promoted"),  # what is better fell for certain by no more
        (0.1, outcomes(100), outcomes(96, 4), "promoted"),
        (0.1, outcomes(100), outcomes(92, 8), "not enough evidence"),
        (0.1, outcomes(100), outcomes(75, 25), "refused"),
        (0.0, outcomes(1000), outcomes(1000), "not enough evidence"),
        (0.0, outcomes(10, 90), outcomes(90, 10), "promoted"),
        (1.0, outcomes(1), outcomes(0, 1), "promoted"),
    ],
)
def test_held_out_rows_say_promoted_refused_or_not_enough(tolerance, before, after, outcome):
    verdict = judge(tolerance, {"a": compare_shares(before, after)})
    assert (verdict.outcome, verdict.promoted) == (outcome, outcome == "promoted")
    assert (verdict.fell == {"a": (sum(before) / len(before), sum(after) / len(after))}) == (outcome == "refused")
    assert "rows)" in announcement(verdict)  # with its interval


def test_one_task_that_fell_and_one_that_is_not_sure_count_whatever_the_others_say():
    sure = compare_shares(outcomes(300), outcomes(300))
    unsure, fell = compare_shares(outcomes(5), outcomes(5)), compare_shares(outcomes(50), outcomes(0, 50))
    assert judge(0.02, {"a": sure}).promoted
    assert judge(0.02, {"a": sure, "b": unsure}).outcome == "not enough evidence"
    assert judge(0.02, {"a": sure, "b": unsure, "c": fell}).outcome == "refused"
    assert judge(0.02, {}).outcome == "not enough evidence"
    assert judge(0.02, {"a": sure}, unchanged=True).outcome == "not enough evidence"


@pytest.mark.parametrize(("lost", "won", "n"), [(5, 1, 40), (0, 7, 30), (12, 12, 60), (3, 0, 100), (2, 9, 20)])
def test_intervals_end_where_the_score_test_does(lost, won, n):
    """The restricted likelihood is maximised numerically, and the statistic set up as it is defined."""
    before = outcomes(lost, won) + outcomes(n - lost - won)
    after = outcomes(0, lost) + outcomes(won) + outcomes(n - lost - won)
    found = compare_shares(before, after)
    for end, z in ((found.low, 1.6448536), (found.high, -1.6448536)):

        def against(share, end=end):
            cells = ((lost, share + end), (won, share), (n - lost - won, 1 - 2 * share - end))
            return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

        bounds = (max(0.0, -end), (1 - end) / 2)
        share = minimize_scalar(against, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        statistic = (lost - won - n * end) / math.sqrt(n * (2 * share + end - end**2))
        assert statistic == pytest.approx(z, abs=2e-3)


@pytest.mark.parametrize(("fall", "discordant", "n"), [(0.0, 0.1, 40), (0.05, 0.1, 60), (-0.1, 0.3, 25)])
def test_a_fall_is_below_the_interval_or_above_it_one_time_in_twenty(fall, discordant, n):
    rng = random.Random(0)
    lost, won = (discordant + fall) / 2, (discordant - fall) / 2
    missed = 0
    for _ in range(1000):
        drawn = rng.choices([(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)], [lost, won, 1 - discordant], k=n)
        found = compare_shares(*zip(*drawn, strict=True))
        missed += not found.low <= fall <= found.high
    assert 0.06 < missed / 1000 < 0.14


def test_rows_that_a_tolerance_needs():
    assert [rows_needed(tolerance) for tolerance in (0.02, 0.05, 0.25, 1.0)] == [133, 52, 9, 1]
    for tolerance in (0.02, 0.1):
        rows = rows_needed(tolerance)
        assert judge(tolerance, {"a": compare_shares(outcomes(rows), outcomes(rows))}).promoted
        assert not judge(tolerance, {"a": compare_shares(outcomes(rows - 1), outcomes(rows - 1))}).promoted


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


@pytest.mark.parametrize(
    ("name", "resumed"),
    slow_but(
        [("lifealign", True), ("seqft", True)],
        [(name, resumed) for name in SEQUENTIAL for resumed in (False, True)],
    ),
)
def test_a_refused_task_leaves_no_trace_in_what_is_learned_next(model, output, clean, name, resumed):
    learner = gated(model, output, SEQUENTIAL[name]())
    learn(learner, "warm")
    refusal = poison(learner)
    assert (refusal.version, refusal.exit_code, refusal.fell.keys()) == ("002-poison", 3, {"warm"})
    if resumed:
        learner = gated(model, output, SEQUENTIAL[name](), resume=True)
    learn(learner, "calm")
    run = load_run(output)
    ids = [[one.id for one in part] for part in (run.versions, run.off_lineage)]
    assert ids == [["001-warm", "003-calm"], ["002-poison"]]
    assert run.current == "003-calm"
    assert not (output / "work").exists()
    check_as_if_never_seen(output, clean(name))


def test_a_refused_first_task_leaves_the_base_model(model, output, clean):
    """The task's own accuracy counts: the base model prefers calm answers, and these rows teach the opposite."""
    learner = gated(model, output)
    with pytest.raises(GateRefusedError, match=r"001-panic was refused .*panic fell from 100\.0% .*000 stays current"):
        learner.learn(swapped("calm"), "panic", held_out("calm"))
    run = load_run(output)
    assert (run.current, run.versions, [one.id for one in run.off_lineage]) == ("000", [], ["001-panic"])
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
    first, second = load_run(output).all_versions
    gate = first.manifest.gate
    assert (gate.tolerance, gate.promoted, gate.fell, gate.outcome) == (0.25, True, {}, "promoted")
    assert gate.compared.keys() == {"warm"}
    assert gate.compared["warm"].rows == PAIRS
    assert second.manifest.gate.promoted is False
    assert second.manifest.gate.fell == {"warm": (1.0, 0.0)} == refusal.fell
    assert [load_run(output).status(version) for version in (first, second)] == ["promoted", "refused by the gate"]
    said = [line for line in lines if "gate:" in line]
    assert said[0].startswith("  gate: promoted, nothing fell by more than 25.0%\n    warm: +")
    assert said[1] == "  gate: refused, warm fell from 100.0% to 0.0% (change −100.0% to −63.2% in 12 rows)"


def test_without_a_gate_everything_is_promoted(model, output):
    learner = make_learner(model, output, LifeAlign(space="product"))
    learn(learner, "warm")
    learner.learn(swapped("warm"), "poison")
    run = load_run(output)
    assert (run.current, run.scores().matrix[1][0]) == ("002-poison", 0.0)
    assert [version.manifest.gate for version in run.versions] == [None, None]


def test_without_held_out_rows_nothing_is_promoted(model, output):
    with pytest.raises(NotEnoughEvidenceError, match="no task has held-out rows") as caught:
        gated(model, output).learn(task_rows("warm"), "warm")
    assert caught.value.exit_code == 4
    run = load_run(output)
    assert (run.current, run.status(run.all_versions[0])) == ("000", "not enough evidence")
    with pytest.raises(InputError, match="001-warm was not promoted for lack of evidence"):
        rollback(output, "001-warm")
    assert rollback(output, "001-warm", force=True).current == "001-warm"


def test_a_task_that_changes_nothing_is_not_promoted(model, output):
    learner = gated(model, output, options={"learning_rate": 1e-30})
    with pytest.raises(NotEnoughEvidenceError, match="nothing differs from the version before"):
        learn(learner, "warm")


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
    again = make_learner(model, output.with_name("other"), LifeAlign(space="product"), gate=0.25)
    learn(again, "warm")
    poison(again)
    bold = make_learner(model, output.with_name("other"), LifeAlign(space="product"), resume=True)
    bold.learn(swapped("warm"), "poison")
    assert load_run(output.with_name("other")).current == "003-poison"


def test_learn_all_stops_at_a_refused_task(model, output):
    learner = gated(model, output)
    given = [
        ("warm", task_rows("warm"), held_out("warm", PAIRS)),
        ("poison", swapped("warm"), None),
        ("calm", task_rows("calm"), held_out("calm", PAIRS)),
    ]
    with pytest.raises(GateRefusedError):
        learner.learn_all(given)
    assert [version.id for version in load_run(output).all_versions] == ["001-warm", "002-poison"]
    learner.learn_all([given[0], given[2]])
    assert load_run(output).current == "003-calm"


def test_rows_of_a_refused_task_may_be_tested_on(model, output):
    """The policy that goes on has not learned them."""
    learner = gated(model, output)
    learn(learner, "warm")
    poison(learner)
    learner.learn(task_rows("calm"), "calm", swapped("warm", PAIRS))
    with pytest.raises(InputError, match="in both the training and the test set"):
        learner.register_test("brief", task_rows("calm"))


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


@pytest.mark.parametrize(
    ("target", "moment"),
    slow_but(
        [("manifest.json", "before"), ("current", "before")],
        [
            (path, moment)
            for path in ("manifest.json", "versions/002-poison", "current")
            for moment in ("before", "after")
        ],
    ),
)
def test_a_kill_around_a_refusal_is_settled_as_the_gate_has_decided(model, output, clean, monkeypatch, target, moment):
    learner = gated(model, output)
    learn(learner, "warm")
    with monkeypatch.context() as patch:
        kill_at(patch, target, moment)
        with pytest.raises(KilledError):
            learner.learn(swapped("warm"), "poison")
    with pytest.raises(EveralignError, match="a task was interrupted"):
        learn(learner, "calm")
    assert [version.id for version in load_run(output).versions] == ["001-warm"]
    again = make_learner(model, output, LifeAlign(space="product"), resume=True)
    assert load_run(output).current == "001-warm"
    assert (output / "work").exists() == (not (output / "versions" / "002-poison").exists())
    learn(again, "calm")
    check_as_if_never_seen(output, clean("lifealign"))


@pytest.mark.parametrize("tolerance", [None, 0.25])
def test_a_kill_before_a_promotion_is_settled_as_the_gate_has_decided(model, output, clean, monkeypatch, tolerance):
    learner = make_learner(model, output, LifeAlign(space="product"), gate=tolerance)
    learn(learner, "warm")
    with monkeypatch.context() as patch:
        kill_at(patch, "current", "before")
        with pytest.raises(KilledError):
            learn(learner, "calm")
    read = load_run(output)
    assert (read.current, [one.id for one in read.off_lineage]) == ("002-calm", [])
    make_learner(model, output, LifeAlign(space="product"), resume=True)
    assert (output / "current").read_text() == "002-calm\n"
    assert not (output / "work").exists()
    check_as_if_never_seen(output, clean("lifealign"))


def test_a_first_task_whose_refusal_was_killed_is_not_taken_for_current(model, output, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, "current", "before")
        with pytest.raises(KilledError):
            gated(model, output).learn(swapped("calm"), "panic", held_out("calm"))
    read = load_run(output)
    assert (read.current, read.versions, [one.id for one in read.off_lineage]) == (None, [], ["001-panic"])
    gated(model, output, resume=True)
    assert (output / "current").read_text() == "000\n"
