"""O-LoRA: a new adapter for each task, pulled to be orthogonal to all earlier ones."""

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
