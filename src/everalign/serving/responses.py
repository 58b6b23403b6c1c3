"""Answers of OpenAI's Responses API on their way to the client: relayed, or written anew with corrected texts.

An answer is a list of items. Each `output_text` of its messages is corrected separately; reasoning, tool calls and what
the server's own tools did pass as they are. In strict mode the answer is written anew, without any of the original's
words.

What the upstream remembers for `previous_response_id` is its own answer, not the correction. The id of an answer is
the upstream's; the one for feedback is in `x-everalign-id` and in the answer's `everalign`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from everalign.serving.chat_request import RequestContext
from everalign.serving.decide import Decision, Summary
from everalign.serving.eligibility import Choice
from everalign.serving.errors import bad_upstream
from everalign.serving.sse import json_bytes
from everalign.serving.upstream import RESPONSE_ENDS

# Calls that the client carries out; what the server's own tools did stands beside the answer's text.
_CALLS = (
    *("function_call", "custom_tool_call", "computer_call", "local_shell_call", "shell_call", "apply_patch_call"),
    *("mcp_approval_request", "tool_search_call"),
)
_FINISH_REASONS = {"completed": "stop", "incomplete": "length", "failed": "error", "cancelled": "error"}
_COUNTS = ("input_tokens", "output_tokens", "total_tokens")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}")
_OPAQUE = re.compile(r"[A-Za-z0-9+/=_-]+")
_EVENT_NAME = re.compile(r"[A-Za-z0-9_.-]+")

_Place = tuple[int, int]
"""Where a text stands: the number of its item in the output, and of its part in the item."""


class ResponsesAnswer:
    """A response, read from its whole JSON or from its events.

    If it is `relayed`, it passes as it is, and only its texts are of interest.
    """

    def __init__(self, request: RequestContext, relayed: bool) -> None:
        self.choices: list[Choice] = []
        self._places: list[_Place | None] = []  # of the choices; None for the one that stands for no text at all
        self._request, self._relayed = request, relayed
        self._response: dict[str, Any] = {}
        self._events: list[dict[str, Any]] = []
        self._sent = self._number = 0
        self._taken = 0  # events that `new_text` has read
        self._first: tuple[int, dict[str, Any]] | None = None  # the first message: its number in the output, and itself
        self._begun = False  # whether its text has begun to leave

    def add(self, event: dict[str, Any]) -> None:
        if not self._request.streams:
            self._response = event
        elif not self._relayed or event.get("type") in (*RESPONSE_ENDS, "response.output_item.done"):
            self._events.append(event)

    def new_text(self) -> str:
        """Return what came of the first message's first text since the last call."""
        new, events = "", self._events[self._taken :]
        self._taken = len(self._events)
        for event in events:
            kind, index, item, delta = (event.get(name) for name in ("type", "output_index", "item", "delta"))
            if kind == "response.output_item.added" and isinstance(item, dict) and item.get("type") == "message":
                if self._first is None and isinstance(index, int):
                    self._first = index, item
            elif kind == "response.output_text.delta" and self._first is not None and isinstance(delta, str):
                new += delta if (index, event.get("content_index")) == (self._first[0], 0) else ""
        return new

    def end(self) -> None:
        """Find the texts, as choices, at least one; raises GatewayError if the answer cannot be read."""
        if self._request.streams:
            self._response = self._last_response()
        response, output = self._response, self._response.get("output")
        failed = response.get("error") or response.get("status") in ("failed", "cancelled")
        if self._request.mode == "strict" and failed:
            raise bad_upstream("the upstream failed in the middle of its answer")
        if not isinstance(output, list) or not all(isinstance(item, dict) for item in output):
            if self._relayed:
                return  # what is passed on as it is need not be an answer
            raise bad_upstream("the upstream's response has no output that could be read", "upstream_malformed")

        details = response.get("incomplete_details")
        cut = details.get("reason") if isinstance(details, Mapping) else None
        finish = _FINISH_REASONS.get(str(response.get("status")), "stop")
        finish = "content_filter" if cut == "content_filter" else finish
        calls = {i: _as_chat_call(item) for i, item in enumerate(output) if item.get("type") in _CALLS}
        for i, item in enumerate(output):
            content = item.get("content") if item.get("type") == "message" else None
            for k, part in enumerate(content if isinstance(content, list) else ()):
                kind = part.get("type") if isinstance(part, dict) else None
                choice = Choice(len(self.choices), tools=bool(calls), finish_reason=finish, calls=calls)
                if kind == "output_text" and isinstance(part.get("text"), str):
                    choice.text, choice.logprobs = part["text"], bool(part.get("logprobs"))
                elif kind == "refusal" and isinstance(part.get("refusal"), str):
                    choice.refusal = part["refusal"]
                else:
                    choice.parts = True
                self.choices.append(choice)
                self._places.append((i, k))
        if not self.choices:
            self.choices = [Choice(0, tools=bool(calls), finish_reason=finish, calls=calls)]
            self._places = [None]

    def check_begun(self) -> None:
        """Raise GatewayError if the text that began to leave before the end is not the first one of the answer."""
        if self._begun and (self._first is None or self._places[0] != (self._first[0], 0)):
            raise bad_upstream("the upstream's answer is not what it streamed", "upstream_malformed")

    def _last_response(self) -> dict[str, Any]:
        """Return the answer that the stream's last event holds."""
        last = next((event for event in reversed(self._events) if event.get("type") in RESPONSE_ENDS), None)
        response = None if last is None else last.get("response")
        if not isinstance(response, dict):
            message = "the upstream's stream of a response has no end that could be read"
            raise bad_upstream(message, "upstream_malformed")
        if not response.get("output"):
            # Some servers send the items only in events of their own.
            done: dict[int, Any] = {
                event["output_index"]: event["item"]
                for event in self._events
                if event.get("type") == "response.output_item.done"
                and isinstance(event.get("output_index"), int)
                and isinstance(event.get("item"), dict)
            }
            response = {**response, "output": [done[i] for i in sorted(done)]}
        return response

    @property
    def usage(self) -> dict[str, Any] | None:
        """The upstream's usage; in strict mode only its numbers."""
        usage = self._response.get("usage")
        if not isinstance(usage, dict):
            return None
        if self._request.mode != "strict":
            return usage
        found: dict[str, Any] = {name: usage[name] for name in _COUNTS if isinstance(usage.get(name), int)}
        for name, detail in (("input_tokens_details", "cached_tokens"), ("output_tokens_details", "reasoning_tokens")):
            details = usage.get(name)
            number = details.get(detail) if isinstance(details, dict) else None
            found[name] = {detail: number if isinstance(number, int) else 0}
        return found

    def unchanged(self) -> dict[str, Any]:
        return self._response

    def corrected(
        self, decisions: Sequence[Decision], summary: Summary, usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return the whole answer with its texts replaced; in strict mode nothing else of the original is in it."""
        response, texts = self._response, self._texts(decisions)
        if self._request.mode == "strict":
            made = self._strict_response(decisions, texts)
        else:
            output = []
            for i, item in enumerate(response["output"]):
                if any(item_number == i for item_number, _ in texts):
                    content = [
                        _text_part(texts[i, k]) if (i, k) in texts else part for k, part in enumerate(item["content"])
                    ]
                    item = {**item, "content": content}
                output.append(item)
            made = {**response, "output": output}
            if "output_text" in response:  # a field that OpenAI's SDKs compute, and some servers send
                parts = [part for item in output if item.get("type") == "message" for part in item["content"]]
                made["output_text"] = "".join(part["text"] for part in parts if part.get("type") == "output_text")
        report = {**summary.report(self._request), "id": self._request.id}
        return {**made, "usage": usage, "everalign": report}

    def _texts(self, decisions: Sequence[Decision]) -> dict[_Place, str]:
        pairs = zip(self._places, decisions, strict=True)
        return {place: one.text for place, one in pairs if place is not None and one.text is not None}

    def _strict_response(self, decisions: Sequence[Decision], texts: Mapping[_Place, str]) -> dict[str, Any]:
        """Return an answer written anew; of the upstream's words it has only refusals, and calls that were checked."""
        calls = next((decision.calls for decision in decisions if decision.calls), ())
        refusals = {
            place: choice.refusal
            for place, choice, decision in zip(self._places, self.choices, decisions, strict=True)
            if place is not None and decision.text is None and choice.refusal
        }
        output: list[dict[str, Any]] = []
        for i, item in enumerate(self._response["output"]):
            kind, name = item.get("type"), _safe_name(item.get("id"), f"item_{i}")
            if kind == "message" and not calls:
                content = [_text_part(text) for place, text in texts.items() if place[0] == i]
                content += [{"type": "refusal", "refusal": text} for place, text in refusals.items() if place[0] == i]
                output.append(
                    {"id": name, "type": kind, "role": "assistant", "status": "completed", "content": content}
                )
            elif kind == "reasoning":
                # Encrypted reasoning, which the upstream wants back in the next request.
                secret = item.get("encrypted_content")
                sealed = {"encrypted_content": secret} if isinstance(secret, str) and _OPAQUE.fullmatch(secret) else {}
                output.append({"id": name, "type": kind, "summary": [], **sealed})
        for call in calls:
            ids = {"id": f"fc_{call['id']}", "type": "function_call", "status": "completed", "call_id": call["id"]}
            output.append({**ids, **call["function"]})
        created = self._response.get("created_at")
        return {
            "id": _safe_name(self._response.get("id"), self._request.id),
            "object": "response",
            "created_at": created if isinstance(created, int | float) else 0,
            "status": "completed",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": self._request.model,
            "output": output,
            "parallel_tool_calls": True,
            "temperature": None,
            "tool_choice": "auto",
            "tools": [],
            "top_p": None,
        }

    def live(self, text: str, opens: bool) -> bytes:
        """Return the event of a piece of a corrected text, and with the first piece all events before it.

        It is the only text, or the first one of an answer that has not ended.
        """
        if len(self._places) == 1 and not self._begun:
            (place,) = self._places
            assert place is not None  # an answer without text is not corrected
            index, part = place
            item = self._response["output"][index]
        else:
            assert self._first is not None  # else there is no text yet
            (index, item), part, self._begun = self._first, 0, True
        about = {"item_id": item.get("id"), "output_index": index, "content_index": part}
        events = [{"type": "response.output_text.delta", **about, "delta": text, "logprobs": []}]
        if opens:
            self._sent = next((n for n, event in enumerate(self._events) if event.get("output_index") == index), 0)
            begun = {"type": "response.content_part.added", **about, "part": _text_part("")}
            events = [*self._events[: self._sent], _item_added(index, item), begun, *events]
        return self._frames(events)

    def remaining(
        self, decisions: Sequence[Decision], summary: Summary, usage: dict[str, Any] | None, written: str
    ) -> bytes:
        """Return all events but those of the text that is `written` already.

        The events of an item with a replaced text are made anew, where its first event stood; in strict mode all are.
        """
        whole = self.corrected(decisions, summary, usage)
        if self._request.mode == "strict":
            begun = {**whole, "status": "in_progress", "output": [], "usage": None}
            events = [{"type": f"response.{kind}", "response": begun} for kind in ("created", "in_progress")]
            for i, item in enumerate(whole["output"]):
                events += _item_events(i, item)
            return self._frames([*events, {"type": "response.completed", "response": whole}])

        events = []
        replaced = {item for item, _ in self._texts(decisions)}
        made = set[Any]()
        if written and self._places[0] is not None:
            number, part = self._places[0]
            events += _item_events(number, whole["output"][number], part, written)
            replaced, made = {*replaced, number}, {number}
        for event in self._events[self._sent :]:
            index = event.get("output_index")
            if event.get("type") in RESPONSE_ENDS:
                events.append({**event, "response": whole})
            elif index not in replaced:
                events.append(event)
            elif index not in made:
                made.add(index)
                events += _item_events(index, whole["output"][index])
        return self._frames(events)

    def _frames(self, events: Sequence[Mapping[str, Any]]) -> bytes:
        frames = b"".join(
            _frame({**event, "sequence_number": number}) for number, event in enumerate(events, self._number)
        )
        self._number += len(events)
        return frames


class ResponsesRelay:
    """Events of an answer that passes as it is; the last ones are held back if they say whether it is stored.

    A response always has its usage, which is never dropped.
    """

    def __init__(self, request: RequestContext, drops_usage: bool = False) -> None:
        self._request = request
        self._held: list[dict[str, Any]] = []

    def frames(self, events: Sequence[dict[str, Any]]) -> bytes:
        """Return what may be sent now."""
        found = list[dict[str, Any]]()
        for event in events:
            ends = self._held or (self._request.reports_storage and event.get("type") in RESPONSE_ENDS)
            (self._held if ends else found).append(event)
        return b"".join(map(_frame, found))

    def rest(self, summary: Summary) -> bytes:
        """Return what was held back, with the outcome."""
        report = {"everalign": summary.report(self._request)}
        # An event `error` has no response that could say it.
        told = [
            {**event, "response": {**event["response"], **report}} if isinstance(event.get("response"), dict) else event
            for event in self._held
        ]
        return b"".join(map(_frame, told))


def _as_chat_call(item: Mapping[str, Any]) -> dict[str, str]:
    kind = "function" if item.get("type") == "function_call" else str(item.get("type"))
    fields = {"id": item.get("call_id"), "name": item.get("name"), "arguments": item.get("arguments")}
    return {"type": kind, **{name: value if isinstance(value, str) else "" for name, value in fields.items()}}


def _safe_name(name: Any, otherwise: str) -> str:
    return name if isinstance(name, str) and _NAME.fullmatch(name) else otherwise


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item_events(
    index: int, item: Mapping[str, Any], first: int = 0, written: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the events of an item; of one whose part `first` begins with what is `written`, those that are left."""
    if written is None:
        yield _item_added(index, item)
    parts = item["content"] if item.get("type") == "message" else ()
    for number in range(first, len(parts)):
        yield from _part_events(index, item, number, written if number == first else None)
    yield {"type": "response.output_item.done", "output_index": index, "item": item}


def _item_added(index: int, item: Mapping[str, Any]) -> dict[str, Any]:
    begun = {**item, "status": "in_progress", "content": []} if item.get("type") == "message" else item
    return {"type": "response.output_item.added", "output_index": index, "item": begun}


def _part_events(
    index: int, item: Mapping[str, Any], number: int, written: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the events of one part; of a text whose beginning is `written`, those that are left."""
    part = item["content"][number]
    about = {"item_id": item.get("id"), "output_index": index, "content_index": number}
    is_text = part.get("type") == "output_text"
    field, kind = ("text", "response.output_text") if is_text else ("refusal", "response.refusal")
    text, logprobs = str(part.get(field, "")), {"logprobs": list[Any]()} if is_text else {}
    if written is None:
        empty = _text_part("") if is_text else {"type": "refusal", "refusal": ""}
        yield {"type": "response.content_part.added", **about, "part": empty}
    if rest := text[len(written or "") :]:
        yield {"type": f"{kind}.delta", **about, "delta": rest, **logprobs}
    yield {"type": f"{kind}.done", **about, field: text, **logprobs}
    yield {"type": "response.content_part.done", **about, "part": part}


def _frame(event: Mapping[str, Any]) -> bytes:
    kind = str(event.get("type", "message"))
    name = kind if _EVENT_NAME.fullmatch(kind) else "message"
    return b"event: " + name.encode() + b"\ndata: " + json_bytes(event) + b"\n\n"
