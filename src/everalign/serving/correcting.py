"""The corrector in service: answers wait for it in a bounded queue, and it can be exchanged while it works.

    service = CorrectionService(corrector, "v3")
    correction = await service.correct(question, answer)
    service.swap(better, "v4")          # those that wait already are still corrected by v3

A corrector blocks, so it works in threads. Answers that wait are corrected together; one that waits alone, and whose
client reads a stream, is given in pieces while it is written.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from everalign.serving.answers import Effort
from everalign.serving.circuit import CircuitBreaker

if TYPE_CHECKING:
    from everalign.correction.corrector import Corrected
    from everalign.correction.templates import Question, Template

_log = logging.getLogger(__name__)

# With these the corrector, or who approves of corrections, has found that the answer may stay as it is.
_VERDICTS = (None, "gate", "not_better")


class AnyCorrector(Protocol):
    """What corrects, such as `everalign.correction.Corrector`."""

    @property
    def template(self) -> "Template":
        """What it reads."""
        ...

    def correct_batch(self, pairs: Sequence[tuple["Question", str]], /) -> list["Corrected"]:
        """Return answers corrected, in the order given."""
        ...

    def follow(self, question: "Question", answer: str, /) -> "Iterator[str | Corrected]":
        """Yield a correction in pieces, and at last all of it."""
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
    effort: Effort
    seconds: float


class CorrectionFailed(Exception):  # noqa: N818 (what is wrong is in the name)
    """No correction came: `corrector_error`, `corrector_timeout`, `corrector_down`, `queue_full` or `no_corrector`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class _Loaded:
    corrector: AnyCorrector
    version: str
    template: str


@dataclass
class _Job:
    question: "Question"
    answer: str
    loaded: _Loaded
    wants_pieces: bool
    until: float
    events: "asyncio.Queue[str | Correction | CorrectionFailed]" = field(default_factory=asyncio.Queue)
    gone: bool = False


