"""`/dashboard`: what is in service, how requests end, what feedback waits, and what the corrector's run has learned."""

import asyncio
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from everalign.errors import EveralignError
from everalign.serving.gateway import Gateway
from everalign.serving.pages.rendering import Pages
from everalign.serving.pages.run_views import forgetting_views, heat_limits, heat_rows, share, version_views

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
        "mode": gateway.desk.mode,
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
    if gateway.keeper is None:
        return {"stats": None, "trouble": "Feedback is off: the gateway has no store. Give it one with serve --store."}
    try:
        return {"stats": await gateway.keeper.stats(), "trouble": None}
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
