"""Request log: counts for every request, whole exchanges where that was asked for."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio
from anyio import to_thread

from everalign.deadlines import call_in_thread
from everalign.errors import EveralignError, InputError
from everalign.serving.chat_request import RequestContext
from everalign.serving.circuit_breaker import CircuitBreaker
from everalign.serving.completion_json import Choice
from everalign.serving.corrector_service import CorrectionFailed, CorrectionService
from everalign.serving.decide import Summary
from everalign.serving.eligibility import why_not_corrected
from everalign.serving.errors import GatewayError
from everalign.serving.limits import AT_ONCE
from everalign.serving.store.records import Exchange, Feedback
from everalign.serving.telemetry import Metrics

if TYPE_CHECKING:
    from everalign.serving.store.database import StoreStats

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

# A store's writers wait for a common commit: more of them than this make it no faster.
_WRITERS, _READERS = 16, 4
_MOST_WAITING = 1000
_FAILURES = 3  # that were too late, one after the other, before it is left alone


class Store(Protocol):
    """Keeps exchanges and feedback; blocking, and used by several threads."""

    def add_exchange(self, exchange: Exchange) -> None:
        """Keep an exchange; durable when it returns."""
        ...

    def add_feedback(self, feedback: Feedback) -> bool:
        """Keep feedback, durable when it returns; False if it replaces earlier one, UnknownExchange if on none."""
        ...

    def exchange(self, id: str, key_id: str | None = None) -> Exchange | None:
        """Return an exchange; of one key only, if it is given."""
        ...

    def stats(self) -> "StoreStats":
        """Count what there is."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


class StoreLate(EveralignError):  # noqa: N818 (what is wrong is in the name)
    """A store that did not do something in time, or that has too much to do."""


class _Lane:
    """Calls of a store, a few at once; those whose turn does not come in time are not made."""

    def __init__(self, threads: int, seconds: float) -> None:
        self._places, self._seconds = asyncio.Semaphore(threads), seconds
        self._breaker = CircuitBreaker(_FAILURES, seconds)
        self.waiting = 0

    async def run(self, call: Callable[[], _Result]) -> _Result:
        """Return what a call of the store returns; raises what it raises, and StoreLate."""
        permit = self._breaker.enter()
        if permit is None:
            raise StoreLate("the store did not answer in time again and again, and is left alone for a few seconds")
        if self.waiting >= _MOST_WAITING:
            permit.abandoned()
            raise StoreLate(f"{_MOST_WAITING} calls wait for the store already")
        self.waiting += 1
        try:
            with anyio.fail_after(self._seconds):
                await self._places.acquire()
                working = call_in_thread(call, "everalign-store")
                working.add_done_callback(self._ended)
                # Whoever gives up leaves the call at work, in its place.
                result = await asyncio.shield(working)
        except TimeoutError:
            permit.failed()
            raise StoreLate(f"the store did not answer within {self._seconds:g} seconds") from None
        except asyncio.CancelledError:
            permit.abandoned()
            raise
        except BaseException:
            permit.succeeded()  # it answers
            raise
        finally:
            self.waiting -= 1
        permit.succeeded()
        return result

    def _ended(self, working: "asyncio.Future[Any]") -> None:
        self._places.release()
        if not working.cancelled():
            working.exception()  # who gave up does not ask for it


class AsyncStore:
    """A store, used from an event loop.

    Args:
        store: what it writes to.
        failed: called once for each exchange that could not be kept.
        seconds: within which something is kept or read; else StoreLate is raised.
    """

    def __init__(self, store: Store, failed: Callable[[], None] = lambda: None, seconds: float = 5.0) -> None:
        self._store, self._failed, self._seconds = store, failed, seconds
        self._writes, self._reads = _Lane(_WRITERS, seconds), _Lane(_READERS, seconds)

    @property
    def waiting(self) -> int:
        """How many writes wait or are under way."""
        return self._writes.waiting

    async def add_exchange(self, exchange: Exchange) -> bool:
        """Return whether an exchange is kept: the client's answer does not depend on it."""
        try:
            await self._writes.run(lambda: self._store.add_exchange(exchange))
        except Exception as error:  # noqa: BLE001 (whatever a database raises, the answer is there and is delivered)
            _log.error("exchange %s could not be kept: %s", exchange.id, type(error).__name__)
            self._failed()
            return False
        return True

    async def add_feedback(self, feedback: Feedback) -> bool:
        """Keep feedback; errors as the store's, and StoreLate."""
        return await self._writes.run(lambda: self._store.add_feedback(feedback))

    async def exchange(self, id: str, key_id: str) -> Exchange | None:
        """Return an exchange of a key; None where that key has none of this id. Errors as in `add_feedback`."""
        return await self._reads.run(lambda: self._store.exchange(id, key_id))

    async def stats(self) -> "StoreStats":
        """Return the store's counts; errors as in `add_feedback`."""
        return await self._reads.run(self._store.stats)

    async def close(self) -> None:
        """Finish what is being written, and close the store; one that hangs is left."""
        closing = call_in_thread(self._store.close, "everalign-store")
        await asyncio.wait({closing}, timeout=2 * self._seconds)
        if closing.done():
            closing.result()
        else:
            _log.error(
                "the store could not be closed within %g seconds; what waited may not be kept", 2 * self._seconds
            )


