"""Pages on what is learned: the gateway's dashboard, and a page that follows a run while it trains.

The dashboard shows the service, how requests ended, feedback to be learned, and the versions of the corrector's run.
The other page is for this machine alone; it reads the run's files, so that it needs nothing of the process that trains,
and goes on where that one ends.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.middleware.trustedhost import TrustedHostMiddleware

from everalign.errors import EveralignError
from everalign.learning.promotion import what_fell
from everalign.learning.run_data import TRAINING_LOG, RunData, RunReader, version_rows
from everalign.learning.run_files import LoggedStep, read_json_lines
from everalign.learning.scores import Scores
from everalign.reporting.formats import METRICS, SUMMARY_TITLES, Errors, is_chance, summary_cells
from everalign.serving.gateway import Gateway
from everalign.serving.pages.base import CONTENT_POLICY, Pages
from everalign.serving.store.records import Exchange, Feedback
from everalign.serving.telemetry import Minute

SHADES = 10
"""Colours of the score matrix, from the lowest score to the highest."""

_UNKNOWN = "–"
_TAIL = 0.95
# Newest feedback of the page's own key that is listed.
_RECENT = 20
_OUTCOMES = ("applied", "unchanged", "skipped", "failed")
_CIRCUITS = {
    "closed": "works",
    "open": "failed repeatedly and gets no requests for a while",
    "half-open": "failed repeatedly and is being tried again",
}
_ASSETS = {"style.css": "text/css; charset=utf-8", "watch.js": "text/javascript; charset=utf-8"}
# Points of a chart: more than a screen shows.
_MOST_STEPS = 3000


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
class Bar:
    """A minute's bar in a chart: its place, the heights of the whole and of a part of it, and what it says.

    Heights are shares of the chart's; `high` holds `low`.
    """

    place: int
    high: float
    low: float
    words: str


@dataclass(frozen=True)
class HourView:
    """The last hour's chat completions.

    Args:
        requests: bars of their number, and of those that failed.
        latency: bars of the seconds within which 95 % ended, and half of them.
        most: requests of the busiest minute.
        slowest: seconds of the slowest minute's 95 %.
        median: seconds within which half of the hour's ended; None of none.
        tail: the same of 95 %.
    """

    requests: Sequence[Bar]
    latency: Sequence[Bar]
    most: int
    slowest: str
    median: str
    tail: str


def hour_view(minutes: Sequence[Minute]) -> HourView | None:
    """Return what the charts show; None where nothing was asked."""
    most = max(one.total for one in minutes)
    if not most:
        return None
    slowest = max(one.quantile(_TAIL) or 0.0 for one in minutes) or 1.0
    requests, latency = [], []
    for place, one in enumerate(minutes):
        if not one.total:
            continue
        when = datetime.fromtimestamp(60 * one.number, timezone.utc).strftime("%H:%M")
        failed, half, tail = one.outcomes["failed"], one.quantile(0.5) or 0.0, one.quantile(_TAIL) or 0.0
        words = f"{when}: {one.total} {'request' if one.total == 1 else 'requests'}, {failed} failed"
        requests.append(Bar(place, one.total / most, failed / most, words))
        spent = f"{when}: half within {half:.2f} s, 95 % within {tail:.2f} s"
        latency.append(Bar(place, tail / slowest, half / slowest, spent))
    whole = Minute(0, Counter(), [spent for one in minutes for spent in one.seconds])
    median, tail = whole.quantile(0.5) or 0.0, whole.quantile(_TAIL) or 0.0
    return HourView(requests, latency, most, f"{slowest:.2f} s", f"{median:.2f} s", f"{tail:.2f} s")


@dataclass(frozen=True)
class FeedbackView:
    """A line of the list of feedback, as texts."""

    id: str
    when: str
    question: str
    said: str
    comment: str
    state: str


def feedback_view(exchange: Exchange, feedback: Feedback, learned: bool) -> FeedbackView:
    """Return one line on what somebody said of an answer."""
    users = [message.get("content") for message in exchange.messages if message["role"] == "user"]
    question = next((text for text in reversed(users) if isinstance(text, str)), "") or _UNKNOWN
    words = {
        "good": feedback.rating == 1,
        "bad": feedback.rating == -1,
        f"prefers {feedback.preferred}": feedback.preferred is not None,
        "edited": feedback.edited_text is not None,
        ", ".join(feedback.tags): bool(feedback.tags),
    }
    return FeedbackView(
        exchange.id,
        feedback.created.strftime("%Y-%m-%d %H:%M"),
        question,
        "; ".join(text for text, holds in words.items() if holds) or _UNKNOWN,
        feedback.comment or "",
        "learned" if learned else "waiting",
    )


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
    """Return the base model's scores and then the score matrix, whose empty cells were not measured; [] if all are."""
    low, high = heat_limits(scores)
    if low is None or high is None:
        return []

    def shade(score: float | None) -> int | None:
        if score is None:
            return None
        return SHADES - 1 if high == low else min(SHADES - 1, int((score - low) / (high - low) * SHADES))

    rows = [("nothing", -1, scores.zero_shot)]
    rows += [(task, i, row) for i, (task, row) in enumerate(zip(scores.learned, scores.matrix, strict=True))]
    return [
        (name, [HeatCell(share(score), shade(score), i == j) for j, score in enumerate(row)]) for name, i, row in rows
    ]


