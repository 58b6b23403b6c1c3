"""Scored tasks through the learner: weights, replay, resuming, what is announced and what is refused."""

import json

import pytest
import torch

from cli_for_tests import run
from everalign import PreferenceSet
from everalign.data import Scored, ScoredSet
from everalign.errors import InputError
from everalign.learning import learner as learning
from everalign.learning.recipe import Recipe
from everalign.learning.run_data import load_run
from everalign.learning.task_training import prepare_rows
from everalign.methods import ExperienceReplay, LifeAlign, MultiTask
from everalign.objectives import var_weights
from everalign.reporting.report import render_report
from everalign.training.options import WeightOptions
from everalign.training.reward_weights import compute_weights
from learner_for_tests import adapter_weights, held_out, make_learner, save_model, task_rows
from tiers_for_tests import slow_but

ANSWERS = {"warm": ("yes, gladly!", "no.", "hm"), "brief": ("ok", "well, let me see", "ah, so")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def scored(name, count=10, start=0):
    rows = [
        {"prompt": f"q{i}?", "completions": [f"{text} {i}" for text in ANSWERS[name]], "rewards": [2.0, 0.5, i % 3]}
        for i in range(start, start + count)
    ]
    return ScoredSet.of(rows, source=f"{name}.jsonl")


def learner(model, output, method=None, lines=None, options=None, **arguments):
    return make_learner(model, output, method, "var", lines=lines, options=options, **arguments)


def learn_two(model, output, method=None, **arguments):
    found = learner(model, output, method, **arguments)
    for name in ANSWERS:
        found.learn(scored(name), name, test=held_out(name))
    return found


# ---- learning ----


@pytest.mark.parametrize("method", slow_but([MultiTask], [LifeAlign, ExperienceReplay, MultiTask]))
def test_scored_tasks_are_learned_with_any_method(model, tmp_path, method):
    found = learn_two(model, tmp_path / "run", method(), options={"epochs": 8.0, "learning_rate": 5e-2})
    assert list(found.scores.tasks) == list(ANSWERS)
    assert found.run.versions[-1].manifest.stages[0].stage == "var"
    newest = sorted((tmp_path / "run" / "versions").iterdir())[-1]
    points = [json.loads(line) for line in (newest / "training.jsonl").read_text().splitlines()]
    assert points[-1]["nll"] < 0.99 * points[0]["nll"]


def test_replayed_rows_keep_the_weights_of_their_own_task(model, tmp_path):
    learn_two(model, tmp_path / "run", ExperienceReplay(replay=0.5), weighting=WeightOptions(temperature=0.5))
    newest = sorted((tmp_path / "run" / "versions").iterdir())[0]
    rows = [json.loads(line) for line in (newest / "replay.jsonl").read_text().splitlines()]
    given = scored("warm")
    expected = compute_weights(given, [(5, 5, 5)] * len(given), WeightOptions(temperature=0.5)).rows
    by_prompt = {row.prompt: row.weights for row in expected}
    assert len(rows) == 5
    for row in rows:
        assert tuple(row["weights"]) == by_prompt[row["prompt"]]
        assert sum(row["weights"]) == pytest.approx(3.0)


def test_the_manifest_tells_what_the_weights_are_like(model, tmp_path):
    learn_two(model, tmp_path / "run")
    weights = load_run(tmp_path / "run").versions[0].manifest.weights
    assert weights["temperature"] == 0.25
    assert weights["dropped_rows"] == 0
    expected = compute_weights(list(scored("warm")), [(5, 5, 5)] * 10, WeightOptions(temperature=0.25)).statistics
    assert weights["effective_share"] == pytest.approx(expected.effective_share)
    assert 0.35 < expected.effective_share < 0.45
    assert weights["scale"] == pytest.approx(torch.tensor(scored("warm")[0].rewards).std(correction=0).item(), rel=0.3)


def test_the_report_shows_the_weights_of_every_task(model, tmp_path):
    learn_two(model, tmp_path / "run", weighting=WeightOptions(temperature=0.25))
    page = render_report([load_run(tmp_path / "run")])
    table = page[page.index("Weights of the completions in lifealign") :].partition("</table>")[0]
    assert table.count('class="name"') == 2
    assert table.count(">0.250</td>") == 2


def test_a_temperature_that_is_not_given_is_that_of_the_run(model, tmp_path):
    learner(model, tmp_path / "run", weighting=WeightOptions(temperature=1.0)).learn(scored("warm"), "warm")
    found = learner(model, tmp_path / "run", resume=True, weighting=WeightOptions(weight_cap=0.0))
    found.learn(scored("brief"), "brief")
    assert [v.manifest.weights["temperature"] for v in load_run(tmp_path / "run").versions] == [1.0, 1.0]


def test_a_run_is_not_resumed_with_other_weights(model, tmp_path):
    learner(model, tmp_path / "run").learn(scored("warm"), "warm", test=held_out("warm"))
    with pytest.raises(InputError, match=r"started with different settings \(temperature: 0.25 then, 2.0 now\)"):
        learner(model, tmp_path / "run", resume=True, weighting=WeightOptions(temperature=2.0))


def test_given_weights_are_used_as_they_are(model, tmp_path):
    """Weight 1 for the first answer alone is supervised fine-tuning on the first answers."""
    rows = [Scored(row.prompt, row.completions[:1], row.rewards[:1], weights=(1.0,)) for row in scored("warm")]
    learner(model, tmp_path / "var").learn(rows, "warm")
    pairs = [{"prompt": row.prompt, "chosen": row.completions[0], "rejected": "x"} for row in rows]
    make_learner(model, tmp_path / "sft", None, "sft").learn(PreferenceSet.of(pairs), "warm")
    assert load_run(tmp_path / "var").versions[0].manifest.weights["temperature"] is None
    first, second = (adapter_weights(tmp_path / name) for name in ("var", "sft"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5


def test_scored_test_rows_are_judged_as_best_over_worst(model, tmp_path):
    found = learner(model, tmp_path / "run")
    found.learn(scored("warm"), "warm", test=scored("warm", 4, start=100))
    kept = next((tmp_path / "run" / "tests").iterdir()).read_text().splitlines()
    assert json.loads(kept[0])["chosen"] == "yes, gladly! 100"
    assert json.loads(kept[0])["rejected"] == "no. 100"


# ---- weights of a dataset ----


def test_weights_are_those_of_the_estimator_over_the_whole_dataset():
    rows = scored("warm", 4)
    rewards = torch.tensor([reward for row in rows for reward in row.rewards], dtype=torch.float64)
    groups = torch.arange(4).repeat_interleave(3)
    for options in (
        WeightOptions(),
        WeightOptions(estimator="group_loo", temperature=0.7, weight_cap=2.5),
        WeightOptions(estimator="in_batch"),
    ):
        found = compute_weights(rows, [(1, 2, 3)] * 4, options)
        expected = var_weights(
            rewards,
            groups,
            estimator=options.estimator,
            temperature=options.resolved().temperature,
            reward_scale=rewards.std(correction=0).item(),
            weight_cap=options.weight_cap or None,
        ).weights
        torch.testing.assert_close(
            torch.tensor([w for row in found.rows for w in row.weights], dtype=torch.float64),
            expected,
            rtol=1e-12,
            atol=0,
        )
    found = compute_weights(rows, [(1, 2, 3)] * 4, WeightOptions(target_ess=0.6))
    assert found.statistics.effective_share == pytest.approx(0.6, abs=1e-6)


def test_collapsed_weights_are_announced_with_advice(model, tmp_path):
    lines = []
    rows = [Scored(row.prompt, row.completions, (2.0, 0.5, 1.0)) for row in scored("warm")]
    learner(model, tmp_path / "run", lines=lines, weighting=WeightOptions(temperature=0.01)).learn(rows, "a")
    assert any(line.startswith("  warning: ") and "Raise the temperature" in line for line in lines)


def test_completions_that_do_not_fit_are_counted_and_left_out(model, tmp_path):
    lines: list[str] = []
    rows = [Scored("q?", ("yes " * 40, "no", "hm"), (1.0, 2.0, 3.0)), *scored("warm", 3)]
    learner(model, tmp_path / "run", lines=lines).learn(rows, "a")
    assert "  1 of 12 completions are longer than max_length allows and left out, and 0 of 4 rows with them" in lines
    assert load_run(tmp_path / "run").versions[0].manifest.weights["dropped_completions"] == 1


def test_tasks_that_are_pooled_are_weighed_one_by_one(model, tmp_path):
    """Rewards of one task may be a hundred times those of another."""
    large = [Scored(row.prompt, row.completions, tuple(100 * r for r in row.rewards)) for row in scored("brief")]
    found = learner(model, tmp_path / "run", MultiTask())
    found.learn_all([("warm", scored("warm"), None), ("brief", large, None)])
    (version,) = (tmp_path / "run" / "versions").iterdir()
    rows = [json.loads(line) for line in (version / "replay.jsonl").read_text().splitlines()]
    weights = {name: {tuple(r["weights"]) for r in rows if ANSWERS[name][0] in r["completions"][0]} for name in ANSWERS}
    expected = {row.weights for row in compute_weights(scored("warm"), [(5, 5, 5)] * 10, WeightOptions()).rows}
    assert weights["warm"] == expected
    assert {tuple(round(w, 9) for w in one) for one in weights["brief"]} == {
        tuple(round(w, 9) for w in one) for one in expected
    }


def test_one_completion_a_prompt_is_compared_with_the_dataset():
    rows = [Scored(f"q{i}", ("a",), (float(i),)) for i in range(6)]
    weights = [row.weights[0] for row in compute_weights(rows, [(3,)] * 6, WeightOptions(estimator="in_batch")).rows]
    assert weights == sorted(weights)
    assert weights[-1] > 3 * weights[0]
    # exp of the standardised reward over the mean of the other rows'
    values = torch.arange(6.0, dtype=torch.float64)
    scores = ((values - values.mean()) / values.std(correction=0)).exp()
    others = (scores.sum() - scores) / 5
    torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), scores / others, rtol=1e-9, atol=0)


def test_given_weights_are_announced_to_overrule_the_options(model, tmp_path):
    lines, rows = [], [Scored(r.prompt, r.completions, r.rewards, weights=(1, 0, 0)) for r in scored("warm")]
    learner(model, tmp_path / "run", lines=lines, weighting=WeightOptions(temperature=5.0)).learn(rows, "a")
    assert any("weights: as given, weighting options do not apply" in line for line in lines)


def test_held_out_rows_without_a_better_completion_are_counted(model, tmp_path):
    lines, rows = [], [*scored("warm", 3, start=50), Scored("p", ("a", "b"), (1.0, 1.0))]
    learner(model, tmp_path / "run", lines=lines).learn(scored("warm"), "warm", test=rows)
    assert any("1 of 4 held-out rows have no better and worse completion and are left out" in line for line in lines)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Scored("p", ("a", "b"), (1.0, 1.0)), Scored("q", ("a", "b"), (1.0, 1.0))], "finite reward.* do not differ"),
        ([*scored("warm", 2), Scored("p", ("a",), (1.0,))], r"1 rows have one completion only \(rows 3\)"),
        ([*scored("warm", 2), Scored("p", ("a", "b"), (1.0, 2.0), weights=(1, 1))], "row 1 has no weights, while"),
        (
            [Scored("p", ("yes " * 40, "no " * 40), (1.0, 2.0))],
            "no row has completions that fit max_length 64",
        ),
        ([Scored("p", ("yes " * 40, "no"), (1.0, 2.0), weights=(1, 0))], "no row has completions that fit"),
        ([*scored("warm", 1), Scored("p", ("yes " * 40, "no"), (1.0, 2.0)), Scored("q", ("a",), (1,))], r"\(rows 3\)"),
        (PreferenceSet.of(task_rows("warm")), r"the objective var learns from scored rows"),
    ],
)
def test_rows_that_cannot_be_weighed_are_refused(model, tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        learner(model, tmp_path / "run").learn(rows, "a")
    assert load_run(tmp_path / "run").versions == []


def test_a_refused_task_leaves_the_learner_usable(model, tmp_path):
    found = learner(model, tmp_path / "run")
    with pytest.raises(InputError):
        found.learn([Scored("p", ("a",), (1.0,))], "bad")
    found.learn(scored("warm"), "warm", test=held_out("warm"))
    assert [version.task for version in found.run.versions] == ["warm"]


def test_every_task_is_weighed_before_the_first_is_learned(model, tmp_path):
    found = learner(model, tmp_path / "run")
    with pytest.raises(InputError, match="one completion only"):
        found.learn_all([("warm", scored("warm"), None), ("bad", [Scored("p", ("a",), (1.0,))], None)])
    assert found.run.versions == []


def test_every_task_is_weighed_once(model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        learning, "prepare_rows", lambda setup, rows: seen.append(rows.source) or prepare_rows(setup, rows)
    )
    sets = [(name, scored(name), None) for name in ANSWERS]
    learner(model, tmp_path / "run").learn_all(sets[:1])
    learner(model, tmp_path / "run", resume=True).learn_all(sets)
    assert seen == ["warm.jsonl", "brief.jsonl"]


@pytest.mark.parametrize("other", [lambda row: row, lambda row: row.preference(), lambda row: rescored(row)])
def test_rows_that_were_trained_on_are_no_test_whatever_their_kind(model, tmp_path, other):
    rows = scored("warm")
    with pytest.raises(InputError, match="rows are in both the training and the test set"):
        learner(model, tmp_path / "run").learn(rows, "warm", test=[other(row) for row in rows])


def rescored(row):
    return Scored(row.prompt, row.completions, tuple(2 * reward + 1 for reward in row.rewards))


def test_weighting_without_rewards_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="weighting is for rewards, and the objective dpo has none"):
        make_learner(model, tmp_path / "run", None, "dpo", weighting=WeightOptions())


