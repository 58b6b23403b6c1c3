"""What the gateway counts, in Prometheus' text; nothing in it comes from a question or an answer."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from everalign.serving.answers import Effort

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
        self.unkept = Counter("everalign_unkept_exchanges", "Exchanges that the store refused.", registry=registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a number that is asked for whenever the metrics are read."""
        Gauge(f"everalign_{name}", text, registry=self._registry).set_function(value)

    def watch_circuits(self, states: Callable[[], dict[str, str]]) -> None:
        """Add the states of circuit breakers: 0 closed, 1 half-open, 2 open."""
        gauge = Gauge("everalign_circuit_state", "0 closed, 1 half-open, 2 open.", ("of",), registry=self._registry)
        for name in states():
            gauge.labels(name).set_function(lambda name=name: _STATES[states()[name]])  # type: ignore[misc]

    def count_effort(self, effort: Effort) -> None:
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
