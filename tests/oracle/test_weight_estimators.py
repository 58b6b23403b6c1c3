"""Weights from files with the estimators that need more than rewards: reference rewards, or reference probabilities."""

import dataclasses
import json

import pytest
import torch

from cli_for_tests import run
from everalign.data import ReplayBuffer, Scored, ScoredSet, load_scored
from everalign.data.tokenization import deduplicate, tokenize_scored
from everalign.errors import InputError
from everalign.learning.recipe import Recipe
from everalign.learning.run_data import load_run
from everalign.methods import ExperienceReplay
from everalign.objectives import var_weights
from everalign.training.options import WeightOptions
from everalign.training.reference import sequence_logprobs
from everalign.training.reward_weights import compute_weights
from learner_for_tests import adapter_weights, make_learner, same_weights, save_model
from tokenizers_for_tests import byte_tokenizer

SINGLE = [Scored(f"q{i}?", (f"a {i}",), (i % 4 / 2,), reference_rewards=(0.0, 1.0, i % 3)) for i in range(8)]
LISTED = [Scored(f"q{i}?", ("yes, gladly!", "no.", "hm"), (2.0, 0.5, i % 3)) for i in range(6)]
LENGTHS = [(4, 2, 1)] * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def learner(model, output, weighting, method=None, **arguments):
    return make_learner(model, output, method, "var", weighting=weighting, **arguments)


def weights_of(weighed):
    return torch.tensor([weight for row in weighed.rows for weight in row.weights], dtype=torch.float64)


def flat(rows):
    """Rewards and groups of rows, as `var_weights` takes them."""
    rewards = torch.tensor([reward for row in rows for reward in row.rewards], dtype=torch.float64)
    return rewards, torch.tensor([number for number, row in enumerate(rows) for _ in row.completions])


def newest_version(output):
    return sorted((output / "versions").iterdir())[-1]


# ---- reference rewards ----


@pytest.mark.parametrize("rows", [SINGLE, [dataclasses.replace(r, reference_rewards=(0.0, 2.0)) for r in LISTED]])
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (WeightOptions(estimator="reference"), {"estimator": "reference", "temperature": 1.0}),
        (
            WeightOptions(estimator="reference", temperature=0.5, weight_cap=1.5),
            {"temperature": 0.5, "weight_cap": 1.5},
        ),
        (WeightOptions(estimator="reference", scale_rewards=False), {"reward_scale": 1.0}),
        (WeightOptions(estimator="reference", target_ess=0.7), {"target_ess": 0.7}),
        (WeightOptions(estimator="quantile"), {"estimator": "quantile", "temperature": 0.25}),
        (WeightOptions(estimator="quantile", temperature=2.0), {"estimator": "quantile", "temperature": 2.0}),
    ],
)
def test_weights_are_those_of_the_estimator(rows, options, arguments):
    rewards, groups = flat(rows)
    scale = 1.0 if options.estimator == "quantile" else rewards.std(correction=0).item()
    beside = torch.tensor([row.reference_rewards for row in rows])
    arguments = {"estimator": "reference", "reward_scale": scale, **arguments}
    expected = var_weights(rewards, groups, reference_rewards=beside, **arguments)
    found = compute_weights(rows, [(3,) * len(row.completions) for row in rows], options)
    torch.testing.assert_close(weights_of(found), expected.weights, rtol=1e-12, atol=0)
    assert (found.temperature, found.scale) == (expected.temperature, arguments["reward_scale"])


def test_quantiles_do_not_depend_on_the_scale_of_rewards():
    bent = [
        dataclasses.replace(row, rewards=tuple(x**3 for x in row.rewards), reference_rewards=(0.0, 1.0, (i % 3) ** 3))
        for i, row in enumerate(SINGLE)
    ]
    first, second = (
        weights_of(compute_weights(rows, [(3,)] * 8, WeightOptions(estimator="quantile"))) for rows in (SINGLE, bent)
    )
    assert torch.equal(first, second)
    assert first.max() > 3 * first.min()


def test_what_is_learned_are_these_weights(model, tmp_path):
    for estimator in ("reference", "quantile"):
        options = WeightOptions(estimator=estimator)
        learner(model, tmp_path / estimator, options, ExperienceReplay(replay=1.0)).learn(SINGLE, "a")
        lines = (newest_version(tmp_path / estimator) / "replay.jsonl").read_text().splitlines()
        found = {row["prompt"]: row for row in map(json.loads, lines)}
        for row in compute_weights(SINGLE, [(4,)] * 8, options).rows:
            assert found[row.prompt]["weights"] == list(row.weights)
            assert found[row.prompt]["reference_rewards"] == list(row.reference_rewards)
        settings = load_run(tmp_path / estimator).facts.settings
        assert (settings["estimator"], settings["temperature"]) == (estimator, options.temperature)


