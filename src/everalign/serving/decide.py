"""Decides what becomes of an upstream's answer: returned as it is, replaced by its correction, or withheld.

In streams by sentence an answer is corrected while the upstream writes it. One task reads the upstream, another
corrects and writes: however long a correction takes, the upstream is read, and the next correction is of all sentences
that have ended meanwhile. What was written is never taken back. If the corrector fails after that, the rest of the
answer leaves as it comes.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from everalign.correction.sentences import GrowingCorrection
from everalign.data.rows import check_text
from everalign.errors import InputError
from everalign.serving.chat_request import RequestContext
from everalign.serving.corrector_service import Correction, CorrectionFailed, CorrectionService, CorrectorUsage
from everalign.serving.eligibility import GIVEN_IN_STRICT, Choice, offers_tools, why_not_corrected
from everalign.serving.errors import bad_upstream, uncorrected
from everalign.serving.settings import OnFailure
from everalign.serving.stream_response import FrameQueue
from everalign.serving.structured import Structure, prose_of, with_prose
from everalign.serving.telemetry import Metrics, Stopwatch

_CHANGED = "the upstream's answer is not what it streamed"
_OUTCOMES = ("applied", "skipped", "unchanged")
# Longest answer and correction, in characters, whose edits are counted exactly, in quadratic time.
_COUNTED_EXACTLY = 20_000


@dataclass(frozen=True)
class Decision:
    """What becomes of one choice of an answer.

    Args:
        text: what the client gets; None if it gets the choice as the upstream sent it.
        outcome: `applied`, `unchanged` or `skipped`.
        reason: why, if there is more to say; if applied, why the rest of the text is the upstream's.
        correction: the corrector's result, if it was asked.
        calls: checked tool calls, which a strict answer has instead of a text.
    """

    text: str | None
    outcome: str
    reason: str | None
    correction: Correction | None = None
    calls: tuple[dict[str, Any], ...] = ()

    def returned(self, choice: Choice) -> str:
        return choice.text if self.text is None else self.text


@dataclass(frozen=True)
class Summary:
    """What became of all choices of an answer.

    Args:
        outcome: `applied` if any choice was replaced, else `skipped` if any was; or `unchanged`; or `pending` for a
            stream that began before it was known.
        reason: why, if there is more to say.
        version: of the corrector, if it was asked.
        template: id of its template.
        usage: what its corrections cost.
        stored: whether the exchange is stored; None if that was not asked for, or is not known yet.
    """

    outcome: str
    reason: str | None
    version: str | None = None
    template: str | None = None
    usage: CorrectorUsage | None = None
    stored: bool | None = None

    @classmethod
    def of(cls, decisions: Sequence[Decision]) -> "Summary":
        """Return the summary of decisions, at least one."""
        first = min(decisions, key=lambda decision: _OUTCOMES.index(decision.outcome))
        corrections = [decision.correction for decision in decisions if decision.correction is not None]
        if not corrections:
            return cls(first.outcome, first.reason)
        usage = sum((one.usage for one in corrections), CorrectorUsage())
        return cls(first.outcome, first.reason, corrections[0].version, corrections[0].template, usage)

    def headers(self, request: RequestContext) -> dict[str, str]:
        found = {
            "x-everalign-id": request.id,
            "x-everalign-mode": request.mode,
            "x-everalign-correction": f"{self.outcome}; reason={self.reason}" if self.reason else self.outcome,
        }
        if self.version is not None:
            found["x-everalign-corrector"] = re.sub(r"[^\x20-\x7e]", "?", self.version)
        if self.template is not None:
            found["x-everalign-template"] = self.template
        if self.stored is not None:
            found["x-everalign-stored"] = str(self.stored).lower()
        return found

    def report(self, request: RequestContext) -> dict[str, Any]:
        """Return it as the field `everalign` of an answer's JSON."""
        about = {
            "mode": request.mode,
            "correction": self.outcome,
            "reason": self.reason,
            "corrector": self.version,
            "template": self.template,
        }
        return about if self.stored is None else {**about, "stored": self.stored}


