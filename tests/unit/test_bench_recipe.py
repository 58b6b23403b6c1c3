"""Recipes of benches: what would compare unlike things, or be ignored, is refused; what is replaced is said."""

from pathlib import Path

import pytest
import yaml

from everalign.bench.recipe import Bench
from everalign.errors import InputError

TASKS = {name: {"train": f"demo:{name}", "test": f"demo:{name}"} for name in ("careful", "frank")}
SCORED = {name: {**task, "scored": {"samples": f"{name}.jsonl"}} for name, task in TASKS.items()}
ER = {"method": "er", "objective": "dpo"}
RATES = {"learning_rate": [1e-3, 2e-3]}


def bench(folder: Path, contenders=None, **changes) -> Bench:
    content = {
        "models": ["tiny"],
        "tasks": TASKS,
        "seeds": [0],
        "training": {"max_length": 128, "epochs": 1.0},
        "contenders": contenders or {"x": ER},
        **changes,
    }
    path = folder / "bench.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return Bench.read(path)


REFUSED = [
    ({"x": {**ER, "training": {"max_length": 64}}}, {}, "x.training: max_length stands in the shared training"),
    ({"x": {**ER, "tune": {"max_length": [64, 128]}}}, {}, "x.tune: max_length stands in the shared training"),
    ({"x": {**ER, "training": {"test_limit": 5}}}, {}, "x.training: test_limit stands outside, beside seeds"),
    ({"x": {**ER, "preset": "paper"}}, {"training": None}, "x.preset: paper would cut the held-out pairs of this"),
    ({"x": {**ER, "preset": "papre"}}, {}, "x.preset: unknown preset 'papre'"),
    (
        {"x": {**ER, "training": {"learning_rate": 1e-4}, "tune": RATES}},
        {},
        "x.training.learning_rate: is given here and tuned under `tune`: leave one of them out",
    ),
    (
        {"x": {"method": {"name": "er", "replay": 0.5}, "tune": {"replay": [0.1, 0.2]}}},
        {},
        "x.method.replay: is given here and tuned",
    ),
    ({"x": {**ER, "tune": {"objective": ["dpo", "sft"]}}}, {}, "x.objective: is given here and tuned"),
    (
        {"x": {"method": "er", "tune": {"objective": ["dpo", "correction"]}}},
        {},
        "x.tune.objective: a bench learns from preferences or scored rows, and correction cannot",
    ),
    ({"x": {"method": "er", "objective": "var"}}, {}, "x.objective: var learns from answers with rewards: name the"),
    (
        {"x": {"method": "er", "objective": "var", "scored": "samples"}},
        {"tasks": {**SCORED, "frank": TASKS["frank"]}},
        "x.scored: tasks.frank.scored has no file 'samples', but none",
    ),
    ({"x": {**ER, "scored": "samples"}}, {"tasks": SCORED}, "x.scored: dpo learns from pairs and would ignore the"),
    ({"x": {"method": "er", "scored": "samples"}}, {"tasks": SCORED}, "x.scored: fpo learns from pairs and would"),
    (None, {"tasks": SCORED}, "tasks.careful.scored.samples: no contender learns from it: leave it out"),
    (
        {"x": {"method": "er", "objective": "snkl", "scored": "samples"}},
        {"tasks": SCORED, "label": "domain"},
        "x.scored: scored rows have no labels here",
    ),
    (
        {
            "x": {
                "method": "er",
                "objective": "var",
                "scored": "samples",
                "weighting": {"temperature": 1.0},
                "tune": {"temperature": [0.5, 1.0]},
            }
        },
        {"tasks": SCORED},
        "x.weighting.temperature: is given here and tuned",
    ),
    (None, {"tuning": {"seeds": [1000, 1000]}}, "tuning.seeds: the seed 1000 is given twice"),
    (None, {"seeds": [0, 0]}, "seeds: the seed 0 is given twice"),
]


@pytest.mark.parametrize(("contenders", "changes", "message"), REFUSED)
def test_what_would_be_ignored_or_unlike_is_refused_with_its_line(tmp_path, contenders, changes, message):
    with pytest.raises(InputError, match=r"bench\.yaml:\d+: ") as error:
        bench(tmp_path, contenders, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize("method", ["mtl", "stl"])
def test_a_measure_that_a_method_cannot_have_chooses_nothing(tmp_path, method):
    contenders = {"x": {**ER, "tune": RATES}, "y": {"method": method, "objective": "dpo", "tune": RATES}}
    wanted = ["accuracy.last", "accuracy.backward_transfer"]
    with pytest.raises(InputError, match=r"tune_on: contenders\.y cannot be tuned on accuracy\.backward_transfer"):
        bench(tmp_path, contenders, tune_on=wanted).check_contenders()
    bench(tmp_path, contenders).check_contenders()
    # With a single trial there is nothing to choose.
    one = {"x": ER, "y": {"method": method, "objective": "dpo"}}
    bench(tmp_path, one, tune_on=wanted).check_contenders()
    alone = bench(tmp_path, {"x": contenders["x"]}, tasks={"careful": TASKS["careful"]}, tune_on=wanted)
    with pytest.raises(InputError, match="which there is none of a single task"):
        alone.check_contenders()


def test_an_instruction_is_not_tuned_by_forgetting(tmp_path):
    told = {"told": {"method": "none", "tune": {"system": ["Be brief.", "Be kind."]}}}
    with pytest.raises(InputError, match=r"contenders\.told cannot be tuned on margin\.average_performance"):
        bench(tmp_path, told, tune_on=["margin.average_performance"]).check_contenders()


def test_the_digest_knows_the_order_of_learning_and_filters_for_null(tmp_path):
    turned = dict(reversed(TASKS.items()))
    assert bench(tmp_path).digest == bench(tmp_path).digest
    assert bench(tmp_path).digest != bench(tmp_path, tasks=turned).digest
    filtered = [{**TASKS, "frank": {**TASKS["frank"], "where": where}} for where in ({}, {"domain": None})]
    assert len({bench(tmp_path, tasks=tasks).digest for tasks in filtered}) == 2


def test_weighting_options_are_given_tuned_and_refused_where_they_mean_nothing(tmp_path):
    var = {"method": "er", "objective": "var", "scored": "samples"}
    tuned = bench(tmp_path, {"x": {**var, "tune": {"temperature": [0.5, 2.0]}}}, tasks=SCORED)
    options = [tuned.learn_recipe("x", choice, "tiny", 0).weighting for choice in tuned.contenders["x"].trials]
    assert [one.temperature for one in options] == [0.5, 2.0]
    assert bench(tmp_path).learn_recipe("x", {}, "tiny", 0).weighting is None
    with pytest.raises(InputError, match="weight_floor is for rewards, which only var and snkl learn from"):
        bench(tmp_path, {"x": {**ER, "weighting": {"weight_floor": 0.1}}}).check_contenders()


def test_what_the_shared_settings_replace_of_a_preset_is_said(tmp_path):
    contenders = {"x": {**ER, "preset": "paper", "tune": RATES}, "y": {**ER, "tune": RATES}}
    shared = {"max_length": 128, "epochs": 1.0, "learning_rate": 1e-3, "beta": 0.1}
    found = bench(tmp_path, contenders, training=shared, adapter={"rank": 4})
    (note,) = found.preset_notes()
    assert note == (
        "x: the shared settings replace some of its preset: epochs 1.0 (preset: 3.0), max_length 128 (preset: 2048), "
        "rank 4 (preset: 8)"
    )
    assert bench(tmp_path, {"y": ER}).preset_notes() == []
