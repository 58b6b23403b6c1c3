"""Request log: metrics of every request, and exchanges written to the feedback store from an event loop."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from anyio import to_thread

from everalign.deadlines import call_in_thread
from everalign.errors import EveralignError, InputError
from everalign.serving.chat_request import RequestContext
from everalign.serving.corrector_service import CorrectionFailed, CorrectionService
from everalign.serving.decide import Summary, count_edits
from everalign.serving.eligibility import Choice, why_not_corrected
from everalign.serving.errors import GatewayError
from everalign.serving.limits import AT_ONCE
from everalign.serving.store.records import Exchange, Feedback
from everalign.serving.stream_response import cancel
from everalign.serving.telemetry import Metrics, Stopwatch
from everalign.serving.upstream_transport import CircuitBreaker

if TYPE_CHECKING:
    from everalign.serving.store.database import FeedbackStore

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

# The store's writers share their commits: more of them make it no faster.
_WRITERS, _READERS = 16, 4
_MOST_WAITING = 1000
_TIMEOUTS = 3  # in a row, after which the store is left alone for a while

_CODES = {
    "client_gone",
    "internal_error",
    "upstream_auth",
    "upstream_cut",
    "upstream_error",
    "upstream_malformed",
    "upstream_timeout",
    "upstream_too_large",
    "upstream_unavailable",
    "upstream_unreachable",
    *(
        f"uncorrected_{reason}"
        for reason in (
            *("tool_calls", "audio", "logprobs", "content", "content_filter", "finish_reason", "length", "too_long"),
            *("unreadable",),
            *("corrector_error", "corrector_timeout", "corrector_down", "queue_full", "no_corrector"),
            *("unfinished", "empty", "echo", "growth", "code", "url", "repeat"),
        )
    ),
}
"""Reasons of failures that become labels of metrics. An upstream could send any number of others."""


class StoreLate(EveralignError):  # noqa: N818 (what is wrong is in the name)
    """The store did not respond in time, or has too many calls waiting."""


class _ThreadLane:
    """Runs blocking calls in threads, a few at once; a call that does not get its turn in time is dropped."""

    def __init__(self, threads: int, seconds: float) -> None:
        self._threads, self._seconds = asyncio.Semaphore(threads), seconds
        self._breaker = CircuitBreaker(_TIMEOUTS, seconds)
        self.waiting = 0

    async def run(self, call: Callable[[], _Result]) -> _Result:
        """Return a call's result; raises what it raises, or StoreLate."""
        permit = self._breaker.enter()
        if permit is None:
            raise StoreLate("the store was too slow several times in a row and is not called for a few seconds")
        if self.waiting >= _MOST_WAITING:
            permit.abandoned()
            raise StoreLate(f"{_MOST_WAITING} calls wait for the store already")

        def ended(working: "asyncio.Future[_Result]") -> None:
            self._threads.release()
            if not working.cancelled():
                working.exception()  # retrieved, since a caller that gave up never asks

        self.waiting += 1
        try:
            with anyio.fail_after(self._seconds):
                await self._threads.acquire()
                working = call_in_thread(call, "everalign-store")
                working.add_done_callback(ended)
                # A caller that gives up leaves the call running, and its thread taken.
                result = await asyncio.shield(working)
        except TimeoutError:
            permit.failed()
            raise StoreLate(f"the store did not answer within {self._seconds:g} seconds") from None
        except asyncio.CancelledError:
            permit.abandoned()
            raise
        except BaseException:
            permit.succeeded()  # an error is a response, too
            raise
        finally:
            self.waiting -= 1
        permit.succeeded()
        return result


class AsyncStore:
    """A store for use in an event loop.

    `failed` is called for each exchange that could not be stored. A call that takes longer than `seconds` raises
    StoreLate.
    """

    def __init__(self, store: "FeedbackStore", failed: Callable[[], None] = lambda: None, seconds: float = 5.0) -> None:
        self._store, self._failed, self._seconds = store, failed, seconds
        self.writes, self._reads = _ThreadLane(_WRITERS, seconds), _ThreadLane(_READERS, seconds)

    async def add_exchange(self, exchange: Exchange) -> bool:
        """Return whether an exchange was stored; never raises, since the client's answer does not depend on it."""
        try:
            await self.writes.run(lambda: self._store.add_exchange(exchange))
        except Exception as error:  # noqa: BLE001 (whatever a database raises, the answer is delivered)
            # Ours say what the store's operator can do, and repeat no text.
            reason = str(error) if isinstance(error, EveralignError) else type(error).__name__
            _log.error("exchange %s could not be kept: %s", exchange.id, reason)
            self._failed()
            return False
        return True

    async def add_feedback(self, feedback: Feedback) -> bool:
        """Add feedback; errors of the store, and StoreLate."""
        return await self.writes.run(lambda: self._store.add_feedback(feedback))

    async def read(self, call: Callable[["FeedbackStore"], _Result]) -> _Result:
        """Return what a reading call of the store returns; errors as in `add_feedback`."""
        return await self._reads.run(lambda: call(self._store))

    async def close(self) -> None:
        """Finish writing and close the store; a store that hangs is abandoned."""
        closing = call_in_thread(self._store.close, "everalign-store")
        await asyncio.wait({closing}, timeout=2 * self._seconds)
        if closing.done():
            closing.result()
        else:
            _log.error(
                "the store could not be closed within %g seconds; what waited may not be kept", 2 * self._seconds
            )


