"""Low-rank weight updates, their history over tasks, and Short-to-Long Memory Consolidation."""

from everalign.memory.bank import MemoryBank, Projection
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
    "consolidate",
    "consolidate_factors",
    "consolidate_into",
    "for_each_weight",
    "integrate",
]
