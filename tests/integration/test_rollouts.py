"""Prompts alone, and answers without rewards: sampled, scored, weighed and learned by one call."""

import json
import threading

import pytest

from cli_for_tests import run
from everalign import AdapterOptions, PreferenceSet, RolloutOptions
from everalign.data import Scored, ScoredSet, load_prompts
from everalign.demo.world import questions
from everalign.errors import EveralignError, InputError
from everalign.evaluation.scorers import CallableScorer
from everalign.learning import task_training as lesson
from everalign.learning.recipe import Recipe
from everalign.learning.run_data import load_run
from everalign.learning.run_files import TrainingStep
from everalign.learning.task_files import load_tasks
from everalign.learning.task_training import prepare_rows
from everalign.methods import ExperienceReplay, LifeAlign, MultiTask, make_method
from everalign.reporting.plots import stage_curves
from everalign.reporting.report import render_report
from everalign.storage import Journal
from everalign.training.options import WeightOptions
from learner_for_tests import (
    adapter_weights,
    held_out,
    make_learner,
    same_weights,
    save_answering_model,
    save_model,
    task_rows,
)
from tiers_for_tests import slow_but

FEW = RolloutOptions(samples=4, max_new_tokens=24)
TWO_STEPS = RolloutOptions(samples=6, first_samples=2, max_new_tokens=24, rounds=2)
LONG = {"max_length": 48, "epochs": 2.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_answering_model(tmp_path_factory.mktemp("model"))


def prompts(count=6, start=0):
    return ScoredSet.of([{"prompt": f"q{i}?"} for i in range(start, start + count)], "prompts.jsonl")


class Scorer:
    """Longer answers are better; remembers how many it was asked for."""

    fingerprint = "longer"

    def __init__(self, fails=False):
        self.asked, self.fails = 0, fails

    def score(self, prompts, completions):
        if self.fails:
            raise EveralignError("the judge is ill")
        self.asked += len(completions)
        return [float(len(text)) for text in completions]


def learner(model, output, method=None, objective="var", reward=None, rollouts=FEW, **arguments):
    options = {**LONG, **arguments.pop("options", {})}
    reward = Scorer() if reward is None else reward
    return make_learner(
        model, output, method, objective, options=options, reward=reward, rollouts=rollouts, **arguments
    )


def manifest(output, index=0):
    return load_run(output).versions[index].manifest


# ---- prompts alone ----


@pytest.mark.parametrize("objective", ["var", "snkl"])
def test_answers_are_sampled_scored_and_learned(model, tmp_path, objective):
    lines = []
    found = learner(model, tmp_path / "run", objective=objective, lines=lines)
    found.learn(prompts(), "long", test=held_out("warm"))
    facts = manifest(tmp_path / "run")
    (rollout,) = facts.rollouts
    assert rollout["answers"] + rollout["unfinished"] <= 24
    assert rollout["answers"] >= 2 * rollout["prompts"] > 0
    assert rollout["sampling_temperature"] == 1.0
    assert facts.train.rows == 6
    assert facts.stages[0].stage == objective
    assert facts.stages[0].rows == rollout["prompts"]
    assert facts.weights["temperature"] == {"var": 0.25, "snkl": 1.0}[objective]
    assert any(line.startswith(f"  round 1: {rollout['answers']:.0f} answers to") for line in lines)


def test_each_round_samples_from_what_the_policy_has_become(tmp_path):
    """The assistant is courteous about half of the time; exclamation marks are rewarded, and become more."""
    courteous = CallableScorer(lambda _, texts: [float("!" in text) for text in texts], "courteous")
    asked = [question.text for question in questions("kitchen") if not question.held_out][::30][:16]
    rows = ScoredSet.of([{"prompt": [{"role": "user", "content": text}]} for text in asked])
    found = learner(
        "tiny",
        tmp_path / "run",
        reward=courteous,
        rollouts=RolloutOptions(samples=8, max_new_tokens=64, rounds=3),
        options={"learning_rate": 4e-3, "epochs": 2.0, "max_length": 256, "tokens_per_batch": 8192},
        weighting=WeightOptions(temperature=1.0),
        adapter=AdapterOptions(rank=8, alpha=16.0),
    )
    found.learn(rows, "courteous")
    facts = manifest(tmp_path / "run")
    assert [rollout["round"] for rollout in facts.rollouts] == [1, 2, 3]
    means = [rollout["mean_reward"] for rollout in facts.rollouts]
    assert [stage.stage for stage in facts.stages] == ["var"] * (2 if means[2] == 1.0 else 3)
    assert 0.3 < means[0] < 0.7
    assert means[0] + 0.2 < means[1] <= means[2]
    # The last round's weights still go by the first round's deviation.
    assert facts.weights["scale"] == pytest.approx((means[0] * (1 - means[0])) ** 0.5)


def test_rounds_end_when_nothing_is_left_to_learn(model, tmp_path):
    """Told apart in the first round only."""

    class Tired(Scorer):
        def score(self, prompts, completions):
            self.asked += 1
            return [float(i % 2) if self.asked == 1 else 1.0 for i in range(len(completions))]

    lines = []
    rollouts = RolloutOptions(samples=4, max_new_tokens=24, rounds=3)
    learner(model, tmp_path / "run", reward=Tired(), rollouts=rollouts, lines=lines).learn(prompts(), "a")
    facts = manifest(tmp_path / "run")
    assert [rollout["round"] for rollout in facts.rollouts] == [1, 2]
    assert len(facts.stages) == 1
    assert "  all answers have the same reward: there is nothing left to learn from them" in lines


def test_a_round_with_the_answers_of_the_one_before_is_learned_too(model, tmp_path, monkeypatch):
    draw = lesson.sample_and_score
    monkeypatch.setattr(lesson, "sample_and_score", lambda *given: draw(*given[:3], 1, *given[4:]))
    rollouts = RolloutOptions(samples=4, max_new_tokens=24, rounds=2)
    found = learner(model, tmp_path / "run", ExperienceReplay(), rollouts=rollouts, options={"learning_rate": 1e-2})
    found.learn(prompts(), "a")
    first, second = load_run(tmp_path / "run").versions[0].manifest.stages
    assert first.rows == second.rows
    losses = [[step.loss for step in stage] for stage in stage_curves(load_run(tmp_path / "run").versions[0].training)]
    assert losses[1] != losses[0]


def test_each_task_is_sampled_from_what_was_learned_before(model, tmp_path):
    scorer = Scorer()
    found = learner(
        model, tmp_path / "run", LifeAlign(replay=0.5, space="product"), reward=scorer, options={"learning_rate": 5e-2}
    )
    found.learn_all([("first", prompts(), None), ("second", prompts(6, 50), None)])
    assert scorer.asked == sum(manifest(tmp_path / "run", i).rollouts[0]["answers"] for i in range(2))
    rows = [json.loads(line) for line in (tmp_path / "run/versions/002-second/replay.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == {"first", "second"}
    assert all(len(row["weights"]) == len(row["completions"]) == len(row["rewards"]) for row in rows)


def test_a_fitted_step_is_fitted_on_sampled_answers(model, tmp_path):
    rollouts = RolloutOptions(samples=4, max_new_tokens=24)
    found = learner(model, tmp_path / "run", LifeAlign(step="fitted", space="product"), rollouts=rollouts)
    found.learn(prompts(60), "a")
    facts = manifest(tmp_path / "run")
    answered = facts.rollouts[0]["prompts"]
    assert answered >= 40
    # The tenth is of the prompts whose answers can be told apart: a few less.
    assert 0.8 * answered < facts.stages[0].rows <= answered - answered // 10


def kept_rows(output, name):
    """The rows that were learned last, all of which are kept."""
    lines = (output / "versions" / name / "replay.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class OnlySomeDiffer(Scorer):
    """Answers to every third prompt are better the longer they are; those to others are all the same."""

    def score(self, prompts, completions):
        rewards = super().score(prompts, completions)
        return [reward if int(p[1:-1]) % 3 == 0 else 0.0 for p, reward in zip(prompts, rewards, strict=True)]


def test_more_is_sampled_only_where_the_first_rewards_disagree(model, tmp_path):
    scorer, lines = OnlySomeDiffer(), []
    rollouts = RolloutOptions(samples=6, first_samples=3, agree_within=0.0, max_new_tokens=24)
    found = learner(
        model, tmp_path / "run", ExperienceReplay(replay=1.0), reward=scorer, rollouts=rollouts, lines=lines
    )
    found.learn(prompts(12), "a")
    (rollout,) = manifest(tmp_path / "run").rollouts
    assert scorer.asked == rollout["answers"] > 0
    assert rollout["agreed"] >= 6
    assert rollout["saved"] == 3 * rollout["agreed"]
    assert rollout["answers"] + rollout["unfinished"] == 12 * 3 + 3 * (12 - rollout["agreed"])
    for row in kept_rows(tmp_path / "run", "001-a"):
        assert len(row["completions"]) == len(row["rewards"]) == len(row["weights"])
        assert sum(row["weights"]) == pytest.approx(len(row["weights"]))
        assert row.get("weight", 1.0) == 1.0
    assert any(f"the first rewards of {rollout['agreed']:.0f} prompts agree, which saves" in line for line in lines)


def test_a_tolerance_is_in_deviations_of_the_first_rewards(model, tmp_path):
    """So the rewards' unit does not matter; and rewards that are not scaled have a tolerance of their own unit."""

    class InCents(Scorer):
        def score(self, prompts, completions):
            return [100 * reward for reward in super().score(prompts, completions)]

    facts = {}
    for name, scorer, scaled in (("euros", Scorer(), True), ("cents", InCents(), True), ("plain", InCents(), False)):
        weighting = WeightOptions(scale_rewards=scaled, temperature=1.0 if scaled else 1000.0)
        rollouts = TWO_STEPS.replace(rounds=1, agree_within=2.0)
        learner(model, tmp_path / name, reward=scorer, rollouts=rollouts, weighting=weighting).learn(prompts(12), "a")
        facts[name] = manifest(tmp_path / name)
    assert 0 < facts["euros"].rollouts[0]["agreed"] < 12
    assert facts["cents"].rollouts[0]["agreed"] == facts["euros"].rollouts[0]["agreed"]
    assert facts["cents"].weights["scale"] == pytest.approx(100 * facts["euros"].weights["scale"])
    assert facts["plain"].rollouts[0]["agreed"] < facts["cents"].rollouts[0]["agreed"]


@pytest.mark.parametrize("estimator", ["group_loo", "in_batch"])
def test_other_estimators_take_groups_of_several_sizes(model, tmp_path, estimator):
    weighting = WeightOptions(estimator=estimator, weight_cap=20.0)
    given = {"reward": OnlySomeDiffer(), "rollouts": TWO_STEPS.replace(rounds=1), "weighting": weighting}
    found = learner(model, tmp_path / "run", ExperienceReplay(replay=1.0), **given)
    found.learn(prompts(12), "a")
    assert len({len(row["completions"]) for row in kept_rows(tmp_path / "run", "001-a")}) > 1


def test_cppo_goes_on_with_the_answers_of_later_rounds(model, tmp_path):
    rollouts = RolloutOptions(samples=4, max_new_tokens=24, rounds=2)
    found = learner(model, tmp_path / "run", make_method("cppo"), rollouts=rollouts, options={"learning_rate": 1e-3})
    found.learn_all([("first", prompts(), None), ("second", prompts(6, 50), None)])
    assert len(manifest(tmp_path / "run", 1).stages) == 2


def test_prompts_and_scored_rows_are_tasks_of_one_run(model, tmp_path):
    scored = [Scored(f"s{i}", ("yes", "no way"), (1.0, float(i))) for i in range(4)]
    found = learner(model, tmp_path / "run", ExperienceReplay(replay=0.5))
    found.learn(scored, "given")
    found.learn(prompts(), "sampled")
    assert [bool(version.manifest.rollouts) for version in found.run.versions] == [False, True]


class Interrupted:
    """A scorer that is interrupted at its n-th call."""

    fingerprint = "longer"

    def __init__(self, at):
        self.calls, self.at = 0, at

    def score(self, prompts, completions):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return [float(len(text)) for text in completions]


TWO_ROUNDS = RolloutOptions(samples=4, max_new_tokens=24, rounds=2)


# In two steps, a round asks the scorer twice: the second and the fourth call are for what was sampled further.
@pytest.mark.parametrize(
    ("rollouts", "at"),
    slow_but(
        [(TWO_ROUNDS, 2), (TWO_STEPS, 2)], [(TWO_ROUNDS, 1), (TWO_ROUNDS, 2), *((TWO_STEPS, n) for n in (1, 2, 3, 4))]
    ),
)
def test_a_run_interrupted_between_sampling_and_training_ends_the_same(model, tmp_path, rollouts, at):
    learner(model, tmp_path / "whole", rollouts=rollouts).learn(prompts(), "a")
    with pytest.raises(KeyboardInterrupt):
        learner(model, tmp_path / "run", reward=Interrupted(at), rollouts=rollouts).learn(prompts(), "a")
    learner(model, tmp_path / "run", rollouts=rollouts, resume=True).learn(prompts(), "a")
    assert same_weights(adapter_weights(tmp_path / "run"), adapter_weights(tmp_path / "whole"))
    assert manifest(tmp_path / "run").rollouts == manifest(tmp_path / "whole").rollouts


@pytest.mark.parametrize(("rollouts", "at"), [(FEW, 1), (TWO_STEPS.replace(rounds=1), 2)])
def test_samples_that_a_kill_has_undone_are_drawn_again(model, tmp_path, rollouts, at):
    learner(model, tmp_path / "whole", rollouts=rollouts).learn(prompts(), "a")
    with pytest.raises(KeyboardInterrupt):
        learner(model, tmp_path / "run", reward=Interrupted(at), rollouts=rollouts).learn(prompts(), "a")
    samples = list((tmp_path / "run" / "work").rglob("*.samples.sqlite"))
    assert len(samples) == at
    for one in samples:
        Journal(one).remove()
    learner(model, tmp_path / "run", rollouts=rollouts, resume=True).learn(prompts(), "a")
    assert same_weights(adapter_weights(tmp_path / "run"), adapter_weights(tmp_path / "whole"))


def test_the_report_shows_every_round(model, tmp_path):
    rollouts = RolloutOptions(samples=4, max_new_tokens=24, rounds=2)
    learner(model, tmp_path / "run", rollouts=rollouts).learn(prompts(), "long")
    page = render_report([load_run(tmp_path / "run")])
    table = page[page.index("Sampled answers in lifealign") :].partition("</table>")[0]
    for rollout in manifest(tmp_path / "run").rollouts:
        assert f">{rollout['answers']:.0f}</td>" in table


# ---- answers without rewards ----


def test_pairs_are_scored_once_and_kept(model, tmp_path):
    scorer = Scorer()
    for name in ("one", "two"):
        found = learner(model, tmp_path / name, reward=scorer, rollouts=None, cache=tmp_path / "cache")
        found.learn(task_rows("warm"), "a")
    assert scorer.asked == 20
    rows = [json.loads(line) for line in (tmp_path / "one/versions/001-a/replay.jsonl").read_text().splitlines()]
    assert all(row["rewards"] == [float(len(text)) for text in row["completions"]] for row in rows)


def test_runs_that_share_a_folder_score_one_after_the_other(model, tmp_path):
    """What both append to would hold rewards twice, and shift them."""
    second, waited = Scorer(), []

    class Slow(Scorer):
        def score(self, prompts, completions):
            if not waited:
                other = threading.Thread(target=prepare_rows, args=(found[1]._setup, task_rows("warm")))
                waited.append(other)
                other.start()
                other.join(0.5)
            return super().score(prompts, completions)

    rewards, names = (Slow(), second), ("one", "two")
    found = [
        learner(model, tmp_path / name, reward=reward, rollouts=None, cache=tmp_path / "cache")
        for name, reward in zip(names, rewards, strict=True)
    ]
    prepare_rows(found[0]._setup, task_rows("warm"))
    waited[0].join()
    assert (rewards[0].asked, second.asked) == (20, 0)


def test_answers_are_scored(model, tmp_path):
    rows = [Scored(f"p{i}", ("short", "rather long", "x" * i)) for i in range(1, 8)]
    learner(model, tmp_path / "run", MultiTask(), rollouts=None).learn(rows, "a")
    assert manifest(tmp_path / "run").weights["rows"] == 21


# ---- the command ----


REWARD = "def longer(prompts, completions):\n    return [float(len(text)) for text in completions]\n"


def test_the_command_takes_prompts(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"q{i}?"}) + "\n" for i in range(6)))
    assert load_prompts(tmp_path / "prompts.jsonl").fingerprint == prompts().fingerprint
    flags = "--objective var --reward my_rewards:longer --samples 4 --max-new-tokens 24 --max-length 48 --rounds 2"
    given = ("--model", str(model), "--task", "a=prompts.jsonl", "--output", "run", "--json")
    code, _, errors = run(capsys, "learn", *given, *flags.split())
    assert code == 0, errors
    assert len(manifest(tmp_path / "run").rollouts) == 2


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "dpo"}, "dpo learns from no rewards and would ignore reward"),
        (
            {"objective": "snkl", "rollouts": RolloutOptions(rounds=2), "options": {"reference": "previous_task"}},
            "the policy before the task is not available",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(model, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        learner(model, tmp_path / "run", **arguments)


def test_sampling_options_without_a_reward_are_refused(model, tmp_path, capsys):
    with pytest.raises(InputError, match="sampled answers need rewards"):
        make_learner(model, tmp_path / "run", None, "var", options=LONG, rollouts=FEW)
    given = ("--model", str(model), "--task", "a=x", "--output", "o", "--objective", "var", "--samples", "3")
    code, _, errors = run(capsys, "learn", *given)
    assert code == 2
    assert "samples is for answers that are sampled" in errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 4, "first_samples": 4}, "first_samples: must be fewer than samples, 4, found 4"),
        ({"first_samples": 1}, "first_samples"),
        ({"agree_within": 0.5}, "agree_within is for first_samples"),
    ],
)
def test_first_samples_that_decide_nothing_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        RolloutOptions(**values)


