"""Comparisons of benches on made-up records: intervals around the very numbers of the runs, marks, what is left out."""

import random
from io import StringIO
from statistics import fmean
from types import SimpleNamespace

import pytest
from rich.console import Console

from everalign.bench.comparison import compare, to_json
from everalign.bench.phases import _limits
from everalign.bench.records import METRICS, Matrix, Record
from everalign.bench.report import headline
from everalign.bench.tables import outcome_tables

TASKS = ("a", "b", "c")
PAIRS = 40
VALUE = {"1": 1.0, "0": 0.0, "=": 0.5}


def outcomes(rng, share):
    return "".join("=" if rng.random() < 0.05 else "01"[rng.random() < share] for _ in range(PAIRS))


def share(text):
    return fmean(VALUE[one] for one in text)


def record(name, order, seed, level, regime="sequential"):
    """A run whose scores are those of its pairs."""
    rng = random.Random(f"{name}/{order}/{seed}")
    pairs, matrix = {}, [[0.5] * 3 for _ in range(3)]
    for j, task in enumerate(order):
        learned, final = outcomes(rng, level + 0.1), outcomes(rng, level)
        if j == 2 or regime == "separate":
            learned = final
        pairs[task] = {"learned": None if regime == "joint" else learned, "final": final}
        for i in range(3):
            matrix[i][j] = share(final) if i == 2 else share(learned) if i == j else rng.random()
    if regime != "sequential":
        kept = {"joint": lambda i, j: i == 2, "separate": lambda i, j: i == j}[regime]
        matrix = [[score if kept(i, j) else None for j, score in enumerate(row)] for i, row in enumerate(matrix)]
        if regime == "separate":
            for j, task in enumerate(order):
                matrix[j][j] = share(pairs[task]["final"])
    kept_bytes = [{"task": task, "adapter": 300, "state": 30, "buffer": 3 * i} for i, task in enumerate(order, 1)]
    return Record.model_validate(
        {
            "format": 1,
            "contender": name,
            "model": "m",
            "order": list(order),
            "seed": seed,
            "part": "test",
            "choice": {},
            "code": "",
            "created": "",
            "tasks": list(order),
            "regime": regime,
            "scores": {metric: {"zero_shot": [0.5] * 3, "matrix": matrix} for metric in METRICS},
            "pairs": dict.fromkeys(("accuracy", "reward_accuracy"), pairs),
            "cost": {
                "seconds": 2.0,
                "processor_seconds": 1.0 + seed,
                "peak_bytes": 100 + seed,
                "kept": kept_bytes,
                "resumed": seed == 9,
            },
        }
    )


FLAT = Matrix(zero_shot=[0.5] * 3, matrix=[[0.5] * 3] * 3)


def runs(name, level, seeds=range(4), regime="sequential"):
    return [record(name, order, seed, level, regime) for order in ("abc", "cab") for seed in seeds]


def test_estimates_are_the_means_of_the_runs_and_intervals_lie_around_them():
    records = {"er": runs("er", 0.6), "new": runs("new", 0.8)}
    found = compare("m", records, "er")
    for number in ("last", "backward_transfer"):
        for name, ones in records.items():
            one = found.contenders[name].numbers["accuracy"][number]
            assert one.mean == pytest.approx(fmean(run.number(f"accuracy.{number}") for run in ones))
            assert one.low < one.mean < one.high
        difference = found.contenders["new"].numbers["accuracy"][number].difference
        means = [found.contenders[name].numbers["accuracy"][number].mean for name in ("new", "er")]
        assert difference.value == pytest.approx(means[0] - means[1])
        assert difference.low < difference.value < difference.high
    assert found.contenders["er"].numbers["accuracy"]["last"].difference is None
    last = found.contenders["new"].numbers["accuracy"]["last"]
    assert last.difference.low > 0
    # All of eight differences are of one sign.
    assert last.p_value == last.p_holm == pytest.approx(2 / 2**8)


def test_two_that_learn_nothing_are_compared_without_a_test():
    """Six equal differences would give p = 0.03."""

    def same(name, level):
        first = record(name, "abc", 0, level, "joint")
        cost = first.cost.model_copy(update={"kept": []})
        return [first.model_copy(update={"seed": seed, "cost": cost}) for seed in range(6)]

    found = compare("m", {"plain": same("plain", 0.5), "told": same("told", 0.9), "er": runs("er", 0.9)}, "plain")
    last = found.contenders["told"].numbers["accuracy"]["last"]
    assert last.difference.low > 0
    assert (last.p_value, last.p_holm) == (None, None)
    outcome = SimpleNamespace(models=[compare("m", {"plain": same("plain", 0.5), "told": same("told", 0.9)}, "plain")])
    assert headline(outcome).endswith("points against plain, which no test over runs can judge: neither learns.")
    # One that learns varies, and is tested as before.
    assert found.contenders["er"].numbers["accuracy"]["last"].p_holm is not None


def test_contenders_that_end_alike_are_all_named():
    records = {name: runs("one", 0.8) for name in ("er", "x", "y")} | {"low": runs("low", 0.3)}
    found = headline(SimpleNamespace(models=[compare("m", records, "er")]))
    assert found.startswith("On m, er, x and y end highest in accuracy: ")
    assert found.endswith("%.")


def test_a_bench_in_which_nothing_was_learned_says_so():
    flat = [one.model_copy(update={"scores": dict.fromkeys(METRICS, FLAT)}) for one in runs("er", 0.5)]
    said = "But nothing was learned: "
    assert said in headline(SimpleNamespace(models=[compare("m", {"er": flat}, "er")]))
    assert said not in headline(SimpleNamespace(models=[compare("m", {"er": flat, "x": runs("x", 0.8)}, "er")]))


