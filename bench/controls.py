"""Controls of continual-learning methods: each takes one idea away and leaves everything else as it is.

A recipe of `everalign bench` names them by file and class, from the root of the repository:

    contenders:
      shrink: {method: "bench/controls.py:NormMatchedShrink", objective: fpo}
      permuted: {method: {name: "bench/controls.py:PermutedAnchors", anchors: 0.01}, objective: hypo-ln}
      swapped: {method: "bench/controls.py:SwappedReplay", objective: dpo}
"""

import random
from dataclasses import replace

from everalign.data.records import Preference
from everalign.data.replay import AnyRow
from everalign.errors import InputError
from everalign.memory import Consolidation, LowRankUpdate, MemoryBank, consolidate, integrate
from everalign.methods import ExperienceReplay, LifeAlign, Task
from everalign.methods.baselines import VALUES, Anchors
from everalign.training.hooks import RowTerms, Stage


class NormMatchedShrink(LifeAlign):
    """Is it the projection? Scales the whole update to the norm that consolidation would leave, and projects nothing.

    Arguments as in `LifeAlign`, of which this is the one in the space `product`.
    """

    def __init__(self, gamma: float | None = None, energy: float = 0.9, keep: float = 0.5, replay: float = 0.2) -> None:
        super().__init__(gamma, energy, keep, "product", replay=replay)

    def new_bank(self) -> MemoryBank:
        """Return the exact bank; the long-term memory lies outside the bases of a bounded one here."""
        return MemoryBank()

    def refine(
        self, memory: LowRankUpdate | None, update: LowRankUpdate, bank: MemoryBank
    ) -> tuple[Consolidation, LowRankUpdate, float]:
        """Add the update scaled; the bank remembers what LifeAlign's would."""
        result = consolidate(update, bank, self.energy, self.keep)
        norm = update.norm()
        shrunk = update.scaled(result.norm / norm if norm > 0 else 0.0)
        return result, *integrate(memory, shrunk, self.rank_cap)


class _Permuted(Anchors):
    """Anchors in which every replayed pair has those of another one, per token."""

    def terms(self, stage: Stage) -> RowTerms | None:
        """Return the values of the replayed rows in another order, each times its new row's length."""
        found = super().terms(stage)
        if found is None:
            return None
        values = list(found.values[VALUES])
        places = [n for n in range(stage.own, stage.learned) if len(stage.rows[n].responses) == 2]
        order = places[:]
        # By the rows alone, so that a stage that was killed continues with the same anchors.
        random.Random(" ".join(stage.rows[n].id for n in places)).shuffle(order)
        for place, other in zip(places, order, strict=True):
            lengths = [[len(tokens) for tokens in stage.rows[n].responses] for n in (place, other)]
            scales = [own / its for own, its in zip(*lengths, strict=True)]
            values[place] = found.values[VALUES][other] * found.values[VALUES][other].new_tensor(scales)
        return replace(found, values={**found.values, VALUES: values})


class PermutedAnchors(ExperienceReplay):
    """Do anchors keep what was learned of each pair, or do they only hold the policy back?

    Every replayed pair is pulled to how likely, per token, the answers of another pair were.

    Args:
        replay: as in `ExperienceReplay`.
        capacity: as there.
        anchors: strength of the pull, above 0.
    """

    def __init__(self, replay: float = 0.2, capacity: int = 3000, anchors: float = 0.01) -> None:
        if anchors == 0:
            raise InputError("anchors is 0: there would be none to permute", field="anchors")
        super().__init__(replay, capacity, anchors)
        self._anchors = _Permuted(anchors)


class SwappedReplay(ExperienceReplay):
    """Does replay keep preferences, or only the kind of text? Replays every pair with its labels exchanged.

    Args:
        replay: as in `ExperienceReplay`.
        capacity: as there.
    """

    def __init__(self, replay: float = 0.2, capacity: int = 3000) -> None:
        super().__init__(replay, capacity)

    def rows(self, task: Task) -> list[AnyRow]:
        """Return the buffer's rows of other tasks with chosen and rejected exchanged."""
        return [_swapped(row) for row in super().rows(task)]


def _swapped(row: AnyRow) -> Preference:
    if not isinstance(row, Preference):
        raise InputError("SwappedReplay exchanges chosen and rejected answers: learn from preferences")
    return replace(row, chosen=row.rejected, rejected=row.chosen)
