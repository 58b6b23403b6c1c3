"""The corrector in service: answers wait for it in a bounded queue, and it can be exchanged while it works.

    service = CorrectionService(corrector, "v3")
    correction = await service.correct(question, answer)
    service.swap(better, "v4")          # those that wait already are still corrected by v3

A corrector blocks, so it works in threads. Answers that wait are corrected together; one that waits alone, and whose
client reads a stream, is given in pieces while it is written. Keys take turns, and none has all the threads. What
takes too long, or nobody waits for any more, is told to end; a thread that does not is left, and another takes its
place.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from everalign.deadlines import Deadline, DeadlineOver, call_in_thread
from everalign.errors import InputError
from everalign.serving.completion_json import CorrectorUsage
from everalign.serving.limits import FairQueue
from everalign.serving.upstream_transport import CircuitBreaker, Permit

if TYPE_CHECKING:
    from everalign.correction.corrector import Corrected
    from everalign.correction.templates import Question, Template

_log = logging.getLogger(__name__)

# With these the corrector, or who approves of corrections, has found that the answer may stay as it is.
_VERDICTS = (None, "gate", "not_better")

_MOMENT = 0.1  # seconds
_GRACE = 2.0  # seconds in which a thread that is told to end may do so
_MOST_STUCK = 8  # threads that did not end, and in whose place others work


class AnyCorrector(Protocol):
    """What corrects, such as `everalign.correction.Corrector`."""

    @property
    def template(self) -> "Template":
        """What it reads."""
        ...

    def correct_batch(self, pairs: Sequence[tuple["Question", str]], /) -> list["Corrected"]:
        """Return answers corrected, in the order given."""
        ...

    def stream_events(self, question: "Question", answer: str, /) -> "Iterator[str | Corrected]":
        """Yield the beginning of a correction in pieces, and finally the result, whose text continues them."""
        ...


@dataclass(frozen=True)
class Correction:
    """What became of an answer.

    Args:
        text: the correction, or the answer.
        outcome: `applied`, `unchanged` (the corrector's verdict), or `skipped` where a correction was refused.
        reason: why it is not applied, if there is more to say than that.
        version: of the corrector.
        template: id of its template.
        effort: what it took.
        seconds: in the corrector, for all that were corrected together.
    """

    text: str
    outcome: str
    reason: str | None
    version: str
    template: str
    effort: CorrectorUsage
    seconds: float


class CorrectionFailed(Exception):  # noqa: N818 (what is wrong is in the name)
    """No correction came: `corrector_error`, `corrector_timeout`, `corrector_down`, `queue_full` or `no_corrector`.

    `rolled_back` and `stopped` where a corrector was withdrawn (see `CorrectionService.withdraw`).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _NotInTime(Exception):  # noqa: N818 (what is wrong is in the name)
    """A corrector that nobody waits for any more."""


@dataclass(frozen=True)
class _Loaded:
    corrector: AnyCorrector
    version: str
    template: str
    breaker: CircuitBreaker


@dataclass
class _Job:
    key: str
    question: "Question"
    answer: str
    loaded: _Loaded
    permit: Permit
    wants_pieces: bool
    until: float
    events: "asyncio.Queue[str | Correction | CorrectionFailed]" = field(default_factory=asyncio.Queue)
    batch: "_Batch | None" = None
    gone: bool = False
    alone: bool = False


class _Batch:
    """Answers that are corrected together, and until when."""

    def __init__(self, jobs: list[_Job]) -> None:
        self.jobs = jobs
        self.deadline = Deadline(max(job.until for job in jobs) - time.monotonic())
        self.left = asyncio.Event()

    def leave(self) -> None:
        """End where nobody waits for any of them."""
        if all(job.gone for job in self.jobs):
            self.left.set()


class CorrectionService:
    """Corrects for many at once. Used in one event loop.

    Args:
        corrector: the first one; None to begin without.
        version: what it is called.
        timeout: seconds for one correction, waiting and all attempts included.
        waiting: most answers that wait.
        batch: most answers corrected together.
        threads: corrections under way at once: one for a model in this process, more for one on a server.
        breaker: makes what counts a corrector's failures: one that only fails is left alone for a while.
    """

    def __init__(
        self,
        corrector: AnyCorrector | None = None,
        version: str = "1",
        *,
        timeout: float = 60.0,
        waiting: int = 256,
        batch: int = 16,
        threads: int = 1,
        breaker: Callable[[], CircuitBreaker] = CircuitBreaker,
    ) -> None:
        self._loaded: _Loaded | None = None
        self._withdrawn: tuple[str, str] | None = None
        self._timeout, self._batch, self._threads = timeout, batch, threads
        self._make_breaker, self._no_breaker = breaker, breaker()
        self._waiting = FairQueue[_Job](waiting)
        self._working: set[asyncio.Task[None]] = set()
        self._held: Counter[str] = Counter()  # by key, answers that are being corrected
        self._stuck = 0
        if corrector is not None:
            self.swap(corrector, version)

    def swap(self, corrector: AnyCorrector, version: str) -> None:
        """Let another corrector correct what comes from now on; may be called in any thread.

        Answers that wait or are being corrected are finished by the former one.
        """
        # One assignment: a request sees the former or the new one, never half of each.
        self._loaded = _Loaded(corrector, version, corrector.template.id, self._make_breaker())
        self._withdrawn = None

    def withdraw(self, version: str, reason: str) -> None:
        """Correct nothing from now on, until another corrector comes; what waits is finished by the former one.

        Args:
            version: what the state without a corrector is called.
            reason: why there are no corrections: `rolled_back`, or `stopped` where no answer may leave without.
        """
        self._withdrawn, self._loaded = (version, reason), None

    @property
    def withdrawn(self) -> bool:
        """Whether the corrector was taken out of service."""
        return self._withdrawn is not None

    @property
    def version(self) -> str | None:
        """What the corrector is called, or the state without one that was withdrawn; None where there is none."""
        loaded, withdrawn = self._loaded, self._withdrawn
        return loaded.version if loaded else withdrawn[0] if withdrawn else None

    @property
    def template(self) -> str | None:
        """Its template's id."""
        loaded = self._loaded
        return loaded.template if loaded else None

    @property
    def depth(self) -> int:
        """How many answers wait."""
        return len(self._waiting)

    @property
    def breaker(self) -> CircuitBreaker:
        """Counts the corrector's failures."""
        loaded = self._loaded
        return loaded.breaker if loaded else self._no_breaker

    async def correct(self, question: "Question", answer: str, key: str = "") -> Correction:
        """Return an answer of a key corrected; raises CorrectionFailed. Cancelled, it gives up its place."""
        job = self._submit(question, answer, key, False)
        with self._attended(job):
            while not isinstance(event := await self._event(job), Correction):
                pass
            return event

    async def follow(
        self, question: "Question", answer: str, key: str = ""
    ) -> AsyncGenerator["str | Correction", None]:
        """Yield a correction in pieces, as far as they come, and at last all of it; raises CorrectionFailed.

        Where all of it is there a moment after the first piece, there are no pieces: the verdict is known at once.
        """
        job = self._submit(question, answer, key, True)
        with self._attended(job):
            event: str | Correction | None = await self._event(job)
            held, until = "", time.monotonic() + _MOMENT
            while isinstance(event, str):
                held += event
                event = await self._event(job, until)
            if isinstance(event, Correction):
                yield event
                return
            yield held
            while not isinstance(event := await self._event(job), Correction):
                assert event is not None  # without another time limit
                yield event
            yield event

    async def _event(self, job: _Job, until: float | None = None) -> "str | Correction | None":
        """Return what comes next; None where nothing has come until then."""
        least = job.until if until is None else min(until, job.until)
        try:
            event = await asyncio.wait_for(job.events.get(), max(0.0, least - time.monotonic()))
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

    @contextmanager
    def _attended(self, job: _Job) -> Iterator[None]:
        """A job is done for somebody: when nobody waits for it any more, it is left."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            job.permit.abandoned()
            raise
        finally:
            job.gone = True
            if job.batch is not None:
                job.batch.leave()

    async def close(self) -> None:
        """Take no more; what is being corrected in a thread is told to end, and not waited for."""
        for task in tuple(self._working):
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)

    def _submit(self, question: "Question", answer: str, key: str, pieces: bool) -> _Job:
        loaded = self._loaded
        if loaded is None:
            raise CorrectionFailed(self._withdrawn[1] if self._withdrawn else "no_corrector")
        permit = loaded.breaker.enter(key)
        if permit is None:
            raise CorrectionFailed("corrector_down")
        job = _Job(key, question, answer, loaded, permit, pieces, time.monotonic() + self._timeout)
        given_way = self._waiting.put(job)
        if given_way is not None:
            given_way.permit.abandoned()
        if given_way is job:
            raise CorrectionFailed("queue_full")
        if given_way is not None:
            given_way.events.put_nowait(CorrectionFailed("queue_full"))
        self._dispatch()
        return job

    def _dispatch(self) -> None:
        """Begin as much of what waits as there are threads for."""
        while len(self._working) + max(0, self._stuck - _MOST_STUCK) < self._threads and (jobs := self._next()):
            task = asyncio.get_running_loop().create_task(self._work(jobs))
            self._working.add(task)
            self._held.update(job.key for job in jobs)
            task.add_done_callback(lambda task, jobs=jobs: self._worked(task, jobs))  # type: ignore[misc]

    def _worked(self, task: "asyncio.Task[None]", jobs: list[_Job]) -> None:
        self._working.discard(task)
        for job in jobs:
            self._held[job.key] -= 1
        self._held = +self._held
        if not task.cancelled():
            task.result()
            self._dispatch()

    def _next(self) -> list[_Job]:
        """Take those that wait for the same corrector, each key's in their order; what spoilt others, alone."""
        free = self._threads - len(self._working)
        found: list[_Job] = []

        def may(job: _Job) -> bool:
            # A key has no more threads than are free: however many answers of it hang, others find some.
            if self._threads > 1 and self._held[job.key] >= free:
                return False
            return not found or (job.loaded is found[0].loaded and not job.alone)

        while len(found) < self._batch and not (found and found[0].alone):
            job = self._waiting.take(may)
            if job is None:
                break
            found.append(job)
        return found

    async def _work(self, jobs: list[_Job]) -> None:
        batch = _Batch(jobs)
        for job in jobs:
            job.batch = batch
        batch.leave()  # who is gone by now
        try:
            found = await self._corrected(batch)
        except (_NotInTime, DeadlineOver):
            return  # each is told when its own time is over
        except Exception as error:  # noqa: BLE001 (whatever a model raises, its requests must be answered)
            self._failed(jobs, error)
            return
        for job, correction in zip(jobs, found, strict=True):
            job.permit.succeeded()
            job.events.put_nowait(correction)

    async def _corrected(self, batch: _Batch) -> list[Correction]:
        """Return corrections; raises what the corrector raises, and _NotInTime where it does not end in time."""
        loop = asyncio.get_running_loop()
        first = batch.jobs[0]

        def call() -> list[Correction]:
            with batch.deadline.held():
                in_pieces = len(batch.jobs) == 1 and first.wants_pieces
                return [_followed(first, loop)] if in_pieces else _all(batch.jobs)

        working = call_in_thread(call, "everalign-corrector")
        left = asyncio.ensure_future(batch.left.wait())
        try:
            timeout = batch.deadline.left
            either: set[asyncio.Future[Any]] = {working, left}
            await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                batch.deadline.cancel()
                await asyncio.wait({working}, timeout=_GRACE)
        finally:
            batch.deadline.cancel()
            left.cancel()
        if working.done() and all(job.gone for job in batch.jobs):
            working.exception()  # nobody is left who could be told
            raise _NotInTime
        if working.done():
            return working.result()
        _log.error("a corrector does not end in time on %d answers, and its thread is left", len(batch.jobs))
        self._stuck += 1
        working.add_done_callback(self._unstuck)
        raise _NotInTime

    def _unstuck(self, working: "asyncio.Future[list[Correction]]") -> None:
        self._stuck -= 1
        if not working.cancelled():
            working.exception()  # it is too late for it
        self._dispatch()

    def _failed(self, jobs: list[_Job], error: Exception) -> None:
        """One answer may have spoilt it for the others: each is tried alone."""
        # No message: it may quote what was asked.
        _log.error("the corrector failed on %d answers: %s", len(jobs), type(error).__name__)
        for job in jobs:
            if len(jobs) > 1:
                job.alone, job.batch = True, None
                self._waiting.put_back(job)
                continue
            if isinstance(error, InputError) or getattr(error, "refused", False):
                job.permit.succeeded()  # it is there, and finds that this request cannot be answered
            else:
                job.permit.failed()
            job.events.put_nowait(CorrectionFailed("corrector_error"))


def _all(jobs: list[_Job]) -> list[Correction]:
    started, loaded = time.perf_counter(), jobs[0].loaded
    found = loaded.corrector.correct_batch([(job.question, job.answer) for job in jobs])
    seconds = time.perf_counter() - started
    return [_correction(one, loaded, seconds) for one in found]


def _followed(job: _Job, loop: asyncio.AbstractEventLoop) -> Correction:
    """Hand on pieces as they come, as long as somebody reads them."""
    started = time.perf_counter()
    for event in job.loaded.corrector.stream_events(job.question, job.answer):
        if not isinstance(event, str):
            return _correction(event, job.loaded, time.perf_counter() - started)
        if job.gone:
            return Correction(
                job.answer, "skipped", "gone", job.loaded.version, job.loaded.template, CorrectorUsage(), 0.0
            )
        with suppress(RuntimeError):  # the loop is closed: nobody reads
            loop.call_soon_threadsafe(job.events.put_nowait, event)
    raise RuntimeError("the corrector ended without a correction")


def _correction(found: "Corrected", loaded: _Loaded, seconds: float) -> Correction:
    outcome = "applied" if found.changed else "unchanged" if found.reason in _VERDICTS else "skipped"
    effort = CorrectorUsage(
        found.output_tokens, found.accepted_draft_tokens, found.rejected_draft_tokens, found.forward_passes
    )
    return Correction(found.text, outcome, found.reason, loaded.version, loaded.template, effort, seconds)
