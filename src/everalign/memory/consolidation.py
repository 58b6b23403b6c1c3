"""Short-to-Long Memory Consolidation: how what a task taught joins what the model already knows.

Source: Li et al. 2026, "LifeAlign", arXiv 2509.17183: denoise a task's update by its singular values, damp
the part of it that lies in the span of earlier tasks' updates, add the rest to long-term memory.
`consolidate` does so with the update of the weight itself, which only depends on the function that was
learnt; `consolidate_factors` does it to each LoRA factor separately, which is the paper's literal reading.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from everalign.memory.bank import Addition, MemoryBank, SharedBasisBank, project_core
from everalign.memory.low_rank import LowRankUpdate, check_share, energy_share, numerical_rank

Item = TypeVar("Item")
Result = TypeVar("Result")


def for_each_weight(work: Callable[[Item], Result], weights: Sequence[Item]) -> list[Result]:
    """Return `work` of every item, in their order, as many at a time as torch has threads.

    Decompositions of small matrices run on one processor whatever torch is told, so that the others would wait. Every
    item is computed with one thread: results do not depend on the number of processors.

    Args:
        work: takes no lock and shares nothing that it writes with its other calls; its first error is raised.
        weights: the items.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=threads) as pool:
            return list(pool.map(work, weights))
    finally:
        torch.set_num_threads(threads)


# Share of the long-term memory's norm that the bases of its bank hold, but for the rounding of stored factors.
_HELD = 1 - 1e-5


@dataclass(frozen=True, eq=False)
class Consolidation:
    """What became of one update.

    Attributes:
        denoised: the update without its weak directions, SM'.
        projected_energy: share of the denoised update's energy inside the span of the bank, 0 to 1.
        rank: rank of the denoised update.
        energy_kept: share of the update's energy that denoising kept, 0 to 1 (1 for a zero update).
        norm: Frobenius norm of the refined update.
        build_refined: makes `refined` when it is asked for.
    """

    denoised: LowRankUpdate
    projected_energy: float
    rank: int
    energy_kept: float
    norm: float
    build_refined: Callable[[], LowRankUpdate]

    @cached_property
    def refined(self) -> LowRankUpdate:
        """What long-term memory receives, RSM. Its width grows with the bank: integrate it, do not store it."""
        return self.build_refined()


def consolidate(update: LowRankUpdate, bank: MemoryBank, energy: float = 0.9, keep: float = 0.5) -> Consolidation:
    """Refine a task's update against the bank, then remember its denoised form there.

        SM' = truncation of SM at `energy`,    RSM = SM' - (1 - keep) * P(SM')

    with P the projection on the span of the bank before this task.

    Args:
        update: the task's update of one weight, SM.
        bank: history of that weight; gains one entry, unless an error is raised.
        energy: share of the squared singular values to keep, 0 to 1 (the paper's theta).
        keep: share of the part inside the bank's span to keep, 0 to 1 (the paper's lambda).

    Raises:
        ValueError: `energy` or `keep` is not within 0 and 1, or the bank is of another weight's shape.
    """
    check_share("keep", keep)
    denoised, energy_kept = update.denoise(energy)
    projection = bank.project(denoised)
    refined = denoised + projection.component.scaled(keep - 1.0)
    bank.remember(denoised)
    return Consolidation(
        denoised=denoised,
        projected_energy=projection.energy,
        rank=denoised.width,
        energy_kept=energy_kept,
        norm=refined.norm(),
        build_refined=lambda: refined,
    )


def consolidate_factors(
    delta_left: Tensor,
    delta_right: Tensor,
    left_bank: MemoryBank,
    right_bank: MemoryBank,
    energy: float = 0.9,
    keep: float = 0.5,
) -> tuple[Consolidation, Consolidation]:
    """Consolidate the changes of LoRA's two factors as if each were a weight of its own.

    Not invariant to (B G, G^-1 A), which is the same model with other factors, and without a bound on what
    the product loses.

    Args:
        delta_left: `(m, r)` change of B over the task.
        delta_right: `(r, n)` change of A over the task.
        left_bank: history of B.
        right_bank: history of A.
        energy: as in `consolidate`.
        keep: as in `consolidate`.

    Returns:
        B's and A's consolidation; `refined.dense()` is the change to apply to the factor.
    """
    left = LowRankUpdate(delta_left, torch.eye(delta_left.shape[-1], dtype=delta_left.dtype))
    right = LowRankUpdate(torch.eye(delta_right.shape[0], dtype=delta_right.dtype), delta_right)
    return consolidate(left, left_bank, energy, keep), consolidate(right, right_bank, energy, keep)


