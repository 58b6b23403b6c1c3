"""What is told of weights: every figure against hand-made examples, every warning on weights that deserve it."""

import dataclasses
import math
import statistics

import pytest
import torch

from everalign.objectives import WeightStatistics, var_weights, weight_statistics

INF = math.inf


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


WEIGHTS = fp64(0.5, 1, 2, 1.5, 1, 0)
GROUPS = torch.tensor([0, 8, 2, 0, 8, 2])
REWARDS = fp64(0, 5, 1, 3, 5, -INF)
LENGTHS = torch.tensor([10, 40, 20, 30, 5, 999])


def test_figures_by_hand():
    found = weight_statistics(WEIGHTS, GROUPS, REWARDS, LENGTHS, weight_cap=2.0)
    logs = [math.log(weight) for weight in WEIGHTS.tolist()[:5]]
    quarter = 0.25 * math.log(2 * 0.25) + 0.75 * math.log(2 * 0.75)
    expected = {
        "rows": 6,
        "effective_share": 6**2 / (6 * (0.25 + 1 + 4 + 2.25 + 1)),
        "effective_share_within": (2**2 / (2 * 2.5) + 1 + 1 / 2) / 3,
        "largest_weight": 2.0,
        "top_decile_share": 2 / 6,
        "length_correlation": statistics.correlation(logs, LENGTHS.tolist()[:5]),
        "reward_correlation": statistics.correlation(logs, REWARDS.tolist()[:5]),
        "constant_share": 1 / 3,
        "capped_share": 1 / 6,
        "kl_to_reference": (quarter + 0 + math.log(2)) / 3,
        "kl_ceiling": math.log(2),
    }
    assert dataclasses.asdict(found) == pytest.approx(expected, rel=1e-12)


def test_the_largest_tenth_is_rounded_up():
    weights, groups = torch.arange(1, 22).double(), torch.zeros(21, dtype=torch.int64)
    found = weight_statistics(weights, groups, weights, weights)
    assert found.top_decile_share == pytest.approx((21 + 20 + 19) / weights.sum().item())


def test_equal_weights_are_worth_every_response_and_correlate_with_nothing():
    found = weight_statistics(torch.ones(6), GROUPS, REWARDS, LENGTHS)
    assert (found.effective_share, found.effective_share_within, found.kl_to_reference) == pytest.approx((1, 1, 0))
    assert found.capped_share == 0
    assert math.isnan(found.length_correlation)
    assert math.isnan(found.reward_correlation)


def test_groups_of_one_and_groups_without_weight_say_nothing_of_groups():
    groups = torch.tensor([0, 0, 5, 6, 7, 7])
    found = weight_statistics(fp64(1.5, 0.5, 9, 3, 0, 0), groups, fp64(1, 0, 2, 2, 3, 3), LENGTHS)
    assert found.effective_share_within == pytest.approx(0.8)
    assert found.kl_ceiling == pytest.approx(math.log(2))
    assert found.kl_to_reference == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert found.constant_share == 0.5
    alone = weight_statistics(fp64(1, 2), torch.tensor([0, 1]), fp64(1, 2), fp64(1, 2))
    within = (alone.effective_share_within, alone.constant_share, alone.kl_to_reference, alone.kl_ceiling)
    assert all(math.isnan(figure) for figure in within)
    assert alone.warnings() == []


def test_huge_weights_do_not_overflow():
    found = weight_statistics(fp64(1e200, 1e200, 1), torch.tensor([0, 0, 0]), fp64(1, 1, 0), fp64(1, 2, 3))
    assert found.effective_share == pytest.approx(2 / 3)


def test_a_cap_is_recognised_in_weights_stored_in_single_precision():
    weights = torch.tensor([19.9, 1.0, 19.8], dtype=torch.float32)
    found = weight_statistics(weights, torch.tensor([0, 0, 0]), fp64(1, 0, 1), fp64(1, 2, 3), weight_cap=19.9)
    assert found.capped_share == pytest.approx(1 / 3)


