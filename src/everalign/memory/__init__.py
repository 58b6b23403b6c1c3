"""What a model keeps from task to task: low-rank updates, their history, and how a new one joins the old."""

from everalign.memory.bank import MemoryBank, Projection, SharedBasisBank
from everalign.memory.consolidation import (
    Consolidation,
    consolidate,
    consolidate_factors,
    consolidate_into,
    for_each_weight,
    integrate,
)
from everalign.memory.low_rank import LowRankUpdate

__all__ = [
    "Consolidation",
    "LowRankUpdate",
    "MemoryBank",
    "Projection",
    "SharedBasisBank",
    "consolidate",
    "consolidate_factors",
    "consolidate_into",
    "for_each_weight",
    "integrate",
]
