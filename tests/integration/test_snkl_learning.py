"""The objective snkl through the learner: scored rows and preferences, references, replay, and what is refused."""

import json

import pytest
import torch

from cli_for_tests import run
from everalign import PreferenceSet
from everalign.data import Preference, Scored, ScoredSet, load_judged
from everalign.data.tokenization import tokenize_scored
from everalign.errors import InputError
from everalign.learning.recipe import Recipe
from everalign.learning.run_data import load_run
from everalign.methods import ExperienceReplay, LifeAlign, MultiTask, SequentialFineTuning, SingleTask
from everalign.training.objectives import make_objective
from everalign.training.options import WeightOptions
from learner_for_tests import adapter_weights, held_out, make_learner, same_weights, save_model, task_rows
from tiers_for_tests import slow_but
from tokenizers_for_tests import byte_tokenizer

ANSWERS = ("yes, gladly!", "no.", "hm")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def scored(count=10, start=0):
    rows = [
        {"prompt": f"q{i}?", "completions": [f"{text} {i}" for text in ANSWERS], "rewards": [2.0, 0.5, i % 3]}
        for i in range(start, start + count)
    ]
    return ScoredSet.of(rows, source="warm.jsonl")


def learner(model, output, method=None, **arguments):
    return make_learner(model, output, method, "snkl", **arguments)


def newest_rows(output):
    version = sorted((output / "versions").iterdir())[-1]
    return [json.loads(line) for line in (version / "replay.jsonl").read_text().splitlines()]


# ---- learning ----


@pytest.mark.parametrize("method", slow_but([LifeAlign], [LifeAlign, ExperienceReplay, MultiTask, SingleTask]))
def test_scored_rows_and_preferences_are_learned_with_any_method(model, tmp_path, method):
    found = learner(model, tmp_path, method(), options={"epochs": 6.0, "learning_rate": 5e-2})
    found.learn(scored(), "warm", test=held_out("warm"))
    found.learn(task_rows("brief"), "brief", test=held_out("brief"))
    assert [version.manifest.stages[0].stage for version in found.run.versions] == ["snkl", "snkl"]
    newest = sorted((tmp_path / "versions").iterdir())[-1]
    points = [json.loads(line) for line in (newest / "training.jsonl").read_text().splitlines()]
    assert points[-1]["kl"] < 0.8 * points[0]["kl"]
    assert points[-1]["margin"] > points[0]["margin"]


def test_a_pair_is_two_completions_with_rewards_1_and_0_and_keeps_its_weight(model, tmp_path):
    pairs = [Preference(row.prompt, row.chosen, row.rejected, 1 + i % 2) for i, row in enumerate(task_rows("warm"))]
    groups = [Scored(p.prompt, (p.chosen, p.rejected), (1.0, 0.0), p.weight) for p in pairs]
    learner(model, tmp_path / "pairs", ExperienceReplay(replay=1.0)).learn(pairs, "warm")
    learner(model, tmp_path / "groups", ExperienceReplay(replay=1.0)).learn(groups, "warm")
    assert same_weights(*(adapter_weights(tmp_path / name) for name in ("pairs", "groups")))
    row = next(row for row in newest_rows(tmp_path / "pairs") if row["prompt"] == pairs[1].prompt)
    assert (row["rewards"], row["weight"]) == ([1.0, 0.0], 2.0)
    # The deviation of 1 and 0 is 1/2: two units apart, at temperature 1.
    shares = torch.tensor([2.0, 0.0]).softmax(0) * 2
    assert row["weights"] == pytest.approx(shares.tolist())


@pytest.mark.parametrize(("reference", "zero"), [("stage_start", True), ("previous_task", True), ("base", False)])
def test_the_log_ratio_at_step_0_is_zero_exactly_where_the_stage_starts_from_its_reference(
    model, tmp_path, reference, zero
):
    lines = []
    found = learner(model, tmp_path, SequentialFineTuning(), options={"reference": reference}, lines=lines)
    found.learn(scored(), "warm")
    found.learn(task_rows("brief"), "brief")
    stages = [version.manifest.stages[0] for version in found.run.versions]
    assert stages[0].step0_log_ratio == 0.0
    assert (stages[1].step0_log_ratio == 0.0) == zero
    assert [stage.step0_margin for stage in stages] == [None, None]
    said = [line.split("), ")[1] for line in lines if "at step 0" in line]
    assert said == [f"reference = {reference}, mean |log-ratio| at step 0 = {s.step0_log_ratio:.6g}" for s in stages]