PENDING = Summary("pending", None)
"""In the headers of a stream that began before its outcome was known; its last chunk has the outcome."""


def summary_before(request: RequestContext) -> Summary | None:
    """Return what becomes of any answer to a request; None if that depends on the answer, as always in strict mode."""
    if not request.corrects:
        return Summary("skipped", request.mode)
    return Summary("skipped", request.rule) if request.mode == "correct" and request.rule is not None else None


@dataclass
class LiveWriter:
    """Writes a correction to a client while it is being decoded; what is `written` is never taken back.

    Args:
        request: what was asked.
        live: makes the frames of a piece of the text; told whether it is the first one.
        queue: gets the frames.
        headers: the upstream's that are passed on, once they are there.
    """

    request: RequestContext
    live: Callable[[str, bool], bytes]
    queue: FrameQueue
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)

    @property
    def written(self) -> str:
        return "".join(self.pieces)

    async def write(self, text: str) -> None:
        if not self.pieces:
            self.queue.open({**self.headers, **PENDING.headers(self.request)})
        frames = self.live(text, not self.pieces)
        self.pieces.append(text)
        await self.queue.send(frames)


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
        growing: its `begun` is the corrected text that has left, and how much of the answer that stands for; its
            `answer` is the upstream's text, up to where the corrector was given up.
    """

    def __init__(
        self,
        request: RequestContext,
        corrections: CorrectionService,
        writer: LiveWriter,
        longest: int,
        fails_closed: bool,
        stopwatch: Stopwatch,
    ) -> None:
        self.failed: str | None = None
        self.last: Correction | None = None
        self.by = corrections.in_service
        self._request, self._corrections, self.writer = request, corrections, writer
        self._longest, self._fails_closed, self._stopwatch = longest, fails_closed, stopwatch
        self.growing = GrowingCorrection()
        self._news, self._ended = asyncio.Event(), False
        self._uncorrected: list[str] = []  # what came since the corrector was given up, and was not written yet
        self._passes_on = False

    def add(self, text: str) -> None:
        """Take what came of the answer's text."""
        if self.failed is None and len(self.growing.answer) + len(text) > self._longest:
            self.failed = "too_long"
        if self.failed is None:
            self.growing.add(text)
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
            answer = None if self.failed else self.growing.next_answer()
            if answer is not None:
                await self._correct(answer)
            begun = self.growing.begun
            if self.failed and begun.text:
                # The rest of the answer is written as it has come.
                rest = ["" if self._passes_on else begun.rest(self.growing.answer), *self._uncorrected]
                self._passes_on = True
                self._uncorrected.clear()
                if text := "".join(rest):
                    await self.writer.write(text)

    async def _correct(self, answer: str) -> None:
        """Correct the answer so far, and write what may leave."""
        try:
            check_text(answer, "answer")
            assert self._request.question is not None  # else a rule holds
            asked = self._request.question, answer, self._request.key_id
            with self._stopwatch:
                found = await self._corrections.correct(*asked, begun=self.growing.begun, by=self.by)
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
        if text := await asyncio.to_thread(self.growing.accept, answer, found.text):
            await self.writer.write(text)

    def with_usage(self, found: Correction) -> Correction:
        """Return a further correction of this answer with the usage of all of them."""
        return found if self.last is None else replace(found, usage=self.last.usage + found.usage)