def test_tasks_are_listed_as_they_were_learned():
    found = compare("m", {"er": [record("er", "cab", 0, 0.8)]}, "er")
    assert list(found.zero_shot_tasks["accuracy"]) == ["c", "a", "b"]
    assert list(found.contenders["er"].tasks["accuracy"]) == ["c", "a", "b"]


def test_p_values_are_corrected_for_the_number_of_contenders():
    found = compare("m", {"er": runs("er", 0.6), "x": runs("x", 0.8), "y": runs("y", 0.85)}, "er")
    values = [found.contenders[name].numbers["accuracy"]["last"] for name in ("x", "y")]
    assert [one.p_holm for one in values] == pytest.approx([2 * one.p_value for one in values])


def test_only_runs_of_both_are_compared():
    found = compare("m", {"er": runs("er", 0.6, range(2)), "new": runs("new", 0.8)}, "er")
    assert (found.contenders["new"].runs, found.contenders["new"].paired) == (8, 4)
    alone = compare("m", {"er": [], "new": runs("new", 0.8)}, "er")
    assert alone.baseline is None
    assert alone.contenders["new"].numbers["accuracy"]["last"].difference is None


@pytest.mark.parametrize("regime", ["joint", "separate"])
def test_a_regime_without_backward_transfer_has_none(regime):
    records = {"er": runs("er", 0.6), "mtl": runs("mtl", 0.8, regime=regime)}
    numbers = compare("m", records, "er").contenders["mtl"].numbers["accuracy"]
    assert numbers["backward_transfer"].mean is None
    assert numbers["last"].difference.value > 0
    assert numbers["worst"].mean <= numbers["last"].mean


def test_a_task_that_is_left_out_counts_for_nothing():
    records = {name: [run.without(["b"]) for run in runs(name, 0.7)] for name in ("er", "new")}
    found = compare("m", records, "er")
    assert list(found.contenders["er"].tasks["accuracy"]) == ["a", "c"]
    for number in ("last", "backward_transfer"):
        one = found.contenders["new"].numbers["accuracy"][number]
        assert one.low < one.mean < one.high
        mean = fmean(run.number(f"accuracy.{number}") for run in records["new"])
        base = fmean(run.number(f"accuracy.{number}") for run in records["er"])
        assert one.difference.value == pytest.approx(mean - base)


def test_costs_leave_interrupted_runs_out_and_count_what_is_needed_to_go_on():
    costs = compare("m", {"er": runs("er", 0.6, (1, 9))}, "er").contenders["er"].costs
    assert (costs.processor_seconds, costs.peak_bytes) == (2.0, 109)
    assert (costs.adapter, costs.state, costs.buffer, costs.kept) == (100, 10, 3, 113)
    separate = compare("m", {"stl": runs("stl", 0.6, (1,), "separate")}, None).contenders["stl"].costs
    assert (separate.adapter, separate.state) == (300, 30)


def test_pairs_that_were_cut_to_different_lengths_are_no_secret():
    """As where learned prompts leave a model less room."""

    def cut(name, length):
        facts = {"settings": {"max_length": length}}
        return [run.model_copy(update={"facts": facts}) for run in runs(name, 0.6)]

    assert _limits(compare("m", {"er": cut("er", 128), "new": cut("new", 128)}, "er"), []) == []
    (note,) = _limits(compare("m", {"er": cut("er", 128), "l2p": cut("l2p", 103)}, "er"), [])
    assert note.startswith("m: held-out pairs are not the same for all, but cut to max_length tokens, er 128, l2p 103")


def test_a_contender_with_too_few_runs_for_a_test_is_named():
    """As where some of its runs diverged, whatever the others have."""
    records = {"er": runs("er", 0.6), "new": runs("new", 0.8), "torn": runs("torn", 0.7, range(2))}
    end = "to compare with the baseline's: no test over runs gives p below"
    assert _limits(compare("m", records, "er"), []) == [f"m: 4 runs of torn {end} 0.125"]
    few = {name: ones[:1] for name, ones in records.items()}
    assert _limits(compare("m", few, "er"), []) == [f"m: 1 run a contender {end} 1"]
    # Runs in places where the baseline failed are compared with nothing.
    apart = {"er": records["er"], "torn": [record("torn", "bca", 0, 0.7)]}
    assert _limits(compare("m", apart, "er"), []) == [f"m: 0 runs a contender {end} 1"]
    for alone in ({"er": records["er"][:1]}, {"new": records["new"][:1]}):
        assert _limits(compare("m", alone, "er"), []) == []


def test_a_narrow_terminal_cuts_nothing_off():
    records = {"er": runs("er", 0.6), "experience-replay": runs("experience-replay", 0.8)}
    outcome = SimpleNamespace(models=[compare("m", records, "er")], notes=["m: a note"])
    last = outcome.models[0].contenders["experience-replay"].numbers["accuracy"]["last"]
    for width in (80, 200):
        file = StringIO()
        for table in outcome_tables(outcome):
            Console(width=width, file=file).print(table)
        shown = file.getvalue()
        assert "…" not in shown
        assert shown.count("│ experience-replay ") == 8
        assert f"{100 * last.mean:.1f}" in shown
        assert all(text in shown for text in ("BWT: mean change", "CPU seconds", "settings", "m: a note"))


def test_everything_can_be_written_as_json():
    found = to_json(compare("m", {"er": runs("er", 0.6), "new": runs("new", 0.8)}, "er"))
    last = found["contenders"]["new"]["numbers"]["accuracy"]["last"]
    assert set(last) == {"mean", "deviation", "low", "high", "difference", "p_value", "p_holm"}
    assert set(last["difference"]) == {"value", "low", "high"}
    assert found["zero_shot"]["accuracy"] == {"a": 0.5, "b": 0.5, "c": 0.5}
