"""The parts of a running gateway, put together."""

from dataclasses import dataclass

from everalign.serving.chat_request import RequestParser
from everalign.serving.corrector_service import AnyCorrector, CorrectionService
from everalign.serving.decide import Judge
from everalign.serving.fallback import Answering
from everalign.serving.limits import Allowances, Limiter
from everalign.serving.request_log import AsyncStore, Recorder, Store
from everalign.serving.security import Keys
from everalign.serving.settings import GatewaySettings, Mode, UpstreamSettings
from everalign.serving.stream import Streams
from everalign.serving.telemetry import Metrics
from everalign.serving.upstream import Upstream
from everalign.serving.upstream_transport import CircuitBreaker, Circuits


def make_corrections(
    settings: GatewaySettings, corrector: AnyCorrector | None, version: str, threads: int = 1
) -> CorrectionService:
    """Return a corrector in service, with the settings' limits.

    Args:
        settings: of the gateway.
        corrector: the first one; None to begin without.
        version: what it is called.
        threads: corrections under way at once: one for a model in this process; more for one on a server, which is
            asked for each answer by itself, so that none waits for or fails with others.
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
    """What the routes work with.

    Args:
        settings: how it is set up.
        keys: the clients'.
        allowances: what each of them may use.
        upstreams: by name.
        fallback: answers what they cannot; None for nobody.
        corrections: the corrector in service.
        metrics: what is counted.
        limiter: requests under way.
        desk: reads requests.
        judge: decides what becomes of answers.
        recorder: remembers.
        streams: streams answers.
        keeper: the store; None where there is none.
    """

    settings: GatewaySettings
    keys: Keys
    allowances: Allowances
    upstreams: dict[str, Answering]
    fallback: Upstream | None
    corrections: CorrectionService
    metrics: Metrics
    limiter: Limiter
    desk: RequestParser
    judge: Judge
    recorder: Recorder
    streams: Streams
    keeper: AsyncStore | None

    @classmethod
    def make(cls, settings: GatewaySettings, store: Store | None, corrections: CorrectionService) -> "Gateway":
        """Put a gateway together; the arguments are those of `create_app`."""
        limits, metrics = settings.limits, Metrics()
        keeper = AsyncStore(store, metrics.store_failures.inc, settings.timeouts.store) if store is not None else None
        access = settings.access
        keys = Keys(settings.keys, access.keys_file, access.no_auth, access.cors_origins)
        allowances = Allowances(keys.allowance, access.allowance)
        fallback = None if settings.fallback is None else _upstream(settings, settings.fallback)
        upstreams = {
            one.name: Answering(_upstream(settings, one), allowances, fallback, settings.fallback_model)
            for one in settings.upstreams
        }
        mode: Mode = settings.mode or ("off" if corrections.version is None else "correct")
        recorder = Recorder(metrics, keeper, corrections, limits.correction_characters)
        judge = Judge(corrections, settings.on_failure, limits.correction_characters, metrics)
        shared = len(settings.keys) > 1 or settings.access.keys_file is not None
        limiter = Limiter(limits.concurrency, limits.per_key, shared, allowances)
        made = cls(
            settings=settings,
            keys=keys,
            allowances=allowances,
            upstreams=upstreams,
            fallback=fallback,
            corrections=corrections,
            metrics=metrics,
            limiter=limiter,
            desk=RequestParser(
                upstreams, mode, settings.keep, limits, settings.access.headers, settings.strict_structured
            ),
            judge=judge,
            recorder=recorder,
            streams=Streams(judge, recorder),
            keeper=keeper,
        )
        metrics.watch("in_flight", "Requests under way.", lambda: limiter.in_flight)
        metrics.watch("correction_queue", "Answers that wait for the corrector.", lambda: corrections.depth)
        if keeper is not None:
            metrics.watch("store_queue", "Writes that wait for the store.", lambda: keeper.waiting)
        metrics.watch_circuits(made.circuits)
        return made

    @property
    def has_corrector(self) -> bool:
        """Whether answers can be corrected."""
        return self.corrections.version is not None

    def circuits(self) -> dict[str, str]:
        """Return the states of the circuits: of each upstream the worst of its models', and the corrector's."""
        found: dict[str, str] = {f"upstream:{name}": one.circuits.state for name, one in self.upstreams.items()}
        if self.fallback is not None:
            found["fallback"] = self.fallback.circuits.state
        return {**found, "corrector": self.corrections.breaker.state}

    async def close(self) -> None:
        """Let go of everything."""
        await self.recorder.close()
        await self.corrections.close()
        for upstream in self.upstreams.values():
            await upstream.close()
        if self.fallback is not None:
            await self.fallback.close()


def _upstream(settings: GatewaySettings, one: UpstreamSettings) -> Upstream:
    return Upstream(
        one,
        settings.timeouts,
        retries=settings.retries,
        longest_wait=settings.longest_wait,
        circuits=Circuits(lambda: CircuitBreaker(settings.breaker_failures, settings.breaker_seconds)),
        largest=settings.limits.answer_bytes,
        headers=settings.access.headers,
    )
