"""Elastic weight consolidation: a quadratic pull to the weights after earlier tasks, by how much those mattered."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from everalign.distributed import add_up
from everalign.errors import InputError
from everalign.methods.base import Method, ModuleRecord, Task, check_share, check_strength
from everalign.modeling.policy import Policy
from everalign.training.hooks import RowTerms, Stage, parameters


class ElasticWeightConsolidation(Method):
    """EWC (arXiv 1612.00796): adds strength/2 · Σ F·(θ − θ*)² to the loss, for the adapter's entries θ.

    θ* are the weights at the end of an earlier task, F the diagonal of the empirical Fisher information there: the
    mean over rows of the squared gradient of each row's own loss in the task's last stage. F is divided by its mean, so
    that a strength means the same for every model and loss. Entries of B and A are taken one by one, so that F depends
    on how their product is written.

    Args:
        strength: λ.
        online: keep one F and one θ*, F ← decay·F + F_new (arXiv 1801.10112), instead of one of each for each task.
        decay: ρ, of the online form.
        fisher_rows: most rows that F is computed on, evenly spaced over the task's own.
    """

    name = "ewc"

    def __init__(
        self, strength: float = 1.0, online: bool = True, decay: float | None = None, fisher_rows: int = 200
    ) -> None:
        check_strength("strength", strength)
        if decay is not None:
            check_share("decay", decay)
            if not online:
                raise InputError("decay is of the online form: leave it out, or set online", field="decay")
        if fisher_rows < 1:
            raise InputError(f"fisher_rows is a number of at least 1, found {fisher_rows}", field="fisher_rows")
        self.strength, self.online, self.fisher_rows = strength, online, fisher_rows
        self.decay = 1.0 if decay is None else decay
        self.watches_stages = strength > 0
        self._tasks: list[tuple[list[Tensor], list[Tensor]]] = []  # of each term: F and θ*, by parameter
        self._last: list[Tensor] = []

    def settings(self) -> dict[str, Any]:
        """Returns the arguments."""
        decay = {"decay": self.decay} if self.online else {}
        return {"strength": self.strength, "online": self.online, **decay, "fisher_rows": self.fisher_rows}

    def penalty(self, policy: Policy) -> Tensor | None:
        """Returns the pull to the weights after earlier tasks."""
        if not self._tasks or not self.strength:
            return None
        learned = parameters(policy)
        terms = [
            (weight.to(value) * (value - start.to(value)).square()).sum()
            for fisher, weights in self._tasks
            for value, weight, start in zip(learned, fisher, weights, strict=True)
        ]
        return self.strength / 2 * torch.stack(terms).sum()

    def begin_stage(self, stage: Stage) -> RowTerms | None:
        """Forgets the Fisher information of the stage before."""
        self._last = []
        return None

    def end_stage(self, stage: Stage) -> None:
        """Computes the Fisher information of the task's own rows."""
        if self.strength:
            step = max(1, -(-stage.own // self.fisher_rows))
            self._last = fisher_diagonal(stage, range(0, stage.own, step))

    def stage_state(self) -> dict[str, Tensor]:
        """Returns the stage's Fisher information."""
        return {f"fisher/{number}": value.cpu() for number, value in enumerate(self._last)}

    def load_stage_state(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restores it."""
        self._last = [state[f"fisher/{number}"] for number in range(len(state))]

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Keeps the last stage's Fisher information and the weights."""
        if self._last:
            fisher, weights = self._last, [value.detach().cpu().clone() for value in parameters(policy)]
            if self.online and self._tasks:
                before = self._tasks.pop()[0]
                fisher = [self.decay * old + new.to(old) for old, new in zip(before, fisher, strict=True)]
            self._tasks.append(([value.cpu() for value in fisher], weights))
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """Returns F and θ* of each term."""
        return {
            f"{name}/{term}/{number}": value
            for term, pair in enumerate(self._tasks)
            for name, values in zip(("fisher", "weights"), pair, strict=True)
            for number, value in enumerate(values)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores them."""
        found: dict[int, dict[str, dict[int, Tensor]]] = {}
        for key, value in state.items():
            name, term, number = key.split("/")
            found.setdefault(int(term), {}).setdefault(name, {})[int(number)] = value
        self._tasks = [
            ([of["fisher"][i] for i in sorted(of["fisher"])], [of["weights"][i] for i in sorted(of["weights"])])
            for _, of in sorted(found.items())
        ]


def fisher_diagonal(stage: Stage, numbers: range) -> list[Tensor]:
    """Return the mean over rows of each row's squared gradient, divided by its mean over all entries.

    Args:
        stage: its objective's loss is differentiated, at the policy's current weights.
        numbers: rows of the stage, one backward pass each: the square of a batch's mean gradient is another thing.
    """

    def squares(own: Sequence[int]) -> list[Tensor]:
        sums = [torch.zeros_like(value) for value in parameters(stage.policy)]
        for number in own:
            for total, gradient in zip(sums, stage.gradient([number]), strict=True):
                total += gradient.square()
        return sums

    sums = add_up(squares, numbers)
    mean = torch.cat([total.flatten() for total in sums]).mean()
    return [total / mean.clamp(min=torch.finfo(total.dtype).tiny) for total in sums]