@dataclass
class RequestTimer:
    """Where one request's time went, and how it ended."""

    upstream: Stopwatch = field(default_factory=Stopwatch)
    corrector: Stopwatch = field(default_factory=Stopwatch)
    outcome: str = "failed"
    reason: str = "internal_error"

    def end(self, summary: Summary) -> None:
        self.outcome, self.reason = summary.outcome, summary.reason or ""


class RequestLog:
    """Counts requests, stores exchanges, and corrects in the background in shadow mode."""

    def __init__(
        self, metrics: Metrics, store: AsyncStore | None, corrections: CorrectionService, longest: int
    ) -> None:
        self._metrics, self._store, self._corrections, self._longest = metrics, store, corrections, longest
        self.has_store = store is not None
        self._background: set[asyncio.Task[None]] = set()

    @contextmanager
    def timed(self, request: RequestContext) -> Iterator[RequestTimer]:
        """Time a request and count it, however it ends."""
        timer = RequestTimer()
        try:
            yield timer
        except (GatewayError, asyncio.CancelledError) as error:
            code = (error.code or str(error.status)) if isinstance(error, GatewayError) else "client_gone"
            timer.outcome, timer.reason = "failed", code
            raise
        finally:
            reason = timer.reason if timer.outcome != "failed" or timer.reason in _CODES else "other"
            self._metrics.requests.labels(request.mode, timer.outcome, reason).inc()
            upstream, corrector = timer.upstream.seconds, timer.corrector.seconds
            self._metrics.upstream_seconds.labels(request.upstream.name).observe(upstream)
            if corrector:
                self._metrics.corrector_seconds.observe(corrector)
            elapsed = time.perf_counter() - request.started
            self._metrics.timeline.add(timer.outcome, elapsed)
            self._metrics.overhead_seconds.observe(max(0.0, elapsed - upstream - corrector))

    async def store(
        self,
        request: RequestContext,
        choices: Sequence[Choice],
        returned: str,
        summary: Summary,
        usage: dict[str, Any] | None,
    ) -> bool:
        """Store an exchange, with its first answer, if the request allows it; return whether it is stored."""
        if self._store is None or not request.keep or not choices:
            return False
        make = partial(
            Exchange,
            id=request.id,
            created=datetime.now(timezone.utc),
            key_id=request.key_id,
            upstream=request.upstream.name,
            model=request.model,
            messages=tuple(request.messages),
            original=choices[0].text,
            returned=returned,
            outcome=summary.outcome,
            reason=summary.reason,
            mode=request.mode,
            corrector=summary.version,
            template=summary.template,
            usage=usage or {},
        )
        # An exchange checks all its texts, which takes long for long ones.
        contents = [returned, *(message.get("content") or "" for message in request.messages)]
        short = all(isinstance(one, str) for one in contents) and sum(map(len, contents)) <= AT_ONCE
        try:
            exchange = make() if short else await to_thread.run_sync(make)
        except InputError as error:
            # U+0000 or half a surrogate pair, which no database can store, but a client can get.
            _log.error("exchange %s could not be kept: %s", request.id, type(error).__name__)
            self._metrics.store_failures.inc()
            return False
        return await self._store.add_exchange(exchange)

    def shadow(self, request: RequestContext, choices: Sequence[Choice]) -> None:
        """Correct answers in the background, for the metrics only."""
        for choice in choices:
            reason = request.rule or why_not_corrected(choice, self._longest)
            if reason is not None:
                self._metrics.shadow.labels("skipped", reason).inc()
                continue
            task = asyncio.get_running_loop().create_task(self._correct(request, choice))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _correct(self, request: RequestContext, choice: Choice) -> None:
        assert request.question is not None  # else a rule holds
        started = time.perf_counter()
        try:
            found = await self._corrections.correct(request.question, choice.text, request.key_id)
        except CorrectionFailed as failed:
            self._metrics.shadow.labels("failed", failed.reason).inc()
            return
        self._metrics.corrector_seconds.observe(time.perf_counter() - started)
        await count_edits(self._metrics, choice.text, found)
        self._metrics.shadow.labels(found.outcome, found.reason or "").inc()

    async def close(self) -> None:
        """Cancel background corrections, and finish writing to the store."""
        await cancel(*self._background)
        if self._store is not None:
            await self._store.close()
