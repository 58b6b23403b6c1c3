"""A stream's answer, corrected sentence by sentence while the upstream writes it.

One task reads the upstream, another corrects and writes: however long a correction takes, the upstream is read, and the
next correction is of all sentences that have ended meanwhile. What was written is never taken back. If the corrector
fails after that, the rest of the answer leaves as it comes.
"""

import asyncio
from dataclasses import replace
from typing import Protocol

from everalign.correction.engines import Begun
from everalign.correction.sentences import GrowingCorrection
from everalign.data.rows import check_text
from everalign.errors import InputError
from everalign.serving.chat_request import RequestContext
from everalign.serving.corrector_service import Correction, CorrectionFailed, CorrectionService
from everalign.serving.eligibility import offers_tools
from everalign.serving.errors import uncorrected
from everalign.serving.telemetry import Stopwatch


class TextWriter(Protocol):
    """Writes a correction to a client while it is being decoded."""

    @property
    def written(self) -> str:
        """The text that the client has."""
        ...

    async def write(self, text: str) -> None:
        """Write a further piece of the text."""
        ...


def may_leave_early(request: RequestContext) -> bool:
    """Whether sentences of an answer may be corrected before the whole answer is known to be one that is corrected.

    Not if it may turn out to be a call of a tool, and not if there are several answers.
    """
    body = request.payload
    tools = offers_tools(body) or (request.api == "responses" and body.get("prompt"))  # a stored prompt may offer some
    return request.mode == "correct" and request.rule is None and not tools and body.get("n") in (None, 1)


class SentenceStream:
    """The beginning of one answer's correction, as far as it left while the answer came.

    Args:
        request: what was asked; its answer may be corrected.
        corrections: the corrector in service; this answer's sentences are all corrected by the same one.
        writer: writes to the client.
        longest: most characters of an answer that is corrected.
        fails_closed: whether an error takes the place of text that could not be corrected.
        stopwatch: counts the corrector's time.

    Attributes:
        failed: why the corrector was given up for this answer; None if it was not.
        last: its last correction, with the usage of all of them; None if there was none.
    """

    def __init__(
        self,
        request: RequestContext,
        corrections: CorrectionService,
        writer: TextWriter,
        longest: int,
        fails_closed: bool,
        stopwatch: Stopwatch,
    ) -> None:
        self.failed: str | None = None
        self.last: Correction | None = None
        self.by = corrections.in_service
        self._request, self._corrections, self._writer = request, corrections, writer
        self._longest, self._fails_closed, self._stopwatch = longest, fails_closed, stopwatch
        self._growing = GrowingCorrection()
        self._news, self._ended = asyncio.Event(), False
        self._uncorrected: list[str] = []  # what came since the corrector was given up, and was not written yet
        self._passes_on = False

    @property
    def begun(self) -> Begun:
        """The corrected text that has left, and how much of the answer it stands for."""
        return self._growing.begun

    @property
    def answer(self) -> str:
        """The upstream's text, up to where the corrector was given up."""
        return self._growing.answer

    @property
    def written(self) -> str:
        """The text that the client has."""
        return self._writer.written

    def add(self, text: str) -> None:
        """Take what came of the answer's text."""
        if self.failed is None and len(self.answer) + len(text) > self._longest:
            self.failed = "too_long"
        if self.failed is None:
            self._growing.add(text)
        else:
            self._uncorrected.append(text)
        self._news.set()

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self._news.set()

    async def run(self) -> None:
        """Correct and write whole sentences until the answer has ended; raises GatewayError if it is withheld."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._ended:
                return
            answer = None if self.failed else self._growing.next_answer()
            if answer is not None:
                await self._correct(answer)
            if self.failed and self.begun.text:
                await self._pass_on()

    async def _pass_on(self) -> None:
        """Write what has come of the rest of the answer."""
        rest = ["" if self._passes_on else self.begun.rest(self.answer), *self._uncorrected]
        self._passes_on = True
        self._uncorrected.clear()
        if text := "".join(rest):
            await self._writer.write(text)

    async def _correct(self, answer: str) -> None:
        """Correct the answer so far, and write what may leave."""
        try:
            check_text(answer, "answer")
            assert self._request.question is not None  # else a rule holds
            asked = self._request.question, answer, self._request.key_id
            with self._stopwatch:
                found = await self._corrections.correct(*asked, begun=self.begun, by=self.by)
        except InputError:
            self.failed = "unreadable"
            return
        except CorrectionFailed as failed:
            self.failed = failed.reason
            if failed.reason == "stopped" or self._fails_closed:
                raise uncorrected(failed.reason, 503, again=True) from None
            return
        self.last = self.with_usage(found)
        if found.reason == "too_long":  # for the corrector: the answer only gets longer
            self.failed = "too_long"
        if self.failed or found.rejected:
            return
        # In a thread, as the comparison of two long texts takes a while.
        if text := await asyncio.to_thread(self._growing.accept, answer, found.text):
            await self._writer.write(text)

    def with_usage(self, found: Correction) -> Correction:
        """Return a further correction of this answer with the usage of all of them."""
        return found if self.last is None else replace(found, usage=self.last.usage + found.usage)
