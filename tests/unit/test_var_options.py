"""What weights refuse: options that would be ignored, inputs that are missing, and values that are not numbers."""

import math

import pytest
import torch

from everalign.objectives import global_scale, var_weights

INF = math.inf
REWARDS, GROUPS = torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([0, 0, 1, 1])
OPTIONS = {
    "reference_logprobs": torch.full((4,), -2.0),
    "sampler_logprobs": torch.full((4,), -3.0),
    "lengths": torch.full((4,), 3),
    "baselines": torch.zeros(2),
    "reference_rewards": torch.tensor([[0.0, 1.0], [1.0, 2.0]]),
    "include_own": True,
    "reward_scale": 2.0,
}
NEEDED = {"support": {"reference_logprobs"}, "reference": {"reference_rewards"}, "quantile": {"reference_rewards"}}
OFF_POLICY = {"reference_logprobs", "sampler_logprobs"}
USED = {
    "group": OFF_POLICY | {"reward_scale"},
    "group_loo": OFF_POLICY | {"reward_scale"},
    "support": {"reference_logprobs", "lengths", "reward_scale"},
    "in_batch": OFF_POLICY | {"baselines", "include_own", "reward_scale"},
    "reference": OFF_POLICY | {"reference_rewards", "reward_scale"},
    "quantile": OFF_POLICY | {"reference_rewards"},
}


def weigh(estimator, names, **changed):
    return var_weights(REWARDS, GROUPS, estimator=estimator, **{name: OPTIONS[name] for name in names}, **changed)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("estimator", USED)
def test_an_option_is_used_or_refused(estimator, option):
    needed = NEEDED.get(estimator, set())
    if option not in USED[estimator]:
        with pytest.raises(ValueError, match=f"'{estimator}' would ignore {option}"):
            weigh(estimator, needed | {option})
    elif option not in needed:
        with_option = OPTIONS[option] if option in ("include_own", "reward_scale") else OPTIONS[option].clone()
        if isinstance(with_option, torch.Tensor):
            with_option[0] += 1  # a change that all rows alike would cancel
        names = needed | (OFF_POLICY - {option} if option in OFF_POLICY and estimator != "support" else set())
        before = weigh(estimator, needed).weights
        after = weigh(estimator, names, **{option: with_option}).weights
        assert not torch.allclose(before, after)


@pytest.mark.parametrize("estimator", NEEDED)
def test_what_an_estimator_needs_is_asked_for(estimator):
    with pytest.raises(ValueError, match=f"'{estimator}' needs {NEEDED[estimator].pop()}"):
        weigh(estimator, set())


@pytest.mark.parametrize("option", sorted(OFF_POLICY))
@pytest.mark.parametrize("estimator", ["group", "group_loo", "in_batch"])
def test_a_reference_without_a_sampler_is_refused_and_so_is_the_reverse(estimator, option):
    with pytest.raises(ValueError, match="both reference_logprobs and sampler_logprobs"):
        weigh(estimator, {option})


def test_an_estimator_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="one of group, group_loo, support, in_batch, reference, quantile, not 'mean'"):
        weigh("mean", set())


def test_a_temperature_beside_a_target_is_refused():
    with pytest.raises(ValueError, match="not both"):
        weigh("group", set(), temperature=1.0, target_ess=0.9)


@pytest.mark.parametrize("name", ["temperature", "reward_scale", "weight_cap"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, INF])
def test_numbers_that_are_not_above_zero_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        weigh("group", set(), **{name: value})


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_reward_that_is_no_reward_is_named_by_its_row(bad):
    with pytest.raises(ValueError, match=f"reward other than -inf must be finite: row 1 is {bad}, row 3 is {bad}"):
        var_weights(torch.tensor([1.0, bad, -INF, bad]), GROUPS)
    with pytest.raises(ValueError, match=f"reference reward other than -inf must be finite: row 3 is {bad}"):
        weigh("reference", set(), reference_rewards=torch.tensor([[0.0, -INF], [0.0, bad]]))
    with pytest.raises(ValueError, match="row 0 is"):
        global_scale(torch.tensor([bad, 1.0]))


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_log_probabilities_and_baselines_must_be_finite(bad):
    broken = torch.tensor([0.0, 0.0, bad, 0.0])
    with pytest.raises(ValueError, match=f"reference log-probability must be finite: row 2 is {bad}"):
        weigh("support", set(), reference_logprobs=broken)
    with pytest.raises(ValueError, match=f"sampler log-probability must be finite: row 2 is {bad}"):
        weigh("group", {"reference_logprobs"}, sampler_logprobs=broken)
    with pytest.raises(ValueError, match=f"baseline must be finite: row 1 is {bad}"):
        weigh("in_batch", set(), baselines=torch.tensor([0.0, bad]))


def test_rewards_that_overflow_at_the_temperature_are_named():
    rewards, options = torch.tensor([1e300, 0.0], dtype=torch.float64), {"baselines": torch.zeros(2)}
    with pytest.raises(ValueError, match="reward / temperature other than -inf must be finite: row 0 is inf"):
        var_weights(rewards, torch.tensor([0, 1]), estimator="in_batch", temperature=1e-9, **options)


@pytest.mark.parametrize(
    "groups", [torch.tensor([0, 0, 1]), torch.zeros(4, 1, dtype=torch.int64), torch.tensor([0.0, 0.0, 1.0, 1.0])]
)
def test_groups_are_one_integer_a_row(groups):
    with pytest.raises(ValueError, match="groups"):
        var_weights(REWARDS, groups)


@pytest.mark.parametrize(
    ("estimator", "name", "value"),
    [
        ("support", "reference_logprobs", torch.zeros(4, 1)),
        ("in_batch", "baselines", torch.zeros(1)),
        ("in_batch", "baselines", torch.zeros(2, 1)),
        ("reference", "reference_rewards", torch.zeros(1, 5)),
        ("reference", "reference_rewards", torch.zeros(4)),
        ("quantile", "reference_rewards", torch.zeros(2, 0)),
    ],
)
def test_shapes_that_do_not_belong_are_refused(estimator, name, value):
    with pytest.raises(ValueError, match=name):
        weigh(estimator, set(), **{name: value})


def test_a_group_number_below_zero_is_no_index():
    with pytest.raises(ValueError, match="indexed by group number"):
        var_weights(REWARDS, GROUPS - 1, estimator="in_batch", baselines=torch.zeros(3))


@pytest.mark.parametrize("lengths", [torch.tensor([3, 0, 1, 1]), torch.tensor([3, 1])])
def test_lengths_are_one_count_of_at_least_one_a_row(lengths):
    with pytest.raises(ValueError, match="token counts of at least 1"):
        weigh("support", {"reference_logprobs"}, lengths=lengths)


def test_a_batch_needs_something_to_compare_with():
    with pytest.raises(ValueError, match="at least two groups"):
        var_weights(REWARDS, GROUPS * 0, estimator="in_batch")
    with pytest.raises(ValueError, match=r"give baselines.* row 2$"):
        var_weights(REWARDS, torch.tensor([0, 0, 1, 0]), estimator="in_batch")
    with pytest.raises(ValueError, match=r"give baselines.* row 0$"):
        var_weights(torch.tensor([1.0, -INF, 1.0, 2.0]), GROUPS, estimator="in_batch")


@pytest.mark.parametrize("rewards", [[], [3.0], [2.0, 2.0, -INF]])
def test_rewards_that_do_not_differ_have_no_scale(rewards):
    with pytest.raises(ValueError, match="do not differ"):
        global_scale(torch.tensor(rewards))
