"""Consolidation against a dense implementation of the paper's equations, and the identities that it obeys."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from everalign.memory import LowRankUpdate, MemoryBank, consolidate, consolidate_factors, integrate

M, N, RANK, TASKS = 14, 11, 4, 6


def factors(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Factors that share a part over all seeds, so that updates are far from orthogonal."""
    shared = torch.Generator().manual_seed(1000)
    own = torch.Generator().manual_seed(seed)
    return (
        (1.5 * torch.randn(M, RANK, generator=shared) + torch.randn(M, RANK, generator=own)).to(dtype),
        (1.5 * torch.randn(RANK, N, generator=shared) + torch.randn(RANK, N, generator=own)).to(dtype),
    )


def update(seed: int, dtype: torch.dtype = torch.float64) -> LowRankUpdate:
    return LowRankUpdate(*factors(seed, dtype))


def bank_of(*updates: LowRankUpdate) -> MemoryBank:
    bank = MemoryBank()
    for one in updates:
        bank.remember(one)
    return bank


def history() -> MemoryBank:
    return bank_of(update(1), update(2), update(3))


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert float(expected.norm()) > 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.norm()))


def project_dense(rows: list[Tensor], matrix: Tensor) -> Tensor:
    """Projection on the span of dense matrices, through an orthonormal basis from an SVD of unit rows."""
    if not rows:
        return torch.zeros_like(matrix)
    stacked = torch.stack([row.flatten() / row.norm() for row in rows])
    _, S, Vh = torch.linalg.svd(stacked, full_matrices=False)
    basis = Vh[S / S[0] > 1e-6]
    return (basis.T @ (basis @ matrix.flatten())).reshape(matrix.shape)


