"""LifeAlign: replay, and short-to-long memory consolidation of every task's update (arXiv 2509.17183, §3.3).

Focalized Preference Optimization, its other half, is the objective `fpo`.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import Tensor

from everalign.errors import InputError
from everalign.memory import (
    Consolidation,
    LowRankUpdate,
    MemoryBank,
    SharedBasisBank,
    consolidate_factors,
    consolidate_into,
    for_each_weight,
)
from everalign.methods.base import ModuleRecord, Task
from everalign.methods.replay import ExperienceReplay
from everalign.modeling.policy import Policy

Space = Literal["product", "factors"]
Bank = MemoryBank | SharedBasisBank
_RANK_CAP = 64
# Directions of the bank's bases to one of the long-term memory: it is held whole, and as much again of the history.
_BANK_TO_MEMORY = 2


class LifeAlign(ExperienceReplay):
    """Denoise a task's update, damp what lies in the span of earlier updates, add it to long-term memory (SLMC).

    Args:
        gamma: focusing exponent for the objective `fpo`; None leaves it at the objective's own 2.
        energy: θ, share of the update's energy that denoising keeps at least.
        keep: λ, share that is kept of the component inside the span of earlier updates; 1 keeps all of it.
        space: `product` consolidates the update B·A itself (a frozen long-term adapter and a fresh short-term one per
            task); `factors` treats B and A as separate matrices of one adapter, as the paper is written.
        rank_cap: highest rank of the long-term adapter, in `product` space.
        replay: share of a task's rows, drawn at random after training, that goes into the buffer.
        capacity: most rows the buffer holds; the oldest leave first.
    """

    name = "lifealign"
    consolidates = True

    def __init__(
        self,
        gamma: float | None = None,
        energy: float = 0.9,
        keep: float = 0.5,
        space: Space = "product",
        rank_cap: int = _RANK_CAP,
        replay: float = 0.2,
        capacity: int = 3000,
    ) -> None:
        super().__init__(replay, capacity)
        for label, value in (("energy", energy), ("keep", keep)):
            if not 0.0 <= value <= 1.0:
                raise InputError(f"{label} is a share between 0 and 1, found {value}")
        if space not in ("product", "factors"):
            raise InputError(f"space is 'product' or 'factors', found {space!r}")
        if rank_cap < 1:
            raise InputError(f"rank_cap is a rank of at least 1, found {rank_cap}")
        if space == "factors" and rank_cap != _RANK_CAP:
            raise InputError("rank_cap means nothing in the space 'factors', where the adapter keeps its rank")
        if gamma is not None and not (math.isfinite(gamma) and gamma >= 0):
            raise InputError(f"gamma is a number of at least 0, found {gamma}")
        self.gamma, self.energy, self.keep, self.space, self.rank_cap = gamma, energy, keep, space, rank_cap
        self.long_term = space == "product"
        self._banks: dict[str, Bank] = defaultdict(self.new_bank)
        self._start: dict[str, tuple[Tensor, Tensor]] = {}

    def settings(self) -> dict[str, Any]:
        """Return all arguments."""
        own = {"energy": self.energy, "keep": self.keep, "space": self.space, "rank_cap": self.rank_cap}
        return {**own, **super().settings()}

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Give the task a fresh short-term adapter (or note where the one adapter starts)."""
        if self.space == "product":
            policy.start_short_term(task.seed)
        else:
            self._start = policy.factors()

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Consolidate every module's update and fill the replay buffer."""
        super().end_task(policy, task)
        return self._end_product(policy, task) if self.space == "product" else self._end_factors(policy)

    def new_bank(self) -> Bank:
        """Return an empty history of one weight."""
        return SharedBasisBank(_BANK_TO_MEMORY * self.rank_cap) if self.space == "product" else MemoryBank()

    def _end_product(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        long_term, updates = policy.long_term(), policy.short_term()
        # Asked for in advance: the dictionary of banks is not to be written by several threads.
        work = [(module, update, long_term.get(module), self._banks[module]) for module, update in updates.items()]
        results = for_each_weight(lambda arguments: self._consolidate(*arguments), work)
        long_term.update({module: memory for module, (memory, _) in zip(updates, results, strict=True)})
        policy.write_long_term(long_term)
        policy.start_short_term(task.seed)
        return [record for _, record in results]

    def refine(
        self, memory: LowRankUpdate | None, update: LowRankUpdate, bank: Any
    ) -> tuple[Consolidation, LowRankUpdate, float]:
        """Consolidate one module's update into its long-term memory; the bank remembers it.

        Returns what `consolidate_into` does: what became of the update, the new memory, the energy discarded.
        """
        return consolidate_into(memory, update, bank, self.energy, self.keep, self.rank_cap)

    def _consolidate(
        self, module: str, update: LowRankUpdate, memory: LowRankUpdate | None, bank: Bank
    ) -> tuple[LowRankUpdate, ModuleRecord]:
        result, merged, discarded = self.refine(memory, update, bank)
        record = ModuleRecord(
            module=module,
            energy_kept=result.energy_kept,
            rank=result.rank,
            projected_energy=result.projected_energy,
            norm_before=update.norm(),
            norm_after=result.norm,
            memory_rank=merged.width,
            discarded_energy=discarded,
            bank_lost_energy=bank.lost_energy,
        )
        return merged, record

    def _end_factors(self, policy: Policy) -> list[ModuleRecord]:
        factors, records = {}, []
        for module, (left, right) in policy.factors().items():
            start_left, start_right = self._start[module]
            left_bank, right_bank = (cast(MemoryBank, self._banks[f"{module}.{side}"]) for side in "BA")
            deltas = (left - start_left, right - start_right)
            results = consolidate_factors(*deltas, left_bank, right_bank, self.energy, self.keep)
            factors[module] = (
                start_left + results[0].refined.dense(),
                start_right + results[1].refined.dense(),
            )
            for side, delta, result in zip("BA", deltas, results, strict=True):
                records.append(
                    ModuleRecord(
                        module=f"{module}.{side}",
                        energy_kept=result.energy_kept,
                        rank=result.rank,
                        projected_energy=result.projected_energy,
                        norm_before=float(delta.norm()),
                        norm_after=result.norm,
                        memory_rank=left.shape[1],
                        discarded_energy=0.0,
                        bank_lost_energy=0.0,
                    )
                )
        policy.write_factors(factors)
        return records

    def state_dict(self) -> dict[str, Tensor]:
        """Return the banks' entries by module."""
        return {
            f"{module}/{key}": tensor
            for module, bank in self._banks.items()
            for key, tensor in bank.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the banks."""
        by_module: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in state.items():
            module, name = key.rsplit("/", 1)
            by_module[module][name] = tensor
        self._banks.clear()
        for module, entries in by_module.items():
            self._banks[module].load_state_dict(entries)