@pytest.mark.parametrize("estimator", ["reference", "quantile"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            Scored("p", ("a",), (1.0,)),
            "row 9: field 'reference_rewards': no such column in this row, from which the estimator {}",
        ),
        (
            Scored("p", ("a",), (1.0,), reference_rewards=(1.0,)),
            "row 9: field 'reference_rewards': 1 numbers, while row 1 has 3; give every row as many",
        ),
    ],
)
def test_rows_without_their_reference_rewards_are_named(model, tmp_path, estimator, row, message):
    with pytest.raises(InputError, match=f"^memory: {message.format(estimator)}"):
        learner(model, tmp_path, WeightOptions(estimator=estimator)).learn([*SINGLE, row], "a")


def test_rows_that_have_weights_need_no_reference_rewards():
    rows = [Scored("p", ("a", "b"), (1.0, 2.0), weights=(1.0, 1.0))]
    for estimator in ("reference", "quantile", "support"):
        assert compute_weights(rows, [(1, 1)], WeightOptions(estimator=estimator)).temperature is None


# ---- the column ----


def test_reference_rewards_are_carried_along(tmp_path):
    row = Scored("p", ("a", "b"), (1.0, 2.0), 3.0, (0.5, 1.5), (1, 2.5))
    assert row.reference_rewards == (1.0, 2.5)
    assert Scored.from_json(json.loads(json.dumps(row.to_json())), "here") == row
    assert row.only([1]).reference_rewards == (1.0, 2.5)
    buffer = ReplayBuffer()
    buffer.add("a", [row], 1.0)
    buffer.to_jsonl(tmp_path / "replay.jsonl")
    assert ReplayBuffer.from_jsonl(tmp_path / "replay.jsonl").rows() == [row]


def test_reference_rewards_tell_sets_apart_and_leave_the_id_alone():
    row = SINGLE[0]
    without = dataclasses.replace(row, reference_rewards=None)
    other = dataclasses.replace(row, reference_rewards=(0.0, 1.0, 0.5))
    assert row.id == without.id
    assert len({ScoredSet.of([each]).fingerprint for each in (row, without, other)}) == 3
    assert len({row, without, other}) == 3


def test_reference_rewards_are_read_from_csv(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completions,rewards,reference_rewards\np,"[""a""]",[1],"[0, 2.5]"\n')
    assert list(load_scored(tmp_path / "a.csv")) == [Scored("p", ("a",), (1.0,), reference_rewards=(0.0, 2.5))]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "the list is empty; give at least one, or leave the column out of the row"),
        (1.0, "must be a list of numbers, found a number"),
    ],
)
def test_bad_reference_rewards_are_named(tmp_path, value, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({**SINGLE[0].to_json(), "reference_rewards": value}) + "\n")
    with pytest.raises(InputError, match=f"a.jsonl:1: field 'reference_rewards': {message}"):
        load_scored(tmp_path / "a.jsonl")
    for bad, what in ((float("nan"), "finite, found nan"), ("1", "a number, found text")):
        with pytest.raises(InputError, match=rf"field 'reference_rewards\[1\]': must be {what}"):
            dataclasses.replace(SINGLE[0], reference_rewards=(1.0, bad))


# ---- support ----


@pytest.mark.parametrize("normalize", [False, True])
def test_support_weighs_with_the_reference_s_probabilities(normalize):
    rewards, groups = flat(LISTED)
    reference = [torch.tensor([-9.0, -4.0 - i, -2.0]) for i in range(6)]
    lengths = torch.tensor([n for row in LENGTHS for n in row])
    expected = var_weights(
        rewards,
        groups,
        estimator="support",
        reward_scale=rewards.std(correction=0).item(),
        reference_logprobs=torch.cat(reference),
        lengths=lengths if normalize else None,
    ).weights
    options = WeightOptions(estimator="support", length_normalize=normalize)
    found = weights_of(compute_weights(LISTED, LENGTHS, options, reference))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert not torch.allclose(found, weights_of(compute_weights(LISTED, LENGTHS, WeightOptions())))


@pytest.mark.parametrize("normalize", [False, True])
def test_length_that_decides_is_announced_unless_it_is_normalised(normalize):
    rows = [Scored(f"q{i}?", ("a", "b"), (float(i % 2), 1.0 - i % 2)) for i in range(20)]
    lengths = [(3 + i % 7, 9 - i % 5) for i in range(20)]
    reference = [-2.0 * torch.tensor(pair, dtype=torch.float64) for pair in lengths]
    options = WeightOptions(estimator="support", length_normalize=normalize)
    told = compute_weights(rows, lengths, options, reference).statistics.warnings()
    assert any("Length decides the weights" in line and "length_normalize" in line for line in told) != normalize


