"""The bounded bank against the exact one, and what its cap costs."""

import math

import pytest
import torch
from safetensors.torch import load, save

from everalign.memory import (
    LowRankUpdate,
    MemoryBank,
    consolidate,
    consolidate_into,
    integrate,
)
from everalign.memory.bank import keep_leading

M, N, RANK, TASKS = 40, 33, 3, 7
SETTINGS = [(0.9, 0.5), (0.7, 0.0), (1.0, 0.25), (0.0, 0.5), (1.0, 1.0)]


def update(seed, dtype=torch.float64, rank=RANK):
    """Updates that share a part over all seeds, so that they are far from orthogonal."""
    shared, own = (torch.Generator().manual_seed(value) for value in (1000, seed))
    left, right = (
        1.5 * torch.randn(*size, generator=shared, dtype=torch.float64)
        + torch.randn(*size, generator=own, dtype=torch.float64)
        for size in ((M, rank), (rank, N))
    )
    return LowRankUpdate(left.to(dtype), right.to(dtype))


def filled(cap=64, tasks=3, dtype=torch.float64):
    bank = MemoryBank(cap)
    for task in range(tasks):
        bank.remember(update(task, dtype))
    return bank


def close(found, expected, tolerance=1e-9):
    assert float(expected.norm()) > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.norm()))