def test_runs_that_sample_in_one_step_are_described_as_before(model, tmp_path):
    """So that those of earlier versions are continued."""
    settings = learner(model, tmp_path / "run")._setup.to_dict()["settings"]
    assert not {"first_samples", "agree_within"} & settings.keys()
    settings = learner(model, tmp_path / "other", rollouts=TWO_STEPS)._setup.to_dict()["settings"]
    assert (settings["first_samples"], settings["agree_within"]) == (2, 0.5)


@pytest.mark.parametrize(
    ("rollouts", "weighting", "message"),
    [
        (RolloutOptions(samples=1, max_new_tokens=24), None, "raise samples"),
        (FEW, WeightOptions(estimator="quantile"), "quantile is not for sampled answers"),
        (RolloutOptions(max_new_tokens=48), None, "no room for a prompt: raise max_length"),
    ],
)
def test_samples_that_cannot_be_weighed_are_refused_before_they_are_drawn(
    model, tmp_path, rollouts, weighting, message
):
    scorer = Scorer()
    with pytest.raises(InputError, match=message):
        learner(model, tmp_path / "run", reward=scorer, rollouts=rollouts, weighting=weighting).learn(prompts(), "a")
    assert scorer.asked == 0


def test_a_prompt_that_is_too_long_is_refused_before_any_task_is_learned(model, tmp_path):
    rows = ScoredSet.of([{"prompt": "q?"}, {"prompt": "many words " * 9}], "prompts.jsonl")
    found = learner(model, tmp_path / "run")
    what = r"prompts.jsonl: prompt 2 has \d+ tokens, .*\(max_prompt_tokens is max_length 48 less max_new_tokens 24\)"
    with pytest.raises(InputError, match=what):
        found.learn_all([("first", prompts(), None), ("second", rows, None)])
    assert not found.run.versions


