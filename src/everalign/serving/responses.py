"""OpenAI's Responses: their requests read as conversations, and their answers as choices. Pure functions over JSON.

An answer is a list of items. The texts of its messages are corrected, each `output_text` by itself; reasoning, calls of
tools and what a tool of the server did pass as they are. In strict mode an answer is written anew, with nothing of the
original's words in it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everalign.serving.completion_json import Choice
from everalign.serving.eligibility import GRAMMARS
from everalign.serving.errors import GatewayError, bad_upstream, refused
from everalign.serving.sse import json_bytes
from everalign.serving.upstream_errors import RESPONSE_ENDS

# Calls that the client carries out; what the server's own tools did is told beside the answer's text.
_CALLS = (
    *("function_call", "custom_tool_call", "computer_call", "local_shell_call", "shell_call", "apply_patch_call"),
    *("mcp_approval_request", "tool_search_call"),
)
_FINISHED = {"completed": "stop", "incomplete": "length", "failed": "error", "cancelled": "error"}
_COUNTS = ("input_tokens", "output_tokens", "total_tokens")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}")
_OPAQUE = re.compile(r"[A-Za-z0-9+/=_-]+")


def check_request(body: Mapping[str, Any]) -> None:
    """Refuse a request that cannot be read; raises GatewayError that names the field."""
    model, given = body.get("model"), body.get("input")
    if not isinstance(model, str) or not model.strip():
        raise refused("model: must be the name of a model", "model", "invalid_value")
    if not isinstance(given, str | list | None):
        raise refused("input: must be text or a list of items", "input", "invalid_type")
    for i, item in enumerate(given if isinstance(given, list) else ()):
        if not isinstance(item, dict):
            raise refused(f"input[{i}]: must be an object", f"input[{i}]", "invalid_type")
    for name in ("stream", "store", "background"):
        if not isinstance(body.get(name), bool | None):
            raise refused(f"{name}: must be true or false", name, "invalid_type")
    for name in ("text", "reasoning"):
        if not isinstance(body.get(name), dict | None):
            raise refused(f"{name}: must be an object", name, "invalid_type")


def messages_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a request as the messages of a conversation, as far as it holds them."""
    found: list[dict[str, Any]] = []
    if isinstance(body.get("instructions"), str) and body["instructions"].strip():
        found.append({"role": "system", "content": body["instructions"]})
    given = body.get("input")
    if isinstance(given, str):
        return [*found, {"role": "user", "content": given}]
    for item in given or ():
        kind = str(item.get("type", "message"))
        if kind == "message":
            content = item.get("content")
            found.append({"role": str(item.get("role", "user")), "content": content if content is not None else ""})
        elif kind.endswith("_call_output"):
            output = item.get("output")
            found.append({"role": "tool", "content": output if isinstance(output, str | list) else ""})
    return found


def response_rule(body: Mapping[str, Any]) -> str | None:
    """Return why the answer to a request is not corrected, whatever it is, besides having no question."""
    form = (body.get("text") or {}).get("format")
    if (isinstance(form, Mapping) and form.get("type") != "text") or any(body.get(name) for name in GRAMMARS):
        return "json"
    include = body.get("include")
    if body.get("top_logprobs") or (isinstance(include, list) and "message.output_text.logprobs" in include):
        return "logprobs"
    return "background" if body.get("background") else None


@dataclass(frozen=True)
class Place:
    """Where in an answer a text stands: the item's number, and the part's in it; -1 where there is none."""

    item: int
    part: int


