"""`POST /v1/responses`: the same machinery as chat's, whole and streamed.

What the upstream remembers for `previous_response_id` is its own answer, not the correction; the id of an answer is the
upstream's, and the one for feedback stands in `x-everalign-id` and in the answer's `everalign`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from everalign.serving.chat_request import ChatRequest, read_json
from everalign.serving.complete import forwarded_headers, known_before, origin, report, returned_text, said_stored
from everalign.serving.completion_json import Choice, with_effort
from everalign.serving.decide import Summary, Verdict, summary
from everalign.serving.eligibility import GRAMMARS
from everalign.serving.gateway import Gateway
from everalign.serving.limits import aside, read_body
from everalign.serving.middleware import json_response
from everalign.serving.openapi import MODE, RESPONSE, RESPONSE_REQUEST, body, replies
from everalign.serving.request_log import Record
from everalign.serving.responses import (
    Place,
    begun_part,
    check_request,
    choices_of,
    closing_events,
    end_of,
    failed_of,
    frame_of,
    messages_of,
    opening_events,
    part_events,
    response_rule,
    strict_response,
    whole_item,
    with_texts,
)
from everalign.serving.stream import PENDING
from everalign.serving.stream_response import Channel, cancel_on_disconnect, deliver
from everalign.serving.structured import structure_of
from everalign.serving.upstream import Asked
from everalign.serving.upstream_errors import RESPONSE_ENDS

_STATUSES = (400, 404, 408, 409, 413, 415, 422, 429, 499, 502, 503, 504)


@dataclass(frozen=True)
class ResponsesCall(ChatRequest):
    """A request; `body` is the conversation that it means, and `request` its own JSON, which the upstream gets."""

    request: dict[str, Any] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        """Whether the client wants events."""
        return bool(self.request.get("stream"))

    def asked(self, with_usage: bool = False) -> Asked:
        """Return what the upstream is asked; usage is always told."""
        own = {"model": self.body["model"], "key_id": self.key_id, "repeated": self.repeated}
        return Asked("POST", "responses", self.request, self.headers, quoted=self.mode != "strict", **own)


def response_routes(gateway: Gateway) -> APIRouter:
    """Return the route."""
    router, responding = APIRouter(), _Responding(gateway)

    @router.post(
        "/v1/responses",
        responses={200: RESPONSE, **replies(*_STATUSES)},
        openapi_extra={**body(RESPONSE_REQUEST), "parameters": [MODE]},
        summary="Answer a conversation, as OpenAI's Responses",
    )
    async def respond(request: Request) -> Response:
        ticket = gateway.limiter.enter(request.state.key_id)
        try:
            content = await read_body(request, gateway.settings.limits.body_bytes)
            headers, state = request.headers.items(), request.state
            call = await aside(content, partial(read_call, gateway, content, headers, state.key_id, state.deployment))
            if call.streams:
                write = partial(responding.write, call)
                keepalive = gateway.settings.keepalive
                late = origin(call, known_before(call) or PENDING)
                delivering = deliver(write, late, keepalive, ticket.release)
                return await cancel_on_disconnect(request.receive, delivering)
            answered, told = await cancel_on_disconnect(request.receive, responding.answer(call))
        except BaseException:
            ticket.release()
            raise
        ticket.release()
        return json_response(answered, told)

    return router


def read_call(
    gateway: Gateway, content: bytes, headers: Sequence[tuple[str, str]], key_id: str, model: str | None
) -> ResponsesCall:
    """Return a request, of a `model` if the path names one; raises GatewayError that names the field."""
    given = read_json(content)
    given = given if model is None else {**given, "model": model}
    check_request(given)
    form = (given.get("text") or {}).get("format")
    meant = gateway.desk.read(
        {"model": given["model"], "messages": messages_of(given), "store": given.get("store")},
        headers,
        key_id,
        gateway.has_corrector,
        response_rule(given),
        bool(given.get("tools")) and given.get("tool_choice") != "none",
        partial(structure_of, given, form, any(given.get(name) for name in GRAMMARS), given.get("tools")),
    )
    facts = {name: getattr(meant, name) for name in meant.__dataclass_fields__}
    return ResponsesCall(**facts, request={**given, "model": meant.body["model"]})


class _Responding:
    """Answers; the arguments are the gateway's parts."""

    def __init__(self, gateway: Gateway) -> None:
        self._judge, self._recorder = gateway.judge, gateway.recorder

    async def answer(self, call: ResponsesCall) -> tuple[dict[str, Any], dict[str, str]]:
        """Return a whole answer and its headers; raises GatewayError where there is none, or none that may leave."""
        with self._recorder.counted(call) as record:
            with record.in_upstream():
                answered = await call.upstream.chat(call.asked())
            if not call.corrects:
                found = Summary("skipped", call.mode)
                found = await self._remember(call, answered.body, found)
                told = answered.body
            else:
                judged = _Judged(call, answered.body)
                with record.in_corrector():
                    judged.verdicts = await self._judge.judge(call, judged.choices)
                found, told = await self._found(judged), judged.rewritten()
            record.end(found)
            return told, {**forwarded_headers(call, answered.headers), **origin(call, found)}

    async def write(self, call: ResponsesCall, channel: Channel) -> None:
        """Write a streamed answer to a channel; raises GatewayError where it fails or may not leave."""
        with self._recorder.counted(call) as record:
            if (known := known_before(call)) is not None:
                await self._relayed(call, channel, record, known)
            else:
                await self._corrected(call, channel, record)

    async def _relayed(self, call: ResponsesCall, channel: Channel, record: Record, found: Summary) -> None:
        events, held = list[dict[str, Any]](), list[dict[str, Any]]()
        remembers = (call.keep and self._recorder.keeps) or call.mode == "shadow"
        with record.in_upstream():
            async with call.upstream.stream(call.asked()) as streamed:
                channel.open({**streamed.headers, **origin(call, found)})
                async for some in streamed.events:
                    events += some if remembers else ()
                    ends = [
                        event for event in some if held or (call.wants_storing and event.get("type") in RESPONSE_ENDS)
                    ]
                    held += ends
                    await channel.send(b"".join(frame_of(event) for event in some[: len(some) - len(ends)]))
        found = await self._remember(call, end_of(events) if remembers else {}, found)
        record.end(found)
        # The last event says whether the answer is stored, and so waits for that.
        told = [
            {**event, "response": {**event["response"], "everalign": report(call, found)}}
            if isinstance(event.get("response"), dict)
            else event
            for event in held
        ]
        await channel.send(b"".join(frame_of(event) for event in told))

    async def _corrected(self, call: ResponsesCall, channel: Channel, record: Record) -> None:
        events = list[dict[str, Any]]()
        with record.in_upstream():
            async with call.upstream.stream(call.asked()) as streamed:
                async for some in streamed.events:
                    events += some
        judged = _Judged(call, end_of(events))
        writer = _Writer(judged, channel, events, forwarded_headers(call, streamed.headers))
        with record.in_corrector():
            alone = len(judged.choices) == 1 and call.mode == "correct"
            if alone and self._judge.rule(call, judged.choices[0]) is None:
                judged.verdicts = [await self._judge.follow(call, judged.choices[0], writer)]
            else:
                judged.verdicts = await self._judge.judge(call, judged.choices)
        found = await self._found(judged)
        record.end(found)
        await writer.finish(found)

    async def _found(self, judged: "_Judged") -> Summary:
        """Return what became of an answer, and remember it."""
        call, found = judged.call, summary(judged.verdicts)
        judged.found = found
        usage = with_effort(judged.usage, found.effort)
        returned = returned_text(judged.choices[0], judged.verdicts[0])
        kept = await self._recorder.keep(call, judged.choices, returned, found, usage)
        judged.found = said_stored(call, found, kept)
        return judged.found

    async def _remember(self, call: ResponsesCall, response: Mapping[str, Any], found: Summary) -> Summary:
        """Return what is told of an answer that is passed on as it is, having remembered it."""
        kept = False
        if isinstance(response.get("output"), list):  # what is passed on as it is need not be an answer
            choices = [choice for _, choice in choices_of(response)]
            usage = response.get("usage")
            known = usage if isinstance(usage, dict) else None
            kept = await self._recorder.keep(call, choices, choices[0].text, found, known)
            if call.mode == "shadow":
                self._recorder.shadow(call, choices)
        return said_stored(call, found, kept)


