"""The corrector in service: answers wait for it in a bounded queue, and it can be exchanged while it works.

    service = CorrectionService(corrector, "v3")
    correction = await service.correct(question, answer)
    service.swap(better, "v4")          # answers that wait already are still corrected by v3

A corrector blocks, so it works in threads. Answers that wait are corrected in batches; one that waits alone, and whose
client reads a stream, is corrected in pieces. Keys take turns, and none has all the threads. Work that takes too long,
or that nobody waits for any more, is told to stop; a thread that does not stop is abandoned, and another takes its
place.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from everalign.deadlines import Deadline, DeadlineOver, call_in_thread
from everalign.errors import InputError
from everalign.serving.limits import FairQueue
from everalign.serving.stream_response import cancel
from everalign.serving.upstream_transport import CircuitBreaker, Permit

if TYPE_CHECKING:
    from everalign.correction.corrector import Corrected, Corrector
    from everalign.correction.engines import Begun
    from everalign.correction.templates import Question

_log = logging.getLogger(__name__)

# With these reasons the corrector, or its approver, has found that the answer may stay as it is.
_UNCHANGED = (None, "gate", "not_better")

_MOMENT = 0.1  # seconds for which the pieces of a stream are held back
_GRACE = 2.0  # seconds in which a thread that is told to stop may do so
_MOST_STUCK = 8  # abandoned threads that others replace


@dataclass(frozen=True)
class CorrectorUsage:
    """What a correction cost; each number is None if the corrector does not report it.

    Args:
        tokens: tokens that the corrector wrote.
        accepted: tokens of the answer, its draft, that it accepted.
        rejected: tokens of the answer that it rejected.
        passes: forward passes.
    """

    tokens: int | None = None
    accepted: int | None = None
    rejected: int | None = None
    passes: int | None = None

    def __add__(self, other: "CorrectorUsage") -> "CorrectorUsage":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return CorrectorUsage(*(a if b is None else b if a is None else a + b for a, b in pairs))

    def beside(self, usage: dict[str, Any] | None) -> dict[str, Any]:
        """Return an upstream's usage with this one as its field `corrector`; the two are not added up."""
        details = {"accepted_prediction_tokens": self.accepted, "rejected_prediction_tokens": self.rejected}
        own = {"completion_tokens": self.tokens, "completion_tokens_details": details, "forward_passes": self.passes}
        return {**(usage or {}), "corrector": own}


@dataclass(frozen=True)
class Correction:
    """The corrector's result for an answer.

    Args:
        text: the correction, or the answer.
        outcome: `applied`, `unchanged` (the corrector's verdict), or `skipped` if its correction was rejected.
        reason: why it is not applied, or not to the end, if there is more to say.
        version: of the corrector.
        template: id of its template.
        usage: what it cost.
    """

    text: str
    outcome: str
    reason: str | None
    version: str
    template: str
    usage: CorrectorUsage

    @property
    def rejected(self) -> bool:
        """Whether the corrector's text was rejected, after what was begun of it."""
        return self.reason not in _UNCHANGED


class CorrectionFailed(Exception):  # noqa: N818 (the name says what is wrong)
    """No correction came: `corrector_error`, `corrector_timeout`, `corrector_down`, `queue_full` or `no_corrector`.

    `rolled_back` and `stopped` if the corrector was withdrawn (see `CorrectionService.withdraw`).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class InService:
    """A corrector and its name; or why there is none, and what that state is called."""

    corrector: "Corrector | None"
    version: str | None
    breaker: CircuitBreaker
    reason: str = "no_corrector"

    @property
    def template(self) -> str | None:
        return None if self.corrector is None else self.corrector.template.id

    def result(self, found: "Corrected") -> Correction:
        """Return the corrector's result as the gateway reports it."""
        accepted = found.reason in _UNCHANGED
        outcome = "applied" if found.changed else "unchanged" if accepted else "skipped"
        # The gate may have passed the rest of an answer whose beginning is changed.
        reason = None if found.changed and accepted else found.reason
        usage = CorrectorUsage(
            found.output_tokens, found.accepted_draft_tokens, found.rejected_draft_tokens, found.forward_passes
        )
        return Correction(found.text, outcome, reason, self.version or "", self.template or "", usage)


