"""One request from its question to its streamed answer.

What stays as it is, because of the mode or of what was asked for, is handed on from its first byte. An answer that is
corrected is first read whole, and not a byte of it leaves before it is judged. Then the correction is written: in
pieces as the corrector finds them, if it is a single one; in strict mode only when all of it is there.
"""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from everalign.serving.chat_request import ChatRequest
from everalign.serving.complete import (
    forwarded_headers,
    known_before,
    malformed,
    origin,
    report,
    reported_usage,
    returned_text,
    said_stored,
    strict_head,
)
from everalign.serving.completion_json import (
    Choice,
    CompletionAccumulator,
    chunk,
    finish_reason,
    head_of,
    without_usage,
)
from everalign.serving.decide import Judge, Summary, Verdict, summary
from everalign.serving.errors import UsageRefused
from everalign.serving.request_log import Record, Recorder
from everalign.serving.sse import DONE, data_frame
from everalign.serving.stream_response import Channel
from everalign.serving.upstream import Streamed

_PIECE = 16  # characters, at least
_WORD = re.compile(r"\s+|\S{1,64}\s*")

PENDING = Summary("pending", None)
"""What the headers say of a stream that began before its answer was judged; its last chunk says what became of it."""


class Streams:
    """Streams answers.

    Args:
        judge: decides what becomes of them.
        recorder: remembers.
    """

    def __init__(self, judge: Judge, recorder: Recorder) -> None:
        self._judge, self._recorder = judge, recorder

    async def write(self, call: ChatRequest, channel: Channel) -> None:
        """Write the whole answer to a channel; raises GatewayError where it fails or may not leave."""
        with self._recorder.counted(call) as record:
            known = known_before(call)
            if known is None:
                await self._corrected(call, channel, record)
            else:
                await self._relayed(call, channel, record, known)

    async def _relayed(self, call: ChatRequest, channel: Channel, record: Record, found: Summary) -> None:
        """Hand on an answer while it comes."""
        gathering = CompletionAccumulator()
        asked = call.keep and self._recorder.keeps
        remembers = asked or call.mode == "shadow"
        relay = _Relay(call, drops_usage=asked and not call.wants_usage)
        with record.in_upstream():
            async with _opened(call, asked) as streamed:
                channel.open({**streamed.headers, **origin(call, found)})
                async for events in streamed.events:
                    if remembers and not all(gathering.add(event) for event in events):
                        raise malformed()
                    if frames := relay.passed(events):
                        await channel.send(_frames(frames))
        if remembers:
            choices = gathering.choices()
            kept = await self._recorder.keep(call, choices, choices[0].text if choices else "", found, gathering.usage)
            if call.mode == "shadow":
                self._recorder.shadow(call, choices)
        else:
            kept = False
        found = said_stored(call, found, kept)
        record.end(found)
        await channel.send(_frames(relay.rest(found)) + DONE)

    async def _corrected(self, call: ChatRequest, channel: Channel, record: Record) -> None:
        """Read an answer whole, and write what becomes of it."""
        gathering, events = CompletionAccumulator(), list[dict[str, Any]]()
        with record.in_upstream():
            async with _opened(call, True) as streamed:
                async for found in streamed.events:
                    events += found
        if not all(gathering.add(event) for event in events) or not (choices := gathering.choices()):
            raise malformed()
        writer = _Writer(call, channel, events, choices, forwarded_headers(call, streamed.headers))
        with record.in_corrector():
            live = len(choices) == 1 and call.mode == "correct" and self._judge.rule(call, choices[0]) is None
            verdicts = (
                [await self._judge.follow(call, choices[0], writer)] if live else await self._judge.judge(call, choices)
            )
        about = summary(verdicts)
        usage = reported_usage(call, gathering.usage, about)
        kept = await self._recorder.keep(call, choices, returned_text(choices[0], verdicts[0]), about, usage)
        about = said_stored(call, about, kept)
        record.end(about)
        await writer.finish(verdicts, about, usage)


