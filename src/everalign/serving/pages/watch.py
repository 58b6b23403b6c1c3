"""A page that follows a run while it trains; for this machine alone.

It reads the run's files, so that it needs nothing of the process that trains, and goes on where that one ends.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.middleware.trustedhost import TrustedHostMiddleware

from everalign.errors import EveralignError
from everalign.learning.run_data import TRAINING_LOG, RunReader
from everalign.learning.run_files import LoggedStep, read_json_lines
from everalign.reporting.formats import METRICS, SUMMARY_TITLES, summary_cells
from everalign.serving.pages.base import CONTENT_POLICY
from everalign.serving.pages.dashboard import heat_rows, version_views

_ASSETS = {"style.css": "text/css; charset=utf-8", "watch.js": "text/javascript; charset=utf-8"}
# Points of a chart: more than a screen shows.
_MOST_STEPS = 3000


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
    measured = any(score is not None for row in (scores.zero_shot, *scores.matrix) for score in row)
    last = steps[-1:]
    return {
        "method": run.facts.method.name,
        "objective": run.facts.objective,
        "model": run.facts.model,
        "steps": [_step(one) for one in [*steps[: -1 : max(1, len(steps) // _MOST_STEPS)], *last]],
        "logged": len(steps),
        "tasks": list(scores.tasks),
        "heat": [
            {"name": name, "cells": [{"text": one.text, "shade": one.shade, "own": one.own} for one in cells]}
            for name, cells in (heat_rows(scores) if measured else [])
        ],
        "summary": [[SUMMARY_TITLES[name], text] for name, text in summary_cells(scores, METRICS["accuracy"]).items()],
        "versions": [
            {"name": one.name, "task": one.task, "then": one.then, "now": one.now, "status": one.status}
            for one in version_views(run)
        ],
    }


def _step(one: LoggedStep) -> dict[str, Any]:
    extra = one.model_extra or {}
    return {
        "task": one.task,
        "version": one.version,
        "stage": one.stage,
        "part": f"{one.version}/{one.round}/{one.stage_number}",
        "step": one.step,
        "steps": extra.get("steps"),
        "time": one.time,
        "loss": one.loss,
        "margin": one.margin,
        "accuracy": None if one.accuracy is None else 100 * one.accuracy,
        "speed": extra.get("tokens_per_second"),
    }
