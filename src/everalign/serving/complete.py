"""From a request to its answer: one path for chat completions and Responses, whole and streamed.

A streamed answer that stays as it is, because of the mode or of what was asked, is relayed from its first byte. One
that is corrected is first read whole: no byte of it leaves before it is judged. Then its correction is written: while
it is being decoded if it is a single one, or only when it is complete in strict mode. Streams by sentence are the
exception: the corrections of whole sentences leave while the answer is being read (see `decide`).
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from everalign.serving.chat_answer import ChatAnswer, ChatRelay
from everalign.serving.chat_request import RequestContext
from everalign.serving.decide import (
    CorrectionDecider,
    LiveWriter,
    SentenceStream,
    Summary,
    summary_before,
)
from everalign.serving.eligibility import Api
from everalign.serving.request_log import RequestLog, RequestTimer
from everalign.serving.responses import ResponsesAnswer, ResponsesRelay
from everalign.serving.settings import StreamBy
from everalign.serving.stream_response import FrameQueue, cancel

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


class Completions:
    """Answers requests."""

    def __init__(self, decider: CorrectionDecider, request_log: RequestLog, stream_by: StreamBy = "answer") -> None:
        self._decider, self._request_log = decider, request_log
        self._by_sentence = stream_by == "sentence"

    async def complete(self, request: RequestContext) -> Completed:
        """Return a whole answer; raises GatewayError if there is none, or none that may be returned."""
        with self._request_log.timed(request) as timer:
            with timer.upstream:
                reply = await request.upstream.chat(request.upstream_request())
            answer = _ANSWERS[request.api](request, relayed=not request.corrects)
            answer.add(reply.body)
            answer.end()
            first = answer.choices[0].text if answer.choices else ""
            if request.corrects:
                with timer.corrector:
                    decisions = await self._decider.decide(request, answer.choices)
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
        with self._request_log.timed(request) as timer:
            known = summary_before(request)
            if known is None:
                return await self._stream_corrected(request, queue, timer)
            return await self._relay(request, queue, timer, known, remembers)

    async def _relay(
        self, request: RequestContext, queue: FrameQueue, timer: RequestTimer, summary: Summary, remembers: bool
    ) -> Completed:
        """Pass an answer on while it comes."""
        keeps = request.keep and self._request_log.has_store
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
        sentences = self._decider.sentences(request, writer, timer.corrector) if self._by_sentence else None
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
            decisions = await self._decider.decide(request, answer.choices, writer, sentences)
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
        stored = await self._request_log.store(request, answer.choices, returned, summary, usage)
        if request.mode == "shadow":
            self._request_log.shadow(request, answer.choices)
        return replace(summary, stored=stored) if request.reports_storage else summary, usage


def _passed_headers(request: RequestContext, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the upstream's headers for the client; none in strict mode, since they could hold any text."""
    return {} if request.mode == "strict" else dict(headers)