def heat_limits(scores: Scores) -> tuple[float | None, float | None]:
    """Return the lowest and the highest score; None where nothing was measured."""
    measured = [score for row in (scores.zero_shot, *scores.matrix) for score in row if score is not None]
    return min(measured, default=None), max(measured, default=None)


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
        stats, trouble, recent = None, None, list[FeedbackView]()
        if gateway.store is None:
            trouble = "Feedback is off: the gateway has no store. Give it one with serve --store."
        else:
            try:
                stats = await gateway.store.read(lambda store: store.stats())
                found = await gateway.store.read(lambda store: store.recent_feedback(request.state.key_id, _RECENT))
                recent = [feedback_view(*one) for one in found]
            except (EveralignError, OSError, RuntimeError) as error:
                # The type alone: a database's message may contain its address and user.
                trouble = f"The store cannot be read ({type(error).__name__}); the log says more."
        values = {
            "version": version,
            "template": corrections.in_service.template,
            "mode": gateway.parser.mode,
            "in_flight": gateway.limiter.in_flight,
            "waiting": corrections.depth,
            "circuits": [(name.replace(":", " "), state, _CIRCUITS[state]) for name, state in circuits.items()],
            "since": since.strftime("%Y-%m-%d %H:%M"),
            "outcomes": [(name, totals[name]) for name in _OUTCOMES],
            "request_rows": rows,
            "hour": hour_view(gateway.metrics.timeline.minutes()),
            "feedback": {"stats": stats, "trouble": trouble, "recent": recent},
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
    return {
        "name": path.resolve().name,
        "trouble": None,
        "method": run.facts.method.name,
        "versions": version_views(run, served),
        "tasks": scores.tasks,
        "heat": heat_rows(scores),
        "low": share(low),
        "high": share(high),
        "forgetting": forgetting_views(scores, error_matrix(run)),
    }


def watch_app(path: Path) -> FastAPI:
    """Return the application of a run's page."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # Only this machine gets a connection; and no other site's page gets one through a browser here.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    templates = Environment(loader=PackageLoader("everalign.serving.pages"), autoescape=True, undefined=StrictUndefined)
    reader = RunReader(path)

    @app.get("/")
    def page() -> Response:
        text = templates.get_template("watch.html.j2").render(name=path.resolve().name)
        headers = {"content-security-policy": CONTENT_POLICY}
        return Response(text, headers=headers, media_type="text/html; charset=utf-8")

    @app.get("/data")
    def data() -> Response:
        try:
            return JSONResponse(watched(path, reader))
        except (EveralignError, OSError) as error:
            return JSONResponse({"trouble": str(error)}, 503)

    @app.get("/assets/{name}")
    def asset(name: str, request: Request) -> Response:
        if name not in _ASSETS:
            return JSONResponse({"trouble": "there is no such file"}, 404)
        content = (files("everalign.serving.pages") / "assets" / name).read_bytes()
        return Response(content, media_type=_ASSETS[name])

    return app


def watched(path: Path, reader: RunReader) -> dict[str, Any]:
    """Return what the page shows: the logged steps, thinned out where they are many, scores and versions.

    Raises:
        InputError: a file of the run is damaged.
    """
    run, log = reader.read(), path / TRAINING_LOG
    steps = read_json_lines(log, LoggedStep, growing=True) if log.exists() else []
    scores = run.scores()
    last = steps[-1:]
    return {
        "method": run.facts.method.name,
        "objective": run.facts.objective,
        "model": run.facts.model,
        "steps": [
            {
                "task": one.task,
                "version": one.version,
                "stage": one.stage,
                "part": f"{one.version}/{one.round}/{one.stage_number}",
                "step": one.step,
                "steps": (one.model_extra or {}).get("steps"),
                "time": one.time,
                "loss": one.loss,
                "margin": one.margin,
                "accuracy": None if one.accuracy is None else 100 * one.accuracy,
                "speed": (one.model_extra or {}).get("tokens_per_second"),
            }
            for one in [*steps[: -1 : max(1, len(steps) // _MOST_STEPS)], *last]
        ],
        "logged": len(steps),
        "tasks": list(scores.tasks),
        "heat": [
            {"name": name, "cells": [{"text": one.text, "shade": one.shade, "own": one.own} for one in cells]}
            for name, cells in heat_rows(scores)
        ],
        "summary": [[SUMMARY_TITLES[name], text] for name, text in summary_cells(scores, METRICS["accuracy"]).items()],
        "versions": [
            {"name": one.name, "task": one.task, "then": one.then, "now": one.now, "status": one.status}
            for one in version_views(run)
        ],
    }