@pytest.mark.parametrize("column", ["responses", "completion"])
def test_answers_under_another_name_are_not_taken_for_no_answers(tmp_path, column):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q?", column: ["yes", "no"]}) + "\n")
    recipe = Recipe(objective="var", reward="m:f", tasks=[{"name": "a", "train": str(path)}])
    with pytest.raises(InputError, match=f"field '{column}': answers stand in 'completions'"):
        load_tasks(recipe)


def test_rows_without_rewards_need_somebody_who_gives_them(model, tmp_path):
    for rows in (prompts(), [Scored("p", ("a", "b"))], PreferenceSet.of(task_rows("warm").items)):
        with pytest.raises(InputError, match="the objective var learns from scored rows"):
            make_learner(model, tmp_path / str(len(rows)), None, "var", options=LONG).learn(rows, "a")


def test_answers_that_never_end_are_an_error_with_advice(tmp_path):
    endless = save_model(tmp_path / "endless")
    with pytest.raises(EveralignError, match=r"\d+ of \d+ sampled answers did not end .* raise --max-new-tokens"):
        learner(endless, tmp_path / "run", rollouts=RolloutOptions(samples=2, max_new_tokens=1)).learn(prompts(2), "a")


def test_a_scorer_that_fails_stops_the_run_and_names_the_rows(model, tmp_path):
    with pytest.raises(EveralignError, match=r"rows 1 to \d: the judge is ill"):
        learner(model, tmp_path / "run", reward=Scorer(fails=True)).learn(prompts(), "a")