class Record:
    """Where the time of one request went, and how it ended."""

    def __init__(self) -> None:
        self.upstream_seconds = self.corrector_seconds = 0.0
        self.outcome, self.reason = "failed", "internal_error"

    @contextmanager
    def in_upstream(self) -> Iterator[None]:
        """What happens inside is the upstream's time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.upstream_seconds += time.perf_counter() - started

    @contextmanager
    def in_corrector(self) -> Iterator[None]:
        """What happens inside is the corrector's time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.corrector_seconds += time.perf_counter() - started

    def end(self, found: Summary) -> None:
        """The client gets its answer."""
        self.outcome, self.reason = found.outcome, found.reason or ""


class Recorder:
    """Remembers.

    Args:
        metrics: counts.
        keeper: keeps exchanges; None where there is no store.
        corrections: asked in the background, in shadow mode.
        longest: characters of an answer that the corrector is given.
    """

    def __init__(
        self, metrics: Metrics, keeper: AsyncStore | None, corrections: CorrectionService, longest: int
    ) -> None:
        self._metrics, self._keeper, self._corrections, self._longest = metrics, keeper, corrections, longest
        self._background: set[asyncio.Task[None]] = set()

    @property
    def keeps(self) -> bool:
        """Whether there is a store."""
        return self._keeper is not None

    @contextmanager
    def counted(self, call: RequestContext) -> Iterator[Record]:
        """Count a request, however it ends."""
        record = Record()
        try:
            yield record
        except GatewayError as error:
            record.outcome, record.reason = "failed", error.code or str(error.status)
            raise
        except asyncio.CancelledError:
            record.outcome, record.reason = "failed", "client_gone"
            raise
        finally:
            self._count(call, record)

    def _count(self, call: RequestContext, record: Record) -> None:
        # Codes of upstreams are theirs to choose: as labels they could be without number.
        known = record.reason if record.outcome != "failed" or record.reason in _CODES else "other"
        self._metrics.requests.labels(call.mode, record.outcome, known).inc()
        self._metrics.upstream_seconds.labels(call.upstream.name).observe(record.upstream_seconds)
        if record.corrector_seconds:
            self._metrics.corrector_seconds.observe(record.corrector_seconds)
        spent = time.perf_counter() - call.started - record.upstream_seconds - record.corrector_seconds
        self._metrics.overhead_seconds.observe(max(0.0, spent))

    async def keep(
        self,
        call: RequestContext,
        choices: Sequence[Choice],
        returned: str,
        found: Summary,
        usage: dict[str, Any] | None,
    ) -> bool:
        """Keep an exchange, if it is to be; of several answers the first one. Return whether it is kept."""
        if self._keeper is None or not call.keep or not choices:
            return False
        make = partial(
            Exchange,
            id=call.id,
            created=datetime.now(timezone.utc),
            key_id=call.key_id,
            upstream=call.upstream.name,
            model=call.model,
            messages=tuple(call.messages),
            original=choices[0].text,
            returned=returned,
            outcome=found.outcome,
            reason=found.reason,
            mode=call.mode,
            corrector=found.version,
            template=found.template,
            usage=usage or {},
        )
        # Each text in it is looked at, which takes long where they are.
        contents = [returned, *(message.get("content") or "" for message in call.messages)]
        short = all(isinstance(one, str) for one in contents) and sum(map(len, contents)) <= AT_ONCE
        try:
            exchange = make() if short else await to_thread.run_sync(make)
        except InputError as error:
            # Texts may hold what no database keeps: U+0000, half a surrogate pair. They are delivered all the same.
            _log.error("exchange %s could not be kept: %s", call.id, type(error).__name__)
            self._metrics.store_failures.inc()
            return False
        return await self._keeper.add_exchange(exchange)

    def shadow(self, call: RequestContext, choices: Sequence[Choice]) -> None:
        """Correct answers in the background, for the numbers alone."""
        for choice in choices:
            reason = call.rule or why_not_corrected(choice, self._longest)
            if reason is not None:
                self._metrics.shadow.labels("skipped", reason).inc()
                continue
            task = asyncio.get_running_loop().create_task(self._correct(call, choice))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _correct(self, call: RequestContext, choice: Choice) -> None:
        from everalign.serving.decide import edit_share

        assert call.question is not None  # else a rule holds
        started = time.perf_counter()
        try:
            found = await self._corrections.correct(call.question, choice.text, call.key_id)
        except CorrectionFailed as failed:
            self._metrics.shadow.labels("failed", failed.reason).inc()
            return
        self._metrics.corrector_seconds.observe(time.perf_counter() - started)
        self._metrics.count_effort(found.usage)
        self._metrics.edited.observe(await edit_share(choice.text, found.text))
        self._metrics.shadow.labels(found.outcome, found.reason or "").inc()

    async def close(self) -> None:
        """Give up what is done in the background, and finish what is written."""
        for task in tuple(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._keeper is not None:
            await self._keeper.close()


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
            *("unfinished", "empty", "echo", "growth", "code", "url"),
        )
    ),
}