@pytest.mark.parametrize(("energy", "keep"), SETTINGS)
@pytest.mark.parametrize("rank_cap", [64, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_without_a_cap_at_work_it_is_the_exact_bank(energy, keep, rank_cap, dtype, tolerance):
    exact, bank, long_term, memory = MemoryBank(), MemoryBank(64), None, None
    for task in range(TASKS):
        expected = consolidate(update(task, dtype), exact, energy, keep)
        long_term, discarded = integrate(long_term, expected.refined, rank_cap)
        found, memory, lost = consolidate_into(memory, update(task, dtype), bank, energy, keep, rank_cap)
        close(found.refined.dense(), expected.refined.dense(), tolerance)
        close(memory.dense(), long_term.dense(), tolerance)
        assert found.projected_energy == pytest.approx(expected.projected_energy, abs=tolerance)
        assert (found.rank, found.energy_kept) == (expected.rank, pytest.approx(expected.energy_kept, abs=1e-12))
        assert lost == pytest.approx(discarded, abs=tolerance)
        assert memory.width == long_term.width or dtype == torch.float32
        assert memory.dtype == dtype
        close(memory.left.T @ memory.left, memory.right @ memory.right.T, 1e-5)
    assert bank.lost_energy < (1e-9 if dtype == torch.float64 else 1e-7)  # as cores are rounded
    for mine, theirs in zip(bank.entries, exact.entries, strict=True):
        close(mine.dense(), theirs.dense(), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_bases_stay_orthonormal(dtype, tolerance):
    state = filled(cap=8, tasks=20, dtype=dtype).state_dict()
    for name in ("left", "right"):
        assert state[name].shape[1] == 8
        assert state[name].dtype == dtype
        gram = state[name].T @ state[name]
        torch.testing.assert_close(gram, torch.eye(8, dtype=dtype), rtol=0, atol=tolerance)


def test_projections_are_those_of_the_exact_bank():
    exact = MemoryBank()
    for task in range(3):
        exact.remember(update(task))
    expected, found = exact.project(update(9)), filled().project(update(9))
    close(found.component.dense(), expected.component.dense())
    close(found.coefficients, expected.coefficients)
    assert found.energy == pytest.approx(expected.energy, rel=1e-9)


@pytest.mark.parametrize(
    "odd",
    [
        LowRankUpdate.zero((M, N), torch.float64),
        update(1).scaled(1e-200),
        update(1).scaled(-3.0),
        LowRankUpdate(torch.cat([update(1).left] * 2, 1), torch.cat([update(1).right, update(2).right])),
    ],
    ids=["zero", "tiny", "repeated", "of less rank than it is wide"],
)
def test_odd_updates_are_taken_in(odd):
    exact, bank = MemoryBank(), filled(tasks=2)
    for one in (update(0), update(1), odd):
        exact.remember(one)
    bank.remember(odd)
    close(bank.project(update(9)).component.dense(), exact.project(update(9)).component.dense())


def test_the_cap_costs_what_is_reported_and_the_leading_directions_stay():
    bank = filled(cap=6, tasks=TASKS)
    lost = [1 - (entry.norm() / update(task).norm()) ** 2 for task, entry in enumerate(bank.entries)]
    assert bank.lost_energy == pytest.approx(sum(lost) / TASKS, rel=1e-9)
    assert 0.01 < bank.lost_energy < filled(cap=3, tasks=TASKS).lost_energy
    assert filled(cap=TASKS * RANK, tasks=TASKS).lost_energy < 1e-12


def test_the_error_of_inner_products_is_of_second_order():
    """<H, K> - <H~, K~> = <E_H, E_K>, at most the product of the errors' norms, where the cap first cuts."""
    entries = filled(cap=2 * RANK, tasks=3).entries
    assert filled(cap=2 * RANK, tasks=2).lost_energy < 1e-12
    for i in range(3):
        for j in range(3):
            error = abs(update(i).inner(update(j)) - entries[i].inner(entries[j]))
            bound = (update(i).dense() - entries[i].dense()).norm() * (update(j).dense() - entries[j].dense()).norm()
            assert error <= 1.0000001 * float(bound) + 1e-9


def test_long_term_memory_is_held_whatever_the_cap():
    """With a cap of one more than its rank, hardly any history is left, and no memory is lost."""
    memory, total = None, torch.zeros(M, N, dtype=torch.float64)
    bank = MemoryBank(5)
    for task in range(TASKS):
        result, new, discarded = consolidate_into(memory, update(task), bank, 0.9, 0.5, rank_cap=4)
        total = result.refined.dense() + (0 if memory is None else memory.dense())
        best = torch.linalg.svdvals(total)
        assert (new.dense() - total).norm() == pytest.approx(float(best[4:].norm()), rel=1e-6)
        assert discarded == pytest.approx(float(best[4:].square().sum() / best.square().sum()), rel=1e-6)
        memory = new
    assert bank.lost_energy > 0.05


def test_the_memory_may_fill_the_whole_cap():
    memory, bank = None, MemoryBank(4)
    for task in range(TASKS):
        _, memory, _ = consolidate_into(memory, update(task), bank, rank_cap=4)
    assert [bank.state_dict()[side].shape[1] for side in ("left", "right")] == [4, 4]


def test_factors_of_very_different_scale_are_held_whole():
    scale = torch.tensor([1e-9, 1.0, 1e9], dtype=torch.float64)
    odd = LowRankUpdate(update(1).left * scale, update(1).right / scale[:, None])
    bank = MemoryBank(128)
    bank.remember(odd)
    close(bank.entries[0].dense(), update(1).dense(), 1e-6)
    assert bank.project(odd).energy == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stored_bank_goes_on_bit_for_bit(dtype):
    bank, again = filled(cap=7, dtype=dtype), MemoryBank(7)
    again.load_state_dict(load(save(bank.state_dict())))
    for each in (bank, again):
        each.remember(update(8, dtype))
    states = [each.state_dict() for each in (bank, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert len(again) == 4
    again.load_state_dict({})
    assert (len(again), again.entries, again.state_dict()) == (0, (), {})


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    bank, state = filled(), filled().state_dict()
    with pytest.raises(ValueError, match="left, right, cores and energies"):
        bank.load_state_dict({"left": state["left"]})
    with pytest.raises(ValueError, match="do not fit"):
        bank.load_state_dict({**state, "left": state["left"][:, 1:]})
    assert len(bank) == 3


def test_wrong_input_is_refused_and_changes_nothing():
    bank = filled()
    other = LowRankUpdate(torch.ones(N, 1), torch.ones(1, M))
    for operation in (bank.project, bank.remember, lambda one: consolidate_into(None, one, bank)):
        with pytest.raises(ValueError, match="different weights"):
            operation(other)
    for arguments, message in (({"keep": math.nan}, "keep"), ({"energy": 2.0}, "energy"), ({"rank_cap": 65}, "cap")):
        with pytest.raises(ValueError, match=message):
            consolidate_into(None, update(5), bank, **arguments)
    with pytest.raises(ValueError, match="different runs"):
        consolidate_into(update(77), update(5), bank)
    with pytest.raises(ValueError, match="at least 1"):
        MemoryBank(0)
    assert len(bank) == 3


def test_weak_new_directions_beside_strong_ones_do_not_spoil_the_bases():
    """Half of every fp32 update repeats the first one up to a relative 1e-4, half is new; 40 tasks, the cap at work."""
    size, half = 256, 4
    generator = torch.Generator().manual_seed(0)
    repeated = [torch.randn(size, half, generator=generator) for _ in range(2)]
    banks = {dtype: MemoryBank(48) for dtype in (torch.float32, torch.float64)}
    memories = dict.fromkeys(banks)
    for _ in range(40):
        new = [torch.randn(size, half, generator=generator) for _ in repeated]
        noise = [1e-4 * torch.randn(size, half, generator=generator) for _ in repeated]
        factors = [torch.cat([old + small, fresh], 1) for old, small, fresh in zip(repeated, noise, new, strict=True)]
        for dtype, bank in banks.items():
            one = LowRankUpdate(factors[0].to(dtype), factors[1].T.to(dtype).contiguous())
            _, memories[dtype], _ = consolidate_into(memories[dtype], one, bank, 1.0, 0.5, rank_cap=24)
    for side in ("left", "right"):
        basis = banks[torch.float32].state_dict()[side]
        torch.testing.assert_close(basis.T @ basis, torch.eye(48), rtol=0, atol=2e-5)
    assert memories[torch.float32].norm() == pytest.approx(memories[torch.float64].norm(), rel=1e-3)


def test_a_held_direction_outside_all_cores_keeps_its_place():
    basis, held = torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)[:, 5:]
    core = torch.zeros(1, 6, 6, dtype=torch.float64)
    core[0, 1, 1] = 1.0
    leading, _, kept = keep_leading(basis, core, held, 4)
    torch.testing.assert_close(leading.T @ leading, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(kept, held)
