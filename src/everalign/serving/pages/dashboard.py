"""`/dashboard`: what is in service, how requests end, what feedback waits, and what the corrector's run has learned."""

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
from everalign.reporting.sampling_error import Errors, is_chance
from everalign.serving.gateway import Gateway
from everalign.serving.pages.base import Pages

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
    verdicts = {one.id: one.manifest.gate for one in run.all_versions}
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


_OUTCOMES = ("applied", "unchanged", "skipped", "failed")
_CIRCUITS = {
    "closed": "works",
    "open": "failed again and again, and is left alone for a while",
    "half-open": "failed again and again, and is tried once more",
}


def dashboard_routes(gateway: Gateway, pages: Pages, run: Path | None) -> APIRouter:
    """Return the route.

    Args:
        gateway: that is shown.
        pages: makes the page.
        run: that the corrector comes from; None where it comes from none.
    """
    router, since = APIRouter(include_in_schema=False), datetime.now(timezone.utc)

    @router.get("/dashboard")
    async def dashboard(request: Request) -> Response:
        values = {
            "since": since.strftime("%Y-%m-%d %H:%M"),
            **_service(gateway),
            **_requests(gateway),
            "feedback": await _feedback(gateway),
            "run": await asyncio.to_thread(_run, run, gateway.corrections.version),
        }
        return pages.page(request, "dashboard.html.j2", values)

    return router


def _service(gateway: Gateway) -> dict[str, Any]:
    circuits = gateway.circuits()
    if not gateway.has_corrector:
        del circuits["corrector"]
    return {
        "version": _in_service(gateway),
        "template": gateway.corrections.template,
        "mode": gateway.parser.mode,
        "in_flight": gateway.limiter.in_flight,
        "waiting": gateway.corrections.depth,
        "circuits": [(name.replace(":", " "), state, _CIRCUITS[state]) for name, state in circuits.items()],
    }


def _in_service(gateway: Gateway) -> str | None:
    """What corrects, in words; None where nothing ever did."""
    corrections = gateway.corrections
    return f"none ({corrections.version}, the base model, is current)" if corrections.withdrawn else corrections.version


def _requests(gateway: Gateway) -> dict[str, Any]:
    rows = sorted(gateway.metrics.outcomes(), key=lambda row: (_OUTCOMES.index(row[1]), -row[3]))
    totals: Counter[str] = Counter()
    for _, outcome, _, number in rows:
        totals[outcome] += number
    return {"outcomes": [(name, totals[name]) for name in _OUTCOMES], "request_rows": rows}


async def _feedback(gateway: Gateway) -> dict[str, Any]:
    """The store's counts, or why there are none."""
    if gateway.store is None:
        return {"stats": None, "trouble": "Feedback is off: the gateway has no store. Give it one with serve --store."}
    try:
        return {"stats": await gateway.store.stats(), "trouble": None}
    except (EveralignError, OSError, RuntimeError) as error:
        # Its name alone: a database's message may tell where it is, and who as.
        return {"stats": None, "trouble": f"The store cannot be read ({type(error).__name__}); the log says more."}


def _run(path: Path | None, served: str | None) -> dict[str, Any]:
    """What a run has learned, or why nothing is known of it; blocks while its files are read."""
    if path is None:
        text = "The corrector in service is not from a run, so its versions are not known here. Serve a run's folder"
        return {"name": None, "trouble": f"{text} (serve --corrector RUN) to see them."}
    from everalign.learning.run_data import load_run
    from everalign.reporting.sampling_error import error_matrix

    try:
        run = load_run(path)
    except (EveralignError, OSError) as error:
        return {"name": path.name, "trouble": f"The run cannot be read: {error}"}
    scores = run.scores()
    low, high = heat_limits(scores)
    return {
        "name": path.resolve().name,
        "trouble": None,
        "method": run.facts.method.name,
        "versions": version_views(run, served),
        "tasks": scores.tasks,
        "heat": heat_rows(scores)
        if any(s is not None for row in (scores.zero_shot, *scores.matrix) for s in row)
        else [],
        "low": share(low),
        "high": share(high),
        "forgetting": forgetting_views(scores, error_matrix(run)),
    }