class CorrectionService:
    """Corrects for many at once. Used in one event loop.

    Args:
        corrector: the first one; None to begin without.
        version: what it is called.
        timeout: seconds for one correction, waiting included.
        waiting: most answers that wait.
        batch: most answers corrected together.
        threads: corrections under way at once: one for a model in this process, more for one on a server.
        breaker: counts failures; a corrector that only fails is left alone for a while.
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
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self._loaded: _Loaded | None = None
        self._timeout, self._most, self._batch, self._threads = timeout, waiting, batch, threads
        self._breaker = breaker or CircuitBreaker()
        self._waiting: deque[_Job] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="everalign-corrector")
        self._working: set[asyncio.Task[None]] = set()
        if corrector is not None:
            self.swap(corrector, version)

    def swap(self, corrector: AnyCorrector, version: str) -> None:
        """Let another corrector correct what comes from now on; may be called in any thread.

        Answers that wait or are being corrected are finished by the former one.
        """
        # One assignment: a request sees the former or the new one, never half of each.
        self._loaded = _Loaded(corrector, version, corrector.template.id)

    @property
    def version(self) -> str | None:
        """What the corrector is called; None where there is none."""
        loaded = self._loaded
        return loaded.version if loaded else None

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
        return self._breaker

    async def correct(self, question: "Question", answer: str) -> Correction:
        """Return an answer corrected; raises CorrectionFailed. Cancelled, it gives up its place."""
        job = self._submit(question, answer, False)
        with self._attended(job):
            while not isinstance(event := await self._event(job), Correction):
                pass
            return event

    async def follow(self, question: "Question", answer: str) -> AsyncGenerator["str | Correction", None]:
        """Yield a correction in pieces, as far as they come, and at last all of it; raises CorrectionFailed."""
        job = self._submit(question, answer, True)
        with self._attended(job):
            while not isinstance(event := await self._event(job), Correction):
                yield event
            yield event

    async def _event(self, job: _Job) -> "str | Correction":
        try:
            event = await asyncio.wait_for(job.events.get(), job.until - time.monotonic())
        except asyncio.TimeoutError:
            self._breaker.failed()
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
            self._breaker.abandoned()
            raise
        finally:
            job.gone = True

    async def close(self) -> None:
        """Take no more; what is being corrected in a thread is not waited for."""
        for task in tuple(self._working):
            task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, question: "Question", answer: str, pieces: bool) -> _Job:
        loaded = self._loaded
        if loaded is None:
            raise CorrectionFailed("no_corrector")
        if len(self._waiting) >= self._most:
            self._waiting = deque(job for job in self._waiting if not job.gone)
        if len(self._waiting) >= self._most:
            raise CorrectionFailed("queue_full")
        if not self._breaker.admits():
            raise CorrectionFailed("corrector_down")
        job = _Job(question, answer, loaded, pieces, time.monotonic() + self._timeout)
        self._waiting.append(job)
        if len(self._working) < self._threads:
            task = asyncio.get_running_loop().create_task(self._work())
            self._working.add(task)
            task.add_done_callback(self._working.discard)
        return job

    async def _work(self) -> None:
        while jobs := self._next():
            try:
                await self._run(jobs)
                self._breaker.succeeded()
            except Exception as error:  # noqa: BLE001 (whatever a model raises, its requests must be answered)
                await self._failed(jobs, error)

    async def _failed(self, jobs: list[_Job], error: Exception) -> None:
        """One answer may have spoilt it for the others: each is tried alone."""
        # No message: it may quote what was asked.
        _log.error("the corrector failed on %d answers: %s", len(jobs), type(error).__name__)
        if len(jobs) == 1:
            self._breaker.failed()
            jobs[0].events.put_nowait(CorrectionFailed("corrector_error"))
            return
        for job in jobs:
            try:
                await self._run([job])
                self._breaker.succeeded()
            except Exception as own:  # noqa: BLE001 (as above)
                await self._failed([job], own)

    def _next(self) -> list[_Job]:
        """Take those that wait for the same corrector, in their order; a lone one whose pieces are wanted, alone."""
        found: list[_Job] = []
        while self._waiting and len(found) < self._batch:
            if found and self._waiting[0].loaded is not found[0].loaded:
                break
            job = self._waiting.popleft()
            if not job.gone:
                found.append(job)
        return found

    async def _run(self, jobs: list[_Job]) -> None:
        loop = asyncio.get_running_loop()
        alone = len(jobs) == 1 and jobs[0].wants_pieces
        call: Callable[[], list[Correction]] = (lambda: [_followed(jobs[0], loop)]) if alone else (lambda: _all(jobs))
        for job, correction in zip(jobs, await loop.run_in_executor(self._pool, call), strict=True):
            job.events.put_nowait(correction)


def _all(jobs: list[_Job]) -> list[Correction]:
    started, loaded = time.perf_counter(), jobs[0].loaded
    found = loaded.corrector.correct_batch([(job.question, job.answer) for job in jobs])
    seconds = time.perf_counter() - started
    return [_correction(one, loaded, seconds) for one in found]


def _followed(job: _Job, loop: asyncio.AbstractEventLoop) -> Correction:
    """Hand on pieces as they come, as long as somebody reads them."""
    started = time.perf_counter()
    for event in job.loaded.corrector.follow(job.question, job.answer):
        if not isinstance(event, str):
            return _correction(event, job.loaded, time.perf_counter() - started)
        if job.gone:
            return Correction(job.answer, "skipped", "gone", job.loaded.version, job.loaded.template, Effort(), 0.0)
        loop.call_soon_threadsafe(job.events.put_nowait, event)
    raise RuntimeError("the corrector ended without a correction")


def _correction(found: "Corrected", loaded: _Loaded, seconds: float) -> Correction:
    outcome = "applied" if found.changed else "unchanged" if found.reason in _VERDICTS else "skipped"
    effort = Effort(found.output_tokens, found.accepted_draft_tokens, found.rejected_draft_tokens, found.forward_passes)
    return Correction(found.text, outcome, found.reason, loaded.version, loaded.template, effort, seconds)