def test_other_objectives_refuse_scored_rows(model, tmp_path):
    with pytest.raises(InputError, match=r"the objective dpo learns from preferences \(prompt, chosen, rejected\)"):
        make_learner(model, tmp_path / "run", None, "dpo").learn(scored("warm"), "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "mean"}, "estimator must be one of group, .*quantile, support, found 'mean'"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"temperature": float("nan")}, "temperature must be a number above 0, found nan"),
        ({"target_ess": 1.0}, "target_ess must be a number from 0 to below 1"),
        ({"weight_cap": -1}, "weight_cap must be a number of at least 0, found -1"),
        ({"weight_cap": "2"}, "weight_cap must be a number of at least 0, found '2'"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        WeightOptions(**options)


def test_a_preset_s_supervised_stage_is_for_preferences_only():
    for objective in ("var", "sft"):
        recipe = Recipe.from_flags({"objective": objective, "preset": "paper", "epochs": 2.0})
        assert (recipe.training_options().sft_epochs, recipe.training_options().epochs) == (0.0, 2.0)
    assert Recipe.from_flags({"objective": "fpo", "preset": "paper"}).training_options().sft_epochs == 3.0


# ---- the command line ----


def write(path, rows):
    path.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))


def test_the_command_line_learns_scored_files(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ANSWERS:
        write(tmp_path / f"{name}.jsonl", scored(name))
        write(tmp_path / f"{name}.test.jsonl", scored(name, 4, start=100))
    tasks = [part for name in ANSWERS for part in ("--task", f"{name}={name}.jsonl,{name}.test.jsonl")]
    common = ["learn", "--model", str(model), *tasks, "--output", "run", "--targets", "q_proj", "--max-length", "64"]
    code, _, err = run(capsys, *common, "--objective", "var", "--temperature", "0.5", "--json")
    assert code == 0, err
    assert load_run(tmp_path / "run").versions[-1].manifest.weights["temperature"] == 0.5
    code, _, err = run(capsys, *common, "--objective", "dpo", "--temperature", "0.5")
    assert (code, "temperature is for rewards, which only var and snkl learn from" in err) == (2, True)
    code, _, err = run(capsys, *common, "--objective", "var", "--beta", "0.5")
    assert (code, "the objective var has no margin and would ignore beta" in err) == (2, True)
    code, _, err = run(capsys, *common, "--objective", "fpo", "--output", "other")
    assert (code, "field 'chosen': no such column" in err) == (2, True)
