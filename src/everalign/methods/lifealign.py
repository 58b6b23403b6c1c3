"""LifeAlign: replay with a review of all tasks, and the paper's consolidation of updates (arXiv 2509.17183, §3.3).

Focalized Preference Optimization, its other half, is the objective `fpo`. Two further choices say how much of a task's
update is added to long-term memory: an average over its steps, and a fitted step length.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from everalign.data.replay import AnyRow
from everalign.distributed import on_main, rank
from everalign.errors import InputError
from everalign.memory import (
    Consolidation,
    LowRankUpdate,
    MemoryBank,
    consolidate_factors,
    consolidate_into,
    for_each_weight,
)
from everalign.methods.base import ModuleRecord, Task, check_share, check_strength
from everalign.methods.baselines import ExperienceReplay
from everalign.methods.table import RANK_CAP, check_space
from everalign.modeling.policy import Policy
from everalign.training.hooks import RowTerms, Stage, parameters

STEPS = (0.4, 0.6, 0.8, 1.0, 1.2)


class AdapterAverage:
    """An exponential moving average of what learns, over a stage's steps.

    After t steps the decay is min(decay, (1 + t) / (10 + t)), so that the start of training is soon forgotten.

    Args:
        decay: at least 0 and below 1; 0 for no average.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.reset()

    def reset(self) -> None:
        """Forget everything, for a new stage."""
        self._values: list[Tensor] = []
        self._steps = 0

    def update(self, policy: Policy) -> None:
        """Take the policy after one more step into the average."""
        if not self.decay:
            return
        now = [parameter.detach() for parameter in parameters(policy)]
        if not self._values:
            self._values = [value.clone() for value in now]
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
        for average, value in zip(self._values, now, strict=True):
            average.lerp_(value.to(average), 1 - decay)
        self._steps += 1

    def apply(self, policy: Policy) -> None:
        """Overwrite what learns by the average, if there is one."""
        if self._values:
            with torch.no_grad():
                for parameter, average in zip(parameters(policy), self._values, strict=True):
                    parameter.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average, on the CPU."""
        found = {f"average/{number}": value.cpu() for number, value in enumerate(self._values)}
        return {**found, "average/steps": torch.tensor(self._steps)} if found else {}

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` returned, on the policy's device."""
        self.reset()
        if "average/steps" in state:
            self._steps = int(state["average/steps"])
            like = parameters(policy)
            self._values = [state[f"average/{number}"].to(value) for number, value in enumerate(like)]


def fit_step(stage: Stage, groups: Sequence[Sequence[int]], steps: Sequence[float] = STEPS) -> float:
    """Scale the short-term update by the step whose loss, a mean over groups of rows, is lowest; return that step.

    Args:
        stage: the task's last; its policy is changed in place.
        groups: rows of the stage, one group a task; an empty one does not count.
        steps: what is tried. Of steps that are equally good the one nearest to 1 is taken.
    """
    groups = [group for group in groups if group]
    if not groups:
        return 1.0
    policy = stage.policy
    trained = policy.factors()

    def scale(step: float) -> None:
        policy.write_factors({name: (left * step, right) for name, (left, right) in trained.items()})

    losses = {}
    for step in sorted(steps, key=lambda step: abs(step - 1)):
        scale(step)
        losses[step] = sum(stage.loss(group) for group in groups) / len(groups)
    best = min(losses, key=lambda step: losses[step])
    scale(best)
    return best


T = TypeVar("T")
Space = Literal["none", "product", "factors"]
Step = Literal["fixed", "fitted"]
_ENERGY, _KEEP = 0.9, 0.5
_REVIEW = 0.3
# Below this a tenth is too few rows to choose a step on.
_FEWEST_TO_HOLD_BACK = 40
# Directions of the bank's bases for each of the long-term memory's, which takes half of them: the rest is history.
_BANK_TO_MEMORY = 2


