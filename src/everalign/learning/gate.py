"""The gate: a finished task is promoted only where its held-out rows show that nothing fell by more than a tolerance.

    verdict = judge(0.02, {"courtesy": compare_shares(before, after)})
    verdict.outcome     # "promoted", "refused", or "not enough evidence"

What two policies make of the same rows is compared by the rows on which they differ, with an interval: a version is
promoted where the interval of every fall ends below the tolerance, and refused where one begins above it. In between,
and where there are too few rows for the tolerance to mean anything, the rows do not say which of the two is so.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

from everalign.errors import GateRefusedError, InputError, NotEnoughEvidenceError
from everalign.learning.run_files import Comparison, Outcome, Verdict

CONFIDENCE = 0.95
"""Of each end of an interval."""

_Z = NormalDist().inv_cdf(CONFIDENCE)
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


def rows_needed(tolerance: float) -> int:
    """Return the fewest held-out rows that can show that nothing fell further, if the version differs on none."""
    return 1 if tolerance >= 1 else math.ceil(_Z**2 * (1 - tolerance) / max(tolerance, 1e-6) - _ROUNDING)


def compare_shares(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Compare outcomes on the same N rows, each 1 (right), 0 (wrong) or ½ (a tie); at least one.

    The interval is that of the score test for paired proportions (Tango, Statistics in Medicine 17, 1998): also where
    the two differ on no row, it is as wide as the number of rows leaves open.
    """
    lost = sum(max(0.0, b - a) for b, a in zip(before, after, strict=True))
    won = sum(max(0.0, a - b) for b, a in zip(before, after, strict=True))
    n = len(before)
    low, high = (_end_of_interval(lost, won, n, side) for side in (1.0, -1.0))
    return Comparison(before=fmean(before), after=fmean(after), low=low, high=high, rows=n)


def compare_values(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Compare values from 0 to 1 of the same N rows, at least two, by Student's t of their differences."""
    from scipy.stats import t

    falls = [b - a for b, a in zip(before, after, strict=True)]
    half = float(t.ppf(CONFIDENCE, len(falls) - 1)) * stdev(falls) / math.sqrt(len(falls))
    mean = fmean(falls)
    return Comparison(before=fmean(before), after=fmean(after), low=mean - half, high=mean + half, rows=len(falls))


def judge(tolerance: float, compared: Mapping[str, Comparison], unchanged: bool = False) -> Verdict:
    """Say whether a finished task may take the place of what was there before.

    Args:
        tolerance: how far each may fall, a share.
        compared: the held-out accuracies of the learned tasks and the new one, by task, and whatever else counts.
        unchanged: nothing differs from what was there before, so that there is nothing to promote.
    """
    fell = {name: (one.before, one.after) for name, one in compared.items() if one.low > tolerance + _ROUNDING}
    shown = bool(compared) and all(one.high <= tolerance + _ROUNDING for one in compared.values())
    outcome: Outcome = "refused" if fell else "promoted" if shown and not unchanged else "not enough evidence"
    return Verdict(
        tolerance=tolerance,
        promoted=outcome == "promoted",
        fell=fell,
        outcome=outcome,
        compared=dict(compared),
        unchanged=unchanged,
    )


def what_fell(verdict: Verdict) -> str:
    """Return what fell, or may have fallen, in words; empty where nothing did."""
    if verdict.outcome != "not enough evidence":
        return ", ".join(
            f"{name} fell from {before:.1%} to {after:.1%}{_interval(verdict.compared.get(name))}"
            for name, (before, after) in verdict.fell.items()
        )
    if verdict.unchanged:
        return "nothing differs from the version before"
    if not verdict.compared:
        return "no task has held-out rows"
    unsure = {name: one for name, one in verdict.compared.items() if one.high > verdict.tolerance + _ROUNDING}
    return ", ".join(
        f"{name} may have fallen by {one.high:.1%}: {one.before:.1%} before, {one.after:.1%} after{_interval(one)}"
        for name, one in unsure.items()
    )


def announcement(verdict: Verdict) -> str:
    """Return one line on a verdict, with the intervals that it rests on."""
    if verdict.outcome == "promoted":
        gains = ", ".join(
            f"{name} {one.after - one.before:+.1%}{_interval(one)}" for name, one in verdict.compared.items()
        )
        return f"gate: promoted, nothing fell by more than {verdict.tolerance:.1%}: {gains}"
    return f"gate: {verdict.outcome}, {what_fell(verdict)}"


def refusal(version: str, verdict: Verdict, current: str) -> GateRefusedError:
    """Return the error that tells of a version that was not promoted, and of the one that stays current."""
    if verdict.outcome == "refused":
        message = (
            f"{version} was refused by the gate, which lets accuracies fall by {verdict.tolerance:.1%}: "
            f"{what_fell(verdict)}; {current} stays current: look at the task's rows, or raise the tolerance"
        )
        return GateRefusedError(message, version, verdict.fell)
    message = (
        f"{version} is not promoted, there is not enough evidence that nothing fell by more than "
        f"{verdict.tolerance:.1%}: {what_fell(verdict)}; {current} stays current: give more held-out rows (at least "
        f"{rows_needed(verdict.tolerance)} of each task), or raise the tolerance"
    )
    return NotEnoughEvidenceError(message, version, verdict.fell)


def _interval(one: Comparison | None) -> str:
    """Return a change's interval in words; nothing of a verdict from before there were intervals."""
    if one is None:
        return ""
    ends = (f"{end:+.1%}".replace("-", "−") for end in (-one.high, -one.low))
    return f" (change {' to '.join(ends)} in {one.rows} rows)"


def _end_of_interval(lost: float, won: float, n: int, side: float) -> float:
    """Return the fall at which the score test's statistic is `side` times its limit, by halving [-1, 1]."""
    low, high = -1.0, 1.0
    while high - low > 1e-9:
        fall = (low + high) / 2
        a, b, c = 2 * n, -lost - won + (2 * n - lost + won) * fall, -won * fall * (1 - fall)
        # The share of rows that were won, at its likeliest where the fall is this one.
        share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = n * (2 * share + fall * (1 - fall))
        distance, limit = lost - won - n * fall, side * _Z * math.sqrt(max(0.0, variance))
        # Where nothing was lost or won, both are 0 at no fall, from where each end is on its own side.
        if distance > limit or (distance == limit and side < 0):
            low = fall
        else:
            high = fall
    return (low + high) / 2