def test_rewards_that_are_all_one_are_an_error(model, tmp_path):
    same = CallableScorer(lambda prompts, completions: [1.0] * len(completions), "same")
    with pytest.raises(InputError, match="do not differ"):
        learner(model, tmp_path / "run", reward=same).learn(prompts(), "a")


def test_a_run_goes_on_only_with_the_same_scorer_and_sampling(model, tmp_path):
    learner(model, tmp_path / "run").learn(prompts(), "a")
    other = CallableScorer(lambda prompts, completions: [0.0] * len(completions), "other")
    with pytest.raises(InputError, match=r"settings \(reward: 'longer' then, 'other' now\)"):
        learner(model, tmp_path / "run", reward=other, resume=True)
    with pytest.raises(InputError, match=r"settings \(samples: 4 then, 5 now\)"):
        learner(model, tmp_path / "run", rollouts=RolloutOptions(samples=5, max_new_tokens=24), resume=True)


def test_several_tasks_of_prompts_cannot_be_pooled(model, tmp_path):
    with pytest.raises(InputError, match="mtl pools rows, not prompts"):
        learner(model, tmp_path / "run", MultiTask()).learn_all([("a", prompts(), None), ("b", prompts(6, 50), None)])


def test_rounds_stand_one_behind_the_other_in_the_training_curve():
    steps = [TrainingStep(stage="var", step=step, epoch=0.1, loss=1.0) for step in (1, 3, 1, 3)]
    assert [[step.step for step in stage] for stage in stage_curves([*steps, steps[-1]])] == [[1, 3], [1, 3], [3]]
    other = TrainingStep(stage="sft", step=5, epoch=0.1, loss=1.0)
    assert [stage[0].stage for stage in stage_curves([*steps[:2], other])] == ["var", "sft"]


