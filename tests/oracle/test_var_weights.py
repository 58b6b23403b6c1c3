"""The weights of scored responses: closed forms, limits, invariances, and values at the edge of what fp64 holds."""

import math
import warnings

import pytest
import torch

from everalign.objectives import global_scale, var_weights, weighted_nll

INF = math.inf
WITHIN_GROUPS = ["group", "group_loo"]


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


def ids(*values):
    return torch.tensor(values)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights_of(rewards, groups, **options):
    return var_weights(rewards, groups, **options).weights


def effective_share(weights):
    return (weights.sum() ** 2 / (len(weights) * weights.square().sum())).item()


# exp(reward) is 1, 2, 4 and, for the second prompt, 3 and 9
REWARDS, GROUPS = fp64(1, 2, 4, 3, 9).log(), ids(7, 7, 7, -2, -2)


def test_group_weights_by_hand():
    found = var_weights(REWARDS, GROUPS)
    torch.testing.assert_close(found.weights, fp64(3 / 7, 6 / 7, 12 / 7, 0.5, 1.5), rtol=1e-14, atol=0)
    torch.testing.assert_close(
        found.log_normalisers.exp(), fp64(7 / 3, 7 / 3, 7 / 3, 6, 6), rtol=1e-14, atol=0
    )  # means of exp(reward)
    assert found.temperature == 1.0


def test_leave_one_out_weights_by_hand():
    found = weights_of(REWARDS, GROUPS, estimator="group_loo")
    torch.testing.assert_close(found, fp64(1 / 3, 2 / 2.5, 4 / 1.5, 1 / 3, 3), rtol=1e-14, atol=0)


def test_in_batch_weights_by_hand():
    # Baselines log 2 and log 3 leave exp(gain) = .5, 1, 2 and 1, 3; the other prompt's means are 2 and 3.5 / 3.
    baselines = fp64(2, 3).log()
    options = {"estimator": "in_batch", "baselines": baselines}
    groups = ids(0, 0, 0, 1, 1)
    found = weights_of(REWARDS, groups, **options)
    torch.testing.assert_close(found, fp64(0.25, 0.5, 1, 6 / 7, 18 / 7), rtol=1e-14, atol=0)
    whole = weights_of(REWARDS, groups, include_own=True, **options)
    torch.testing.assert_close(whole, fp64(0.5, 1, 2, 1, 3) / 1.5, rtol=1e-14, atol=0)


def test_in_batch_baselines_are_by_default_those_of_the_prompts_other_responses():
    rewards, groups = fp64(1, 2, 6, 0, 10), ids(0, 0, 0, 1, 1)
    gains = rewards - fp64(4, 3.5, 1.5, 10, 0)
    found = weights_of(rewards, groups, estimator="in_batch", include_own=True)
    torch.testing.assert_close(found, 5 * gains.softmax(0), rtol=1e-13, atol=0)


def test_reference_weights_by_hand():
    drawn = fp64([1, 3], [2, 10]).log()
    found = weights_of(REWARDS, ids(0, 0, 0, 1, 1), estimator="reference", reference_rewards=drawn)
    torch.testing.assert_close(found, fp64(1 / 2, 1, 2, 3 / 6, 9 / 6), rtol=1e-14, atol=0)


def test_support_weights_by_hand():
    reference = fp64(4, 1, 1, 3, 1).log()
    found = weights_of(REWARDS, GROUPS, estimator="support", reference_logprobs=reference)
    torch.testing.assert_close(found, fp64(12, 6, 12, 18, 18) / fp64(10, 10, 10, 18, 18), rtol=1e-14, atol=0)
    halved = weights_of(REWARDS, GROUPS, estimator="support", reference_logprobs=2 * reference, lengths=ids(*[2] * 5))
    torch.testing.assert_close(halved, found, rtol=1e-14, atol=0)


@pytest.mark.parametrize("estimator", WITHIN_GROUPS)
def test_a_samplers_probability_is_divided_out(estimator):
    reference, sampler = draw(5, seed=1), draw(5, seed=2)
    found = weights_of(REWARDS, GROUPS, estimator=estimator, reference_logprobs=reference, sampler_logprobs=sampler)
    expected = weights_of(REWARDS + reference - sampler, GROUPS, estimator=estimator)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_quantiles_count_ties_half():
    drawn = fp64([0, 1, 1, 2], [5, 5, 5, 5])
    found = var_weights(fp64(1, 3, -1, 5, -INF), ids(0, 0, 0, 1, 1), estimator="quantile", reference_rewards=drawn)
    assert found.temperature == 0.25
    z = 0.25 * math.expm1(4)
    expected = fp64(*(math.exp(4 * q) / z for q in (0.5, 1, 0, 0.5)), 0)
    torch.testing.assert_close(found.weights, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 5.0])
