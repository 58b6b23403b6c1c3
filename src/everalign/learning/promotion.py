"""The promotion gate, which compares held-out accuracies by their confidence intervals; promotion and rollback."""

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

from everalign.errors import GateRefusedError, InputError, NotEnoughEvidenceError
from everalign.learning.run_data import BASE, BASE_ADAPTER, BASE_MODEL, ZERO_SHOT, RunData, check_is_run, load_run
from everalign.learning.run_files import Comparison, Outcome, Verdict
from everalign.storage import differing_files, exclusive, is_partial, write_text

CONFIDENCE = 0.95
"""Of each end of a confidence interval."""

_Z = NormalDist().inv_cdf(CONFIDENCE)
# Accuracies are quotients of counts: 0.96 - 0.94 is above 0.02 in binary, and the small term gives what is meant.
_ROUNDING = 1e-9


def check_tolerance(tolerance: Any, method: str, regime: str) -> None:
    """Refuses an invalid tolerance, and a method whose versions do not build on each other.

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
    """Returns the fewest held-out rows that can show that nothing fell further, if the version differs on none."""
    return 1 if tolerance >= 1 else math.ceil(_Z**2 * (1 - tolerance) / max(tolerance, 1e-6) - _ROUNDING)


def compare_shares(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Compares outcomes on the same N rows, each 1 (right), 0 (wrong) or ½ (a tie); at least one.

    The interval is that of the score test for paired proportions (Tango, Statistics in Medicine 17, 1998): also where
    the two differ on no row, it is as wide as the number of rows leaves open.
    """
    lost = sum(max(0.0, b - a) for b, a in zip(before, after, strict=True))
    won = sum(max(0.0, a - b) for b, a in zip(before, after, strict=True))
    n = len(before)
    low, high = (_end_of_interval(lost, won, n, side) for side in (1.0, -1.0))
    return Comparison(before=fmean(before), after=fmean(after), low=low, high=high, rows=n)


