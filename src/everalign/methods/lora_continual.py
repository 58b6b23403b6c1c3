"""Methods that say how one task's LoRA adapter follows another: O-LoRA and SLAO."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from everalign.methods.base import Method, ModuleRecord, Task, check_strength
from everalign.modeling.policy import Policy


class OrthogonalLora(Method):
    """O-LoRA: a new adapter for each task, whose A is pulled to be orthogonal to all earlier ones (arXiv 2310.14152).

    Earlier adapters stay as they are and take part in the forward pass; the policy after t tasks is their exact sum, of
    rank t·r. To the loss is added strength · Σ ‖A_earlier A_newᵀ‖₁ + shrinkage · Σ ‖(A_new, B_new)‖₂ over modules. Only
    where the rows of the As are exactly orthogonal are the updates, too.

    Args:
        strength: λ₁, of the products' absolute values. The authors' code has 0.5.
        shrinkage: λ₂, of the norm of the new factors. The authors' code has 0.
    """

    name = "olora"
    long_term = True

    def __init__(self, strength: float = 0.5, shrinkage: float = 0.0) -> None:
        check_strength("strength", strength)
        check_strength("shrinkage", shrinkage)
        self.strength, self.shrinkage = strength, shrinkage
        self._earlier: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {"strength": self.strength, "shrinkage": self.shrinkage}

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Gives the task a fresh adapter."""
        policy.start_short_term(task.seed)
        self._earlier = {name: update.right for name, update in policy.long_term().items()}

    def penalty(self, policy: Policy) -> Tensor | None:
        """Returns the pull of the new As off the earlier ones."""
        terms = []
        for name, (left, right) in policy.learned_factors().items():
            if self.strength and name in self._earlier:
                earlier = self._earlier[name] = self._earlier[name].to(right.device)
                terms.append(self.strength * (earlier @ right.T).abs().sum())
            if self.shrinkage:
                terms.append(self.shrinkage * torch.cat([left.flatten(), right.flatten()]).norm())
        return torch.stack(terms).sum() if terms else None

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Puts the new adapter beside the earlier ones."""
        policy.write_long_term(policy.total())
        policy.start_short_term(task.seed)
        return []


class MergeBeforeForget(Method):
    """SLAO: one adapter, A replaced and B averaged after each task (arXiv 2512.23017, after a summary of it).

    A task starts from the earlier task's own B and an orthonormal basis of the rows of its A. After task i the policy
    has that task's A, and as B the average B̄ ← B̄ + (B − B̄)/√i. Stores one B beside the adapter, and no data.
    """

    name = "slao"

    def __init__(self) -> None:
        self._own: dict[str, Tensor] = {}  # the last task's own B
        self._before: dict[str, Tensor] = {}  # the average before this task

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Starts from the earlier task's own factors, A made orthonormal."""
        factors = policy.factors()
        self._before = {name: left for name, (left, _) in factors.items()} if self._own else {}
        if self._own:
            start = {name: (self._own[name], _orthonormal_rows(right)) for name, (_, right) in factors.items()}
            policy.write_factors(start)

    def end_task(self, policy: Policy, task: Task) -> list[ModuleRecord]:
        """Averages B over the tasks."""
        factors = policy.factors()
        self._own = {name: left for name, (left, _) in factors.items()}
        if self._before:
            share = 1 / sqrt(task.index)
            merged = {name: (self._before[name].lerp(left, share), right) for name, (left, right) in factors.items()}
            policy.write_factors(merged)
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the last task's own B of every module."""
        return {name: value.contiguous() for name, value in self._own.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores it."""
        self._own = dict(state)


def _orthonormal_rows(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis (r, n) of the rows of a matrix (r, n), in the order in which QR finds it."""
    basis, upper = torch.linalg.qr(matrix.double().T)
    # QR leaves each direction's sign open; that of the row itself.
    rows: Tensor = (basis * torch.where(upper.diagonal() < 0, -1.0, 1.0)).T.to(matrix)
    return rows
