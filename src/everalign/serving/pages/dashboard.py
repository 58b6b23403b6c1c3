"""The dashboard: the service, how requests ended, feedback to be learned, and the versions of the corrector's run."""

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from everalign.errors import EveralignError
from everalign.learning.promotion import what_fell
from everalign.learning.run_data import RunData, version_rows
from everalign.learning.scores import Scores
from everalign.reporting.formats import Errors, is_chance
from everalign.serving.gateway import Gateway
from everalign.serving.pages.base import Pages

SHADES = 10
"""Colours of the score matrix, from the lowest score to the highest."""

_UNKNOWN = "–"
_OUTCOMES = ("applied", "unchanged", "skipped", "failed")
_CIRCUITS = {
    "closed": "works",
    "open": "failed repeatedly and gets no requests for a while",
    "half-open": "failed repeatedly and is being tried again",
}


@dataclass(frozen=True)
class VersionView:
    """A row of the table of versions, as texts."""

    name: str
    task: str
    learned: str
    then: str
    now: str
    status: str
    note: str


@dataclass(frozen=True)
class HeatCell:
    """A cell of the score matrix: text, shade (None without a score), and whether its task was learned just then."""

    text: str
    shade: int | None
    own: bool


@dataclass(frozen=True)
class ForgettingView:
    """A row of the table of forgetting: a task's score when it was learned and now, the change and its direction."""

    task: str
    then: str
    now: str
    change: str
    direction: str


def version_views(run: RunData, served: str | None = None) -> list[VersionView]:
    """Return the versions, the newest first; `served` is the one in service, None if it is unknown."""
    verdicts = {one.id: one.manifest.gate for one in run.all_versions}
    found = []
    for row in version_rows(run):
        verdict = verdicts[row["version"]]
        note = "" if verdict is None or verdict.promoted else what_fell(verdict)
        status = row["status"] or "in the line"
        if served is not None and (row["version"] == served or row["promoted"]):
            status += ", in service" if row["version"] == served else ", not in service yet"
        learned = row["created"][:16].replace("T", " ")
        found.append(
            VersionView(row["version"], row["task"], learned, share(row["then"]), share(row["now"]), status, note)
        )
    return found[::-1]


def heat_rows(scores: Scores) -> list[tuple[str, list[HeatCell]]]:
    """Return the base model's scores and then the score matrix; scores that were not measured are empty."""
    low, high = heat_limits(scores)

    def shade(score: float | None) -> int | None:
        if score is None:
            return None
        return SHADES - 1 if high == low else min(SHADES - 1, int((score - low) / (high - low) * SHADES))

    rows = [("nothing", -1, scores.zero_shot)]
    rows += [(task, i, row) for i, (task, row) in enumerate(zip(scores.learned, scores.matrix, strict=True))]
    return [
        (name, [HeatCell(share(score), shade(score), i == j) for j, score in enumerate(row)]) for name, i, row in rows
    ]


def heat_limits(scores: Scores) -> tuple[float, float]:
    """Return the lowest and the highest score; 0 and 1 if there are none."""
    found = [score for row in (scores.zero_shot, *scores.matrix) for score in row if score is not None]
    return (min(found), max(found)) if found else (0.0, 1.0)


def forgetting_views(scores: Scores, errors: Errors | None = None) -> list[ForgettingView]:
    """Return how each task's score has changed since it was learned; tasks without scores are left out.

    A change within the scores' standard errors has no direction.
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
    """Return a share in percent, without the percent sign."""
    return _UNKNOWN if score is None else f"{100 * score:.1f}"


def dashboard_routes(gateway: Gateway, pages: Pages, run: Path | None) -> APIRouter:
    """Return the route of the dashboard; `run` is None if the corrector comes from no run."""
    router, since = APIRouter(include_in_schema=False), datetime.now(timezone.utc)

    @router.get("/dashboard")
    async def dashboard(request: Request) -> Response:
        corrections, circuits = gateway.corrections, gateway.circuits()
        if not gateway.has_corrector:
            del circuits["corrector"]
        version = corrections.version
        if corrections.withdrawn:
            version = f"none ({version}, the base model, is current)"
        rows = sorted(gateway.metrics.outcomes(), key=lambda row: (_OUTCOMES.index(row[1]), -row[3]))
        totals: Counter[str] = Counter()
        for _, outcome, _, number in rows:
            totals[outcome] += number
        stats, trouble = None, None
        if gateway.store is None:
            trouble = "Feedback is off: the gateway has no store. Give it one with serve --store."
        else:
            try:
                stats = await gateway.store.stats()
            except (EveralignError, OSError, RuntimeError) as error:
                # The type alone: a database's message may contain its address and user.
                trouble = f"The store cannot be read ({type(error).__name__}); the log says more."
        values = {
            "version": version,
            "template": corrections.template,
            "mode": gateway.parser.mode,
            "in_flight": gateway.limiter.in_flight,
            "waiting": corrections.depth,
            "circuits": [(name.replace(":", " "), state, _CIRCUITS[state]) for name, state in circuits.items()],
            "since": since.strftime("%Y-%m-%d %H:%M"),
            "outcomes": [(name, totals[name]) for name in _OUTCOMES],
            "request_rows": rows,
            "feedback": {"stats": stats, "trouble": trouble},
            "run": await asyncio.to_thread(_run_values, run, corrections.version),
        }
        return pages.page(request, "dashboard.html.j2", values)

    return router


def _run_values(path: Path | None, served: str | None) -> dict[str, Any]:
    """Return what the page shows of a run, or why it shows nothing; blocks while files are read."""
    if path is None:
        text = "The corrector in service is not from a run, so its versions are not known here. Serve a run's folder"
        return {"name": None, "trouble": f"{text} (serve --corrector RUN) to see them."}
    from everalign.learning.run_data import load_run
    from everalign.reporting.formats import error_matrix

    try:
        run = load_run(path)
    except (EveralignError, OSError) as error:
        return {"name": path.name, "trouble": f"The run cannot be read: {error}"}
    scores = run.scores()
    low, high = heat_limits(scores)
    measured = any(score is not None for row in (scores.zero_shot, *scores.matrix) for score in row)
    return {
        "name": path.resolve().name,
        "trouble": None,
        "method": run.facts.method.name,
        "versions": version_views(run, served),
        "tasks": scores.tasks,
        "heat": heat_rows(scores) if measured else [],
        "low": share(low),
        "high": share(high),
        "forgetting": forgetting_views(scores, error_matrix(run)),
    }
