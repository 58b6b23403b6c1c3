"""Access log, Prometheus metrics and a stopwatch; nothing of a question or an answer is in any of them."""

import json
import logging
import random
import sys
import time
from collections import Counter as Counts
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everalign.errors import InputError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SHARES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 4.0)
_STATES = {"closed": 0, "half-open": 1, "open": 2}
_LOGGED_HEADERS = {
    "id": "x-everalign-id",
    "request_id": "x-request-id",
    "mode": "x-everalign-mode",
    "correction": "x-everalign-correction",
    "corrector": "x-everalign-corrector",
}
_LONGEST_HEADER = 200  # characters

_access_log = logging.getLogger("everalign.access")


class Stopwatch:
    """Adds up the seconds that are spent inside its `with` blocks."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._started


class Minute(NamedTuple):
    """The chat completions that ended within one minute.

    Args:
        number: minutes since 1970.
        outcomes: how they ended.
        seconds: how long some of them took, drawn at random where they are many.
    """

    number: int
    outcomes: Counts[str]
    seconds: list[float]

    @property
    def total(self) -> int:
        return self.outcomes.total()

    def quantile(self, share: float) -> float | None:
        """Return the seconds within which this share of them ended; None of none."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


@dataclass(eq=False)
class Timeline:
    """The chat completions of the last hour, minute by minute, of this process."""

    MINUTES = 60
    _MOST = 1000  # durations of one minute

    clock: Callable[[], float] = time.time
    _minutes: deque[Minute] = field(default_factory=lambda: deque(maxlen=Timeline.MINUTES), init=False)

    def add(self, outcome: str, seconds: float) -> None:
        number = int(self.clock() // 60)
        if not self._minutes or self._minutes[-1].number < number:
            self._minutes.append(Minute(number, Counts(), []))
        minute = self._minutes[-1]
        minute.outcomes[outcome] += 1
        if len(minute.seconds) < self._MOST:
            minute.seconds.append(seconds)
        elif (place := random.randrange(minute.total)) < self._MOST:
            minute.seconds[place] = seconds  # each request has the same chance to be kept

    def minutes(self) -> list[Minute]:
        """Return the last hour's minutes, the oldest first, also those without a request."""
        now, known = int(self.clock() // 60), {one.number: one for one in self._minutes}
        numbers = range(now - self.MINUTES + 1, now + 1)
        return [known.get(number) or Minute(number, Counts(), []) for number in numbers]


class Metrics:
    """The metrics of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        counter = partial(Counter, namespace="everalign", registry=self._registry)
        histogram = partial(Histogram, namespace="everalign", registry=self._registry, buckets=_SECONDS)
        outcomes = "Chat completions by mode, outcome (applied, unchanged, skipped, failed) and reason."
        self.requests = counter("requests", outcomes, ("mode", "outcome", "reason"))
        self.shadow = counter("shadow_corrections", "Corrections in the background.", ("outcome", "reason"))
        edited = "Words put in, taken out or replaced, per word of the answer, of answers that were corrected."
        self.edited = histogram("edit_ratio", edited, buckets=_SHARES)
        self.draft_tokens = counter("draft_tokens", "Tokens of answers that the corrector verified.", ("verdict",))
        self.upstream_seconds = histogram("upstream_seconds", "In the upstream.", ("upstream",))
        self.corrector_seconds = histogram("corrector_seconds", "In the corrector, waiting included.")
        self.overhead_seconds = histogram("overhead_seconds", "Of a request, besides upstream and corrector.")
        self.feedback = counter("feedback", "Feedback kept.", ("new",))
        self.timeline = Timeline()
        self.store_failures = counter("unkept_exchanges", "Exchanges that the store refused.")

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read when the metrics are."""
        Gauge(f"everalign_{name}", text, registry=self._registry).set_function(value)

    def watch_circuits(self, states: Callable[[], dict[str, str]]) -> None:
        """Add gauges of circuit breakers: 0 closed, 1 half-open, 2 open."""
        gauge = Gauge("everalign_circuit_state", "0 closed, 1 half-open, 2 open.", ("of",), registry=self._registry)
        for name in states():
            gauge.labels(name).set_function(lambda name=name: _STATES[states()[name]])  # type: ignore[misc]

    def outcomes(self) -> list[tuple[str, str, str, int]]:
        """Return (mode, outcome, reason, number of requests)."""
        # A counter has two samples for each of its labels: its total, and when it was created.
        samples = (sample for family in self.requests.collect() for sample in family.samples)
        return [
            (one.labels["mode"], one.labels["outcome"], one.labels["reason"], int(one.value))
            for one in samples
            if one.name.endswith("_total")
        ]

    def text(self) -> bytes:
        return bytes(generate_latest(self._registry))


@dataclass(eq=False)
class AccessLog:
    """ASGI middleware that logs a line of JSON when a request has ended.

    It logs the route's pattern instead of the path, which may contain anything.
    """

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _access_log.isEnabledFor(logging.INFO):
            await self.app(scope, receive, send)
            return
        started, ended, sizes = time.perf_counter(), False, {"received": 0, "sent": 0}
        status, headers = 0, Headers()

        async def counted_receive() -> Message:
            message = await receive()
            sizes["received"] += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, headers, ended
            if message["type"] == "http.response.start":
                status, headers = message["status"], Headers(raw=message["headers"])
            sizes["sent"] += len(message.get("body", b""))
            await send(message)
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))

        state = scope.setdefault("state", {})
        try:
            await self.app(scope, counted_receive, counted_send)
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
                **{key: headers[name][:_LONGEST_HEADER] for key, name in _LOGGED_HEADERS.items() if name in headers},
            }
            _access_log.info("%s", json.dumps(line))


def write_access_log(where: str) -> None:
    """Write the access log to a file, which may be rotated, or to standard error for `-`; may raise InputError."""
    try:
        handler = (
            logging.StreamHandler(sys.stderr) if where == "-" else WatchedFileHandler(Path(where), encoding="utf-8")
        )
    except OSError as error:
        raise InputError(f"--access-log {where}: cannot be written: {error.strerror}") from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    _access_log.handlers = [handler]
    _access_log.setLevel(logging.INFO)
    _access_log.propagate = False
