"""What is remembered of requests: numbers of all, and whole exchanges where that was asked for."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from typing import Any

from anyio import to_thread

from everalign.errors import InputError
from everalign.serving.answers import Choice
from everalign.serving.correcting import CorrectionFailed, CorrectionService
from everalign.serving.errors import GatewayError
from everalign.serving.json_size import AT_ONCE
from everalign.serving.judging import Summary
from everalign.serving.keeping import Keeper
from everalign.serving.metrics import Metrics
from everalign.serving.policy import answer_rule
from everalign.serving.requests import ChatCall
from everalign.serving.store.records import Exchange

_log = logging.getLogger(__name__)


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

    def __init__(self, metrics: Metrics, keeper: Keeper | None, corrections: CorrectionService, longest: int) -> None:
        self._metrics, self._keeper, self._corrections, self._longest = metrics, keeper, corrections, longest
        self._background: set[asyncio.Task[None]] = set()

    @property
    def keeps(self) -> bool:
        """Whether there is a store."""
        return self._keeper is not None

    @contextmanager
    def counted(self, call: ChatCall) -> Iterator[Record]:
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

    def _count(self, call: ChatCall, record: Record) -> None:
        # Codes of upstreams are theirs to choose: as labels they could be without number.
        known = record.reason if record.outcome != "failed" or record.reason in _CODES else "other"
        self._metrics.requests.labels(call.mode, record.outcome, known).inc()
        self._metrics.upstream_seconds.labels(call.upstream.name).observe(record.upstream_seconds)
        if record.corrector_seconds:
            self._metrics.corrector_seconds.observe(record.corrector_seconds)
        spent = time.perf_counter() - call.started - record.upstream_seconds - record.corrector_seconds
        self._metrics.overhead_seconds.observe(max(0.0, spent))

    async def keep(
        self, call: ChatCall, choices: Sequence[Choice], returned: str, found: Summary, usage: dict[str, Any] | None
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
            model=call.body["model"],
            messages=tuple(call.body["messages"]),
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
        contents = [returned, *(message.get("content") or "" for message in call.body["messages"])]
        short = all(isinstance(one, str) for one in contents) and sum(map(len, contents)) <= AT_ONCE
        try:
            exchange = make() if short else await to_thread.run_sync(make)
        except InputError as error:
            # Texts may hold what no database keeps: U+0000, half a surrogate pair. They are delivered all the same.
            _log.error("exchange %s could not be kept: %s", call.id, type(error).__name__)
            self._metrics.unkept.inc()
            return False
        return await self._keeper.add_exchange(exchange)

    def shadow(self, call: ChatCall, choices: Sequence[Choice]) -> None:
        """Correct answers in the background, for the numbers alone."""
        for choice in choices:
            reason = call.rule or answer_rule(choice, self._longest)
            if reason is not None:
                self._metrics.shadow.labels("skipped", reason).inc()
                continue
            task = asyncio.get_running_loop().create_task(self._correct(call, choice))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _correct(self, call: ChatCall, choice: Choice) -> None:
        from everalign.serving.judging import edited

        assert call.question is not None  # else a rule holds
        started = time.perf_counter()
        try:
            found = await self._corrections.correct(call.question, choice.text, call.key_id)
        except CorrectionFailed as failed:
            self._metrics.shadow.labels("failed", failed.reason).inc()
            return
        self._metrics.corrector_seconds.observe(time.perf_counter() - started)
        self._metrics.count_effort(found.effort)
        self._metrics.edited.observe(await edited(choice.text, found.text))
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
