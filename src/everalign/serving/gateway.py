"""The parts of a running gateway, put together from its settings."""

from typing import TYPE_CHECKING

from everalign.serving.chat_request import RequestParser
from everalign.serving.complete import Completions
from everalign.serving.corrector_service import CorrectionService
from everalign.serving.decide import CorrectionDecider
from everalign.serving.limits import Allowances, Limiter
from everalign.serving.request_log import AsyncStore, RequestLog
from everalign.serving.security import Keys
from everalign.serving.settings import GatewaySettings, Mode, UpstreamSettings
from everalign.serving.telemetry import Metrics
from everalign.serving.upstream import Upstream
from everalign.serving.upstream_transport import CircuitBreaker, Circuits

if TYPE_CHECKING:
    from everalign.correction.corrector import Corrector
    from everalign.serving.store import FeedbackStore


def make_corrections(
    settings: GatewaySettings, corrector: "Corrector | None", version: str, threads: int = 1
) -> CorrectionService:
    """Return a corrector in service under the name `version`, with the settings' limits.

    One thread is for a corrector whose model is in this process; more are for one on a server, which gets each answer
    separately, so that none waits for or fails with others.

    Raises:
        InputError: streams are corrected by sentence, and the corrector has an approver.
    """
    if corrector is not None and settings.stream_by == "sentence":
        corrector.check_continues()
    return CorrectionService(
        corrector,
        version,
        timeout=settings.timeouts.correction,
        waiting=settings.limits.waiting,
        batch=settings.limits.batch if threads == 1 else 1,
        threads=threads,
        breaker=lambda: CircuitBreaker(settings.breaker_failures, settings.breaker_seconds),
    )


class Gateway:
    """What the routes work with; upstreams by name. The arguments are those of `create_app`."""

    def __init__(
        self, settings: GatewaySettings, store: "FeedbackStore | None", corrections: CorrectionService
    ) -> None:
        limits, access, longest = settings.limits, settings.access, settings.limits.correction_characters
        self.settings, self.corrections, self.metrics = settings, corrections, Metrics()
        self.store: AsyncStore | None = None
        if store is not None:
            self.store = opened = AsyncStore(store, self.metrics.store_failures.inc, settings.timeouts.store)
            self.metrics.watch("store_queue", "Writes that wait for the store.", lambda: opened.writes.waiting)
        self.keys = Keys(settings.keys, access.keys_file, access.no_auth, access.cors_origins)
        self.allowances = Allowances(self.keys.allowance, access.allowance)
        self.request_log = RequestLog(self.metrics, self.store, corrections, longest)
        decider = CorrectionDecider(corrections, settings.on_failure, longest, self.metrics)
        self.completions = Completions(decider, self.request_log, settings.stream_by)
        shared = len(settings.keys) > 1 or access.keys_file is not None
        self.limiter = Limiter(limits.concurrency, limits.per_key, shared, self.allowances)

        def upstream(one: UpstreamSettings, allowances: Allowances | None, fallback: Upstream | None) -> Upstream:
            return Upstream(
                one,
                settings.timeouts,
                retries=settings.retries,
                longest_wait=settings.longest_wait,
                circuits=Circuits(lambda: CircuitBreaker(settings.breaker_failures, settings.breaker_seconds)),
                largest=limits.answer_bytes,
                headers=access.headers,
                allowances=allowances,
                fallback=fallback,
                fallback_model=settings.fallback_model,
            )

        self.fallback = None if settings.fallback is None else upstream(settings.fallback, None, None)
        self.upstreams = {one.name: upstream(one, self.allowances, self.fallback) for one in settings.upstreams}
        mode: Mode = settings.mode or ("off" if corrections.version is None else "correct")
        structured = settings.strict_structured
        self.parser = RequestParser(self.upstreams, mode, settings.keep, limits, access.headers, structured)
        self.metrics.watch("in_flight", "Requests under way.", lambda: self.limiter.in_flight)
        self.metrics.watch("correction_queue", "Answers that wait for the corrector.", lambda: corrections.depth)
        self.metrics.watch_circuits(self.circuits)

    @property
    def has_corrector(self) -> bool:
        return self.corrections.version is not None

    def circuits(self) -> dict[str, str]:
        """Return the states of the circuit breakers: the worst of each upstream's models, and the corrector's."""
        found: dict[str, str] = {f"upstream:{name}": one.circuits.state for name, one in self.upstreams.items()}
        if self.fallback is not None:
            found["fallback"] = self.fallback.circuits.state
        return {**found, "corrector": self.corrections.in_service.breaker.state}

    async def close(self) -> None:
        """Finish what is being stored, and close everything."""
        await self.request_log.close()
        await self.corrections.close()
        for upstream in self.upstreams.values():
            await upstream.close()
        if self.fallback is not None:
            await self.fallback.close()