def choices_of(response: Mapping[str, Any]) -> list[tuple[Place, Choice]]:
    """Return the texts of an answer, with where they stand; at least one, if an empty one.

    Raises:
        GatewayError: it is no answer.
    """
    output = response.get("output")
    if not isinstance(output, list) or not all(isinstance(item, dict) for item in output):
        raise bad_upstream("the upstream's response has no output that could be read", "upstream_malformed")
    details = response.get("incomplete_details")
    cut = details.get("reason") if isinstance(details, Mapping) else None
    finish = "content_filter" if cut == "content_filter" else _FINISHED.get(str(response.get("status")), "stop")
    calls = any(item.get("type") in _CALLS for item in output)
    called = {i: _call(item) for i, item in enumerate(output) if item.get("type") in _CALLS}
    found: list[tuple[Place, Choice]] = []
    for i, item in enumerate(output):
        if item.get("type") != "message":
            continue
        content = item.get("content")
        for k, part in enumerate(content if isinstance(content, list) else ()):
            found.append((Place(i, k), _choice(len(found), part, calls, finish)))
    found = found or [(Place(-1, -1), Choice(0, tools=calls, finish_reason=finish))]
    for _, choice in found:
        choice.calls = called
    return found


def _call(item: Mapping[str, Any]) -> dict[str, str]:
    """Return a call as chat has it."""
    kind = "function" if item.get("type") == "function_call" else str(item.get("type"))
    told = {"id": item.get("call_id"), "name": item.get("name"), "arguments": item.get("arguments")}
    return {"type": kind, **{name: value if isinstance(value, str) else "" for name, value in told.items()}}


def _choice(index: int, part: Any, calls: bool, finish: str) -> Choice:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "output_text" and isinstance(part.get("text"), str):
        return Choice(index, part["text"], tools=calls, logprobs=bool(part.get("logprobs")), finish_reason=finish)
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return Choice(index, refusal=part["refusal"], tools=calls, finish_reason=finish)
    return Choice(index, tools=calls, parts=True, finish_reason=finish)


def with_texts(response: Mapping[str, Any], texts: Mapping[Place, str]) -> dict[str, Any]:
    """Return an answer with some of its texts replaced, and nothing about the former ones beside them."""
    output = [
        {**item, "content": [_part(part, texts.get(Place(i, k))) for k, part in enumerate(item["content"])]}
        if any(place.item == i for place in texts)
        else item
        for i, item in enumerate(response["output"])
    ]
    # Some servers tell all texts once more, in a field that OpenAI's SDKs compute.
    whole = {"output_text": _whole_text(output)} if "output_text" in response else {}
    return {**response, "output": output, **whole}


