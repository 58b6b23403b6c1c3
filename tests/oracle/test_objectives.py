"""The preference and likelihood objectives against closed forms, finite differences and extreme inputs."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from everalign.objectives import (
    dpo_loss,
    focalpo_loss,
    fpo_gradient_at_zero,
    fpo_loss,
    hybrid_margin,
    implicit_margin,
    token_nll,
)
from everalign.training.objectives import make_objective

EXTREMES = [-100.0, -88.5, -50.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 50.0, 88.5, 100.0]

# margin: (weight (1 - sigmoid)^2, ratio of FPO's gradient to DPO's), at gamma = 2, correctly rounded
FOCAL_TABLE = {
    -10.0: ("1.00", "1.001"),
    -3.0: (".907", "1.183"),
    -2.15: (".802", "1.225"),
    -1.0: (".534", "1.051"),
    -0.859: (".493", "1.000"),
    -0.5: (".387", ".845"),
    0.0: (".250", ".597"),
    0.5: (".143", ".365"),
    1.0: (".072", ".196"),
    2.0: (".014", ".041"),
    3.0: (".0022", ".0066"),
    5.0: ("4.5e-5", "1e-4"),
}


def as_printed(value: float, printed: str) -> bool:
    """Whether `value`, rounded to as many digits as `printed` has, is what `printed` says."""
    mantissa, _, exponent = printed.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(value - float(printed)) <= unit / 2


def gradient(loss, margin: Tensor) -> Tensor:
    leaf = margin.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return slope


def margins(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def test_margin_is_the_scaled_difference_of_log_ratios():
    found = implicit_margin(margins(-1.0, -4.0), margins(-3.0, -2.0), margins(-2.0, -2.0), margins(-2.5, -2.5), 0.1)
    # chosen log-ratios +1 and -2, rejected -0.5 and +0.5: differences 1.5 and -2.5
    torch.testing.assert_close(found, margins(0.15, -0.25), rtol=0, atol=1e-15)


def test_margin_of_the_reference_itself_is_zero_and_swapping_the_pair_negates_it():
    chosen, rejected, other = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(implicit_margin(chosen, rejected, chosen, rejected, 0.3), torch.zeros(7))
    forward = implicit_margin(chosen, rejected, other, other, 0.3)
    assert torch.equal(implicit_margin(rejected, chosen, other, other, 0.3), -forward)


def test_margin_leaves_half_precision_before_it_subtracts():
    # 1000 - 0.25 and the sum of the differences need more bits than bfloat16 has.
    half = [margins(value, dtype=torch.bfloat16) for value in (-0.25, -1000.0, -1000.0, -0.25)]
    found = implicit_margin(*half, beta=0.5)
    assert found.dtype == torch.float32
    assert found.item() == 999.75


def test_dpo_is_log_two_at_margin_zero_and_linear_where_badly_ranked():
    torch.testing.assert_close(dpo_loss(margins(0.0)), margins(math.log(2)), rtol=0, atol=1e-15)
    assert dpo_loss(margins(-100.0, dtype=torch.float32)).item() == 100.0


@pytest.mark.parametrize(("margin", "printed"), FOCAL_TABLE.items())
def test_fpo_weight_and_gradient_ratio_table(margin, printed):
    at = margins(margin)
    weight = (fpo_loss(at, 2.0) / dpo_loss(at)).item()
    ratio = (gradient(lambda m: fpo_loss(m, 2.0), at) / gradient(dpo_loss, at)).item()
    assert as_printed(weight, printed[0]), (weight, printed[0])
    assert as_printed(ratio, printed[1]), (ratio, printed[1])


def test_fpo_gradient_ratio_is_largest_at_the_badly_ranked_margin():
    grid = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    ratio = gradient(lambda m: fpo_loss(m, 2.0), grid) / gradient(dpo_loss, grid)
    assert abs(grid[ratio.argmax()].item() + 2.15) < 0.01
    assert abs(ratio.max().item() - 1.225) < 5e-4


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
def test_fpo_gradient_is_the_closed_form_with_the_weight_not_detached(gamma):
    at = torch.linspace(-12, 12, 97, dtype=torch.float64)
    s = torch.sigmoid(at)
    expected = (1 - s) ** gamma * (gamma * s * logsigmoid(at) - (1 - s))
    torch.testing.assert_close(gradient(lambda m: fpo_loss(m, gamma), at), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
def test_gradcheck_in_double_precision(gamma):
    at = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dpo_loss, at)
    assert torch.autograd.gradcheck(lambda m: fpo_loss(m, gamma), at)


def test_margin_gradcheck():
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *four: fpo_loss(implicit_margin(*four, beta=0.7), 2.0), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gamma_zero_is_dpo_bit_for_bit_in_value_and_gradient(dtype):
    at = torch.cat([torch.tensor(EXTREMES), torch.randn(200, generator=torch.Generator().manual_seed(2)) * 8])
    at = at.to(dtype)
    assert torch.equal(fpo_loss(at, 0.0), dpo_loss(at))
    assert torch.equal(gradient(lambda m: fpo_loss(m, 0.0), at), gradient(dpo_loss, at))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_fpo_at_margin_zero_is_log_two_over_two_to_the_gamma(gamma):
    torch.testing.assert_close(fpo_loss(margins(0.0), gamma), margins(2**-gamma * math.log(2)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_extreme_margins_stay_finite_and_accurate_with_the_right_sign(dtype, gamma):
    at = torch.tensor(EXTREMES, dtype=dtype)
    loss = fpo_loss(at, gamma)
    slope = gradient(lambda m: fpo_loss(m, gamma), at.float())
    assert loss.dtype == torch.float32
    for margin, value, tilt in zip(at.tolist(), loss.tolist(), slope.tolist(), strict=True):
        nll = math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)
        expected = (1.0 / (1.0 + math.exp(margin))) ** gamma * nll
        # Below fp32's smallest normal number a result may lose digits or vanish; nothing else may.
        assert math.isclose(value, expected, rel_tol=2e-5, abs_tol=1e-38)
        assert math.isfinite(tilt)
        assert tilt < 0.0 if expected > 1e-37 else tilt <= 0.0


def test_half_precision_inputs_receive_a_finite_gradient_of_their_own_type():
    at = torch.tensor(EXTREMES, dtype=torch.bfloat16)
    slope = gradient(lambda m: fpo_loss(m, 2.0), at)
    assert slope.dtype == torch.bfloat16
    assert bool(torch.isfinite(slope).all())


def test_double_precision_stays_double():
    assert fpo_loss(margins(0.3), 2.0).dtype == torch.float64
    assert token_nll(margins(-0.3), 2).dtype == torch.float64


def test_losses_are_not_reduced_and_take_an_empty_batch():
    assert fpo_loss(torch.zeros(5), 2.0).shape == (5,)
    assert dpo_loss(torch.zeros(0)).shape == (0,)


@given(
    margin=st.floats(-100, 100),
    gammas=st.tuples(st.floats(0, 6), st.floats(0, 6)).map(sorted),
)
def test_a_larger_gamma_never_raises_the_loss(margin, gammas):
    low, high = (fpo_loss(margins(margin), gamma).item() for gamma in gammas)
    assert 0.0 <= high <= low * (1 + 1e-12) <= dpo_loss(margins(margin)).item() * (1 + 2e-12)


@given(pair=st.tuples(st.floats(-60, 60), st.floats(-60, 60)).map(sorted), gamma=st.floats(0, 4))
def test_a_larger_margin_never_raises_the_loss(pair, gamma):
    lower, higher = fpo_loss(margins(*pair), gamma).tolist()
    assert higher <= lower * (1 + 1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", [dpo_loss, lambda m: fpo_loss(m, 2.0), lambda m: token_nll(m, 3)])
def test_a_value_that_is_not_finite_is_named_by_its_row(loss, bad):
    with pytest.raises(ValueError, match=f"row 2 is {re.escape(str(bad))}$"):
        loss(torch.tensor([0.1, 0.2, bad, 0.4]))


def test_margin_names_the_row_whose_log_probability_is_not_finite():
    fine, broken = torch.zeros(3), torch.tensor([0.0, -math.inf, 0.0])
    with pytest.raises(ValueError, match="margin must be finite: row 1 is inf"):
        implicit_margin(fine, broken, fine, fine, 0.1)


def test_many_bad_rows_are_counted():
    with pytest.raises(ValueError, match=r"row 0 is nan, .*row 4 is nan and 3 more$"):
        dpo_loss(torch.full((8,), math.nan))


@pytest.mark.parametrize("gamma", [-1e-9, -2.0, math.nan, math.inf])
def test_fpo_refuses_a_gamma_that_is_negative_or_not_finite(gamma):
    with pytest.raises(ValueError, match="gamma"):
        fpo_loss(torch.zeros(2), gamma)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_margin_refuses_a_beta_that_is_not_above_zero(beta):
    with pytest.raises(ValueError, match="beta"):
        implicit_margin(*torch.zeros(4, 2), beta=beta)


def test_margin_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"reference_chosen \(2, 1\)"):
        implicit_margin(torch.zeros(2), torch.zeros(2), torch.zeros(2, 1), torch.zeros(2), 0.1)


def test_token_nll_of_micro_batches_adds_up_to_the_mean_of_the_whole_step():
    generator = torch.Generator().manual_seed(3)
    per_token = -torch.rand(8, 11, dtype=torch.float64, generator=generator)
    mask = torch.arange(11) < torch.randint(1, 12, (8, 1), generator=generator)
    whole_step = -per_token[mask].mean()
    sequences = (per_token * mask).sum(1)
    accumulated = sum(token_nll(part, mask.sum()).sum() for part in sequences.split([1, 4, 3]))
    torch.testing.assert_close(accumulated, whole_step, rtol=1e-14, atol=0)


def test_token_nll_is_positive_for_unlikely_text_and_its_gradient_is_one_over_the_tokens():
    at = margins(-8.0, -2.0)
    assert token_nll(at, 4).tolist() == [2.0, 0.5]
    assert gradient(lambda m: token_nll(m, 4), at).tolist() == [-0.25, -0.25]


def test_token_nll_leaves_half_precision_before_it_divides():
    share = token_nll(margins(-1.0, dtype=torch.bfloat16), 3)
    torch.testing.assert_close(share, margins(1 / 3, dtype=torch.float32), rtol=1e-7, atol=0)


@pytest.mark.parametrize("tokens", [0, -3, math.nan, torch.tensor(0)])
def test_token_nll_refuses_a_normaliser_that_is_not_above_zero(tokens):
    with pytest.raises(ValueError, match="normaliser"):
        token_nll(torch.zeros(2), tokens)


# ---- FocalPO, normalised FPO, the hybrid margin ----


@pytest.mark.parametrize("loss", [fpo_loss, focalpo_loss])
def test_without_a_focus_a_focal_loss_is_dpo(loss):
    margin = margins(*EXTREMES)
    assert torch.equal(loss(margin, 0.0), dpo_loss(margin))


@pytest.mark.parametrize("gamma", [0.05, 1.0, 2.0])
def test_focalpo_is_its_formula_with_its_gradient(gamma):
    margin = margins(-3.0, -0.5, 0.0, 0.7, 4.0)
    share = margin.sigmoid()
    torch.testing.assert_close(focalpo_loss(margin, gamma), -(share**gamma) * share.log())
    expected = share**gamma * (1 - share) * (-gamma * share.log() - 1)
    torch.testing.assert_close(gradient(lambda m: focalpo_loss(m, gamma), margin), expected)


def test_focalpo_turns_away_from_badly_ranked_pairs_and_fpo_towards_them():
    margin = margins(-4.0, 4.0)
    plain = gradient(dpo_loss, margin)
    away = gradient(lambda m: focalpo_loss(m, 1.0), margin) / plain
    towards = gradient(lambda m: fpo_loss(m, 1.0), margin) / plain
    assert away[0] < away[1]
    assert towards[0] > towards[1]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_fpo_divided_by_its_gradient_at_zero_starts_as_dpo_does(gamma):
    zero = margins(0.0)
    ratio = gradient(lambda m: fpo_loss(m, gamma), zero) / gradient(dpo_loss, zero)
    assert ratio.item() == pytest.approx(fpo_gradient_at_zero(gamma), rel=1e-12)


def test_the_hybrid_margin_asks_for_the_right_ranking_where_the_reference_is_wrong():
    chosen, rejected = margins(-1.0, -1.0), margins(-3.0, -3.0)
    right, wrong = margins(-2.0, -5.0), margins(-2.5, -2.0)
    # reference gaps +0.5 and -3: the first is subtracted, the second counts as 0
    torch.testing.assert_close(hybrid_margin(chosen, rejected, right, wrong, 2.0), margins(3.0, 4.0))


@given(st.lists(st.floats(-50, 50), min_size=4, max_size=4), st.floats(0.01, 10))
def test_the_hybrid_margin_is_never_above_the_plain_one_and_equal_where_the_reference_is_right(values, beta):
    pair = [margins(value) for value in values]
    hybrid, plain = hybrid_margin(*pair, beta), implicit_margin(*pair, beta)
    if values[2] >= values[3]:
        torch.testing.assert_close(hybrid, plain)
    else:
        assert hybrid <= plain + 1e-9


def test_dpo_with_the_ranking_is_the_mean_of_both_losses_by_their_formulas():
    # Chosen and rejected of two pairs; the second row counts three times.
    policy = torch.tensor([-12.0, -20.0, -30.0, -9.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-15.0, -18.0, -32.0, -10.0], dtype=torch.float64)
    lengths, weight = torch.tensor([6.0, 10.0, 10.0, 2.0]), torch.tensor([1.0, 3.0])
    batch = {"reference": reference, "lengths": lengths, "weight": weight}
    objective = make_objective("dpo+hypo-ln", beta=0.2)
    loss, metrics = objective.loss(lambda _: policy, batch, torch.tensor(4.0))

    def softplus(x: float) -> float:
        return math.log1p(math.exp(-x))

    gains = [0.2 * ((-12 + 15) - (-20 + 18)), 0.2 * ((-30 + 32) - (-9 + 10))]
    # per token: -2 and -2 against -2.5 and -1.8 (wrong, so nothing is subtracted); -3 and -4.5 against -3.2 and -5
    rankings = [10 * (-2 + 2.0), 10 * ((-3 + 4.5) - (-3.2 + 5))]
    terms = [(softplus(gain) + softplus(ranking)) / 2 for gain, ranking in zip(gains, rankings, strict=True)]
    assert loss.item() == pytest.approx((terms[0] + 3 * terms[1]) / 4, rel=1e-6)
    assert metrics["margin"].tolist() == pytest.approx(gains)
    assert metrics["accuracy"].tolist() == [1.0, 1.0]
    assert torch.autograd.grad(loss, policy)[0].sign().tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize("loss", [fpo_loss, focalpo_loss])
@pytest.mark.parametrize("gamma", [-1.0, math.nan, math.inf])
def test_a_bad_focus_is_refused(loss, gamma):
    with pytest.raises(ValueError, match="gamma must be a finite number"):
        loss(margins(0.0), gamma)