def test_quantile_weights_average_to_one_and_are_worth_what_the_closed_form_says(temperature):
    grid = torch.arange(2000, dtype=torch.float64)
    options = {"estimator": "quantile", "temperature": temperature, "reference_rewards": grid[None]}
    found = weights_of(grid, torch.zeros(2000, dtype=torch.int64), **options)
    assert found.mean().item() == pytest.approx(1, abs=1e-4)
    assert effective_share(found) == pytest.approx(2 * temperature * math.tanh(1 / (2 * temperature)), rel=1e-4)
    assert found.max().item() == pytest.approx(1 / (temperature * -math.expm1(-1 / temperature)), rel=1e-2)


def test_hot_weights_are_uniform_and_cold_ones_go_to_the_best():
    hot = weights_of(REWARDS, GROUPS, temperature=1e9)
    torch.testing.assert_close(hot, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)
    logprobs = draw(5, seed=3)
    torch.testing.assert_close(weighted_nll(logprobs, hot, 5).sum(), -logprobs.mean(), rtol=0, atol=1e-6)
    assert weights_of(REWARDS, GROUPS, temperature=1e-4).tolist() == pytest.approx([0, 0, 3, 0, 2], rel=1e-14)


def test_ties_share_evenly_however_cold():
    found = weights_of(fp64(1, 3, 3, 0), ids(0, 0, 0, 0), temperature=1e-6)
    assert found.tolist() == pytest.approx([0, 2, 2, 0], rel=1e-14)
    alone = weights_of(fp64(1, 3, 3, 0), ids(0, 0, 0, 0), estimator="group_loo", temperature=1e-6)
    assert alone.tolist() == pytest.approx([0, 3, 3, 0], rel=1e-14)


@pytest.mark.parametrize("estimator", [*WITHIN_GROUPS, "in_batch"])
def test_the_offset_of_a_prompt_does_not_matter(estimator):
    rewards, groups = draw(12), ids(*[0, 1, 2] * 4)
    found = weights_of(rewards, groups, estimator=estimator)
    moved = weights_of(rewards + fp64(100, -3, 7)[groups], groups, estimator=estimator)
    torch.testing.assert_close(moved, found, rtol=1e-11, atol=0)


def test_the_offset_of_a_prompt_does_matter_in_a_batch_whose_baselines_do_not_know_it():
    rewards, groups = draw(12), ids(*[0, 1, 2] * 4)
    options = {"estimator": "in_batch", "baselines": torch.zeros(3)}
    moved = weights_of(rewards + fp64(3, 0, 0)[groups], groups, **options)
    assert not torch.allclose(moved, weights_of(rewards, groups, **options), rtol=0.5)


@pytest.mark.parametrize("estimator", [*WITHIN_GROUPS, "in_batch"])
def test_rows_may_come_in_any_order_and_groups_have_any_number(estimator):
    rewards, groups = draw(12), ids(*[0] * 3 + [1] * 7 + [2] * 2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found = weights_of(rewards, groups, estimator=estimator)
    shuffled = weights_of(rewards[order], ids(900, -5, 3)[groups][order], estimator=estimator)
    torch.testing.assert_close(shuffled, found[order], rtol=1e-13, atol=0)


def test_every_group_averages_to_one():
    rewards, groups = draw(500) * 5, torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(0))
    found = weights_of(rewards, groups)
    for group in groups.unique():
        assert found[groups == group].mean().item() == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("estimator", ["group", "group_loo", "support", "in_batch", "reference", "quantile"])
def test_weights_are_exponentiated_scores_over_the_normaliser_that_is_told(estimator):
    options = {"estimator": estimator, "reward_scale": 1.0 if estimator == "quantile" else 2.0, "temperature": 0.7}
    if estimator in ("reference", "quantile"):
        options["reference_rewards"] = draw(3, 4, seed=1)
    rewards, groups, reference, sampler = draw(12) + 50, ids(*[0, 1, 2] * 4), draw(12, seed=2), draw(12, seed=3)
    options |= {"reference_logprobs": reference} | ({} if estimator == "support" else {"sampler_logprobs": sampler})
    found = var_weights(rewards, groups, **options)
    rewards = (
        torch.ones(12).double() if estimator == "quantile" else rewards / 2
    )  # above every drawn one, which are about 0
    scores = rewards / 0.7 + reference - (0 if estimator == "support" else sampler)
    torch.testing.assert_close(found.weights, (scores - found.log_normalisers).exp(), rtol=1e-11, atol=0)


