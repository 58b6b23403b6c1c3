"""The factored algebra against dense matrices and dense singular value decompositions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everalign.memory import LowRankUpdate

SHAPES = [(12, 9, 4), (9, 12, 4), (5, 7, 1), (4, 6, 10), (6, 3, 5), (1, 8, 2)]


def update(m: int, n: int, q: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, q, dtype=torch.float64, generator=generator)
    right = torch.randn(q, n, dtype=torch.float64, generator=generator)
    return LowRankUpdate(left.to(dtype), right.to(dtype))


def with_singular_values(values: list[float], m: int = 9, n: int = 7) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(5)
    q = len(values)
    left = torch.linalg.qr(torch.randn(m, q, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, q, dtype=torch.float64, generator=generator)).Q
    return LowRankUpdate(left * torch.tensor(values, dtype=torch.float64), right.T)


def dense_truncation(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("shape", SHAPES)
def test_sum_scale_inner_product_and_norm_equal_the_dense_ones(shape):
    one, two = update(*shape, seed=1), update(*shape, seed=2)
    assert one.shape == shape[:2]
    assert_same((one + two.scaled(-0.3)).dense(), one.dense() - 0.3 * two.dense())
    assert one.inner(two) == pytest.approx(float((one.dense() * two.dense()).sum()), rel=1e-12)
    assert one.norm() == pytest.approx(float(one.dense().norm()), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_equal_the_dense_ones(shape):
    found = update(*shape).singular_values()
    assert_same(found, torch.linalg.svdvals(update(*shape).dense())[: len(found)])


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_by_energy_equals_the_dense_one(shape, energy):
    dense = update(*shape).dense()
    shares = torch.linalg.svdvals(dense).square().cumsum(0)
    rank = next(k for k in range(1, len(shares) + 1) if shares[k - 1] >= energy * shares[-1] * (1 - 1e-12))
    truncated = update(*shape).truncate(energy)
    assert truncated.width == rank
    assert_same(truncated.dense(), dense_truncation(dense, rank))


@pytest.mark.parametrize(
    ("energy", "rank"),
    [(0.0, 1), (0.5, 1), (0.64, 1), (0.641, 2), (0.99, 2), (0.9999, 2), (0.99991, 3), (1.0, 3)],
)
def test_energy_thresholds_of_a_known_spectrum(energy, rank):
    # energies 0.64, 0.3599 and 0.0001, then one that is rounding noise beside them
    known = with_singular_values([0.8, math.sqrt(0.3599), 0.01, 1e-9])
    assert known.truncate(energy).width == rank


def test_energy_is_relative_so_that_a_tiny_update_is_not_taken_for_zero():
    spectrum = [3.0, 2.0, 0.1]
    ranks = [with_singular_values([scale * s for s in spectrum]).truncate(0.9).width for scale in (1.0, 1e-180)]
    assert ranks == [2, 2]


def test_truncation_error_is_the_tail_and_no_larger_than_the_discarded_energy_allows():
    known = with_singular_values([4.0, 3.0, 2.0, 1.0])
    nearest, discarded = known.truncate_rank(2)
    assert float((known.dense() - nearest.dense()).norm()) == pytest.approx(math.sqrt(5.0), rel=1e-12)
    assert discarded == pytest.approx(5 / 30, rel=1e-12)


def test_a_rank_cap_above_the_rank_loses_nothing():
    nearest, discarded = update(12, 9, 4).truncate_rank(64)
    assert nearest.width == 4
    assert discarded == pytest.approx(0.0, abs=1e-15)
    assert_same(nearest.dense(), update(12, 9, 4).dense())


def test_a_rank_cap_drops_numerically_zero_directions():
    one = update(12, 9, 3)
    assert (one + one).truncate_rank(64)[0].width == 3


@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    q=st.integers(1, 8),
    energy=st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=40)
def test_truncation_keeps_enough_energy_with_the_fewest_directions(m, n, q, energy, seed):
    whole = update(m, n, q, seed)
    truncated = whole.truncate(energy)
    values = whole.singular_values().square()
    lost = float((whole.dense() - truncated.dense()).norm())
    assert lost <= math.sqrt(1 - energy + 2e-12) * whole.norm() + 1e-12
    assert float(values[: truncated.width - 1].sum()) < max(energy, 1e-300) * float(values.sum())


def test_truncation_does_not_depend_on_how_the_update_is_factored():
    one = update(12, 9, 4)
    gauge = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    same = LowRankUpdate(one.left @ gauge, torch.linalg.solve(gauge, one.right))
    assert_same(same.truncate(0.8).dense(), one.truncate(0.8).dense())


@pytest.mark.parametrize("shape", SHAPES)
def test_balanced_factors_multiply_to_the_update_and_share_its_singular_values(shape):
    whole = update(*shape)
    B, A = whole.balanced_factors()
    assert_same(B @ A, whole.dense())
    assert_same(B.T @ B, torch.diag(whole.singular_values()))
    assert_same(A @ A.T, torch.diag(whole.singular_values()))


def test_results_of_truncation_are_balanced():
    truncated = update(12, 9, 4).truncate(0.8)
    assert_same(truncated.left.T @ truncated.left, truncated.right @ truncated.right.T)


def test_a_zero_update_has_rank_zero():
    for zero in (LowRankUpdate(torch.zeros(5, 2), torch.randn(2, 3)), LowRankUpdate.zero((5, 3))):
        assert zero.truncate(0.9).width == 0
        assert zero.truncate(0.0).width == 0
        nearest, discarded = zero.truncate_rank(4)
        assert (nearest.width, discarded) == (0, 0.0)
        assert zero.norm() == 0.0
        assert torch.equal(zero.truncate(1.0).dense(), torch.zeros(5, 3))


def test_zero_times_an_update_is_the_zero_update():
    nothing = update(5, 3, 2).scaled(0.0)
    assert nothing.width == 0
    assert nothing.shape == (5, 3)
    assert nothing.dtype == torch.float64


def test_norm_keeps_its_accuracy_where_the_parts_cancel():
    one, tiny = update(9, 7, 3, seed=1), update(9, 7, 1, seed=2).scaled(1e-11)
    difference = one + tiny + one.scaled(-1.0)
    assert difference.norm() == pytest.approx(tiny.norm(), rel=1e-3)


@pytest.mark.parametrize(
    ("given_type", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_factors_are_kept_in_single_precision_unless_double_is_given(given_type, kept):
    one = update(6, 5, 2, dtype=given_type)
    results = [one, one + one, one.scaled(2.0), one.truncate(0.5), one.truncate_rank(1)[0]]
    assert {result.dtype for result in results} == {kept}
    assert one.dense().dtype == kept


def test_single_precision_results_are_accurate_to_single_precision():
    exact, single = update(40, 30, 6), update(40, 30, 6, dtype=torch.float32)
    assert_same(single.truncate(0.9).dense().double(), exact.truncate(0.9).dense(), tolerance=1e-6)


def test_an_update_of_trainable_parameters_does_not_hold_on_to_their_graph():
    left = torch.nn.Parameter(torch.randn(4, 2))
    assert not LowRankUpdate(left * 2, torch.randn(2, 3)).truncate(0.9).left.requires_grad


def test_a_weight_too_large_to_build_is_handled_in_factored_form():
    side = 200_000  # 320 GB in double precision
    generator = torch.Generator().manual_seed(0)
    huge = LowRankUpdate(torch.randn(side, 2, generator=generator), torch.randn(2, side, generator=generator))
    truncated = huge.truncate(0.0)
    assert truncated.width == 1
    assert truncated.norm() == pytest.approx(float(huge.singular_values()[0]), rel=1e-5)
    assert truncated.inner(huge) == pytest.approx(truncated.norm() ** 2, rel=1e-5)


def test_truncation_is_deterministic():
    first, second = (update(50, 40, 8).truncate(0.9) for _ in range(2))
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(3, 5), r"left \(4, 2\), right \(3, 5\)"),
        (torch.zeros(4), torch.zeros(4, 5), "factors must be"),
        (torch.zeros(0, 2), torch.zeros(2, 5), "rows and columns"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(2, 5), "left factor must hold real"),
        (torch.tensor([[math.nan]]), torch.ones(1, 1), "left factor of the update holds a NaN"),
        (torch.ones(1, 1), torch.tensor([[-math.inf]]), "right factor of the update holds a NaN"),
        (torch.ones(1, 2), torch.tensor([[math.inf], [-math.inf]]), "right factor of the update holds a NaN"),
    ],
)
def test_broken_factors_are_refused(left, right, message):
    with pytest.raises(ValueError, match=message):
        LowRankUpdate(left, right)


def test_large_finite_factors_are_not_taken_for_infinite():
    assert LowRankUpdate(torch.full((4, 2), 3e38), torch.zeros(2, 3)).norm() == 0.0


@pytest.mark.parametrize("energy", [-1e-9, 1.0001, math.nan])
def test_an_energy_outside_zero_and_one_is_refused(energy):
    with pytest.raises(ValueError, match="energy"):
        update(4, 3, 2).truncate(energy)


def test_a_rank_cap_below_one_is_refused():
    with pytest.raises(ValueError, match="cap"):
        update(4, 3, 2).truncate_rank(0)


def test_updates_of_different_weights_do_not_mix():
    for operation in (LowRankUpdate.inner, LowRankUpdate.__add__):
        with pytest.raises(ValueError, match="different weights"):
            operation(update(4, 3, 2), update(3, 4, 2))