def test_replayed_rows_keep_the_targets_of_their_own_task(model, tmp_path):
    """Rewards of one task may be a hundred times those of another."""
    found = learner(model, tmp_path, ExperienceReplay(replay=1.0), weighting=WeightOptions(temperature=0.5))
    found.learn(scored(), "warm")
    large = [Scored(r.prompt + " ", r.completions, tuple(100 * x for x in r.rewards)) for r in scored()]
    found.learn(large, "large")
    targets = {name: {} for name in ("warm", "large")}
    for row in newest_rows(tmp_path):
        targets[row["task"]][row["prompt"].strip()] = row["weights"]
    assert len(targets["warm"]) == 10
    for prompt, weights in targets["warm"].items():
        assert targets["large"][prompt] == pytest.approx(weights, rel=1e-9)
    scale = torch.tensor([reward for row in scored() for reward in row.rewards]).double().std(correction=0)
    wanted = 3 * (torch.tensor([2.0, 0.5, 1.0]).double() / scale / 0.5).softmax(0)
    assert targets["warm"]["q1?"] == pytest.approx(wanted.tolist())


def test_the_manifest_tells_what_the_targets_are_like(model, tmp_path):
    lines = []
    options = WeightOptions(target_ess=0.6)
    found = learner(model, tmp_path, weighting=options, lines=lines)
    found.learn(scored(), "warm")
    weights = load_run(tmp_path).versions[0].manifest.weights
    assert weights["effective_share"] == pytest.approx(0.6, abs=1e-6)
    assert f"  targets: temperature {weights['temperature']:.3g}, worth 60% of 30 completions, the largest" in "".join(
        lines
    )
    settings = load_run(tmp_path).facts.settings
    assert (settings["target_ess"], "estimator" in settings, "weight_cap" in settings) == (0.6, False, False)


def test_a_run_is_resumed_only_with_the_same_targets(model, tmp_path):
    learner(model, tmp_path / "cut").learn(scored(), "warm")
    learner(model, tmp_path / "cut", resume=True).learn(task_rows("brief"), "brief")
    with pytest.raises(InputError, match=r"started with different settings \(temperature: 1.0 then, 2.0 now\)"):
        learner(model, tmp_path / "cut", resume=True, weighting=WeightOptions(temperature=2.0))


def test_tasks_of_both_kinds_are_pooled(model, tmp_path):
    found = learner(model, tmp_path, MultiTask())
    found.learn_all([("warm", scored(), held_out("warm")), ("brief", task_rows("brief"), held_out("brief"))])
    assert load_run(tmp_path).versions[0].manifest.stages[0].rows == 20


def test_weights_of_a_row_are_its_targets_in_proportion():
    row = Scored("q?", ("a", "b", "c"), (1.0, 2.0, 3.0), weight=2.0, weights=(0.0, 1.0, 3.0))
    batch = make_objective("snkl").collate(tokenize_scored([row], byte_tokenizer(), 64), shared=True)
    assert batch["log_shares"].exp().tolist() == pytest.approx([0.0, 0.25, 0.75])
    assert batch["weight"].tolist() == [2.0]


def test_completions_that_do_not_fit_are_counted_and_left_out(model, tmp_path):
    lines: list[str] = []
    rows = [
        Scored("q?", ("yes " * 40, "no", "hm"), (1.0, 2.0, 3.0)),
        Scored("p?", ("yes " * 40, "no"), (1.0, 2.0)),
        Scored("r?", ("yes " * 40, "no"), (1.0, 2.0)),
        *scored(3),
    ]
    learner(model, tmp_path, lines=lines).learn(rows, "a")
    assert "  3 of 16 completions are longer than max_length allows and left out, and 2 of 6 rows with them" in lines
    assert load_run(tmp_path).versions[0].manifest.stages[0].rows == 4


# ---- what is refused ----


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Scored("p", ("a", "b"), (1.0, 1.0)), Scored("q", ("a", "b"), (1.0, 1.0))], "finite reward.* do not differ"),
        ([*scored(2), Scored("p", ("a",), (1.0,))], r"1 rows have one completion only \(rows 3\), with nothing to"),
        ([Scored("p", ("a",), (1.0,), weights=(1.0,))], r"\(rows 1\), with nothing to compare it to: sample more"),
        ([*scored(2), Scored("p", ("a", "b"), (1.0, 2.0), weights=(1, 1))], "row 1 has no weights, while"),
        ([Scored("p", ("yes " * 40, "no"), (1.0, 2.0))], "no row has completions that fit max_length 64"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(model, tmp_path, rows, message):
    with pytest.raises(InputError, match=f"^memory: .*{message}"):
        learner(model, tmp_path).learn(rows, "a")
    assert load_run(tmp_path).versions == []


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (WeightOptions(estimator="group_loo"), "estimator"),
        (WeightOptions(estimator="support", length_normalize=True), "estimator"),
        (WeightOptions(weight_cap=2.0), "weight_cap"),
    ],
)
def test_weighting_options_that_would_be_ignored_are_refused(model, tmp_path, options, name):
    message = f"the objective snkl compares the completions of a prompt and would ignore {name}: leave it out"
    with pytest.raises(InputError, match=message):
        learner(model, tmp_path, weighting=options)


