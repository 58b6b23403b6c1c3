"""The temperature that makes weights worth a given share of the responses."""

import math

import pytest
import torch

from everalign.objectives import var_weights

NORMAL = torch.special.ndtri((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)


def effective_share(weights):
    return (weights.sum() ** 2 / (len(weights) * weights.square().sum())).item()


def scored(estimator):
    rewards = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    options = {"estimator": estimator}
    if estimator in ("reference", "quantile"):
        options["reference_rewards"] = torch.randn(15, 9, generator=torch.Generator().manual_seed(1)) * 3
    return rewards, torch.arange(60) // 4, options


@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("estimator", ["group", "group_loo", "in_batch", "reference", "quantile"])
def test_the_weights_are_worth_what_was_asked_for(estimator, target):
    rewards, groups, options = scored(estimator)
    found = var_weights(rewards, groups, target_ess=target, **options)
    assert effective_share(found.weights) == pytest.approx(target, rel=1e-9)
    given = var_weights(rewards, groups, temperature=found.temperature, **options)
    assert torch.equal(given.weights, found.weights)


def test_the_target_counts_the_cap():
    rewards, groups, options = scored("group_loo")
    found = var_weights(rewards, groups, target_ess=0.4, weight_cap=1.5, **options)
    assert effective_share(found.weights) == pytest.approx(0.4, rel=1e-9)
    assert found.weights.max().item() == 1.5


def test_the_solved_temperature_is_in_units_of_the_scaled_reward():
    rewards, groups, _ = scored("group")
    plain, scaled = (var_weights(rewards, groups, target_ess=0.5, reward_scale=scale) for scale in (1.0, 4.0))
    assert plain.temperature == pytest.approx(4 * scaled.temperature, rel=1e-9)
    torch.testing.assert_close(plain.weights, scaled.weights)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_normal_rewards_are_worth_the_closed_form(temperature):
    groups = torch.zeros(len(NORMAL), dtype=torch.int64)
    expected = math.exp(-1 / temperature**2)  # exp(-(deviation / temperature)^2)
    found = var_weights(NORMAL, groups, temperature=temperature)
    assert effective_share(found.weights) == pytest.approx(expected, rel=1e-2)
    assert var_weights(NORMAL, groups, target_ess=expected).temperature == pytest.approx(temperature, rel=1e-2)


def test_a_target_beyond_reach_says_how_far_it_goes():
    rewards, groups, _ = scored("group")
    with pytest.raises(ValueError, match=r"sample size of 0.2: it goes from 0.25 of the rows.* to 1,"):
        var_weights(rewards, groups, target_ess=0.2)
    with pytest.raises(ValueError, match="from 1 of the rows"):
        var_weights(torch.zeros(4), torch.tensor([0, 0, 1, 1]), target_ess=0.9)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.5, 3.0, math.nan])
def test_a_target_that_is_no_share_is_refused(target):
    with pytest.raises(ValueError, match="target_ess must be between 0 and 1"):
        var_weights(torch.zeros(2), torch.zeros(2, dtype=torch.int64), target_ess=target)