def compare_values(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Compares values from 0 to 1 of the same N rows, at least two, by Student's t of their differences."""
    from scipy.stats import t

    falls = [b - a for b, a in zip(before, after, strict=True)]
    half = float(t.ppf(CONFIDENCE, len(falls) - 1)) * stdev(falls) / math.sqrt(len(falls))
    mean = fmean(falls)
    return Comparison(before=fmean(before), after=fmean(after), low=mean - half, high=mean + half, rows=len(falls))


def judge(tolerance: float, compared: Mapping[str, Comparison], unchanged: bool = False) -> Verdict:
    """Decides whether a finished task may replace the version before it.

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
    """Returns what fell, or may have fallen, in words; empty where nothing did."""
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
    """Returns a verdict in words, with a line for each comparison that a promotion rests on."""
    if verdict.outcome == "promoted":
        lines = [f"gate: promoted, nothing fell by more than {verdict.tolerance:.1%}"]
        lines += [
            f"    {name}: {one.after - one.before:+.1%}{_interval(one)}" for name, one in verdict.compared.items()
        ]
        return "\n".join(lines)
    return f"gate: {verdict.outcome}, {what_fell(verdict)}"


def refusal(version: str, verdict: Verdict, current: str) -> GateRefusedError:
    """Returns the error for a version that was not promoted; it names the one that stays current."""
    if verdict.outcome == "refused":
        message = (
            f"{version} was refused by the gate, which lets accuracies fall by {verdict.tolerance:.1%}: "
            f"{what_fell(verdict)}; {current} stays current: look at the task's rows, or raise the tolerance"
        )
        return GateRefusedError(message, version, verdict.fell)
    remedy = f"give more held-out rows (at least {rows_needed(verdict.tolerance)} of each task), or raise the tolerance"
    if verdict.unchanged:
        remedy = "raise the learning rate or the epochs"
    elif not verdict.tolerance:
        remedy = "allow a tolerance above 0: no number of held-out rows shows that nothing fell at all"
    message = (
        f"{version} is not promoted, there is not enough evidence that nothing fell by more than "
        f"{verdict.tolerance:.1%}: {what_fell(verdict)}; {current} stays current: {remedy}"
    )
    return NotEnoughEvidenceError(message, version, verdict.fell)


def _interval(one: Comparison | None) -> str:
    """A change's interval in words; nothing for a verdict without intervals, as earlier versions wrote."""
    if one is None:
        return ""
    ends = (f"{end:+.1%}".replace("-", "−") for end in (-one.high, -one.low))
    return f" (change {' to '.join(ends)} in {one.rows} rows)"


def _end_of_interval(lost: float, won: float, n: int, side: float) -> float:
    """The fall at which the score test's statistic is `side` times its limit, by bisection of [-1, 1]."""
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


LOCK = ".lock"


@dataclass(frozen=True)
class Rollback:
    """What a rollback did.

    Args:
        before: the version that was current; "000" is the base model.
        current: the one that is now.
        left_out: versions that were in the line and are no longer.
        taken_back: versions that are in the line again.
    """

    before: str
    current: str
    left_out: tuple[str, ...]
    taken_back: tuple[str, ...]


def exclusive_run(run: Path) -> AbstractContextManager[None]:
    """Context manager that keeps other processes from writing into a run; may be nested.

    Raises:
        InputError: another process writes into it, or the path is a file.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{run} is not a directory: choose another output directory")
    return exclusive(run / LOCK, "learning into this run")


def check_output(path: Path, resume: bool) -> None:
    """Refuses a folder that holds a run, unless it is to be resumed, or other files.

    A run that was killed as it began may have left files, but no run.json: they do not count.
    """
    exists = (path / "run.json").exists()
    if exists and not resume:
        raise InputError(f"{path} holds a run already: resume it, or choose another output directory")
    if exists or not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path} is not a directory: choose another output directory")
    ours = (ZERO_SHOT, LOCK, BASE_ADAPTER, BASE_MODEL)
    if any(entry.name not in ours and not is_partial(entry) for entry in path.iterdir()):
        raise InputError(f"{path} is not empty and holds no run: choose another output directory")


def promote(path: Path, version: str) -> None:
    """Makes a version, or the base model, current and deletes the checkpoints of its task."""
    write_text(path / "current", version + "\n")
    shutil.rmtree(path / "work", ignore_errors=True)


def rollback(path: Path, version: str | None = None, force: bool = False) -> Rollback:
    """Makes an earlier version of a run current, or one that was rolled back.

    Args:
        path: the run directory.
        version: its folder's name or number, "000" for the base model; the current version's parent when None.
        force: take one that the gate refused.

    Raises:
        InputError: there is no such version, it is damaged or was refused by the gate, or another process is learning
            into the run.
    """
    check_is_run(path)
    with exclusive_run(path):
        return roll_back(load_run(path), version, force)


def roll_back(run: RunData, version: str | None, force: bool) -> Rollback:
    """Does the work of `rollback` on a run whose lock is held."""
    if run.regime != "sequential":
        raise InputError(
            f"{run.path}: the versions of {run.facts.method.name} do not build on each other, so there is none to go "
            "back to: export the one you want"
        )
    if version is None:
        if not run.versions:
            raise InputError(f"{run.path}: the base model is current: there is nothing to roll back")
        target = run.versions[-2] if len(run.versions) > 1 else None
    elif version == BASE:
        target = None
    else:
        found = [one for one in run.all_versions if one.is_called(version)]
        if len(found) != 1:
            known = ", ".join([BASE, *(one.id for one in run.all_versions)])
            raise InputError(f"{run.path}: has no version {version!r}: choose one of {known}")
        target = found[0]
    if target is not None:
        check_version(run.path / "versions" / target.id, target.manifest.files)
        verdict = target.manifest.gate
        if verdict is not None and target.refused and not force:
            unsure = verdict.outcome == "not enough evidence"
            why = "was not promoted for lack of evidence" if unsure else "was refused by the gate"
            raise InputError(f"{target.id} {why} ({what_fell(verdict)}): force it, or choose another")
    current = BASE if target is None else target.id
    # First of all: the interrupted task's checkpoints go on from the version that is being left, and those of a
    # version that a kill kept from being promoted would promote it after all.
    if (run.path / "work").exists():
        shutil.rmtree(run.path / "work")
    write_text(run.path / "current", current + "\n")
    before, after = ([one.id for one in lineage] for lineage in (run.versions, load_run(run.path).versions))
    return Rollback(
        before=run.head,
        current=current,
        left_out=tuple(name for name in before if name not in after),
        taken_back=tuple(name for name in after if name not in before),
    )


def check_version(folder: Path, files: dict[str, str]) -> None:
    """Refuses a version of which a file differs from its manifest."""
    if wrong := differing_files(folder, files):
        raise InputError(f"{folder / wrong[0]}: missing or changed since it was written; restore the file")
