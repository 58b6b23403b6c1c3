"""The parts of a running gateway, put together from its settings."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from everalign.serving.chat_request import RequestParser
from everalign.serving.complete import Completions
from everalign.serving.corrector_service import AnyCorrector, CorrectionService
from everalign.serving.decide import CorrectionDecider
from everalign.serving.limits import Allowances, Limiter
from everalign.serving.request_log import AsyncStore, RequestLog
from everalign.serving.security import Keys
from everalign.serving.settings import GatewaySettings, UpstreamSettings
from everalign.serving.telemetry import Metrics
from everalign.serving.upstream import Upstream
from everalign.serving.upstream_transport import CircuitBreaker, Circuits

if TYPE_CHECKING:
    from everalign.serving.store import FeedbackStore


def make_corrections(
    settings: GatewaySettings, corrector: AnyCorrector | None, version: str, threads: int = 1
) -> CorrectionService:
    """Return a corrector in service, with the settings' limits.

    Args:
        settings: of the gateway.
        corrector: the first one; None to begin without.
        version: its name.
        threads: corrections at the same time: one for a model in this process; more for one on a server, which gets
            each answer by itself, so that none waits for or fails with others.
    """
    return CorrectionService(
        corrector,
        version,
        timeout=settings.timeouts.correction,
        waiting=settings.limits.waiting,
        batch=settings.limits.batch if threads == 1 else 1,
        threads=threads,
        breaker=lambda: CircuitBreaker(settings.breaker_failures, settings.breaker_seconds),
    )


@dataclass(frozen=True)
class Gateway:
    """What the routes work with; upstreams by name."""

    settings: GatewaySettings
    keys: Keys
    allowances: Allowances
    upstreams: dict[str, Upstream]
    fallback: Upstream | None
    corrections: CorrectionService
    metrics: Metrics
    limiter: Limiter
    parser: RequestParser
    completions: Completions
    request_log: RequestLog
    store: AsyncStore | None

    @classmethod
    def make(
        cls, settings: GatewaySettings, store: "FeedbackStore | None", corrections: CorrectionService
    ) -> "Gateway":
        """Return a gateway; the arguments are those of `create_app`."""
        limits, access, metrics = settings.limits, settings.access, Metrics()
        async_store = None
        if store is not None:
            async_store = AsyncStore(store, metrics.store_failures.inc, settings.timeouts.store)
        keys = Keys(settings.keys, access.keys_file, access.no_auth, access.cors_origins)
        allowances = Allowances(keys.allowance, access.allowance)
        request_log = RequestLog(metrics, async_store, corrections, limits.correction_characters)
        decider = CorrectionDecider(corrections, settings.on_failure, limits.correction_characters, metrics)
        shared = len(settings.keys) > 1 or access.keys_file is not None
        limiter = Limiter(limits.concurrency, limits.per_key, shared, allowances)

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

        fallback = None if settings.fallback is None else upstream(settings.fallback, None, None)
        upstreams = {one.name: upstream(one, allowances, fallback) for one in settings.upstreams}
        parser = RequestParser(
            upstreams,
            settings.mode or ("off" if corrections.version is None else "correct"),
            settings.keep,
            limits,
            access.headers,
            settings.strict_structured,
        )
        made = cls(
            settings=settings,
            keys=keys,
            allowances=allowances,
            upstreams=upstreams,
            fallback=fallback,
            corrections=corrections,
            metrics=metrics,
            limiter=limiter,
            parser=parser,
            completions=Completions(decider, request_log),
            request_log=request_log,
            store=async_store,
        )
        metrics.watch("in_flight", "Requests under way.", lambda: limiter.in_flight)
        metrics.watch("correction_queue", "Answers that wait for the corrector.", lambda: corrections.depth)
        if async_store is not None:
            metrics.watch("store_queue", "Writes that wait for the store.", lambda: async_store.waiting)
        metrics.watch_circuits(made.circuits)
        return made

    @property
    def has_corrector(self) -> bool:
        """Whether answers can be corrected."""
        return self.corrections.version is not None

    def circuits(self) -> dict[str, str]:
        """Return the states of the circuit breakers: the worst of each upstream's models, and the corrector's."""
        found: dict[str, str] = {f"upstream:{name}": one.circuits.state for name, one in self.upstreams.items()}
        if self.fallback is not None:
            found["fallback"] = self.fallback.circuits.state
        return {**found, "corrector": self.corrections.breaker.state}

    async def close(self) -> None:
        """Finish what is being stored, and close everything."""
        await self.request_log.close()
        await self.corrections.close()
        for upstream in self.upstreams.values():
            await upstream.close()
        if self.fallback is not None:
            await self.fallback.close()