class _Relay:
    """Events of an answer that stays as it is.

    The last ones are held back where they say whether the answer is stored, which is known when all of it is there.
    """

    def __init__(self, call: ChatRequest, drops_usage: bool) -> None:
        self._call, self._drops_usage = call, drops_usage
        self._holds = call.wants_storing
        self._tells = call.corrects or call.wants_storing
        choices = call.body.get("n")
        self._running = choices if isinstance(choices, int) else 1
        self._held: list[dict[str, Any]] = []

    def passed(self, events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return what may leave now."""
        found = []
        for event in events:
            kept = without_usage(event) if self._drops_usage else event
            if kept is None:
                continue
            self._running -= sum(choice.get("finish_reason") is not None for choice in event.get("choices") or ())
            if self._tells and (self._held or self._running <= 0):
                self._held.append({**kept, "id": self._call.id})
            else:
                found.append({**kept, "id": self._call.id})
        if self._held and not self._holds:
            return found + self._told(Summary("skipped", self._call.rule))
        return found

    def rest(self, about: Summary) -> list[dict[str, Any]]:
        """Return what was held back, with what became of the answer."""
        if not self._held and self._holds:  # no choice has said that it ended
            common = strict_head(self._call, {})
            self._held = [{**common, "object": "chat.completion.chunk", "choices": []}]
        return self._told(about) if self._held else []

    def _told(self, about: Summary) -> list[dict[str, Any]]:
        first, *others = self._held
        self._held, self._tells = [], False
        return [{**first, "everalign": report(self._call, about)}, *others]


class _Writer:
    """Writes an answer as events; what is given of it already is never taken back."""

    def __init__(
        self,
        call: ChatRequest,
        channel: Channel,
        events: Sequence[dict[str, Any]],
        choices: Sequence[Choice],
        headers: Mapping[str, str],
    ) -> None:
        self.choices, self.given = choices, ""
        self._call, self._channel, self._events, self._headers = call, channel, events, headers
        strict = {**strict_head(call, events[0]), "object": "chat.completion.chunk"}
        self._head = strict if call.mode == "strict" else head_of(events, call.id)

    async def piece(self, text: str) -> None:
        """Write a part of a single answer's text."""
        if not self.given:
            self._channel.open({**self._headers, **origin(self._call, PENDING)})
            await self._send([self._begun(self.choices[0])])
        self.given += text
        await self._send(self._chunks(self.choices[0], text))

    async def finish(self, verdicts: Sequence[Verdict], found: Summary, usage: dict[str, Any] | None) -> None:
        """Write the rest, and the end."""
        self._channel.open({**self._headers, **origin(self._call, found)})
        frames = self._rest(verdicts[0]) if self.given else self._all(verdicts)
        frames[-1] = {**frames[-1], "everalign": report(self._call, found)}
        if self._call.wants_usage and usage is not None:
            frames.append({**self._head, "choices": [], "usage": usage})
        await self._send(frames)
        await self._channel.send(DONE)

    def _rest(self, verdict: Verdict) -> list[dict[str, Any]]:
        choice = self.choices[0]
        more = self._chunks(choice, returned_text(choice, verdict)[len(self.given) :])
        return [*more, chunk(self._head, choice.index, {}, finish_reason(choice))]

    def _all(self, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
        pairs = list(zip(self.choices, verdicts, strict=True))
        strict = self._call.mode == "strict"
        as_they_are = {choice.index for choice, verdict in pairs if verdict.text is None and not strict}
        frames = list(self._replayed(as_they_are)) if as_they_are else []
        for choice, verdict in pairs:
            if verdict.calls:
                calls = [{"index": i, **one} for i, one in enumerate(verdict.calls)]
                called = {"role": "assistant", "content": None, "tool_calls": calls}
                frames.append(chunk(self._head, choice.index, called))
                frames.append(chunk(self._head, choice.index, {}, "tool_calls"))
            elif choice.index not in as_they_are:
                frames.append(self._begun(choice))
                if verdict.text is None:
                    frames.append(chunk(self._head, choice.index, {"refusal": choice.refusal}))
                else:
                    frames += self._chunks(choice, verdict.text)
                frames.append(chunk(self._head, choice.index, {}, finish_reason(choice)))
        return frames

    def _replayed(self, indices: set[int]) -> list[dict[str, Any]]:
        """Return the upstream's own chunks of some choices."""
        found = []
        for event in self._events:
            choices = [choice for choice in event.get("choices") or () if choice.get("index", 0) in indices]
            if choices:
                plain = {name: value for name, value in event.items() if name != "usage"}
                found.append({**plain, "id": self._call.id, "choices": choices})
        return found

    def _chunks(self, choice: Choice, text: str) -> list[dict[str, Any]]:
        """Return a text in pieces of a few words, which clients show one after the other."""
        found, begun = [], 0
        for word in _WORD.finditer(text):
            if word.end() - begun >= _PIECE or word.end() == len(text):
                found.append(chunk(self._head, choice.index, {"content": text[begun : word.end()]}))
                begun = word.end()
        return found

    def _begun(self, choice: Choice) -> dict[str, Any]:
        return chunk(self._head, choice.index, {"role": "assistant", "content": ""})

    async def _send(self, frames: Sequence[Mapping[str, Any]]) -> None:
        if self._call.wants_usage:  # every other chunk says that it has none
            frames = [{"usage": None, **frame} for frame in frames]
        await self._channel.send(_frames(frames))


def _frames(events: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(data_frame(event) for event in events)


@asynccontextmanager
async def _opened(call: ChatRequest, asks_usage: bool) -> AsyncIterator[Streamed]:
    """Open the upstream's stream, asking for its usage too; some upstreams refuse to be asked."""
    asks = asks_usage and not call.wants_usage and call.upstream.reports_usage
    async with AsyncExitStack() as stack:
        try:
            streamed = await stack.enter_async_context(call.upstream.stream(call.asked(asks)))
        except UsageRefused:
            if not asks:
                raise
            call.upstream.reports_usage = False
            streamed = await stack.enter_async_context(call.upstream.stream(call.asked()))
        yield streamed