@dataclass
class _Job:
    """An answer to be corrected, and the events for whoever is waiting for it."""

    key: str
    question: "Question"
    answer: str
    by: InService  # the corrector that it came to
    permit: Permit
    wants_pieces: bool
    until: float
    begun: "Begun | None" = None
    events: "asyncio.Queue[str | Correction | CorrectionFailed]" = field(default_factory=asyncio.Queue)
    batch: "_Batch | None" = None
    gone: bool = False
    alone: bool = False


@dataclass(eq=False)
class _Batch:
    """Answers that are corrected together, by a common deadline; `left` is set when nobody waits for them."""

    jobs: list[_Job]
    deadline: Deadline
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def stop_if_left(self) -> None:
        """Stop the work if nobody waits for any of the answers."""
        if all(job.gone for job in self.jobs):
            self.left.set()


class CorrectionService:
    """Corrects answers of many requests at once. Used in one event loop.

    Args:
        corrector: the first one, or what has a `Corrector`'s `template`, `correct_batch` and `stream_events`; None to
            begin without.
        version: its name.
        timeout: seconds for one correction, with waiting and all attempts.
        waiting: most answers that wait.
        batch: most answers corrected together.
        threads: batches corrected at the same time: one for a model in this process, more for one on a server.
        breaker: makes the circuit breaker of each corrector.

    Attributes:
        in_service: the corrector in service, for corrections that belong together (see `correct`).
    """

    def __init__(
        self,
        corrector: "Corrector | None" = None,
        version: str = "1",
        *,
        timeout: float = 60.0,
        waiting: int = 256,
        batch: int = 16,
        threads: int = 1,
        breaker: Callable[[], CircuitBreaker] = CircuitBreaker,
    ) -> None:
        self.in_service = InService(None, None, breaker())
        self._timeout, self._batch, self._threads = timeout, batch, threads
        self._make_breaker = breaker
        self._waiting = FairQueue[_Job](waiting)
        self._working: set[asyncio.Task[None]] = set()
        self._held: Counter[str] = Counter()  # by key, answers that are being corrected
        self._stuck = 0
        if corrector is not None:
            self.swap(corrector, version)

    def swap(self, corrector: "Corrector", version: str) -> None:
        """Put another corrector in service; may be called in any thread.

        Answers that wait or are being corrected are finished by the former one.
        """
        # One assignment: a request sees the former or the new one, never half of each.
        self.in_service = InService(corrector, version, self._make_breaker())

    def withdraw(self, version: str, reason: str) -> None:
        """Take the corrector out of service; it still finishes what waits.

        Args:
            version: name of the state without a corrector.
            reason: why there are no corrections: `rolled_back`, or `stopped` if no answer may be returned without.
        """
        self.in_service = InService(None, version, self._make_breaker(), reason)

    @property
    def withdrawn(self) -> bool:
        now = self.in_service  # read once: `swap` may be called in another thread
        return now.corrector is None and now.version is not None

    @property
    def version(self) -> str | None:
        """Name of the corrector, or of the state after it was withdrawn; None if there was no corrector."""
        return self.in_service.version

    @property
    def depth(self) -> int:
        return len(self._waiting)

    async def correct(
        self,
        question: "Question",
        answer: str,
        key: str = "",
        begun: "Begun | None" = None,
        by: InService | None = None,
    ) -> Correction:
        """Return an answer of a key corrected; raises CorrectionFailed. If cancelled, it gives up its place.

        Args:
            question: what is asked.
            answer: the answer.
            key: whose it is.
            begun: the beginning of the correction, which stays as it is.
            by: what was `in_service` when it began; what is now, when None.
        """
        with self._submitted(question, answer, key, False, begun, by) as job:
            while not isinstance(event := await self._next_event(job), Correction):
                pass
            return event

    async def stream_events(
        self, question: "Question", answer: str, key: str = ""
    ) -> AsyncGenerator["str | Correction", None]:
        """Yield the beginning of a correction in pieces, and finally the result; raises CorrectionFailed.

        Pieces are held back for a moment: if the result comes within it, it comes alone, so that a reply's headers can
        name the outcome.
        """
        with self._submitted(question, answer, key, True) as job:
            event: str | Correction | None = await self._next_event(job)
            held, until = "", time.monotonic() + _MOMENT
            while isinstance(event, str):
                held += event
                event = await self._next_event(job, until)
            if event is None:
                yield held
                while isinstance(event := await self._next_event(job), str):
                    yield event
            assert event is not None  # without another time limit
            yield event

    async def close(self) -> None:
        """Stop; threads at work are told to stop, and not waited for."""
        await cancel(*self._working)

    @contextmanager
    def _submitted(
        self,
        question: "Question",
        answer: str,
        key: str,
        wants_pieces: bool,
        begun: "Begun | None" = None,
        by: InService | None = None,
    ) -> Iterator[_Job]:
        """Queue an answer for correction while somebody waits for it; raises CorrectionFailed."""
        by = by or self.in_service
        if by.corrector is None:
            raise CorrectionFailed(by.reason)
        permit = by.breaker.enter(key)
        if permit is None:
            raise CorrectionFailed("corrector_down")
        job = _Job(key, question, answer, by, permit, wants_pieces, time.monotonic() + self._timeout, begun)
        displaced = self._waiting.put(job)
        if displaced is not None:
            displaced.permit.abandoned()
            if displaced is job:
                raise CorrectionFailed("queue_full")
            displaced.events.put_nowait(CorrectionFailed("queue_full"))
        self._dispatch()
        try:
            yield job
        except (asyncio.CancelledError, GeneratorExit):
            job.permit.abandoned()
            raise
        finally:
            job.gone = True
            if job.batch is not None:
                job.batch.stop_if_left()

    async def _next_event(self, job: _Job, until: float | None = None) -> "str | Correction | None":
        """Return the next event; None if none has come until a time before the job's own deadline."""
        deadline = job.until if until is None else min(until, job.until)
        try:
            event = await asyncio.wait_for(job.events.get(), max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            if until is not None and time.monotonic() < job.until:
                return None
            if job.batch is None:
                job.permit.abandoned()  # it waited for others all the time
            else:
                job.permit.failed()
            raise CorrectionFailed("corrector_timeout") from None
        if isinstance(event, CorrectionFailed):
            raise event
        return event

    def _dispatch(self) -> None:
        """Start work on as many waiting answers as there are threads for; when one ends, the next begins."""

        def worked(jobs: list[_Job], task: "asyncio.Task[None]") -> None:
            self._working.discard(task)
            for job in jobs:
                self._held[job.key] -= 1
            # Without the keys that hold nothing any more: there may be any number of them.
            self._held = +self._held
            if not task.cancelled():
                task.result()  # raises what is no corrector's failure, which the loop then reports
                self._dispatch()

        while len(self._working) + max(0, self._stuck - _MOST_STUCK) < self._threads and (jobs := self._next_jobs()):
            task = asyncio.get_running_loop().create_task(self._work(jobs))
            self._working.add(task)
            self._held.update(job.key for job in jobs)
            task.add_done_callback(partial(worked, jobs))

    def _next_jobs(self) -> list[_Job]:
        """Take answers that wait for the same corrector, fairly between keys; one that spoilt a batch comes alone."""
        free = self._threads - len(self._working)
        found: list[_Job] = []

        def may(job: _Job) -> bool:
            # A key gets no more threads than are free: however many of its answers hang, other keys find some.
            if self._threads > 1 and self._held[job.key] >= free:
                return False
            return not found or (job.by is found[0].by and not job.alone)

        while len(found) < self._batch and not (found and found[0].alone):
            job = self._waiting.take(may)
            if job is None:
                break
            found.append(job)
        return found

    async def _work(self, jobs: list[_Job]) -> None:
        """Correct answers together, and hand each its result or its failure."""
        batch = _Batch(jobs, Deadline(max(job.until for job in jobs) - time.monotonic()))
        for job in jobs:
            job.batch = batch
        batch.stop_if_left()  # some are gone by now
        try:
            found = await self._run(batch)
        except DeadlineOver:
            return  # each waiter notices when its own time is over
        except Exception as error:  # noqa: BLE001 (whatever a model raises, its requests must be answered)
            # No message: it may quote what was asked.
            _log.error("the corrector failed on %d answers: %s", len(jobs), type(error).__name__)
            for job in jobs:
                if len(jobs) > 1:
                    # One answer may have spoilt it for the others: each is tried alone.
                    job.alone, job.batch = True, None
                    self._waiting.put_back(job)
                    continue
                if isinstance(error, InputError) or getattr(error, "refused", False):
                    job.permit.succeeded()  # the corrector works, and refuses this request
                else:
                    job.permit.failed()
                job.events.put_nowait(CorrectionFailed("corrector_error"))
            return
        for job, correction in zip(jobs, found, strict=True):
            job.permit.succeeded()
            job.events.put_nowait(correction)

    async def _run(self, batch: _Batch) -> list[Correction]:
        """Run the corrector in a thread; raises what it raises, and DeadlineOver if it does not end in time."""
        loop = asyncio.get_running_loop()

        def call() -> list[Correction]:
            with batch.deadline.held():
                if len(batch.jobs) == 1 and batch.jobs[0].wants_pieces:
                    return [_correct_in_pieces(batch.jobs[0], loop)]
                by = batch.jobs[0].by
                assert by.corrector is not None  # else nothing was submitted to it
                pairs = [(job.question, job.answer) for job in batch.jobs]
                if any(job.begun is not None for job in batch.jobs):
                    from everalign.correction.engines import Begun

                    begun = [job.begun or Begun() for job in batch.jobs]
                    return [by.result(one) for one in by.corrector.correct_batch(pairs, begun=begun)]
                found = by.corrector.correct_batch(pairs)
                return [by.result(one) for one in found]

        working = call_in_thread(call, "everalign-corrector")
        left = asyncio.ensure_future(batch.left.wait())
        try:
            either: set[asyncio.Future[Any]] = {working, left}
            await asyncio.wait(either, timeout=batch.deadline.left, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                batch.deadline.cancel()
                await asyncio.wait({working}, timeout=_GRACE)
        finally:
            batch.deadline.cancel()
            left.cancel()
        if not working.done():
            _log.error("a corrector does not end in time on %d answers, and its thread is left", len(batch.jobs))
            self._stuck += 1
            working.add_done_callback(self._unstuck)
            raise DeadlineOver("the corrector does not stop")
        if all(job.gone for job in batch.jobs):
            working.exception()  # retrieved, though nobody is left to get it
            raise DeadlineOver("nobody waits for these answers")
        return working.result()

    def _unstuck(self, working: "asyncio.Future[list[Correction]]") -> None:
        self._stuck -= 1
        if not working.cancelled():
            working.exception()  # retrieved, though it comes too late
        self._dispatch()


def _correct_in_pieces(job: _Job, loop: asyncio.AbstractEventLoop) -> Correction:
    """Correct an answer in a thread, and hand on pieces while somebody reads them."""
    assert job.by.corrector is not None  # else nothing was submitted to it
    for event in job.by.corrector.stream_events(job.question, job.answer):
        if not isinstance(event, str):
            return job.by.result(event)
        if job.gone:
            raise DeadlineOver("nobody waits for this answer")
        with suppress(RuntimeError):  # the loop is closed: nobody reads
            loop.call_soon_threadsafe(job.events.put_nowait, event)
    raise RuntimeError("the corrector ended without a result")
