"""What a run or a comparison of runs shows, in sentences computed from its numbers, and how far to trust them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from everalign.learning.run_data import RunData
from everalign.reporting.formats import METRICS, WIDTH, count, of_last, of_transfer

_ACCURACY = METRICS["accuracy"]


def headline(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    """Return how much a run kept of what it had learned, or which of several kept more and which ends higher."""
    if len(runs) == 1:
        return _one_run(runs[0], labels[0])
    scores = {label: run.scores() for label, run in zip(labels, runs, strict=True)}
    last = {label: one.last for label, one in scores.items() if one.last is not None}
    if not last:
        return "No held-out pairs were scored, so nothing can be said about what was kept."
    order = sorted(last, key=lambda label: -last[label])
    listing = _listing([f"{_ACCURACY.full(last[label])} for {label}" for label in order])
    ends = f"At the end, the chosen response is preferred in this share of held-out pairs: {listing}."
    kept = {label: one.backward_transfer for label, one in scores.items() if one.backward_transfer is not None}
    return f"{_who_kept_more(kept, dict(zip(labels, runs, strict=True)))} {ends}" if len(kept) > 1 else ends


def cautions(runs: Sequence[RunData], labels: Sequence[str]) -> list[str]:
    """Return reasons to read the headline with care, each a sentence."""
    found = []
    if len({tuple(run.tasks) for run in runs}) > 1:
        found.append("The runs have different tasks, or another order of tasks.")
    if len({run.facts.model_fingerprint for run in runs}) > 1:
        found.append("The runs start from different base models.")
    tests = {(v.task, v.manifest.test.fingerprint) for run in runs for v in run.versions if v.manifest.test}
    if len(tests) > len({task for task, _ in tests}):
        found.append("The runs were tested on different held-out pairs.")
    # (value, its standard error, label, held-out pairs) of each run, by what is compared.
    compared: dict[str, list[tuple[float, float, str, int]]] = {"What was kept": [], "The final score": []}
    for run, label in zip(runs, labels, strict=True):
        scores = run.scores()
        values = ((scores.backward_transfer, of_transfer(run)), (scores.last, of_last(run)))
        for rows, (value, error) in zip(compared.values(), values, strict=True):
            if value is not None:
                rows.append((value, error or 0.0, label, _pairs(run)))
    found += filter(None, (_too_close(name, rows) for name, rows in compared.items()))
    for label, run in zip(labels, runs, strict=True):
        for version in run.versions:
            found += [f"{label}, {version.task}: {warning}." for warning in version.manifest.warnings]
    if len(runs) > 1:
        found.append("Each run is one seed; a claim about methods needs several.")
    return found


def _too_close(name: str, rows: list[tuple[float, float, str, int]]) -> str:
    """Return a sentence if the best two runs differ by less than twice the sampling error of their difference."""
    if len(rows) < 2:
        return ""
    (best, error, first, pairs), (other, other_error, second, _) = sorted(rows, key=lambda row: -row[0])[:2]
    spread = math.hypot(error, other_error)
    if best - other >= WIDTH * spread:
        return ""
    return (
        f"{name} differs between {first} and {second} by {_ACCURACY.amount(best - other)}, less than "
        f"twice the sampling error of that difference ({_ACCURACY.amount(spread)} with {count(pairs)} "
        "held-out pairs): too close to call."
    )


def _one_run(run: RunData, label: str) -> str:
    scores = run.scores()
    last, transfer, lost = scores.last, scores.backward_transfer, scores.forgetting
    if last is None and not run.versions and run.off_lineage:
        tried = ", ".join(f"{version.id} ({run.status(version)})" for version in run.off_lineage)
        return f"{label}: no version is promoted, so nothing has changed. Tried: {tried}."
    if last is None:
        return f"{label}: no held-out pairs were scored, so nothing can be said about what it keeps."
    n = len(scores.learned)
    better, rows = (
        ("correction to the answer", "rows") if run.facts.objective == "correction" else ("chosen response", "pairs")
    )
    start = (
        f"After {n} {'task' if n == 1 else 'tasks'}, {label} prefers the {better} in "
        f"{_ACCURACY.full(last)} of held-out {rows} (± {_ACCURACY.amount(WIDTH * (of_last(run) or 0.0))})"
    )
    if transfer is None or not lost:
        return f"{start}."
    error = WIDTH * (of_transfer(run) or 0.0)
    if abs(transfer) < error:
        return (
            f"{start}; whether its earlier tasks gained or lost since they were learned cannot be told from chance "
            f"with {count(_pairs(run))} pairs ({_ACCURACY.change(transfer)} ± {_ACCURACY.amount(error)} on average)."
        )
    worst = max(lost, key=lambda task: lost[task])
    detail = f" (most on {worst}: {_ACCURACY.amount(lost[worst])} below its best)" if lost[worst] > 0 else ""
    return (
        f"{start}; its earlier tasks {_moved(transfer)} (± {_ACCURACY.amount(error)}) on average "
        f"since they were learned{detail}."
    )


def _who_kept_more(kept: Mapping[str, float], runs: Mapping[str, RunData]) -> str:
    """Compare runs by their backward transfer, `kept`."""
    order = sorted(kept, key=lambda label: -kept[label])
    best, second = order[:2]
    if len({_ACCURACY.change(value) for value in kept.values()}) == 1:
        return f"All runs kept equally much: their earlier tasks {_moved(kept[best])} on average."
    each = [f"{label}'s {_moved(kept[label])}" for label in order]
    error = math.hypot(*(of_transfer(runs[label]) or 0.0 for label in (best, second)))
    if kept[best] - kept[second] < WIDTH * error:
        return f"Which run kept more cannot be told from chance: of their earlier tasks, {_listing(each)} on average."
    return (
        f"{best} kept more of what it had learned: its earlier tasks {_moved(kept[best])} on average "
        f"since they were learned, while {_listing(each[1:])}."
    )


def _moved(change: float) -> str:
    direction = _ACCURACY.direction(change)
    return f"{direction} {_ACCURACY.amount(change)}" if direction else "stayed where they were"


def _listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _pairs(run: RunData) -> int:
    return sum(score.pairs for score in run.versions[-1].scores.values()) if run.versions else 0