def test_the_reference_of_support_is_the_base_model_whatever_was_learned(model, tmp_path):
    found = learner(model, tmp_path / "run", WeightOptions(estimator="support"), ExperienceReplay(replay=1.0))
    found.learn(LISTED, "first")
    second = [dataclasses.replace(row, prompt=row.prompt + " ") for row in LISTED]
    found.learn(second, "second")
    rows = [json.loads(line) for line in (newest_version(tmp_path / "run") / "replay.jsonl").read_text().splitlines()]
    weights = {row["prompt"]: row["weights"] for row in rows if row["task"] == "second"}
    alike = [dataclasses.replace(row, weights=(1.0,) * 3) for row in second]
    with found.policy.as_base():
        reference = sequence_logprobs(found.policy, list(tokenize_scored(alike, found.tokenizer, 64)), 240)
    lengths = [[len(response) for response in g.responses] for g in tokenize_scored(alike, found.tokenizer, 64)]
    for row in compute_weights(second, lengths, WeightOptions(estimator="support"), reference).rows:
        assert weights[row.prompt] == pytest.approx(list(row.weights), rel=1e-5)
    # With the policy as it is now they would be others.
    now = sequence_logprobs(found.policy, list(tokenize_scored(alike, found.tokenizer, 64)), 240)
    assert max((a - b).abs().max() for a, b in zip(now, reference, strict=True)) > 0.1


def test_a_resumed_run_weighs_alike(model, tmp_path):
    sets = [("first", LISTED, None), ("second", [dataclasses.replace(r, prompt=r.prompt + " ") for r in LISTED], None)]
    learner(model, tmp_path / "whole", WeightOptions(estimator="support")).learn_all(sets)
    learner(model, tmp_path / "cut", WeightOptions(estimator="support")).learn_all(sets[:1])
    learner(model, tmp_path / "cut", WeightOptions(estimator="support"), resume=True).learn_all(sets)
    assert same_weights(*(adapter_weights(tmp_path / name) for name in ("whole", "cut")))
    with pytest.raises(InputError, match=r"started with different settings \(length_normalize: False then, True now\)"):
        learner(model, tmp_path / "cut", WeightOptions(estimator="support", length_normalize=True), resume=True)