def consolidate_dense(matrix: Tensor, refined: list[Tensor], energy: float, keep: float) -> Tensor:
    """The paper's equations, with a bank of refined updates."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    shares = S.square().cumsum(0) / S.square().sum()
    k = next(i + 1 for i, share in enumerate(shares.tolist()) if share >= energy * (1 - 1e-12))
    denoised = (U[:, :k] * S[:k]) @ Vh[:k]
    return denoised - (1 - keep) * project_dense(refined, denoised)


# --- the identities ---


def test_the_first_task_is_only_denoised():
    result = consolidate(update(1), MemoryBank(), energy=0.8, keep=0.3)
    assert torch.equal(result.refined.dense(), update(1).truncate(0.8).dense())
    assert result.projected_energy == 0.0


def test_full_energy_leaves_the_update_as_it_is():
    result = consolidate(update(4), history(), energy=1.0)
    assert_same(result.denoised.dense(), update(4).dense(), 1e-13)
    assert result.energy_kept == pytest.approx(1.0, abs=1e-15)
    assert result.rank == RANK


def test_keeping_everything_refines_nothing_whatever_the_bank():
    result = consolidate(update(4), history(), energy=0.7, keep=1.0)
    assert torch.equal(result.refined.dense(), result.denoised.dense())
    assert result.projected_energy > 0.05


def test_full_energy_and_keep_make_long_term_memory_the_trained_weights():
    bank, long_term, trained = MemoryBank(), None, torch.zeros(M, N, dtype=torch.float64)
    for task in range(TASKS):
        trained = trained + update(task).dense()
        refined = consolidate(update(task), bank, energy=1.0, keep=1.0).refined
        long_term, discarded = integrate(long_term, refined, rank_cap=RANK * TASKS)
        assert_same(long_term.dense(), trained, 1e-12)
        assert discarded == pytest.approx(0.0, abs=1e-15)


def test_keeping_nothing_makes_the_refined_update_orthogonal_to_every_entry():
    bank = history()
    entries = bank.entries
    refined = consolidate(update(4), bank, energy=0.9, keep=0.0).refined
    for entry in entries:
        assert abs(refined.inner(entry)) <= 1e-12 * refined.norm() * entry.norm()


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.5, 1.0])
def test_an_update_inside_the_span_is_scaled_by_keep(keep):
    inside = update(1).scaled(2.0) + update(3).scaled(-0.7)
    result = consolidate(inside, history(), energy=1.0, keep=keep)
    torch.testing.assert_close(result.refined.dense(), keep * inside.dense(), rtol=0, atol=1e-11 * inside.norm())
    assert result.projected_energy == pytest.approx(1.0, abs=1e-12)


def test_an_update_orthogonal_to_the_span_is_left_alone():
    def block(rows: slice, seed: int) -> LowRankUpdate:
        left, right = factors(seed)
        only = torch.zeros_like(left)
        only[rows] = left[rows]
        return LowRankUpdate(only, right)

    bank = bank_of(block(slice(0, 7), 1), block(slice(0, 7), 2))
    result = consolidate(block(slice(7, 14), 3), bank, energy=1.0, keep=0.0)
    assert_same(result.refined.dense(), block(slice(7, 14), 3).dense(), 1e-13)
    assert result.projected_energy == pytest.approx(0.0, abs=1e-25)


def test_projecting_twice_is_projecting_once():
    bank = history()
    once = bank.project(update(4)).component
    assert_same(bank.project(once).component.dense(), once.dense(), 1e-12)


@given(seed=st.integers(10, 10_000), energy=st.floats(0, 1), keep=st.floats(0, 1))
@settings(deadline=None, max_examples=25)
def test_squared_norm_falls_by_exactly_what_was_damped(seed, energy, keep):
    bank = history()
    inside = bank.project(update(seed).truncate(energy)).component.norm()
    result = consolidate(update(seed), bank, energy, keep)
    whole = result.denoised.norm() ** 2
    assert result.refined.norm() ** 2 == pytest.approx(whole - (1 - keep**2) * inside**2, rel=1e-10)
    assert result.projected_energy == pytest.approx(inside**2 / whole, rel=1e-10)


@pytest.mark.parametrize(
    "same_span",
    [
        [update(3), update(1), update(2)],
        [update(1).scaled(1e-5), update(2).scaled(-1e6), update(3)],
        [update(1), update(2), update(1), update(3), update(2).scaled(3.0), update(1)],
        [LowRankUpdate.zero((M, N)), update(1), update(2).scaled(1e-300), update(2), update(3)],
        [update(1), update(1) + update(2), update(1) + update(2) + update(3)],
    ],
    ids=["permuted", "scaled", "repeated", "with zeros", "recombined"],
)
def test_only_the_span_of_the_bank_matters(same_span):
    expected = consolidate(update(4), history(), energy=0.9, keep=0.2)
    found = consolidate(update(4), bank_of(*same_span), energy=0.9, keep=0.2)
    assert_same(found.refined.dense(), expected.refined.dense(), 1e-11)
    assert found.projected_energy == pytest.approx(expected.projected_energy, rel=1e-10)


def test_a_bank_of_zeros_projects_nothing():
    zero = LowRankUpdate.zero((M, N))
    projection = bank_of(zero, zero).project(update(1))
    assert projection.component.width == 0
    assert projection.energy == 0.0
    assert projection.coefficients.tolist() == [0.0, 0.0]


def regauged(B: Tensor, A: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    gauge = torch.randn(RANK, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return B @ gauge, torch.linalg.solve(gauge, A)


def test_product_space_depends_on_the_update_alone_and_factor_space_does_not():
    product, factor = [], []
    for change in (lambda B, A, _: (B, A), regauged):
        bank, left_bank, right_bank = MemoryBank(), MemoryBank(), MemoryBank()
        for task in range(3):
            B, A = change(*factors(task), task)
            last = consolidate(LowRankUpdate(B, A), bank, energy=0.8)
            left, right = consolidate_factors(B, A, left_bank, right_bank, energy=0.8)
        product.append(last.refined.dense())
        factor.append(left.refined.dense() @ right.refined.dense())
    assert_same(product[1], product[0], 1e-10)
    assert float((factor[1] - factor[0]).norm()) > 0.01 * float(factor[0].norm())


@pytest.mark.parametrize(("energy", "keep"), [(0.9, 0.5), (0.7, 0.0), (1.0, 0.25), (0.0, 0.5)])
def test_factored_consolidation_equals_the_dense_equations_over_six_tasks(energy, keep):
    # The dense reference banks refined updates, ours denoised ones: their spans are the same.
    bank, refined, long_term = MemoryBank(), [], None
    for task in range(TASKS):
        refined.append(consolidate_dense(update(task).dense(), refined, energy, keep))
        found = consolidate(update(task), bank, energy, keep).refined
        assert_same(found.dense(), refined[-1])
        long_term, _ = integrate(long_term, found)
        assert_same(long_term.dense(), torch.stack(refined).sum(0))


def test_refined_and_denoised_updates_span_the_same_space():
    bank, refined, denoised = MemoryBank(), [], []
    for task in range(4):
        result = consolidate(update(task), bank, energy=0.8, keep=0.3)
        refined.append(result.refined.dense())
        denoised.append(result.denoised.dense())
    for matrix in (*refined, *denoised):
        assert_same(project_dense(refined, matrix), matrix, 1e-12)
        assert_same(project_dense(denoised, matrix), matrix, 1e-12)


def test_the_refined_update_is_linear_in_keep():
    low, middle, high = (
        consolidate(update(4), history(), energy=0.9, keep=keep).refined.dense() for keep in (0.0, 0.3, 1.0)
    )
    assert_same(middle, 0.7 * low + 0.3 * high, 1e-13)


@given(seed=st.integers(0, 10_000), energy=st.floats(0, 1))
@settings(deadline=None, max_examples=25)
def test_denoising_loses_at_most_the_energy_it_may(seed, energy):
    result = consolidate(update(seed), MemoryBank(), energy)
    lost = float((update(seed).dense() - result.denoised.dense()).norm())
    assert lost <= math.sqrt(1 - energy + 2e-12) * update(seed).norm()
    assert result.energy_kept == pytest.approx(1 - (lost / update(seed).norm()) ** 2, abs=1e-12)
    assert result.energy_kept >= energy - 2e-12


def test_consolidation_is_deterministic_also_after_the_bank_was_stored():
    stored = MemoryBank()
    stored.load_state_dict(load(save(history().state_dict())))
    results = [consolidate(update(4), bank) for bank in (history(), history(), stored)]
    for result in results[1:]:
        assert torch.equal(result.refined.left, results[0].refined.left)
        assert torch.equal(result.refined.right, results[0].refined.right)
        assert result.projected_energy == results[0].projected_energy


# --- precision ---


def test_single_precision_agrees_with_double_over_six_tasks():
    bank, refined = MemoryBank(), []
    for task in range(TASKS):
        refined.append(consolidate_dense(update(task).dense(), refined, 0.9, 0.5))
        found = consolidate(update(task, torch.float32), bank).refined
        assert found.dtype == torch.float32
        assert_same(found.dense().double(), refined[-1], 1e-5)


def test_nearly_parallel_entries_do_not_blow_up_single_precision():
    base, nudge = update(1, torch.float32), update(2, torch.float32)
    bank = bank_of(base.truncate(1.0), (base + nudge.scaled(1e-4)).truncate(1.0))
    # Both entries are the same to four digits; only their difference spans the second direction.
    inside = bank.project(nudge)
    assert float(inside.coefficients.abs().max()) > 1e3
    exact = project_dense([entry.to(torch.float64).dense() for entry in bank.entries], nudge.dense().double())
    assert_same(inside.component.dense().double(), exact, 1e-6)


def test_a_small_task_still_counts_as_history():
    tiny = update(2).scaled(1e-8)
    result = consolidate(update(2), bank_of(update(1), tiny), energy=1.0, keep=0.5)
    assert_same(result.refined.dense(), 0.5 * update(2).dense(), 1e-11)


# --- long-term memory ---


def test_integration_takes_the_nearest_matrix_under_the_rank_cap_and_reports_the_loss():
    total = update(1).dense() + update(2).dense()
    long_term, discarded = integrate(update(1), update(2), rank_cap=3)
    U, S, Vh = torch.linalg.svd(total)
    assert long_term.width == 3
    assert_same(long_term.dense(), (U[:, :3] * S[:3]) @ Vh[:3], 1e-12)
    assert discarded == pytest.approx(float(S[3:].square().sum() / S.square().sum()), rel=1e-10)


def test_integration_returns_balanced_factors():
    long_term, _ = integrate(None, update(1))
    assert_same(long_term.left.T @ long_term.left, long_term.right @ long_term.right.T, 1e-12)


# --- the literal variant ---


def test_factor_space_applies_the_dense_equations_to_each_factor():
    banks = MemoryBank(), MemoryBank()
    refined_left, refined_right = [], []
    for task in range(4):
        B, A = factors(task)
        refined_left.append(consolidate_dense(B, refined_left, 0.9, 0.5))
        refined_right.append(consolidate_dense(A, refined_right, 0.9, 0.5))
        left, right = consolidate_factors(B, A, *banks)
        assert_same(left.refined.dense(), refined_left[-1])
        assert_same(right.refined.dense(), refined_right[-1])


def test_factors_may_be_orthogonal_where_the_products_are_the_same():
    eye, mirror = (
        torch.eye(2, dtype=torch.float64),
        torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)),
    )
    left, right = consolidate_factors(
        mirror, mirror, bank_of(LowRankUpdate(eye, eye)), bank_of(LowRankUpdate(eye, eye))
    )
    assert left.projected_energy == right.projected_energy == 0.0
    product = consolidate(LowRankUpdate(mirror, mirror), bank_of(LowRankUpdate(eye, eye)))
    assert product.projected_energy == pytest.approx(1.0, abs=1e-14)


# --- the bank ---


def test_consolidation_reads_the_bank_before_it_remembers():
    bank = MemoryBank()
    assert consolidate(update(1), bank).projected_energy == 0.0
    assert len(bank) == 1
    assert consolidate(update(1), bank).projected_energy == pytest.approx(1.0, abs=1e-12)
    assert len(bank) == 2


def test_the_bank_keeps_denoised_updates_of_low_width():
    bank = MemoryBank()
    for task in range(TASKS):
        result = consolidate(update(task), bank, energy=0.9, keep=0.2)
        assert torch.equal(bank.entries[-1].dense(), result.denoised.dense())
    assert all(entry.width <= RANK for entry in bank.entries)


def test_the_bank_does_not_change_with_weights_that_go_on_training():
    B, A = factors(1)
    bank = bank_of(LowRankUpdate(B, A))
    B.zero_()
    assert_same(bank.entries[0].dense(), update(1).dense(), 1e-15)


def test_coefficients_rebuild_the_component():
    bank = history()
    projection = bank.project(update(4))
    pairs = zip(projection.coefficients.tolist(), bank.entries, strict=True)
    rebuilt = sum(coefficient * entry.dense() for coefficient, entry in pairs)
    assert_same(projection.component.dense(), rebuilt, 1e-12)
    assert_same(rebuilt, project_dense([entry.dense() for entry in bank.entries], update(4).dense()))


def test_a_zero_update_consolidates_to_zero():
    result = consolidate(LowRankUpdate.zero((M, N)), history())
    assert (result.rank, result.refined.norm(), result.projected_energy, result.energy_kept) == (
        0,
        0.0,
        0.0,
        1.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stored_bank_comes_back_bit_for_bit(dtype):
    bank = bank_of(update(1, dtype), LowRankUpdate.zero((M, N), dtype), update(2, dtype))
    again = MemoryBank()
    again.load_state_dict(load(save(bank.state_dict())))
    assert len(again) == 3
    for mine, theirs in zip(again.entries, bank.entries, strict=True):
        assert torch.equal(mine.left, theirs.left)
        assert torch.equal(mine.right, theirs.right)
        assert mine.dtype == dtype


def test_more_than_ten_entries_come_back_in_order():
    bank = bank_of(*(update(task) for task in range(12)))
    again = MemoryBank()
    again.load_state_dict(dict(sorted(bank.state_dict().items())))
    assert all(torch.equal(a.left, b.left) for a, b in zip(again.entries, bank.entries, strict=True))


def test_loading_replaces_what_was_there():
    bank = history()
    bank.load_state_dict({})
    assert len(bank) == 0
    assert bank.project(update(1)).energy == 0.0


@pytest.mark.parametrize("missing", ["left.0", "right.2"])
def test_a_state_with_missing_tensors_is_refused_and_changes_nothing(missing):
    bank, state = history(), history().state_dict()
    del state[missing]
    with pytest.raises(ValueError, match=r"left\.J and right\.J"):
        bank.load_state_dict(state)
    assert len(bank) == 3


# --- wrong input ---


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"energy": 1.1}, "energy"),
        ({"energy": -0.1}, "energy"),
        ({"energy": math.nan}, "energy"),
        ({"keep": 1.1}, "keep"),
        ({"keep": -0.1}, "keep"),
        ({"keep": math.nan}, "keep"),
    ],
)
def test_shares_outside_zero_and_one_are_refused_and_nothing_is_remembered(arguments, name):
    bank = history()
    with pytest.raises(ValueError, match=name):
        consolidate(update(4), bank, **arguments)
    assert len(bank) == 3


def test_an_update_of_another_weight_is_refused_and_nothing_is_remembered():
    bank = history()
    other = LowRankUpdate(torch.ones(N, 1), torch.ones(1, M))
    for operation in (bank.project, bank.remember, lambda one: consolidate(one, bank)):
        with pytest.raises(ValueError, match="different weights"):
            operation(other)
    assert len(bank) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_refused(bad):
    B, A = factors(1)
    B[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        consolidate(LowRankUpdate(B, A), MemoryBank())
    with pytest.raises(ValueError, match="NaN or infinite"):
        consolidate_factors(B, A, MemoryBank(), MemoryBank())


def test_integration_refuses_a_rank_cap_below_one():
    with pytest.raises(ValueError, match="cap"):
        integrate(None, update(1), rank_cap=0)