def test_one_scale_divides_every_reward_given():
    options = {"estimator": "reference", "temperature": 0.8}
    drawn = draw(2, 6, seed=1)
    found = weights_of(100 * REWARDS, abs(GROUPS) // 7, reward_scale=100, reference_rewards=100 * drawn, **options)
    expected = weights_of(REWARDS, abs(GROUPS) // 7, reference_rewards=drawn, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    options = {"estimator": "in_batch", "temperature": 0.8}
    found = weights_of(100 * REWARDS, ids(0, 0, 0, 1, 1), reward_scale=100, baselines=fp64(100, -200), **options)
    expected = weights_of(REWARDS, ids(0, 0, 0, 1, 1), baselines=fp64(1, -2), **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_global_scale_is_the_deviation_of_all_finite_rewards():
    assert global_scale(fp64(1, 3, -INF, 1, 3)) == 1.0


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e6])
@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_extreme_rewards_and_log_probabilities_stay_finite(offset, temperature):
    rewards = fp64(0, 1e6, -1e6, -INF, 5, 5 - 1e-6) + offset
    groups, improbable = ids(0, 0, 0, 0, 1, 1), fp64(-9e3, 0, -1, -9e3, -9e3, -9e3)
    for options in (
        {},
        {"estimator": "support", "reference_logprobs": improbable},
        {"reference_logprobs": improbable, "sampler_logprobs": improbable.flip(0)},
    ):
        found = weights_of(rewards, groups, temperature=temperature, **options)
        assert bool(torch.isfinite(found).all())
        assert found[:4].sum().item() == pytest.approx(4)
        assert found[4:].sum().item() == pytest.approx(2)
        assert found[3].item() == 0
    # The differences of large rewards survive: 1e-6 at temperature 1e-3 is a factor of exp(1e-3).
    ratio = weights_of(rewards, groups, temperature=1e-3)[4:]
    assert (ratio[0] / ratio[1]).item() == pytest.approx(math.exp(1e-3), rel=1e-6)


def test_single_precision_rewards_are_weighed_in_double_precision():
    rewards = (draw(64) + 1e4).float()
    groups = torch.arange(64) // 8
    found = weights_of(rewards, groups)
    assert found.dtype == torch.float64
    assert torch.equal(found, weights_of(rewards.double(), groups))
    centred = rewards.double() - 1e4
    torch.testing.assert_close(found, weights_of(centred, groups), rtol=1e-11, atol=0)


def test_leaving_out_the_largest_does_not_cancel():
    # Without its largest member the sum is exp(-40) of itself: below what subtracting from 1 can see.
    found = var_weights(fp64(40, 0, 0.5), ids(0, 0, 0), estimator="group_loo")
    expected = 2 * math.exp(40) / (1 + math.exp(0.5))
    assert found.weights[0].item() == pytest.approx(expected, rel=1e-13)
    tied = weights_of(fp64(40, 40, 0), ids(0, 0, 0), estimator="group_loo")
    torch.testing.assert_close(tied[:2], fp64(2, 2), rtol=1e-13, atol=0)


def test_a_response_alone_in_its_group_weighs_one():
    for estimator in WITHIN_GROUPS:
        assert weights_of(fp64(50, 0, 0), ids(3, 1, 1), estimator=estimator)[0].item() == 1


def test_a_group_without_a_possible_response_weighs_nothing_and_is_named():
    rewards, groups = fp64(-INF, 1, -INF, 1, -INF), ids(8, 3, 8, 3, 5)
    for estimator in WITHIN_GROUPS:
        with pytest.warns(UserWarning, match=r"every reward of 2 group\(s\) is -inf.*: 5, 8$") as caught:
            found = weights_of(rewards, groups, estimator=estimator)
        assert found.tolist() == pytest.approx([0, 1, 0, 1, 0], rel=1e-14)
        assert caught[0].filename == __file__  # where the weights were asked for


def test_ordinary_groups_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights_of(fp64(-INF, 1, 2, 3), ids(0, 0, 1, 1))


def test_no_gradient_reaches_the_weights():
    policy = draw(5, seed=4).requires_grad_()
    rewards = REWARDS.clone().requires_grad_()
    weights = weights_of(rewards, GROUPS, estimator="support", reference_logprobs=policy)
    assert not weights.requires_grad
    weighted_nll(policy, weights, normaliser=8).sum().backward()
    assert torch.equal(policy.grad, -weights / 8)
    assert rewards.grad is None


def test_capped_weights_are_the_cap_and_the_others_stay():
    found = weights_of(REWARDS, GROUPS, estimator="group_loo", weight_cap=2.6)
    torch.testing.assert_close(found, fp64(1 / 3, 0.8, 2.6, 1 / 3, 2.6), rtol=1e-14, atol=0)
    assert found[4].item() == 2.6


def test_what_overflows_asks_for_a_cap():
    rewards, groups = fp64(1e6, 0), ids(0, 0)
    with pytest.raises(ValueError, match=r"weight \(a weight_cap bounds it\) must be finite: row 0 is inf"):
        weights_of(rewards, groups, estimator="group_loo")
    with pytest.raises(ValueError, match="weight_cap"):
        weights_of(fp64(0, -INF), groups, estimator="group_loo")
    assert weights_of(rewards, groups, estimator="group_loo", weight_cap=20).tolist() == [20, 0]
    assert weights_of(fp64(0, -INF), groups, estimator="group_loo", weight_cap=20).tolist() == [20, 0]


def test_no_response_gives_no_weight():
    assert weights_of(fp64(), ids().long()).shape == (0,)