def test_equal_completions_are_listed_once(model, tmp_path):
    lines = []
    rows = [*LISTED, Scored("p?", ("a", "b", "a"), (1.0, 0.0, 1.0))]
    learner(model, tmp_path, WeightOptions(estimator="support"), ExperienceReplay(replay=1.0), lines=lines).learn(
        rows, "a"
    )
    assert "  1 of 21 completions are listed before with the same reward and left out" in lines
    assert load_run(tmp_path).versions[0].manifest.weights["merged_completions"] == 1
    rows = [json.loads(line) for line in (newest_version(tmp_path) / "replay.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["prompt"] == "p?"]
    assert (row["completions"], row["rewards"]) == (["a", "b"], [1.0, 0.0])


def test_the_same_answer_sampled_twice_stays_there_twice_elsewhere(model, tmp_path):
    rows = [*LISTED, Scored("p?", ("a", "b", "a"), (1.0, 0.0, 1.0))]
    learner(model, tmp_path, WeightOptions(estimator="group"), ExperienceReplay(replay=1.0)).learn(rows, "a")
    text = (newest_version(tmp_path) / "replay.jsonl").read_text()
    assert '"completions": ["a", "b", "a"]' in text


def test_equal_completions_with_different_rewards_are_named(model, tmp_path):
    rows = [*LISTED, Scored("p?", ("a", "b", "a"), (1.0, 0.0, 2.5))]
    with pytest.raises(InputError, match=r"^memory: row 7 .*completions\[0\] and completions\[2\] are .* 1 and 2.5"):
        learner(model, tmp_path, WeightOptions(estimator="support")).learn(rows, "a")


def test_a_row_with_one_answer_listed_twice_has_one_completion(model, tmp_path):
    rows = [*LISTED, Scored("p?", ("a", "a"), (1.0, 1.0))]
    with pytest.raises(InputError, match=r"1 rows have one completion only \(rows 7\)"):
        learner(model, tmp_path, WeightOptions(estimator="support")).learn(rows, "a")


def test_rows_without_equal_completions_are_left_as_they_are():
    assert all(a is b for a, b in zip(deduplicate(LISTED, byte_tokenizer()), LISTED, strict=True))


# ---- options ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "quantile", "scale_rewards": True}, "the estimator quantile would ignore scale_rewards"),
        ({"estimator": "group", "length_normalize": True}, "the estimator group would ignore length_normalize"),
        ({"estimator": "support", "length_normalize": 1}, "length_normalize must be true or false, found 1"),
        ({"scale_rewards": "yes"}, "scale_rewards must be true or false, found 'yes'"),
        ({"estimator": "cross"}, "estimator must be one of .*, found 'cross'"),
    ],
)
def test_options_that_an_estimator_would_ignore_are_refused(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        WeightOptions(**options)


def test_a_quantile_has_its_own_temperature_and_no_scale():
    assert (WeightOptions(estimator="quantile").temperature, WeightOptions(estimator="quantile").scale_rewards) == (
        0.25,
        False,
    )
    assert WeightOptions(estimator="quantile", scale_rewards=False) == WeightOptions(
        estimator="quantile", temperature=0.25
    )
    assert (WeightOptions(estimator="reference").temperature, WeightOptions(estimator="reference").scale_rewards) == (
        1.0,
        True,
    )


@pytest.mark.parametrize("estimator", ["group", "reference", "quantile", "support"])
def test_a_printed_recipe_can_be_given_again(estimator):
    tasks = [{"name": "a", "train": "a.jsonl"}]
    given = {"model": "tiny", "output": "run", "objective": "var", "tasks": tasks, "estimator": estimator}
    printed = Recipe.from_flags(given).complete()
    assert ("length_normalize" in printed["weighting"]) == (estimator == "support")
    again = Recipe.model_validate(printed).learner_arguments()["weighting"]
    assert again == WeightOptions(estimator=estimator).resolved()


def test_runs_from_before_an_option_go_on(model, tmp_path):
    """What an estimator does not look at is no setting of its run."""
    learner(model, tmp_path, WeightOptions()).learn(LISTED, "a")
    written = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert "length_normalize" not in written
    assert (written["estimator"], written["temperature"], written["scale_rewards"]) == ("group", 0.25, True)


def test_the_command_line_takes_the_estimators(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("single", SINGLE), ("listed", LISTED)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    common = ["learn", "--model", str(model), "--objective", "var", "--targets", "q_proj", "--max-length", "64"]
    for number, (name, flags) in enumerate(
        [("single", ["quantile"]), ("single", ["reference"]), ("listed", ["support", "--length-normalize"])]
    ):
        output = ["--task", f"{name}={name}.jsonl", "--output", f"run{number}", "--estimator", *flags]
        code, _, err = run(capsys, *common, *output)
        assert code == 0, err
        assert load_run(tmp_path / f"run{number}").facts.settings["estimator"] == flags[0]
    code, _, err = run(capsys, *common, "--task", "a=listed.jsonl", "--output", "other", "--estimator", "reference")
    assert (code, "listed.jsonl: row 1: field 'reference_rewards': no such column" in err) == (2, True)


# ---- what is left out ----


def test_completions_below_the_floor_are_left_out_and_what_they_weighed_is_said():
    rows = [Scored("p", ("a", "b", "c"), (3.0, 2.0, -3.0)), Scored("q", ("a", "b"), (1.0, 1.0))]
    whole = compute_weights(rows, [(1, 1, 1), (1, 1)], WeightOptions(scale_rewards=False, temperature=1.0))
    found = compute_weights(
        rows, [(1, 1, 1), (1, 1)], WeightOptions(scale_rewards=False, temperature=1.0, weight_floor=0.1)
    )
    assert found.rows[0].weights == (*whole.rows[0].weights[:2], 0.0)
    assert found.rows[1].weights == (1.0, 1.0)
    assert found.left_out == 1
    assert found.left_out_weight == pytest.approx(whole.rows[0].weights[2] / 5)
    assert found.statistics == whole.statistics
    assert "; 1 completions with 0.1% of the weight are left out" in found.one_line()
    assert found.to_dict()["left_out"] == 1
    assert "left_out" not in whole.to_dict()


def test_prompts_whose_rewards_are_all_one_are_left_out():
    rows = [Scored("p", ("a", "b"), (1.0, 1.0)), Scored("q", ("a", "b"), (1.0, 2.0))]
    found = compute_weights(rows, [(1, 1), (1, 1)], WeightOptions(drop_constant=True))
    assert [row.prompt for row in found.rows] == ["q"]
    assert (found.left_out, found.left_out_weight) == (2, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_constant": True}, "drop_constant leaves all others out"),
        ({"weight_cap": 0.1, "weight_floor": 0.5}, "weighs less than weight_floor, 0.5"),
    ],
)
def test_options_that_leave_no_row_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        compute_weights(SINGLE, [(4,)] * 8, WeightOptions(estimator="in_batch", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_floor": 1.0}, "weight_floor must be a number from 0 to below 1"),
        ({"weight_floor": -0.1}, "weight_floor must be a number from 0 to below 1"),
        ({"drop_constant": 1}, "drop_constant must be true or false"),
    ],
)
def test_bad_limits_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        WeightOptions(**options)