class LifeAlign(ExperienceReplay):
    """Learns each task beside replayed rows and ends it with a review of all tasks, or consolidates its update.

    By default one adapter goes on from task to task, and the last steps of a task, its review, consolidate what all
    tasks have taught. The paper's short-to-long memory consolidation (SLMC) denoises the task's update, damps what lies
    in the span of earlier updates, and adds it to long-term memory: `space` turns it on. Which is better was measured:
    see bench/results/methods.md.

    Args:
        gamma: focusing exponent for the objective `fpo`; None for the objective's own 2.
        energy: θ, least share of the update's energy that denoising keeps; None for 0.9.
        keep: λ, share that is kept of the component inside the span of earlier updates; 1 keeps all of it, None is 0.5.
        space: where updates are consolidated. `none`: not at all. `product`: the update B·A itself, with a frozen
            long-term adapter and a fresh short-term one for each task. `factors`: B and A as separate matrices of one
            adapter, as the paper is written. Only these two have energy, keep, rank_cap, average and step.
        rank_cap: highest rank of the long-term adapter, in `product` space; None for 64.
        average: decay of an average of the short-term adapter over the task's steps, which takes its place at the end;
            0 for none. It rises to this value from 0.1, as (1 + t) / (10 + t) after t steps.
        step: `fixed` adds the consolidated update as it is; `fitted` first multiplies the task's update by the number
            among 0.4, 0.6, 0.8, 1 and 1.2 whose mean loss is lowest over the tasks, with every task's rows in the
            buffer and a tenth of the new task's rows, which is then not trained on; of fewer than 40 rows none is held
            back, and the update is added as it is.
        replay: share of a task's rows that goes into the buffer, drawn at random after training.
        capacity: most rows in the buffer; the oldest are dropped first.
        anchors: strength of the pull of replayed answers back to the log-probabilities that they had; 0 for none.
        review: share of a stage's steps, its last ones, in which all tasks so far are seen equally often; 0 for none.
            None for 0.3 where rows are replayed and nothing is consolidated, and 0 elsewhere.
    """

    name = "lifealign"

    def __init__(
        self,
        gamma: float | None = None,
        energy: float | None = None,
        keep: float | None = None,
        space: Space = "none",
        rank_cap: int | None = None,
        average: float = 0.0,
        step: Step = "fixed",
        replay: float = 0.2,
        capacity: int = 3000,
        anchors: float = 0.0,
        review: float | None = None,
    ) -> None:
        if review is None:
            review = _REVIEW if replay and space == "none" else 0.0
        super().__init__(replay, capacity, anchors, review)
        # Given at their defaults they are refused too, where they would do nothing.
        given = {"energy": energy, "keep": keep, "rank_cap": rank_cap, "average": average, "step": step}
        energy, keep = _ENERGY if energy is None else energy, _KEEP if keep is None else keep
        rank_cap = RANK_CAP if rank_cap is None else rank_cap
        for label, value in (("energy", energy), ("keep", keep)):
            check_share(label, value)
        if rank_cap < 1:
            raise InputError(f"rank_cap is a rank of at least 1, found {rank_cap}", field="rank_cap")
        if not 0.0 <= average < 1.0:
            raise InputError(f"average is a decay of at least 0 and below 1, found {average}", field="average")
        if step not in ("fixed", "fitted"):
            raise InputError(f"step is 'fixed' or 'fitted', found {step!r}", field="step")
        check_space(space, given)
        if gamma is not None:
            check_strength("gamma", gamma)
        self.gamma, self.energy, self.keep, self.space, self.rank_cap = gamma, energy, keep, space, rank_cap
        self.step, self._average = step, AdapterAverage(average)
        self.long_term, self.consolidates = space == "product", space != "none"
        self.watches_stages = self.watches_stages or step == "fitted"
        self._banks: dict[str, MemoryBank] = defaultdict(self.new_bank)
        self._start: dict[str, tuple[Tensor, Tensor]] = {}

    def settings(self) -> dict[str, Any]:
        """Returns all arguments that do something but gamma, which belongs to the objective."""
        if self.space == "none":
            return {"space": "none", **super().settings(), "review": self._review}
        own: dict[str, Any] = {"energy": self.energy, "keep": self.keep, "space": self.space, "rank_cap": self.rank_cap}
        # Recorded only where they do something.
        own |= {"average": self._average.decay} if self._average.decay else {}
        own |= {"step": self.step} if self.step != "fixed" else {}
        return {**own, **super().settings()}

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Gives the task a fresh short-term adapter (`product`), or notes where the one adapter starts (`factors`)."""
        if self.space == "product":
            policy.start_short_term(task.seed)
        elif self.space == "factors":
            self._start = policy.factors()

    def own_rows(self, task: Task) -> Sequence[AnyRow]:
        """Returns all rows but those that the step is fitted on."""
        held_back = set(self._held_back(task))
        return [row for place, row in enumerate(task.rows) if place not in held_back] if held_back else task.rows

    def apart(self, task: Task) -> list[AnyRow]:
        """Returns the rows of the task that the step is fitted on."""
        return [task.rows[place] for place in self._held_back(task)]

    def _held_back(self, task: Task) -> list[int]:
        if self.step == "fixed" or len(task.rows) < _FEWEST_TO_HOLD_BACK:
            return []
        return random.Random(f"{task.seed}/{task.name}/held back").sample(range(len(task.rows)), len(task.rows) // 10)

    def begin_stage(self, stage: Stage) -> RowTerms | None:
        """Returns the replayed rows' anchors."""
        self._average.reset()
        return super().begin_stage(stage)

    def after_step(self, policy: Policy) -> None:
        """Takes the short-term adapter into its average."""
        self._average.update(policy)

    def end_stage(self, stage: Stage) -> None:
        """Puts the average in the adapter's place."""
        self._average.apply(stage.policy)

    def stage_state(self) -> dict[str, Tensor]:
        """Returns the average."""
        return self._average.state_dict()

    def load_stage_state(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restores the average."""
        self._average.load_state_dict(state, policy)

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Consolidates every module's update, if at all, fills the replay buffer, and notes its anchors."""
        stage = self._stage
        # Rows of earlier tasks alone would choose the shortest step.
        if self.step == "fitted" and stage is not None and len(stage.rows) > stage.learned:
            fit_step(stage, [*self.replayed_groups(stage), range(stage.learned, len(stage.rows))])
        records: list[ModuleRecord] = []
        if self.space == "product":
            records = self._end_product(policy, task)
        elif self.space == "factors":
            factors, records = self._once(lambda: self._consolidated_factors(policy))
            policy.write_factors(factors)
        super().end_task(policy, task)
        return records

    def new_bank(self) -> MemoryBank:
        """Returns an empty history of one weight."""
        return MemoryBank(_BANK_TO_MEMORY * self.rank_cap if self.space == "product" else None)

    def refine(
        self, memory: LowRankUpdate | None, update: LowRankUpdate, bank: MemoryBank
    ) -> tuple[Consolidation, LowRankUpdate, float]:
        """Consolidates one module's update into its long-term memory and the bank; returns as `consolidate_into`."""
        return consolidate_into(memory, update, bank, self.energy, self.keep, self.rank_cap)

    def _end_product(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        long_term, updates = policy.long_term(), policy.short_term()

        def consolidated(module: str) -> tuple[LowRankUpdate, ModuleRecord]:
            bank, update = self._banks[module], updates[module]
            result, memory, discarded = self.refine(long_term.get(module), update, bank)
            lost = bank.lost_energy
            return memory, _record(module, result, update.norm(), memory.width, discarded, lost)

        for module in updates:  # before the threads start, which must not write the dictionary of banks
            _ = self._banks[module]
        results = self._once(lambda: for_each_weight(consolidated, list(updates)))
        long_term.update({module: memory for module, (memory, _) in zip(updates, results, strict=True)})
        policy.write_long_term(long_term)
        policy.start_short_term(task.seed)
        return [record for _, record in results]

    def _once(self, consolidate: Callable[[], T]) -> T:
        """Consolidates in the main process; all get its result and the banks: two machines' SVDs may differ."""
        result, banks = on_main(lambda: (consolidate(), dict(self._banks)))()
        if rank() > 0:
            self._banks.update(banks)
        return result

    def _consolidated_factors(self, policy: Policy) -> tuple[dict[str, tuple[Tensor, Tensor]], list[ModuleRecord]]:
        factors, records = {}, []
        for module, ends in policy.factors().items():
            start, names = self._start[module], (f"{module}.B", f"{module}.A")
            deltas = (ends[0] - start[0], ends[1] - start[1])
            banks = (self._banks[names[0]], self._banks[names[1]])
            results = consolidate_factors(*deltas, *banks, self.energy, self.keep)
            factors[module] = (start[0] + results[0].refined.dense(), start[1] + results[1].refined.dense())
            for name, delta, result in zip(names, deltas, results, strict=True):
                records.append(_record(name, result, float(delta.norm()), memory_rank=ends[0].shape[1]))
        return factors, records

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the anchors, and the banks' entries as `MODULE/NAME`."""
        banks = {
            f"{module}/{key}": tensor
            for module, bank in self._banks.items()
            for key, tensor in bank.state_dict().items()
        }
        return {**super().state_dict(), **banks}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores anchors and banks."""
        super().load_state_dict(state)
        by_module: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in state.items():
            module, slash, name = key.rpartition("/")
            if slash:
                by_module[module][name] = tensor
        self._banks.clear()
        for module, entries in by_module.items():
            self._banks[module].load_state_dict(entries)


def _record(
    module: str, result: Consolidation, norm: float, memory_rank: int, discarded: float = 0.0, bank_lost: float = 0.0
) -> ModuleRecord:
    return ModuleRecord(
        module=module,
        energy_kept=result.energy_kept,
        rank=result.rank,
        projected_energy=result.projected_energy,
        norm_before=norm,
        norm_after=result.norm,
        memory_rank=memory_rank,
        discarded_energy=discarded,
        bank_lost_energy=bank_lost,
    )