class CorrectionDecider:
    """Decides on answers, streamed or not; `longest` is in characters."""

    def __init__(self, corrections: CorrectionService, on_failure: OnFailure, longest: int, metrics: Metrics) -> None:
        self._corrections, self._fails_closed, self._longest = corrections, on_failure == "closed", longest
        self._metrics = metrics

    def sentences(self, request: RequestContext, writer: LiveWriter, stopwatch: Stopwatch) -> SentenceStream | None:
        """Return what corrects the sentences of a request's answer while it comes.

        None if no sentence may leave before the whole answer is known to be one that is corrected: where the mode or a
        rule says so, where it may turn out to be a call of a tool, and where there are several answers.
        """
        body = request.payload
        # A prompt that the upstream has stored may offer tools.
        tools = offers_tools(body) or (request.api == "responses" and body.get("prompt"))
        if request.mode != "correct" or request.rule is not None or tools or body.get("n") not in (None, 1):
            return None
        return SentenceStream(request, self._corrections, writer, self._longest, self._fails_closed, stopwatch)

    async def decide(
        self,
        request: RequestContext,
        choices: Sequence[Choice],
        writer: LiveWriter | None = None,
        sentences: SentenceStream | None = None,
    ) -> list[Decision]:
        """Return what becomes of each choice; raises GatewayError if one may not be returned.

        `writer` gets the correction while it is being decoded, if it may: a single choice, not in strict mode. Of the
        first choice `sentences` may have left already.
        """
        # All rules come first: a choice that is withheld spares the others' correction.
        ruled = [await self._ruled(request, choice) for choice in choices]
        if sentences is not None and (sentences.growing.begun.text or sentences.failed):
            others = await self.decide(request, choices[1:])
            return [await self._finish(request, choices[0], ruled[0], sentences), *others]
        if len(choices) == 1 and ruled[0] is None and writer is not None and request.mode == "correct":
            return [await self._correct(request, choices[0], writer, sentences)]
        corrected = await _gather(
            self._correct(request, choice) for choice, decision in zip(choices, ruled, strict=True) if decision is None
        )
        found = iter(corrected)
        return [decision or next(found) for decision in ruled]

    async def _finish(
        self, request: RequestContext, choice: Choice, ruled: Decision | None, sentences: SentenceStream
    ) -> Decision:
        """Return what becomes of a choice whose first sentences have left, or whose corrector was given up."""
        begun = sentences.growing.begun
        if begun.text and not choice.text.startswith(sentences.growing.answer):
            raise bad_upstream(_CHANGED, "upstream_malformed")
        if begun.text and not choice.is_text:
            kind = "content" if ruled is None else str(ruled.reason)
            raise uncorrected(kind, 502, again=True)
        reason = ruled.reason if ruled is not None else sentences.failed
        if reason is None:
            assert request.question is not None  # else a rule holds
            asked = request.question, choice.text, request.key_id
            try:
                found = await self._corrections.correct(*asked, begun=begun, by=sentences.by)
                return await self._decision(request, choice, sentences.with_usage(found))
            except CorrectionFailed as failed:
                if self._fails_closed or failed.reason == "stopped":
                    raise uncorrected(failed.reason, 503, again=True) from None
                reason = failed.reason
        if not begun.text or sentences.last is None:
            return ruled or Decision(None, "skipped", reason, sentences.last)
        text = begun.with_rest(choice.text)
        if not text.startswith(sentences.writer.written):
            raise bad_upstream(_CHANGED, "upstream_malformed")
        outcome = "skipped" if text == choice.text else "applied"
        return await self._decision(request, choice, replace(sentences.last, text=text, outcome=outcome, reason=reason))

    async def _ruled(self, request: RequestContext, choice: Choice) -> Decision | None:
        """Return what the rules make of a choice, None if it is to be corrected; raises GatewayError."""
        reason, structure = why_not_corrected(choice, self._longest), request.structure
        if structure is not None and reason == "tool_calls":
            # In a thread, as other checks of structures: a schema and an answer may be large.
            calls = await asyncio.to_thread(structure.calls_of, choice.calls)
            return Decision("", "skipped", reason, calls=tuple(calls))
        if structure is not None and structure.is_json and reason is None:
            value = await asyncio.to_thread(structure.json_of, choice.text)
            if structure.corrects:
                return await self._correct_strings(request, choice, structure, value)
            return Decision(choice.text, "skipped", "json")
        if structure is None:
            reason = request.rule or reason
        if reason is None:
            return None
        if request.mode == "strict" and reason not in GIVEN_IN_STRICT:
            raise uncorrected(reason, 422, again=False)
        # Strict mode leaves out even white space, which the corrector has not checked.
        return Decision("" if request.mode == "strict" and reason == "empty" else None, "skipped", reason)

    async def _correct_strings(
        self, request: RequestContext, choice: Choice, structure: Structure, value: Any
    ) -> Decision:
        """Return a JSON choice with each of its prose strings corrected separately."""
        prose = prose_of(value, structure.schema)
        decisions = await _gather(self._correct(request, Choice(0, text, finish_reason="stop")) for _, text in prose)
        applied = [decision.correction for decision in decisions if decision.outcome == "applied"]
        if not applied:
            return Decision(choice.text, "unchanged" if decisions else "skipped", None if decisions else "json")
        texts = {path: decision.text or "" for (path, _), decision in zip(prose, decisions, strict=True)}
        text = json.dumps(with_prose(value, texts), ensure_ascii=False)
        await asyncio.to_thread(structure.json_of, text)  # a correction may have broken the schema
        return Decision(text, "applied", None, applied[0])

    async def _correct(
        self,
        request: RequestContext,
        choice: Choice,
        writer: LiveWriter | None = None,
        sentences: SentenceStream | None = None,
    ) -> Decision:
        """Return a choice's correction, and write its beginning meanwhile; raises GatewayError if it is withheld."""
        assert request.question is not None  # else a rule holds
        asked = request.question, choice.text, request.key_id
        correction: Correction | None = None
        try:
            if writer is None:
                correction = await self._corrections.correct(*asked)
            else:
                async with aclosing(self._corrections.stream_events(*asked)) as events:
                    async for event in events:
                        if isinstance(event, str):
                            await writer.write(event)
                        else:
                            correction = event
        except CorrectionFailed as failed:
            # A client that has the beginning of a correction cannot be given the answer instead.
            begun = writer is not None and not choice.text.startswith(writer.written)
            if request.mode == "strict" or self._fails_closed or failed.reason == "stopped" or begun:
                raise uncorrected(failed.reason, 503, again=True) from None
            return Decision(None, "skipped", failed.reason)
        assert correction is not None  # every stream ends with one, or with CorrectionFailed
        return await self._decision(request, choice, sentences.with_usage(correction) if sentences else correction)

    async def _decision(self, request: RequestContext, choice: Choice, correction: Correction) -> Decision:
        """Return what a correction makes of a choice; raises GatewayError if it is withheld."""
        await count_edits(self._metrics, choice.text, correction)
        if correction.outcome != "skipped":
            return Decision(correction.text, correction.outcome, correction.reason, correction)
        # The corrector's text was rejected, and in strict mode the upstream's must not leave either.
        if request.mode == "strict":
            raise uncorrected(correction.reason or "refused", 503, again=False)
        return Decision(None, "skipped", correction.reason, correction)


async def _gather(work: Iterable[Coroutine[Any, Any, Decision]]) -> list[Decision]:
    """Return the results of all work; if any fails, the rest is cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def count_edits(metrics: Metrics, answer: str, correction: Correction) -> None:
    """Count the draft tokens of an answer's correction, and the words it inserts, deletes or replaces.

    These are per word of the answer; for long texts, disregarding their order.
    """
    for verdict, tokens in (("accepted", correction.usage.accepted), ("rejected", correction.usage.rejected)):
        if tokens:
            metrics.draft_tokens.labels(verdict).inc(tokens)
    share = 0.0
    if len(answer) + len(correction.text) > _COUNTED_EXACTLY and answer != correction.text:
        share = await asyncio.to_thread(unordered_edit_share, answer, correction.text)
    elif answer != correction.text:
        from everalign.correction.edits import edit_ratio

        share = edit_ratio(answer.split(), correction.text.split())
    metrics.edited.observe(share)


def unordered_edit_share(answer: str, correction: str) -> float:
    """Return the words inserted, deleted or replaced, per word of the answer: as multisets, in linear time."""
    before, after = Counter(answer.split()), Counter(correction.split())
    return (max(before.total(), after.total()) - (before & after).total()) / max(1, before.total())