def test_sampling_options_that_do_nothing_are_announced(model, tmp_path):
    lines = []
    found = learner(model, tmp_path / "run", lines=lines)
    found.learn_all([("a", [Scored(f"s{i}", ("yes", "no way"), (1.0, float(i))) for i in range(4)], None)])
    assert "no task has prompts alone: nothing is sampled, and the sampling options do nothing" in lines


def test_held_out_pairs_judge_scored_tasks(model, tmp_path, capsys):
    rows = [{"prompt": f"s{i}", "completions": ["yes", "no way"], "rewards": [1.0, float(i)]} for i in range(4)]
    pairs = [{"prompt": "other", "chosen": "yes", "rejected": "no"}]
    for name, items in (("train", rows), ("test", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = f"a={tmp_path}/train.jsonl,{tmp_path}/test.jsonl"
    given = ("--model", str(model), "--task", task, "--output", str(tmp_path / "run"), "--objective", "var", "--json")
    code, _, errors = run(capsys, "learn", *given, "--max-length", "48")
    assert code == 0, errors
    assert load_run(tmp_path / "run").tasks == ["a"]


def test_pairs_without_anybody_who_gives_rewards_are_refused_with_advice(model, tmp_path, capsys):
    pairs = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = ("--model", str(model), "--task", f"a={tmp_path}/pairs.jsonl", "--output", str(tmp_path / "run"))
    code, _, errors = run(capsys, "learn", *given, "--objective", "var")
    assert code == 2
    assert "pairs.jsonl: preferences have no rewards: name a scorer with reward" in errors
