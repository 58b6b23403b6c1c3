"""A run as the dashboard shows it: its versions, its score matrix in colours, and what was forgotten."""

from dataclasses import dataclass

from everalign.learning.gate import what_fell
from everalign.learning.run_data import RunData
from everalign.learning.scores import Scores
from everalign.learning.version_rows import version_rows
from everalign.reporting.sampling_error import Errors, is_chance

SHADES = 10
"""Colours of the heatmap, from the lowest score to the highest."""

_STATUS = {"": "in the line"}
_UNKNOWN = "–"


@dataclass(frozen=True)
class VersionView:
    """One version: all as texts but whether its task's score rose or fell."""

    name: str
    task: str
    learned: str
    then: str
    now: str
    status: str
    note: str


@dataclass(frozen=True)
class HeatCell:
    """One score: as text, its shade (None where there is none), and whether its task was learned just then."""

    text: str
    shade: int | None
    own: bool


@dataclass(frozen=True)
class ForgettingView:
    """One task: its score when it was learned and now, the change, and which way it went."""

    task: str
    then: str
    now: str
    change: str
    direction: str


def version_views(run: RunData, served: str | None = None) -> list[VersionView]:
    """Return the versions, the newest first; `served` is the one in the gateway's service, None where it is unknown."""
    verdicts = {one.id: one.manifest.gate for one in run.everything}
    found = []
    for row in version_rows(run):
        verdict = verdicts[row["version"]]
        note = "" if verdict is None or verdict.promoted else what_fell(verdict)
        status = _STATUS.get(row["status"], row["status"])
        if served is not None and (row["version"] == served or row["promoted"]):
            status += ", in service" if row["version"] == served else ", not in service yet"
        learned = row["created"][:16].replace("T", " ")
        found.append(
            VersionView(row["version"], row["task"], learned, share(row["then"]), share(row["now"]), status, note)
        )
    return found[::-1]


def heat_rows(scores: Scores) -> list[tuple[str, list[HeatCell]]]:
    """Return the score matrix, below the base model's scores; rows and scores that were not measured are empty."""
    rows = [("nothing", -1, scores.zero_shot)]
    rows += [(task, i, row) for i, (task, row) in enumerate(zip(scores.learned, scores.matrix, strict=True))]
    low, high = heat_limits(scores)
    return [
        (name, [HeatCell(share(score), _shade(score, low, high), i == j) for j, score in enumerate(row)])
        for name, i, row in rows
    ]


def heat_limits(scores: Scores) -> tuple[float, float]:
    """Return the lowest and the highest score; 0 and 1 where there is none."""
    found = [score for row in (scores.zero_shot, *scores.matrix) for score in row if score is not None]
    return (min(found), max(found)) if found else (0.0, 1.0)


def _shade(score: float | None, low: float, high: float) -> int | None:
    if score is None:
        return None
    return SHADES - 1 if high == low else min(SHADES - 1, int((score - low) / (high - low) * SHADES))


def forgetting_views(scores: Scores, errors: Errors | None = None) -> list[ForgettingView]:
    """Return how each task's score has moved since it was learned; those without scores are left out.

    A change that may be chance by the scores' standard errors has no direction.
    """
    found = []
    for j, (task, change) in enumerate(zip(scores.learned, scores.changes, strict=True)):
        if change is None or scores.regime != "sequential" or j == len(scores.learned) - 1:
            continue
        points = f"{100 * change:+.1f}".replace("-", "−")
        points = "0.0" if points[1:] == "0.0" else points
        chance = is_chance(change, errors, len(scores.matrix) - 1, j)
        direction = "" if chance else {"+": "gained", "−": "lost"}.get(points[0], "")
        found.append(ForgettingView(task, share(scores.matrix[j][j]), share(scores.matrix[-1][j]), points, direction))
    return found


def share(score: float | None) -> str:
    """Return a share in percent, without the sign."""
    return _UNKNOWN if score is None else f"{100 * score:.1f}"