class _Judged:
    """A whole answer with what becomes of its texts.

    Args:
        call: the request.
        response: the answer.
    """

    def __init__(self, call: ResponsesCall, response: dict[str, Any]) -> None:
        if call.mode == "strict" and (response.get("error") or response.get("status") in ("failed", "cancelled")):
            raise failed_of({})
        placed = choices_of(response)
        self.call, self.response = call, response
        self.places = [place for place, _ in placed]
        self.choices: list[Choice] = [choice for _, choice in placed]
        self.verdicts: list[Verdict] = []
        self.found = PENDING
        usage = response.get("usage")
        self.usage = usage if isinstance(usage, dict) else None

    def texts(self) -> dict[Place, str]:
        """Return the texts that take the place of others."""
        pairs = zip(self.places, self.verdicts, strict=True)
        return {place: verdict.text for place, verdict in pairs if verdict.text is not None and place.item >= 0}

    def rewritten(self) -> dict[str, Any]:
        """Return the answer as the client gets it; with every verdict there."""
        call, texts = self.call, self.texts()
        if call.mode == "strict":
            triples = zip(self.places, self.choices, self.verdicts, strict=True)
            refusals = {
                place: choice.refusal for place, choice, verdict in triples if verdict.text is None and choice.refusal
            }
            calls = next((verdict.calls for verdict in self.verdicts if verdict.calls), ())
            made = strict_response(self.response, texts, refusals, call.id, call.body["model"], calls)
        else:
            made = with_texts(self.response, texts)
        known = made.get("usage")
        usage = with_effort(known if isinstance(known, dict) else None, self.found.effort)
        return {**made, "usage": usage, "everalign": {**report(call, self.found), "id": call.id}}


