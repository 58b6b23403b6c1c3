"""Methods that change a step's gradient so that earlier tasks do not lose by it: GEM and OGPSA."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from random import Random
from typing import Any, ClassVar

import torch
from scipy.optimize import nnls
from torch import Tensor

from everalign.data.replay import AnyRow
from everalign.errors import InputError
from everalign.methods.base import Task, check_share, check_strength
from everalign.methods.baselines import ExperienceReplay
from everalign.modeling.policy import Policy
from everalign.training.hooks import RowTerms, Stage, parameters

# Added to the diagonal of the Gram matrix of unit gradients, so that equal ones can be told apart.
_RIDGE = 1e-9


class GradientMemory(ExperienceReplay):
    """Base of methods that compare a step's gradient with those of earlier tasks, on rows of the buffer.

    The rows are not learned. Their gradients are those of the stage's own objective at the current weights.

    Args:
        strength: what the method makes of it; its `default_strength` if not given.
        replay: share of a task's rows that goes into the buffer, drawn at random after training.
        capacity: most rows in the buffer; the oldest are dropped first.
        memory_rows: rows of each earlier task that its gradient is computed on, drawn anew for each task.
        refresh: optimiser steps after which the gradients of earlier tasks are computed again.
    """

    default_strength: ClassVar[float]
    strength_is_share: ClassVar[bool] = False

    def __init__(
        self,
        strength: float | None = None,
        replay: float = 0.2,
        capacity: int = 3000,
        memory_rows: int = 16,
        refresh: int = 5,
    ) -> None:
        super().__init__(replay, capacity)
        self.strength = self.default_strength if strength is None else strength
        (check_share if self.strength_is_share else check_strength)("strength", self.strength)
        for label, value in (("memory_rows", memory_rows), ("refresh", refresh)):
            if value < 1:
                raise InputError(f"{label} is a number of at least 1, found {value}", field=label)
        self.memory_rows, self.refresh = memory_rows, refresh
        self.watches_stages = False
        self._sizes: list[int] = []
        self._gradients: list[list[Tensor]] = []
        self._steps = 0

    def settings(self) -> dict[str, Any]:
        """Returns the arguments."""
        own = {"strength": self.strength, "memory_rows": self.memory_rows, "refresh": self.refresh}
        return {**super().settings(), **own}

    def rows(self, task: Task) -> list[AnyRow]:
        """Returns nothing: the buffer's rows are not learned."""
        return []

    def apart(self, task: Task) -> list[AnyRow]:
        """Returns some rows of each earlier task, task by task."""
        by_task: dict[str, list[AnyRow]] = {}
        kept = zip(self.buffer.names(exclude_task=task.name), self.buffer.rows(exclude_task=task.name), strict=True)
        for name, row in kept:
            by_task.setdefault(name, []).append(row)
        drawn = [
            Random(f"{task.seed}/{name}/memory").sample(rows, min(self.memory_rows, len(rows)))
            for name, rows in by_task.items()
        ]
        self._sizes = [len(rows) for rows in drawn]
        return [row for rows in drawn for row in rows]

    def begin_stage(self, stage: Stage) -> RowTerms | None:
        """Forgets the gradients of the stage before."""
        self._gradients, self._steps, self._stage = [], 0, stage
        return None

    def earlier_gradients(self) -> list[list[Tensor]]:
        """Returns each earlier task's gradient, a tensor for each parameter that learns; called once a step."""
        if self._stage is not None and self._sizes and self._steps % self.refresh == 0:
            ends = accumulate(self._sizes, initial=self._stage.learned)
            self._gradients = [self._stage.gradient(range(start, end)) for start, end in pairwise(ends)]
        self._steps += 1
        return self._gradients

    def stage_state(self) -> dict[str, Tensor]:
        """Returns the earlier tasks' gradients and when they were computed."""
        found = {
            f"gradient/{task}/{number}": value.cpu()
            for task, gradient in enumerate(self._gradients)
            for number, value in enumerate(gradient)
        }
        return {**found, "steps": torch.tensor(self._steps)}

    def load_stage_state(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restores them, on the policy's device."""
        self._steps = int(state["steps"])
        like, tasks = parameters(policy), {name.split("/")[1] for name in state if name.startswith("gradient/")}
        self._gradients = [
            [state[f"gradient/{task}/{number}"].to(value) for number, value in enumerate(like)]
            for task in range(len(tasks))
        ]


class GradientEpisodicMemory(GradientMemory):
    """GEM: the nearest gradient along which, to first order, no earlier task's loss rises (arXiv 1706.08840).

    Nothing is changed where the step's gradient g has no negative product with an earlier task's gradient. Else, with
    unit vectors of those gradients in the rows of G, g + Gᵀv takes its place, where v minimises
    ½ vᵀGGᵀv + (Gg)ᵀv under v ≥ strength·‖g‖. The original takes gradients as they are and v ≥ 0.5, which has no scale:
    gradients of preference losses differ by orders of magnitude. AdamW makes of the gradient a step along which the
    guarantee does not hold exactly.

    Args:
        strength: how far to go towards the earlier tasks where they would lose, as a share of the gradient's norm.
        replay, capacity, memory_rows, refresh: as in `GradientMemory`.
    """

    name = "gem"
    default_strength = 0.5

    def adjust_gradients(self, policy: Policy) -> None:
        """Projects the step's gradient where an earlier task would lose."""
        earlier = self.earlier_gradients()
        learned = parameters(policy)
        if not earlier:
            return
        memory = torch.stack([_flat(gradient) for gradient in earlier])
        clipped = _flat([_gradient(parameter) for parameter in learned])
        projected = gem_projection(clipped, memory, self.strength)
        # No longer than it was clipped to: shorter, it still loses for no earlier task.
        projected *= (clipped.norm() / projected.norm().clamp(min=1e-30)).clamp(max=1.0)
        sizes = [parameter.numel() for parameter in learned]
        for parameter, part in zip(learned, torch.split(projected, sizes), strict=True):
            _gradient(parameter).copy_(part.view_as(parameter))


def gem_projection(gradient: Tensor, memory: Tensor, strength: float) -> Tensor:
    """Return the gradient that GEM puts in the place of `gradient` (see `GradientEpisodicMemory`).

    Args:
        gradient: (p,).
        memory: (t, p), a gradient of each earlier task.
        strength: γ.
    """
    norms = memory.double().norm(dim=1)
    rows = memory[norms > 0]
    unit = rows / norms[norms > 0, None].to(rows)
    products = (unit @ gradient).double().cpu()
    if bool((products >= 0).all()):
        return gradient
    gram = (unit @ unit.T).double().cpu()
    gram = (gram + gram.T) / 2 + _RIDGE * torch.eye(len(gram), dtype=torch.float64)
    least = strength * float(gradient.double().norm())
    # With v = u + least the bound is u ≥ 0, and with GGᵀ = LLᵀ the objective is ½‖Lᵀu + L⁻¹q‖² up to a constant.
    root = torch.linalg.cholesky(gram)
    linear = products + least * gram.sum(dim=1)
    target = -torch.linalg.solve_triangular(root, linear[:, None], upper=False)[:, 0]
    solution, _ = nnls(root.T.numpy(), target.numpy())
    dual = torch.from_numpy(solution) + least
    projected: Tensor = gradient + dual.to(unit) @ unit
    return projected


class OrthogonalGradients(GradientMemory):
    """OGPSA: each tensor's gradient without its component in the span of earlier tasks' gradients (arXiv 2602.07892).

    Written after a summary of the paper, which keeps a few reference rows and computes their gradients again from time
    to time; here the reference rows are those of earlier tasks in the buffer.

    Args:
        strength: share of the component that is removed; 0 changes nothing.
        replay, capacity, memory_rows, refresh: as in `GradientMemory`.
    """

    name = "ogpsa"
    default_strength = 1.0
    strength_is_share = True

    def adjust_gradients(self, policy: Policy) -> None:
        """Removes what lies in the span of earlier gradients, tensor by tensor."""
        earlier = self.earlier_gradients()
        if not earlier:
            return
        for number, parameter in enumerate(parameters(policy)):
            gradient = _gradient(parameter)
            span = torch.stack([task[number].flatten() for task in earlier], dim=1).double()
            # An orthonormal basis of the span, without directions that are rounding errors.
            left, values, _ = torch.linalg.svd(span, full_matrices=False)
            basis = left[:, values > 1e-10 * values.max().clamp(min=torch.finfo(values.dtype).tiny)]
            inside = basis @ (basis.T @ gradient.flatten().double())
            gradient.sub_((self.strength * inside).to(gradient).view_as(gradient))


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])
