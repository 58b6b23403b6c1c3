"""What a run or a comparison shows, in sentences computed from the numbers, and how far to trust them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from everalign.learning.run_data import RunData
from everalign.reporting.formats import METRICS, count
from everalign.reporting.sampling_error import WIDTH, of_last, of_transfer

_ACCURACY = METRICS["accuracy"]


def headline(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    """Which run kept more of what it had learned; for one run, how much it kept."""
    if len(runs) == 1:
        return _one_run(runs[0], labels[0])
    return " ".join(filter(None, (_who_kept_more(runs, labels), _who_ends_higher(runs, labels))))


def cautions(runs: Sequence[RunData], labels: Sequence[str]) -> list[str]:
    """Reasons to read the headline with care, each a sentence."""
    found = []
    if len({tuple(run.tasks) for run in runs}) > 1:
        found.append("The runs have different tasks, or another order of tasks.")
    if len({run.facts.model_fingerprint for run in runs}) > 1:
        found.append("The runs start from different base models.")
    if _other_test_sets(runs):
        found.append("The runs were tested on different held-out pairs.")
    for name, value, error in (
        ("What was kept", _kept, of_transfer),
        ("The final score", _last, of_last),
    ):
        found.extend(_too_close(runs, labels, name, value, error))
    for label, run in zip(labels, runs, strict=True):
        for version in run.versions:
            found += [f"{label}, {version.task}: {warning}." for warning in version.manifest.warnings]
    if len(runs) > 1:
        found.append("Each run is one seed; a claim about methods needs several.")
    return found


def _one_run(run: RunData, label: str) -> str:
    scores = run.scores()
    last, transfer, lost = scores.last, scores.backward_transfer, scores.forgetting
    if last is None:
        return f"{label}: no held-out pairs were scored, so nothing can be said about what it keeps."
    n = len(scores.learned)
    start = (
        f"After {n} {'task' if n == 1 else 'tasks'}, {label} prefers the chosen response in "
        f"{_ACCURACY.full(last)} of held-out pairs (± {_half(of_last(run))})"
    )
    if transfer is None or not lost:
        return f"{start}."
    error = of_transfer(run) or 0.0
    if abs(transfer) < WIDTH * error:
        return (
            f"{start}; whether its earlier tasks gained or lost since they were learned cannot be told from chance "
            f"with {count(_pairs(run))} pairs ({_ACCURACY.change(transfer)} ± {_half(error)} on average)."
        )
    worst = max(lost, key=lambda task: lost[task])
    detail = f" (most on {worst}: {_ACCURACY.amount(lost[worst])} below its best)" if lost[worst] > 0 else ""
    return (
        f"{start}; its earlier tasks {_moved(transfer)} (± {_half(error)}) on average since they were learned{detail}."
    )


def _who_kept_more(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    kept = {label: value for run, label in zip(runs, labels, strict=True) if (value := _kept(run)) is not None}
    if len(kept) < 2:
        return ""
    order = sorted(kept, key=lambda label: -kept[label])
    if len({_ACCURACY.change(value) for value in kept.values()}) == 1:
        return f"All runs kept equally much: their earlier tasks {_moved(kept[order[0]])} on average."
    by_label = dict(zip(labels, runs, strict=True))
    first, second = (by_label[label] for label in order[:2])
    spread = math.hypot(of_transfer(first) or 0.0, of_transfer(second) or 0.0)
    if kept[order[0]] - kept[order[1]] < WIDTH * spread:
        each = _listing([f"{label}'s {_moved(kept[label])}" for label in order])
        return f"Which run kept more cannot be told from chance: of their earlier tasks, {each} on average."
    others = _listing([f"{label}'s {_moved(kept[label])}" for label in order[1:]])
    return (
        f"{order[0]} kept more of what it had learned: its earlier tasks {_moved(kept[order[0]])} on average "
        f"since they were learned, while {others}."
    )


def _who_ends_higher(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    last = {label: value for run, label in zip(runs, labels, strict=True) if (value := _last(run)) is not None}
    if not last:
        return "No held-out pairs were scored, so nothing can be said about what was kept."
    order = sorted(last, key=lambda label: -last[label])
    listing = _listing([f"{_ACCURACY.full(last[label])} for {label}" for label in order])
    return f"At the end, the chosen response is preferred in this share of held-out pairs: {listing}."


def _moved(change: float) -> str:
    direction = _ACCURACY.direction(change)
    return f"{direction} {_ACCURACY.amount(change)}" if direction else "stayed where they were"


def _listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _kept(run: RunData) -> float | None:
    return run.scores().backward_transfer


def _last(run: RunData) -> float | None:
    return run.scores().last


def _too_close(
    runs: Sequence[RunData],
    labels: Sequence[str],
    name: str,
    value: Callable[[RunData], float | None],
    error: Callable[[RunData], float | None],
) -> list[str]:
    """A sentence if the best two runs differ by less than twice the sampling error of their difference."""
    known = [
        (number, label, run) for run, label in zip(runs, labels, strict=True) if (number := value(run)) is not None
    ]
    if len(known) < 2:
        return []
    (best, first, one), (second_best, second, two) = sorted(known, key=lambda entry: -entry[0])[:2]
    spread = math.hypot(error(one) or 0.0, error(two) or 0.0)
    if best - second_best >= WIDTH * spread:
        return []
    return [
        f"{name} differs between {first} and {second} by {_ACCURACY.amount(best - second_best)}, less than "
        f"twice the sampling error of that difference ({_ACCURACY.amount(spread)} with {count(_pairs(one))} "
        "held-out pairs): too close to call."
    ]


def _half(error: float | None) -> str:
    """Half the width of the 95 % interval."""
    return _ACCURACY.amount(WIDTH * (error or 0.0))


def _pairs(run: RunData) -> int:
    return sum(score.pairs for score in run.versions[-1].scores.values())


def _other_test_sets(runs: Sequence[RunData]) -> bool:
    """Whether a task's held-out pairs differ between two runs."""
    seen: dict[str, str] = {}
    sets = ((version.task, version.manifest.test) for run in runs for version in run.versions)
    return any(test and seen.setdefault(task, test.fingerprint) != test.fingerprint for task, test in sets)
