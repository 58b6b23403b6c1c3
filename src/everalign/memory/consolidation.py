"""Short-to-Long Memory Consolidation: add a task's weight update to long-term memory without overwriting earlier tasks.

Source: Li et al. 2026, "LifeAlign", arXiv 2509.17183: denoise the update by its singular values, damp the part of it
that lies in the span of earlier tasks' updates, add the rest to long-term memory. `consolidate` works on the update of
the weight itself, which depends only on the function that was learned; `consolidate_factors` works on each LoRA factor
separately, as the paper is written.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from everalign.memory.bank import Coordinates, MemoryBank
from everalign.memory.low_rank import LowRankUpdate, check_share, energy_share, numerical_rank

Item = TypeVar("Item")
Result = TypeVar("Result")

# Share of the long-term memory's norm that its bank's bases must hold; the rest is the rounding of stored factors.
_HELD = 1 - 1e-5


@dataclass(frozen=True, eq=False)
class Consolidation:
    """The result for one update.

    Attributes:
        denoised: the update without its weak directions, SM'.
        energy_kept: share of the update's energy that denoising kept, 0 to 1 (1 for a zero update).
        projected_energy: share of the denoised update's energy inside the span of the bank, 0 to 1.
        norm: Frobenius norm of the refined update.
        part: (p, p') fp64, core of the denoised update's part inside the span, in the bases of `coordinates`.
        coordinates: the denoised update and the bank before it in common bases.
        keep: the share of the part that stays.
    """

    denoised: LowRankUpdate
    energy_kept: float
    projected_energy: float
    norm: float
    part: Tensor
    coordinates: Coordinates
    keep: float

    @property
    def rank(self) -> int:
        """Rank of the denoised update."""
        return self.denoised.width

    @cached_property
    def refined(self) -> LowRankUpdate:
        """What long-term memory receives, RSM. Its width grows with the bank: integrate it, do not store it."""
        return self.denoised + self.coordinates.component(self.part).scaled(self.keep - 1.0)


def consolidate(update: LowRankUpdate, bank: MemoryBank, energy: float = 0.9, keep: float = 0.5) -> Consolidation:
    """Refines a task's update against the bank, then remembers its denoised form there.

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
    result, _ = _refine(update, bank, energy, keep)
    bank.add(result.coordinates)
    return result


def consolidate_into(
    long_term: LowRankUpdate | None,
    update: LowRankUpdate,
    bank: MemoryBank,
    energy: float = 0.9,
    keep: float = 0.5,
    rank_cap: int = 64,
) -> tuple[Consolidation, LowRankUpdate, float]:
    """Does what `consolidate` and `integrate` do; with a capped bank, without factoring anything wider than its bases.

    Args:
        long_term: the sum of all refined updates so far, None before the first.
        update: as in `consolidate`.
        bank: history of that weight; gains one entry. A capped bank always holds the long-term memory's directions.
        energy: as in `consolidate`.
        keep: as in `consolidate`.
        rank_cap: as in `integrate`; at most the bank's cap.

    Returns:
        The consolidation, the new long-term memory with balanced factors, and the share of its energy that the rank cap
        cut off.
    """
    if bank.cap is not None and not 1 <= rank_cap <= bank.cap:
        raise ValueError(f"the rank cap must lie within 1 and the bank's cap of {bank.cap} directions, not {rank_cap}")
    result, total = _refine(update, bank, energy, keep)
    where = result.coordinates
    if bank.cap is None:
        memory, discarded = integrate(long_term, result.refined, rank_cap)
        bank.add(where)
        return result, memory, discarded
    if long_term is not None:
        left, right = long_term.left.to(where.left.dtype), long_term.right.to(where.right.dtype)
        core = (where.left.T @ left).double() @ (right @ where.right).double()
        whole = float(((left.T @ left).double() * (right @ right.T).double()).sum())
        if float(core.norm()) < _HELD * math.sqrt(max(whole, 0.0)):
            raise ValueError("the long-term memory does not lie in the bank's bases: they belong to different runs")
        total = total + core
    U, values, Vh = torch.linalg.svd(total, full_matrices=False)
    k = min(rank_cap, numerical_rank(values, (len(where.left), len(where.right))))
    left, right = bank.add(where, held=(U[:, :k], Vh[:k].T))
    root = values[:k].sqrt().to(left.dtype)
    return result, LowRankUpdate(left * root, (right * root).T), 1.0 - energy_share(values, k)


def _refine(update: LowRankUpdate, bank: MemoryBank, energy: float, keep: float) -> tuple[Consolidation, Tensor]:
    """Returns the consolidation and the refined update's core (p, p'); the bank does not change."""
    check_share("keep", keep)
    denoised, energy_kept = update.denoise(energy)
    coordinates = bank.coordinates(denoised)
    _, part, projected_energy = coordinates.project()
    refined = coordinates.core - (1.0 - keep) * part
    norm = float(refined.norm())
    return Consolidation(denoised, energy_kept, projected_energy, norm, part, coordinates, keep), refined


def consolidate_factors(
    delta_left: Tensor,
    delta_right: Tensor,
    left_bank: MemoryBank,
    right_bank: MemoryBank,
    energy: float = 0.9,
    keep: float = 0.5,
) -> tuple[Consolidation, Consolidation]:
    """Consolidates the changes of LoRA's two factors as if each were a weight of its own.

    Not invariant to (B G, G^-1 A), which is the same model with other factors, and without a bound on what the product
    loses.

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
    """Adds a refined update to long-term memory: LM_t = LM_(t-1) + RSM, at rank `rank_cap` at most.

    Args:
        long_term: the sum of all refined updates so far, None before the first.
        refined: this task's refined update.
        rank_cap: highest rank of the result; the nearest such matrix is taken.

    Returns:
        The new long-term memory, its factors balanced, and the share of its energy that the cap cut off.

    Raises:
        ValueError: shapes differ, or `rank_cap` is below 1.
    """
    total = refined if long_term is None else long_term + refined
    return total.truncate_rank(rank_cap)


def for_each_weight(work: Callable[[Item], Result], weights: Sequence[Item]) -> list[Result]:
    """Returns `work` of every item, in order, as many at a time as torch has threads.

    Decompositions of small matrices use one processor whatever torch is told, so the others would wait. Every item is
    computed with one thread: results do not depend on the number of processors.

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
