"""Access log and Prometheus metrics; neither holds anything of a question or an answer."""

import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from logging.handlers import WatchedFileHandler
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everalign.errors import InputError
from everalign.serving.corrector_service import CorrectorUsage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SHARES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 4.0)
_STATES = {"closed": 0, "half-open": 1, "open": 2}


class Metrics:
    """The counters of one gateway."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "everalign_requests",
            "Chat completions by mode, outcome (applied, unchanged, skipped, failed) and reason.",
            ("mode", "outcome", "reason"),
            registry=registry,
        )
        self.shadow = Counter(
            "everalign_shadow_corrections", "Corrections in the background.", ("outcome", "reason"), registry=registry
        )
        self.edited = Histogram(
            "everalign_edit_ratio",
            "Words put in, taken out or replaced, per word of the answer, of answers that were corrected.",
            buckets=_SHARES,
            registry=registry,
        )
        self.draft_tokens = Counter(
            "everalign_draft_tokens", "Tokens of answers that the corrector verified.", ("verdict",), registry=registry
        )
        self.upstream_seconds = Histogram(
            "everalign_upstream_seconds", "In the upstream.", ("upstream",), buckets=_SECONDS, registry=registry
        )
        self.corrector_seconds = Histogram(
            "everalign_corrector_seconds", "In the corrector, waiting included.", buckets=_SECONDS, registry=registry
        )
        self.overhead_seconds = Histogram(
            "everalign_overhead_seconds",
            "Of a request, besides upstream and corrector.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.feedback = Counter("everalign_feedback", "Feedback kept.", ("new",), registry=registry)
        self.store_failures = Counter(
            "everalign_unkept_exchanges", "Exchanges that the store refused.", registry=registry
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a number that is asked for whenever the metrics are read."""
        Gauge(f"everalign_{name}", text, registry=self._registry).set_function(value)

    def watch_circuits(self, states: Callable[[], dict[str, str]]) -> None:
        """Add the states of circuit breakers: 0 closed, 1 half-open, 2 open."""
        gauge = Gauge("everalign_circuit_state", "0 closed, 1 half-open, 2 open.", ("of",), registry=self._registry)
        for name in states():
            gauge.labels(name).set_function(lambda name=name: _STATES[states()[name]])  # type: ignore[misc]

    def count_effort(self, effort: CorrectorUsage) -> None:
        """Count what a corrector tells of its draft."""
        for verdict, tokens in (("accepted", effort.accepted), ("rejected", effort.rejected)):
            if tokens:
                self.draft_tokens.labels(verdict).inc(tokens)

    def outcomes(self) -> list[tuple[str, str, str, int]]:
        """Return mode, outcome, reason and number of the requests so far."""
        samples = (sample for family in self.requests.collect() for sample in family.samples)
        counts = (one for one in samples if one.name.endswith("_total"))
        return [(*(one.labels[name] for name in ("mode", "outcome", "reason")), int(one.value)) for one in counts]  # type: ignore[misc]

    def text(self) -> bytes:
        """Return all of it."""
        return bytes(generate_latest(self._registry))


_log = logging.getLogger("everalign.access")
_TOLD = {
    "id": "x-everalign-id",
    "request_id": "x-request-id",
    "mode": "x-everalign-mode",
    "correction": "x-everalign-correction",
    "corrector": "x-everalign-corrector",
}
_LONGEST = 200  # characters of a header


class AccessLog:
    """Writes a line when a request has ended. The path is the route's: what stands in it could be anything.

    Args:
        app: what is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, as ASGI has it."""
        if scope["type"] != "http" or not _log.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        started, ended, sizes = time.perf_counter(), False, {"received": 0, "sent": 0}
        status, told = 0, Headers()

        async def received() -> Message:
            message = await receive()
            sizes["received"] += len(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            nonlocal status, told, ended
            if message["type"] == "http.response.start":
                status, told = message["status"], Headers(raw=message["headers"])
            sizes["sent"] += len(message.get("body", b""))
            await send(message)
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))

        state = scope.setdefault("state", {})
        try:
            await self._app(scope, received, sent)
        finally:
            client = scope.get("client")
            line = {
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "method": scope["method"],
                "route": state.get("route"),
                "status": status,
                "whole": ended,
                "seconds": round(time.perf_counter() - started, 4),
                **sizes,
                "key": state.get("key_id") or None,
                "client": client[0] if client else None,
                **{name: told[header][:_LONGEST] for name, header in _TOLD.items() if header in told},
            }
            _log.info("%s", json.dumps(line))


def write_access_log(where: str) -> None:
    """Let the lines be written: to a file, which may be moved away meanwhile, or to standard error for `-`.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        handler = (
            logging.StreamHandler(sys.stderr) if where == "-" else WatchedFileHandler(Path(where), encoding="utf-8")
        )
    except OSError as error:
        raise InputError(f"--access-log {where}: cannot be written: {error.strerror}") from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.handlers = [handler]
    _log.setLevel(logging.INFO)
    _log.propagate = False
