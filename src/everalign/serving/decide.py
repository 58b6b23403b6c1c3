"""Decide what becomes of an upstream's answer: passed on, replaced by its correction, or withheld."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from everalign.serving.chat_request import ChatRequest
from everalign.serving.completion_json import Choice, CorrectorUsage
from everalign.serving.corrector_service import Correction, CorrectionFailed, CorrectionService
from everalign.serving.eligibility import GIVEN_IN_STRICT, why_not_corrected
from everalign.serving.errors import uncorrected
from everalign.serving.settings import OnFailure
from everalign.serving.structured import Structure, prose_of, with_prose
from everalign.serving.telemetry import Metrics

_OUTCOMES = ("applied", "skipped", "unchanged")
# Up to so many characters edits are counted exactly, which takes time that grows with the square of them.
_COUNTED_EXACTLY = 20_000


@dataclass(frozen=True)
class Verdict:
    """What becomes of one answer.

    Args:
        text: what the client gets; None where it gets the answer as the upstream gave it.
        outcome: `applied`, `unchanged` or `skipped`.
        reason: why, where there is one.
        correction: what the corrector made of it, if it was asked.
        calls: of tools, that a strict answer is instead of a text.
    """

    text: str | None
    outcome: str
    reason: str | None
    correction: Correction | None = None
    calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Summary:
    """What became of all answers to a request: `applied` where one was, else `skipped` where one was.

    `stored` is whether the exchange is kept, None where nobody asked for that.
    """

    outcome: str
    reason: str | None
    version: str | None = None
    template: str | None = None
    effort: CorrectorUsage | None = None
    stored: bool | None = None


def summary(verdicts: Sequence[Verdict]) -> Summary:
    """Return what is told of the verdicts."""
    first = min(verdicts, key=lambda verdict: _OUTCOMES.index(verdict.outcome))
    asked = [verdict.correction for verdict in verdicts if verdict.correction is not None]
    if not asked:
        return Summary(first.outcome, first.reason)
    effort = sum((one.effort for one in asked), CorrectorUsage())
    return Summary(first.outcome, first.reason, asked[0].version, asked[0].template, effort)


class Writer(Protocol):
    """Writes the answer to a client as it comes; `given` is what the client has of it."""

    given: str

    async def piece(self, text: str) -> None:
        """Write a further part of the text."""
        ...


class Judge:
    """Decides on answers, in the same way whether they are streamed or not.

    Args:
        corrections: corrects them.
        on_failure: whether `correct` gives an answer that could not be corrected, or an error.
        longest: characters of an answer that the corrector is given.
        metrics: counts.
    """

    def __init__(self, corrections: CorrectionService, on_failure: OnFailure, longest: int, metrics: Metrics) -> None:
        self._corrections, self._closed, self._longest = corrections, on_failure == "closed", longest
        self._metrics = metrics

    async def judge(self, call: ChatRequest, choices: Sequence[Choice]) -> list[Verdict]:
        """Return what becomes of each answer; raises GatewayError where one may not leave."""
        # Before any is corrected: one that may not leave spares the others' correction.
        ruled = [await self._structured(call, choice) or self.rule(call, choice) for choice in choices]
        if len(choices) == 1:
            return [ruled[0] or await self._corrected(call, choices[0])]
        tasks = [
            asyncio.ensure_future(self._corrected(call, choice))
            for choice, verdict in zip(choices, ruled, strict=True)
            if verdict is None
        ]
        try:
            found = iter(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        return [verdict or next(found) for verdict in ruled]

    async def _structured(self, call: ChatRequest, choice: Choice) -> Verdict | None:
        """Return what becomes of a strict answer that is JSON or calls tools; None for any other."""
        structure = call.structure
        if structure is None:
            return None
        reason = why_not_corrected(choice, self._longest)
        if reason == "tool_calls":
            # In a thread: a schema and an answer may be large.
            calls = await asyncio.to_thread(structure.calls_of, choice.calls)
            return Verdict("", "skipped", reason, calls=tuple(calls))
        if not structure.is_json or reason is not None:
            return None
        value = await asyncio.to_thread(structure.json_of, choice.text)
        if not structure.corrects:
            return Verdict(choice.text, "skipped", "json")
        return await self._with_prose(call, choice, structure, value)

    async def _with_prose(self, call: ChatRequest, choice: Choice, structure: Structure, value: Any) -> Verdict:
        """Return a strict answer in JSON with its texts corrected, each by itself."""
        found = prose_of(value, structure.schema)
        pieces = [Choice(0, text, finish_reason="stop") for _, text in found]
        tasks = [asyncio.ensure_future(self._corrected(call, piece)) for piece in pieces]
        try:
            verdicts = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        if not any(verdict.outcome == "applied" for verdict in verdicts):
            return Verdict(choice.text, "unchanged" if verdicts else "skipped", None if verdicts else "json")
        texts = {path: verdict.text or "" for (path, _), verdict in zip(found, verdicts, strict=True)}
        text = json.dumps(with_prose(value, texts), ensure_ascii=False)
        await asyncio.to_thread(structure.json_of, text)
        return Verdict(text, "applied", None, next(one.correction for one in verdicts if one.outcome == "applied"))

    def rule(self, call: ChatRequest, choice: Choice) -> Verdict | None:
        """Return what a rule makes of an answer, None where it is to be corrected; raises GatewayError."""
        own = why_not_corrected(choice, self._longest)
        reason = own if call.structure is not None else call.rule or own
        if reason is None:
            return None
        if call.mode == "strict" and reason not in GIVEN_IN_STRICT:
            raise uncorrected(reason, 422, again=False)
        # White space too is something that nobody has looked at.
        text = "" if call.mode == "strict" and reason == "empty" else None
        return Verdict(text, "skipped", reason)

    def failed(self, call: ChatRequest, reason: str) -> Verdict:
        """Return what becomes of an answer whose correction failed; raises GatewayError."""
        if call.mode == "strict" or self._closed or reason == "stopped":
            raise uncorrected(reason, 503, again=True)
        return Verdict(None, "skipped", reason)

    async def decided(self, call: ChatRequest, choice: Choice, correction: Correction) -> Verdict:
        """Return what becomes of an answer that the corrector has seen; raises GatewayError."""
        self._metrics.count_effort(correction.effort)
        self._metrics.edited.observe(await edited(choice.text, correction.text))
        if correction.outcome != "skipped":
            return Verdict(correction.text, correction.outcome, correction.reason, correction)
        if call.mode == "strict":
            raise uncorrected(correction.reason or "refused", 503, again=False)
        return Verdict(None, "skipped", correction.reason, correction)

    async def follow(self, call: ChatRequest, choice: Choice, writer: Writer) -> Verdict:
        """Return what becomes of a single answer, having written the beginning of its correction meanwhile."""
        assert call.question is not None  # else a rule holds
        try:
            async with aclosing(self._corrections.follow(call.question, choice.text, call.key_id)) as pieces:
                async for piece in pieces:
                    if not isinstance(piece, str):
                        return await self.decided(call, choice, piece)
                    await writer.piece(piece)
        except CorrectionFailed as failed:
            verdict = self.failed(call, failed.reason)
            if not choice.text.startswith(writer.given):
                # What the client has can be continued neither with the answer nor with a correction.
                raise uncorrected(failed.reason, 503, again=True) from None
            return verdict
        raise AssertionError("a correction ends with what it is, or with CorrectionFailed")

    async def _corrected(self, call: ChatRequest, choice: Choice) -> Verdict:
        assert call.question is not None  # else a rule holds
        try:
            correction = await self._corrections.correct(call.question, choice.text, call.key_id)
        except CorrectionFailed as failed:
            return self.failed(call, failed.reason)
        return await self.decided(call, choice, correction)


async def edited(answer: str, correction: str) -> float:
    """Return the words put in, taken out or replaced, per word of the answer; of long texts whatever their order."""
    if answer == correction:
        return 0.0
    if len(answer) + len(correction) <= _COUNTED_EXACTLY:
        from everalign.correction.edits import edit_ratio

        return edit_ratio(answer.split(), correction.split())
    return await asyncio.to_thread(_exchanged, answer, correction)


def _exchanged(answer: str, correction: str) -> float:
    before, after = Counter(answer.split()), Counter(correction.split())
    return (max(before.total(), after.total()) - (before & after).total()) / max(1, before.total())
