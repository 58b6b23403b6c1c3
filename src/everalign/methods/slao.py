"""SLAO: one adapter whose A follows the tasks and whose B is averaged over them."""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

from everalign.methods.base import Method, ModuleRecord, Task
from everalign.modeling.policy import Policy


class MergeBeforeForget(Method):
    """SLAO: one adapter, A replaced and B averaged after each task (arXiv 2512.23017, after a summary of it).

    A task starts from the earlier task's own B and an orthonormal basis of the rows of its A. After task i the policy
    has that task's A, and as B the average B̄ ← B̄ + (B − B̄)/√i. Stores one B beside the adapter, and no data.
    """

    name = "slao"
    starts_elsewhere = True

    def __init__(self) -> None:
        self._own: dict[str, Tensor] = {}  # the last task's own B
        self._before: dict[str, Tensor] = {}  # the average before this task

    def begin_task(self, policy: Policy, task: Task) -> None:
        """Starts from the earlier task's own factors, A made orthonormal."""
        factors = policy.factors()
        self._before = {name: left for name, (left, _) in factors.items()} if self._own else {}
        if self._own:
            start = {}
            for name, (_, right) in factors.items():
                # An orthonormal basis (n, r) of A's rows. QR leaves each direction's sign open; that of the row itself.
                basis, upper = torch.linalg.qr(right.double().T)
                basis = basis * torch.where(upper.diagonal() < 0, -1.0, 1.0)
                start[name] = self._own[name], basis.T.to(right)
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