def _part(part: dict[str, Any], text: str | None) -> dict[str, Any]:
    return part if text is None else {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _whole_text(output: Sequence[Mapping[str, Any]]) -> str:
    parts = [part for item in output if item.get("type") == "message" for part in item["content"]]
    return "".join(part["text"] for part in parts if part.get("type") == "output_text")


def strict_response(
    response: Mapping[str, Any],
    texts: Mapping[Place, str],
    refusals: Mapping[Place, str],
    id: str,
    model: str,
    calls: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return an answer written anew, of which nothing is the upstream's own words but its refusals, and calls."""
    output: list[dict[str, Any]] = []
    for i, item in enumerate(response["output"]):
        kind, name = item.get("type"), _known(item.get("id"), f"item_{i}")
        if kind == "message" and not calls:
            content = [_part({}, text) for place, text in texts.items() if place.item == i]
            content += [{"type": "refusal", "refusal": text} for place, text in refusals.items() if place.item == i]
            output.append({"id": name, "type": kind, "role": "assistant", "status": "completed", "content": content})
        elif kind == "reasoning":
            # What the upstream wants back, to go on thinking where it left off.
            secret = item.get("encrypted_content")
            sealed = {"encrypted_content": secret} if isinstance(secret, str) and _OPAQUE.fullmatch(secret) else {}
            output.append({"id": name, "type": kind, "summary": [], **sealed})
    output += [
        {
            "id": f"fc_{one['id']}",
            "type": "function_call",
            "status": "completed",
            "call_id": one["id"],
            **one["function"],
        }
        for one in calls
    ]
    created = response.get("created_at")
    usage = response.get("usage")
    return {
        "id": _known(response.get("id"), id),
        "object": "response",
        "created_at": created if isinstance(created, int | float) else 0,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": model,
        "output": output,
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "usage": _counts(usage) if isinstance(usage, dict) else None,
    }


def _counts(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Return nothing but the numbers of a usage, in the fields that are known."""
    found: dict[str, Any] = {name: usage[name] for name in _COUNTS if isinstance(usage.get(name), int)}
    for name, detail in (("input_tokens_details", "cached_tokens"), ("output_tokens_details", "reasoning_tokens")):
        details = usage.get(name)
        number = details.get(detail) if isinstance(details, dict) else None
        found[name] = {detail: number if isinstance(number, int) else 0}
    return found


def _known(name: Any, otherwise: str) -> str:
    return name if isinstance(name, str) and _NAME.fullmatch(name) else otherwise


def end_of(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the whole answer that ends a stream; raises GatewayError where that has none."""
    last = next((event for event in reversed(events) if event.get("type") in RESPONSE_ENDS), None)
    response = None if last is None else last.get("response")
    if not isinstance(response, dict):
        raise bad_upstream("the upstream's stream of a response has no end that could be read", "upstream_malformed")
    if not response.get("output"):
        # Some servers tell the items only while they come.
        done: dict[int, Any] = {event["output_index"]: event["item"] for event in events if _is_done_item(event)}
        response = {**response, "output": [done[i] for i in sorted(done)]}
    return response


def _is_done_item(event: Mapping[str, Any]) -> bool:
    known = isinstance(event.get("output_index"), int) and isinstance(event.get("item"), dict)
    return event.get("type") == "response.output_item.done" and known


def failed_of(response: Mapping[str, Any]) -> GatewayError:
    """Return the error of an answer that says that it failed."""
    error = response.get("error")
    message = error.get("message") if isinstance(error, Mapping) else None
    shown = message if isinstance(message, str) else "the upstream failed in the middle of its answer"
    return bad_upstream(shown[:1000], "upstream_error")


def frame_of(event: Mapping[str, Any]) -> bytes:
    """Return one event of a stream."""
    kind = str(event.get("type", "message"))
    name = kind if re.fullmatch(r"[A-Za-z0-9_.-]+", kind) else "message"
    return b"event: " + name.encode() + b"\ndata: " + json_bytes(event) + b"\n\n"


def opening_events(index: int, item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the event that begins an item."""
    begun = {**item, "status": "in_progress", "content": []} if item.get("type") == "message" else item
    return [{"type": "response.output_item.added", "output_index": index, "item": begun}]


def part_events(index: int, item: Mapping[str, Any], k: int, given: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the events of one part; of a text that has begun with `given`, those that are left."""
    part = item["content"][k]
    about = {"item_id": item.get("id"), "output_index": index, "content_index": k}
    is_text = part.get("type") == "output_text"
    field = "text" if is_text else "refusal"
    kind, text = ("response.output_text" if is_text else "response.refusal"), str(part.get(field, ""))
    logprobs: dict[str, Any] = {"logprobs": []} if is_text else {}
    if given is None:
        yield begun_part(about, is_text)
    if rest := text[len(given or "") :]:
        yield {"type": f"{kind}.delta", **about, "delta": rest, **logprobs}
    yield {"type": f"{kind}.done", **about, field: text, **logprobs}
    yield {"type": "response.content_part.done", **about, "part": part}


def begun_part(about: Mapping[str, Any], is_text: bool = True) -> dict[str, Any]:
    """Return the event that begins a part."""
    empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    part = empty if is_text else {"type": "refusal", "refusal": ""}
    return {"type": "response.content_part.added", **about, "part": part}


def closing_events(index: int, item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the event that ends an item."""
    return [{"type": "response.output_item.done", "output_index": index, "item": item}]


def whole_item(index: int, item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all events of an item."""
    parts = range(len(item["content"])) if item.get("type") == "message" else ()
    within = [event for k in parts for event in part_events(index, item, k)]
    return [*opening_events(index, item), *within, *closing_events(index, item)]