class _Writer:
    """Writes an answer as events; what is given of it already is never taken back.

    The events of items whose text is replaced are made anew; all others are the upstream's. In strict mode all are made
    anew.
    """

    def __init__(
        self, judged: _Judged, channel: Channel, events: Sequence[dict[str, Any]], headers: Mapping[str, str]
    ) -> None:
        self.given = ""
        self._judged, self._channel, self._headers = judged, channel, headers
        self._events, self._number, self._sent = list(events), 0, 0

    async def piece(self, text: str) -> None:
        """Write a part of a single text."""
        place = self._judged.places[0]
        item = self._judged.response["output"][place.item]
        if not self.given:
            self._channel.open({**self._headers, **origin(self._judged.call, PENDING)})
            before = self._before(place.item)
            await self._send([*before, *opening_events(place.item, item), begun_part(self._about(place))])
        self.given += text
        delta = {"type": "response.output_text.delta", **self._about(place), "delta": text, "logprobs": []}
        await self._send([delta])

    async def finish(self, found: Summary) -> None:
        """Write the rest, and the end."""
        judged = self._judged
        self._channel.open({**self._headers, **origin(judged.call, found)})
        whole = judged.rewritten()
        if judged.call.mode == "strict":
            begun = {**whole, "status": "in_progress", "output": [], "usage": None}
            items = [event for i, item in enumerate(whole["output"]) for event in whole_item(i, item)]
            start = [{"type": f"response.{kind}", "response": begun} for kind in ("created", "in_progress")]
            await self._send([*start, *items, {"type": "response.completed", "response": whole}])
            return
        new = {place.item for place in judged.texts()}
        if self.given:
            place = judged.places[0]
            item = whole["output"][place.item]
            rest = part_events(place.item, item, place.part, self.given)
            await self._send([*rest, *closing_events(place.item, item)])
            new = {place.item}
        await self._send(self._remaining(new, whole))

    def _remaining(self, new: set[int], whole: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what was not sent yet, with some items made anew where their first event stood."""
        made: set[int] = {self._judged.places[0].item} if self.given else set()
        found: list[dict[str, Any]] = []
        for event in self._events[self._sent :]:
            index = event.get("output_index")
            if event.get("type") in RESPONSE_ENDS:
                found.append({**event, "response": whole})
            elif index not in new:
                found.append(event)
            elif index not in made:
                made.add(index)
                found += whole_item(index, whole["output"][index])
        return found

    def _before(self, index: int) -> list[dict[str, Any]]:
        """Return the events that come before those of an item."""
        self._sent = next((n for n, event in enumerate(self._events) if event.get("output_index") == index), 0)
        return self._events[: self._sent]

    def _about(self, place: Place) -> dict[str, Any]:
        item = self._judged.response["output"][place.item]
        return {"item_id": item.get("id"), "output_index": place.item, "content_index": place.part}

    async def _send(self, events: Sequence[Mapping[str, Any]]) -> None:
        numbered = []
        for event in events:
            numbered.append(frame_of({**event, "sequence_number": self._number}))
            self._number += 1
        await self._channel.send(b"".join(numbered))