def integrate(
    long_term: LowRankUpdate | None, refined: LowRankUpdate, rank_cap: int = 64
) -> tuple[LowRankUpdate, float]:
    """Long-term memory with a refined update added: LM_t = LM_(t-1) + RSM, at rank `rank_cap` at most.

    Args:
        long_term: the sum of all refined updates so far, None before the first.
        refined: this task's refined update.
        rank_cap: rank of the result at most; the nearest such matrix is taken.

    Returns:
        The new long-term memory, its factors balanced, and the share of its energy that the cap discards.

    Raises:
        ValueError: shapes differ, or `rank_cap` is below 1.
    """
    total = refined if long_term is None else long_term + refined
    return total.truncate_rank(rank_cap)


def consolidate_into(
    long_term: LowRankUpdate | None,
    update: LowRankUpdate,
    bank: SharedBasisBank,
    energy: float = 0.9,
    keep: float = 0.5,
    rank_cap: int = 64,
) -> tuple[Consolidation, LowRankUpdate, float]:
    """Do what `consolidate` and `integrate` do, in the bank's shared bases: nothing wider than the update is factored.

    Args:
        long_term: the sum of all refined updates so far, None before the first.
        update: as in `consolidate`.
        bank: history of that weight; gains one entry and goes on holding the long-term memory.
        energy: as in `consolidate`.
        keep: as in `consolidate`.
        rank_cap: as in `integrate`; at most the bank's cap.

    Returns:
        What became of the update, the new long-term memory with balanced factors, and the share of its energy that
        the rank cap discards.
    """
    check_share("keep", keep)
    if not 1 <= rank_cap <= bank.cap:
        raise ValueError(f"the rank cap must lie within 1 and the bank's cap of {bank.cap} directions, not {rank_cap}")
    denoised, energy_kept = update.denoise(energy)
    addition = bank.extend(denoised)
    _, part, length = project_core(addition.core, addition.cores)
    refined = addition.core - (1.0 - keep) * part
    memory, discarded = _integrate_core(long_term, refined, addition, bank, rank_cap)
    norm = float(addition.core.norm())
    result = Consolidation(
        denoised=denoised,
        projected_energy=min(1.0, (length / norm) ** 2) if norm > 0.0 else 0.0,
        rank=denoised.width,
        energy_kept=energy_kept,
        norm=float(refined.norm()),
        build_refined=lambda: LowRankUpdate(addition.left.double() @ refined, addition.right.T).to(update.dtype),
    )
    return result, memory, discarded


def _integrate_core(
    long_term: LowRankUpdate | None, refined: Tensor, addition: Addition, bank: SharedBasisBank, rank_cap: int
) -> tuple[LowRankUpdate, float]:
    """Add a refined core to long-term memory, whose directions the bank holds; the sum, and the energy discarded."""
    total = refined if long_term is None else refined + _core_of(long_term, addition)
    U, values, Vh = torch.linalg.svd(total, full_matrices=False)
    k = min(rank_cap, numerical_rank(values, (len(addition.left), len(addition.right))))
    left, right = bank.adopt(addition, held=(U[:, :k], Vh[:k].T))
    root = values[:k].sqrt().to(left.dtype)
    return LowRankUpdate(left * root, (right * root).T), 1.0 - energy_share(values, k)


def _core_of(long_term: LowRankUpdate, addition: Addition) -> Tensor:
    """Return the long-term memory's core (p, p') fp64 in the bases."""
    left, right = long_term.left.to(addition.left.dtype), long_term.right.to(addition.right.dtype)
    core: Tensor = (addition.left.T @ left).double() @ (right @ addition.right).double()
    energy = float(((left.T @ left).double() * (right @ right.T).double()).sum())
    if float(core.norm()) < _HELD * math.sqrt(max(energy, 0.0)):
        raise ValueError("the long-term memory does not lie in the bank's bases: they belong to different runs")
    return core
