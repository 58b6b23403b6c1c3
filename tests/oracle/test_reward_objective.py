"""The Bradley-Terry loss and the calibration of its rewards against values worked out by hand."""

import math

import pytest
import torch
from torch.nn.functional import softplus

from everalign.objectives import bradley_terry_loss, calibrating_temperature, pair_calibration_error


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_hand_values():
    # Equal rewards: log 2. A difference of log 3: sigmoid is 3/4.
    found = bradley_terry_loss(double(0.0, math.log(3)), double(0.0, 0.0), centring=0.0)
    torch.testing.assert_close(found, double(math.log(2), math.log(4 / 3)), rtol=1e-14, atol=0)
    # (2 + 1)^2 * 0.1 is added, and the margin of 1 takes away what the difference of 1 gives.
    found = bradley_terry_loss(double(2.0), double(1.0), centring=0.1, margin=1.0)
    torch.testing.assert_close(found, double(math.log(2) + 0.9), rtol=1e-14, atol=0)


def test_a_shift_of_both_rewards_changes_the_centring_term_alone():
    chosen, rejected = double(0.3, -2.0), double(-0.1, 1.0)
    plain = bradley_terry_loss(chosen, rejected, centring=0.0)
    torch.testing.assert_close(bradley_terry_loss(chosen + 7, rejected + 7, centring=0.0), plain, rtol=1e-12, atol=0)
    shifted = bradley_terry_loss(chosen + 7, rejected + 7, centring=0.01)
    torch.testing.assert_close(shifted, plain + 0.01 * (chosen + rejected + 14) ** 2, rtol=1e-12, atol=0)


def test_extreme_differences_neither_overflow_nor_lose_their_gradient():
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry_loss(chosen, -chosen.detach(), centring=0.0)
    loss.sum().backward()
    assert loss.tolist() == [2e4, 0.0]
    assert chosen.grad.tolist() == [-1.0, 0.0]


def test_half_precision_is_left_before_the_subtraction():
    half = torch.tensor([1000.0], dtype=torch.bfloat16), torch.tensor([-0.25], dtype=torch.bfloat16)
    found = bradley_terry_loss(half[1], half[0], centring=0.0)
    assert found.dtype == torch.float32
    assert found.item() == 1000.25


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(6, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry_loss(a, b, 0.3, 0.5), pair)


def test_bad_values_are_named_by_row():
    good = torch.zeros(3)
    with pytest.raises(ValueError, match=r"every chosen reward must be finite: row 1 is nan"):
        bradley_terry_loss(torch.tensor([0.0, math.nan, 0.0]), good)
    with pytest.raises(ValueError, match=r"every rejected reward must be finite: row 2 is -inf"):
        bradley_terry_loss(good, torch.tensor([0.0, 0.0, -math.inf]))
    assert bradley_terry_loss(good + math.nan, good, check_finite=False).isnan().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3, 1)), "same shape"),
        ((torch.zeros(1), torch.zeros(1), -0.1), "centring"),
        ((torch.zeros(1), torch.zeros(1), math.nan), "centring"),
        ((torch.zeros(1), torch.zeros(1), 0.0, math.inf), "margin"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry_loss(*arguments)


# ---- calibration ----


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_calibration_error_by_hand():
    # Four pairs of confidence 0.72, three right: |0.75 - 0.72|. One of 0.9 or so, wrong: 0.9. Weights 4/5 and 1/5.
    difference = double(*[logit(0.72)] * 3, -logit(0.72), -logit(0.91))
    assert pair_calibration_error(difference) == pytest.approx(0.8 * 0.03 + 0.2 * 0.91)


def test_confidence_that_is_right_as_often_as_it_says_has_no_error():
    assert pair_calibration_error(double(*[logit(0.75)] * 3, -logit(0.75))) == pytest.approx(0, abs=1e-12)
    assert pair_calibration_error(double(0.0, 0.0)) == 0.0
    assert pair_calibration_error(double(1e4)) == 0.0
    assert pair_calibration_error(double(-1e4)) == 1.0


def test_the_temperature_makes_a_confidence_right():
    # One size of difference only, right in three of four pairs: sigmoid(5 / T) = 3/4.
    found = calibrating_temperature(double(5.0, 5.0, 5.0, -5.0))
    assert found == pytest.approx(5 / math.log(3), rel=1e-12)


def test_no_other_temperature_has_a_lower_loss():
    difference = 3 * torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    found = calibrating_temperature(difference)
    losses = [softplus(-difference / t).mean().item() for t in (0.99 * found, found, 1.01 * found)]
    assert losses[1] < min(losses[0], losses[2])


@pytest.mark.parametrize("values", [(1.0, 2.0), (0.0, 1.0), (0.0, 0.0), (-1.0, 1.0), (-2.0, 1.0)])
def test_there_is_no_temperature_for_separated_pairs_or_for_chance(values):
    assert calibrating_temperature(double(*values)) is None


def test_a_temperature_far_from_one_is_found():
    assert calibrating_temperature(1e6 * double(5.0, 5.0, 5.0, -5.0)) == pytest.approx(5e6 / math.log(3))
    assert calibrating_temperature(double(1.0, 1.0, -1e-9)) > 0


@pytest.mark.parametrize("function", [pair_calibration_error, calibrating_temperature])
def test_calibration_needs_finite_differences(function):
    with pytest.raises(ValueError, match="at least one pair"):
        function(torch.zeros(0))
    with pytest.raises(ValueError, match="row 1 is nan"):
        function(double(0.0, math.nan))