def test_the_divergence_is_that_of_the_weights_made():
    rewards = torch.randn(40000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = torch.zeros(40000, dtype=torch.int64)
    found = weight_statistics(var_weights(rewards, groups, temperature=2.0).weights, groups, rewards, rewards)
    assert found.kl_to_reference == pytest.approx(1 / 8, rel=0.03)  # deviation^2 / (2 temperature^2)
    assert found.effective_share == pytest.approx(math.exp(-1 / 4), rel=0.03)
    assert found.reward_correlation == pytest.approx(1)


HEALTHY = WeightStatistics(
    rows=100,
    effective_share=0.6,
    effective_share_within=0.6,
    largest_weight=3.0,
    top_decile_share=0.3,
    length_correlation=0.1,
    reward_correlation=0.8,
    constant_share=0.1,
    capped_share=0.01,
    kl_to_reference=0.4,
    kl_ceiling=1.4,
)


def test_healthy_weights_give_no_warning():
    assert HEALTHY.warnings() == []
    rewards = torch.randn(400, generator=torch.Generator().manual_seed(0))
    groups, lengths = torch.arange(400) // 4, torch.arange(400) % 37
    found = weight_statistics(var_weights(rewards, groups).weights, groups, rewards, lengths)
    assert found.warnings() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"effective_share": 0.09}, "worth 9.0% of the responses. Raise the temperature"),
        ({"top_decile_share": 0.95}, "holds 95% of the weight. Raise the temperature"),
        ({"kl_to_reference": 1.3}, "1.30 nats, is close to the most that groups of this size can show, 1.40"),
        ({"length_correlation": 0.6}, "Length decides the weights (correlation +0.60)"),
        ({"length_correlation": -0.6}, "Length decides the weights (correlation -0.60)"),
        ({"reward_correlation": 0.05}, "hardly follow the rewards (correlation +0.05)"),
        ({"reward_correlation": -0.9}, "hardly follow the rewards (correlation -0.90)"),
        ({"constant_share": 0.7}, "70% of the groups have one reward"),
        ({"capped_share": 0.2}, "20% of the weights are capped"),
    ],
)
def test_every_sick_figure_gives_one_warning_with_advice(changes, words):
    (warning,) = dataclasses.replace(HEALTHY, **changes).warnings()
    assert words in warning
    assert warning.endswith(".")


def test_no_cap_is_advised_where_there_is_none():
    sick = dataclasses.replace(HEALTHY, effective_share=0.01, top_decile_share=0.95)
    assert all(line.endswith("Raise the temperature, set target_ess, or cap the weights.") for line in sick.warnings())
    uncapped = sick.warnings(can_cap=False)
    assert len(uncapped) == 2
    assert all(line.endswith("Raise the temperature or set target_ess.") for line in uncapped)


def test_few_rows_correlate_by_chance():
    sick = {"length_correlation": 0.9, "reward_correlation": -0.9}
    assert len(dataclasses.replace(HEALTHY, rows=16, **sick).warnings()) == 2
    assert dataclasses.replace(HEALTHY, rows=15, **sick).warnings() == []


def test_cold_weights_are_found_out():
    rewards = torch.randn(400, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(400) // 2
    found = weight_statistics(var_weights(rewards, groups, temperature=1e-3).weights, groups, rewards, rewards)
    assert any("only each prompt's best response counts" in warning for warning in found.warnings())


def test_summed_log_probabilities_are_found_out_and_their_mean_is_not():
    generator = torch.Generator().manual_seed(0)
    rewards, noise = torch.randn(2, 200, dtype=torch.float64, generator=generator)
    lengths = torch.randint(50, 400, (200,), generator=generator)
    groups, reference = torch.arange(200) // 2, lengths * (-1 + 0.25 * noise)

    def told(**options):
        options |= {"estimator": "support", "reference_logprobs": reference}
        weights = var_weights(rewards, groups, **options).weights
        return [line for line in weight_statistics(weights, groups, rewards, lengths).warnings() if "Length" in line]

    assert len(told()) == 1
    assert told(lengths=lengths) == []


@pytest.mark.parametrize("bad", [math.nan, INF, -1.0])
def test_bad_weights_are_named(bad):
    with pytest.raises(ValueError, match=r"weight must be .*row 1 is"):
        weight_statistics(fp64(1, bad), torch.tensor([0, 0]), fp64(1, 2), fp64(1, 2))


def test_what_has_no_figures_is_refused():
    two = torch.tensor([0, 0])
    with pytest.raises(ValueError, match="no weight is positive"):
        weight_statistics(fp64(0, 0), two, fp64(1, 2), fp64(1, 2))
    with pytest.raises(ValueError, match="reward other than -inf must be finite: row 0 is nan"):
        weight_statistics(fp64(1, 1), two, fp64(math.nan, 2), fp64(1, 2))
    with pytest.raises(ValueError, match="same shape"):
        weight_statistics(fp64(1, 1), two, fp64(1, 2), fp64(1, 2, 3))
    with pytest.raises(ValueError, match="weight_cap"):
        weight_statistics(fp64(1, 1), two, fp64(1, 2), fp64(1, 2), weight_cap=0.0)
