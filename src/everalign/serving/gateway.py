"""The gateway: its parts, put together from its settings, and a request's way through them to its answer.

There is one path for chat completions and Responses, whole and streamed. A streamed answer that stays as it is, because
of the mode or of what was asked, is relayed from its first byte. One that is corrected is first read whole: no byte of
it leaves before it is judged. Then its correction is written: while it is being decoded if it is a single one, or only
when it is complete in strict mode. Streams by sentence are the exception: the corrections of whole sentences leave
while the answer is being read (see `decide`).
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from everalign.serving.chat_answer import ChatAnswer, ChatRelay
from everalign.serving.chat_request import RequestContext, RequestParser
from everalign.serving.corrector_service import CorrectionService
from everalign.serving.decide import CorrectionDecider, LiveWriter, SentenceStream, Summary, summary_before
from everalign.serving.eligibility import Api
from everalign.serving.limits import Allowances, Limiter
from everalign.serving.request_log import AsyncStore, RequestLog, RequestTimer
from everalign.serving.responses import ResponsesAnswer, ResponsesRelay
from everalign.serving.security import Keys
from everalign.serving.settings import GatewaySettings, Mode, StreamBy, UpstreamSettings
from everalign.serving.stream_response import FrameQueue, cancel
from everalign.serving.telemetry import Metrics
from everalign.serving.upstream import Upstream
from everalign.serving.upstream_transport import CircuitBreaker, Circuits

if TYPE_CHECKING:
    from everalign.correction.corrector import Corrector
    from everalign.serving.store import FeedbackStore

Answer = ChatAnswer | ResponsesAnswer
_ANSWERS: dict[Api, type[ChatAnswer] | type[ResponsesAnswer]] = {"chat": ChatAnswer, "responses": ResponsesAnswer}
_RELAYS: dict[Api, type[ChatRelay] | type[ResponsesRelay]] = {"chat": ChatRelay, "responses": ResponsesRelay}


@dataclass(frozen=True)
class Completed:
    """A request with its whole answer.

    Of the first choice, `original` is the upstream's text, which is not for the client, and `returned` the text that
    the client gets.
    """

    request: RequestContext
    body: dict[str, Any]
    headers: dict[str, str]
    original: str
    returned: str
    summary: Summary
    usage: dict[str, Any] | None
    upstream_seconds: float
    corrector_seconds: float


@dataclass(eq=False)
class Completions:
    """Answers requests."""

    decider: CorrectionDecider
    request_log: RequestLog
    stream_by: StreamBy = "answer"

    async def complete(self, request: RequestContext) -> Completed:
        """Return a whole answer; raises GatewayError if there is none, or none that may be returned."""
        with self.request_log.timed(request) as timer:
            with timer.upstream:
                reply = await request.upstream.chat(request.upstream_request())
            answer = _ANSWERS[request.api](request, relayed=not request.corrects)
            answer.add(reply.body)
            answer.end()
            first = answer.choices[0].text if answer.choices else ""
            if request.corrects:
                with timer.corrector:
                    decisions = await self.decider.decide(request, answer.choices)
                returned = decisions[0].returned(answer.choices[0])
                summary, usage = await self._store(request, answer, Summary.of(decisions), returned)
                body = answer.corrected(decisions, summary, usage)
            else:
                returned = first
                summary, usage = await self._store(request, answer, Summary("skipped", request.mode), returned)
                body = answer.unchanged()
            timer.end(summary)
            headers = {**_passed_headers(request, reply.headers), **summary.headers(request)}
            spent = timer.upstream.seconds, timer.corrector.seconds
            return Completed(request, body, headers, first, returned, summary, usage, *spent)

    async def stream(self, request: RequestContext, queue: FrameQueue, remembers: bool = False) -> Completed:
        """Write a streamed answer to a queue; raises GatewayError if it fails or may not be returned.

        Args:
            request: what is asked.
            queue: gets the frames.
            remembers: whether the result has the texts of an answer that is passed on as it comes; its body is empty.
        """
        with self.request_log.timed(request) as timer:
            known = summary_before(request)
            if known is None:
                return await self._stream_corrected(request, queue, timer)
            return await self._relay(request, queue, timer, known, remembers)

    async def _relay(
        self, request: RequestContext, queue: FrameQueue, timer: RequestTimer, summary: Summary, remembers: bool
    ) -> Completed:
        """Pass an answer on while it comes."""
        keeps = request.keep and self.request_log.has_store
        remembers = remembers or keeps or request.mode == "shadow"
        answer = _ANSWERS[request.api](request, relayed=True)
        with timer.upstream:
            async with request.upstream.stream(request.upstream_request(), with_usage=keeps) as streamed:
                relay = _RELAYS[request.api](request, streamed.usage_added)
                queue.open({**streamed.headers, **summary.headers(request)})
                async for events in streamed.events:
                    for event in events if remembers else ():
                        answer.add(event)
                    if frames := relay.frames(events):
                        await queue.send(frames)
        if remembers:
            answer.end()
        returned = answer.choices[0].text if answer.choices else ""
        summary, usage = await self._store(request, answer, summary, returned)
        timer.end(summary)
        await queue.send(relay.rest(summary))
        return Completed(request, {}, {}, returned, returned, summary, usage, timer.upstream.seconds, 0.0)

    async def _stream_corrected(self, request: RequestContext, queue: FrameQueue, timer: RequestTimer) -> Completed:
        """Read an answer whole, and write what becomes of it; its first sentences meanwhile, in streams by sentence."""
        answer = _ANSWERS[request.api](request, relayed=False)
        writer = LiveWriter(request, answer.live, queue)
        by_sentence = self.stream_by == "sentence"
        sentences = self.decider.sentences(request, writer, timer.corrector) if by_sentence else None
        if sentences is None:
            await self._read(request, answer, timer, writer)
        else:
            reading = asyncio.create_task(self._read(request, answer, timer, writer, sentences))
            try:
                await sentences.run()
                await reading
            finally:
                await cancel(reading)
            answer.check_begun()
        with timer.corrector:
            decisions = await self.decider.decide(request, answer.choices, writer, sentences)
        returned = decisions[0].returned(answer.choices[0])
        summary, usage = await self._store(request, answer, Summary.of(decisions), returned)
        timer.end(summary)
        queue.open({**writer.headers, **summary.headers(request)})
        await queue.send(answer.remaining(decisions, summary, usage, writer.written))
        spent = timer.upstream.seconds, timer.corrector.seconds
        first = answer.choices[0].text if answer.choices else ""
        return Completed(request, {}, writer.headers, first, returned, summary, usage, *spent)

    async def _read(
        self,
        request: RequestContext,
        answer: Answer,
        timer: RequestTimer,
        writer: LiveWriter,
        sentences: SentenceStream | None = None,
    ) -> None:
        """Read an answer whole, and give its text to `sentences` as it comes."""
        try:
            with timer.upstream:
                async with request.upstream.stream(request.upstream_request(), with_usage=True) as streamed:
                    writer.headers = _passed_headers(request, streamed.headers)
                    async for events in streamed.events:
                        for event in events:
                            answer.add(event)
                        if sentences is not None and (text := answer.new_text()):
                            sentences.add(text)
            answer.end()
        finally:
            if sentences is not None:
                sentences.end()

    async def _store(
        self, request: RequestContext, answer: Answer, summary: Summary, returned: str
    ) -> tuple[Summary, dict[str, Any] | None]:
        """Store an exchange if it is to be; return the summary with that, and the usage with the corrector's."""
        usage = answer.usage if summary.usage is None else summary.usage.beside(answer.usage)
        stored = await self.request_log.store(request, answer.choices, returned, summary, usage)
        if request.mode == "shadow":
            self.request_log.shadow(request, answer.choices)
        return replace(summary, stored=stored) if request.reports_storage else summary, usage


def _passed_headers(request: RequestContext, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the upstream's headers for the client; none in strict mode, since they could hold any text."""
    return {} if request.mode == "strict" else dict(headers)


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