def test_a_supervised_stage_is_refused(model, tmp_path):
    with pytest.raises(InputError, match=r"sft_epochs adds a stage .* with objective snkl set epochs"):
        learner(model, tmp_path, options={"sft_epochs": 1.0})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"beta": 0.5}, "the objective snkl takes log-ratios as they are and would ignore beta: leave it out"),
        ({"estimator": "group"}, "the objective snkl compares the completions of a prompt and would ignore estimator"),
        ({"weight_cap": 0.0}, "would ignore weight_cap: leave it out"),
        ({"length_normalize": False}, "would ignore length_normalize: leave it out"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags, message):
    tasks = [{"name": "a", "train": "a.jsonl"}]
    common = {"model": "tiny", "output": "run", "objective": "snkl", "tasks": tasks}
    with pytest.raises(InputError, match=message):
        Recipe.from_flags({**common, **flags}).learner_arguments()


def test_a_printed_recipe_can_be_given_again():
    tasks = [{"name": "a", "train": "a.jsonl"}]
    given = {"model": "tiny", "output": "run", "objective": "snkl", "tasks": tasks, "reference": "base"}
    printed = Recipe.from_flags({**given, "temperature": 0.5, "preset": "paper"}).complete()
    assert printed["weighting"] == {"temperature": 0.5, "target_ess": 0.0, "scale_rewards": True}
    assert (printed["training"]["reference"], "beta" in printed["training"]) == ("base", False)
    assert printed["training"]["sft_epochs"] == 0.0
    assert Recipe.model_validate(printed).learner_arguments()["weighting"] == WeightOptions(temperature=0.5)


# ---- files ----


def write(path, rows):
    path.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    return path


def test_the_kind_of_a_file_is_told_by_its_first_row(tmp_path):
    assert isinstance(load_judged(write(tmp_path / "a.jsonl", scored(2))), ScoredSet)
    assert isinstance(load_judged(write(tmp_path / "b.jsonl", task_rows("warm", 2))), PreferenceSet)
    (tmp_path / "c.csv").write_text("prompt,chosen,rejected\np,a,b\n")
    assert list(load_judged(tmp_path / "c.csv")) == [Preference("p", "a", "b")]
    (tmp_path / "d.csv").write_text('prompt,completions,rewards\np,"[""a"",""b""]","[1,2]"\n')
    assert list(load_judged(tmp_path / "d.csv")) == [Scored("p", ("a", "b"), (1.0, 2.0))]
    (tmp_path / "e.jsonl").write_text('oops\n{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    assert len(load_judged(tmp_path / "e.jsonl", skip_bad_rows=True)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "p", "chosen": "a"}\n', "field 'rejected': no such column"),
        ('{"prompt": "p", "responses": ["a"]}\n', "field 'completions': no such column; rename 'responses'"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "completions": []}\n', ":2: field 'chosen'"),
        ("", "no rows in it"),
    ],
)
def test_a_file_of_no_kind_is_refused(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        load_judged(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="no such file"):
        load_judged(tmp_path / "b.jsonl")


def test_the_command_line_learns_files_of_both_kinds(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "warm.jsonl", scored())
    write(tmp_path / "warm.test.jsonl", scored(4, start=100))
    write(tmp_path / "brief.jsonl", task_rows("brief"))
    write(tmp_path / "brief.test.jsonl", held_out("brief"))
    tasks = [part for name in ("warm", "brief") for part in ("--task", f"{name}={name}.jsonl,{name}.test.jsonl")]
    common = ["learn", "--model", str(model), *tasks, "--output", "run", "--targets", "q_proj", "--max-length", "64"]
    code, _, err = run(capsys, *common, "--objective", "snkl", "--temperature", "0.5", "--json")
    assert code == 0, err
    assert [version.task for version in load_run(tmp_path / "run").versions] == ["warm", "brief"]
    code, _, err = run(capsys, *common, "--objective", "snkl", "--estimator", "group_loo", "--output", "other")
    assert (code, "would ignore estimator" in err) == (2, True)
