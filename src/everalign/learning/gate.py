"""The gate: a finished task is promoted only where no held-out accuracy has fallen by more than a tolerance."""

import math
from collections.abc import Mapping
from typing import Any

from everalign.errors import GateRefusedError, InputError
from everalign.learning.run_files import Verdict

# Accuracies are quotients of counts: 0.96 - 0.94 is above 0.02 in binary, and the small term gives what is meant.
_ROUNDING = 1e-9


def check_tolerance(tolerance: Any, method: str, regime: str) -> None:
    """Refuse a tolerance that is none, and a method whose versions do not build on each other.

    Args:
        tolerance: how far an accuracy may fall, as a share: 0.02 for two points; None for no gate.
        method: the method's name.
        regime: how it learns its tasks.
    """
    if tolerance is None:
        return
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool) and math.isfinite(tolerance)
    if not number or not 0.0 <= tolerance <= 1.0:
        raise InputError(f"gate must be a share from 0 to 1, such as 0.02 for two points, found {tolerance!r}")
    if regime != "sequential":
        raise InputError(
            f"gate: the versions of {method} do not build on each other, so there is none to stay with: "
            "leave the gate out, or choose a method that learns task by task"
        )


def judge(tolerance: float, before: Mapping[str, float], after: Mapping[str, float]) -> Verdict:
    """Compare held-out accuracies of the same tasks before and after a task was learned.

    Args:
        tolerance: how far one may fall, a share.
        before: accuracies by task, of the learned tasks and the new one.
        after: the same, and maybe those of further tasks, which do not count.
    """
    fell = {task: (score, after[task]) for task, score in before.items() if score - after[task] > tolerance + _ROUNDING}
    return Verdict(tolerance=tolerance, promoted=not fell, fell=fell)


def what_fell(verdict: Verdict) -> str:
    """Return what fell in words; empty where nothing did."""
    return ", ".join(f"{task} fell from {before:.1%} to {after:.1%}" for task, (before, after) in verdict.fell.items())


def announcement(verdict: Verdict, compared: int) -> str:
    """Return one line on a verdict.

    Args:
        verdict: it.
        compared: the number of tasks that had held-out rows.
    """
    if not compared:
        return "gate: promoted unseen, because no task has held-out rows"
    if verdict.promoted:
        return f"gate: promoted, no held-out accuracy of {compared} fell by more than {verdict.tolerance:.1%}"
    return f"gate: refused, {what_fell(verdict)}"


def refusal(version: str, verdict: Verdict, current: str) -> GateRefusedError:
    """Return the error that tells of a refused version, and of the one that stays current."""
    message = (
        f"{version} was refused by the gate, which lets accuracies fall by {verdict.tolerance:.1%}: "
        f"{what_fell(verdict)}; {current} stays current: look at the task's rows, or raise the tolerance"
    )
    return GateRefusedError(message, version, verdict.fell)
