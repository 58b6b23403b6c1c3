"""An OpenAI-compatible server whose answers are written down: chats, responses, embeddings, and its errors.

What it answers follows from the last user message alone, so that a client gets the same from it at every call.
"""

import json
from collections.abc import Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

TEXT = "The capital of France is Paris.\n\n* It lies on the *Seine*.\n* Zwölf Brücken, 日本 🎉"
PLACE = json.dumps({"city": "Paris", "country": "France", "people": 2_100_000})
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
USAGE = {"prompt_tokens": 21, "completion_tokens": 17, "total_tokens": 38}
RESPONSE_USAGE = {
    "input_tokens": 21,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 17,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 38,
}
LIMITS = {"x-ratelimit-remaining-requests": "7", "x-request-id": "req-upstream"}
ERRORS = {
    "refuse with 400": (
        400,
        {"message": "no such thing", "type": "invalid_request_error", "param": "x", "code": "bad"},
    ),
    "refuse with 429": (429, {"message": "slow down", "type": "rate_limit_error", "param": None, "code": "rate"}),
    "refuse with 500": (500, {"message": "broken", "type": "server_error", "param": None, "code": None}),
}


def app() -> Starlette:
    """Return the server."""
    routes = [
        Route("/v1/models", _models),
        Route("/v1/chat/completions", _chat, methods=["POST"]),
        Route("/v1/responses", _respond, methods=["POST"]),
        Route("/v1/embeddings", _embed, methods=["POST"]),
        Route("/v1/completions", _complete, methods=["POST"]),
        Route("/v1/moderations", _moderate, methods=["POST"]),
    ]
    return Starlette(routes=routes)


def _refused(question: str) -> Response | None:
    if question not in ERRORS:
        return None
    status, error = ERRORS[question]
    return JSONResponse({"error": error}, status, headers=LIMITS | {"retry-after": "0"})


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


# ---- chats ----


def _message(body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the message that answers a chat, and why it ends."""
    asked_for = (body.get("response_format") or {}).get("type", "text")
    answered = body["messages"][-1]["role"] == "tool"
    if body.get("tools") and not answered:
        # instructor and the like make a tool of the structure that they want.
        name = body["tools"][0]["function"]["name"]
        given = CALL["function"]["arguments"] if name == "get_weather" else PLACE
        call = CALL | {"function": {"name": name, "arguments": given}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"
    return {"role": "assistant", "content": TEXT if asked_for == "text" else PLACE, "refusal": None}, "stop"


async def _chat(request: Request) -> Response:
    body = await request.json()
    asked = [_text_of(message["content"]) for message in body["messages"] if message["role"] == "user"]
    if (refused := _refused(asked[-1])) is not None:
        return refused
    if body.get("stream"):
        events = (f"data: {json.dumps(chunk)}\n\n" for chunk in _chunks(body))
        return StreamingResponse(_ended(events), media_type="text/event-stream", headers=LIMITS)
    message, finish = _message(body)
    choices = [
        {"index": i, "message": message, "logprobs": None, "finish_reason": finish} for i in range(body.get("n") or 1)
    ]
    whole = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1_700_000_000, "model": body["model"]}
    return JSONResponse(
        whole | {"choices": choices, "usage": USAGE, "service_tier": "default", "system_fingerprint": "fp_1"},
        headers=LIMITS,
    )


def _ended(events: Iterator[str]) -> Iterator[str]:
    yield from events
    yield "data: [DONE]\n\n"


def _chunks(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    counted = (body.get("stream_options") or {}).get("include_usage")
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": body["model"]}
    head |= {"system_fingerprint": "fp_1", **({"usage": None} if counted else {})}
    message, finish = _message(body)
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": "" if message["content"] else None}]
    if message["content"]:
        deltas += [{"content": message["content"][i : i + 7]} for i in range(0, len(message["content"]), 7)]
    for index, call in enumerate(message.get("tool_calls", [])):
        function = call["function"]
        begun = {"index": index, **call, "function": {"name": function["name"], "arguments": ""}}
        deltas.append({"tool_calls": [begun]})
        for start in range(0, len(function["arguments"]), 5):
            piece = function["arguments"][start : start + 5]
            deltas.append({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    for delta in deltas:
        yield {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]}
    yield {**head, "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": finish}]}
    if counted:
        yield {**head, "choices": [], "usage": USAGE}


# ---- responses ----


def _item(body: dict[str, Any]) -> dict[str, Any]:
    """Return the one item that answers a response's input."""
    given = body["input"]
    answered = isinstance(given, list) and given[-1].get("type") == "function_call_output"
    if body.get("tools") and not answered:
        name = body["tools"][0].get("name")
        return {"id": "fc_1", "type": "function_call", "status": "completed", "call_id": "call_1", "name": name,
                "arguments": CALL["function"]["arguments"]}  # fmt: skip
    shaped = ((body.get("text") or {}).get("format") or {}).get("type", "text") != "text"
    part = {"type": "output_text", "text": PLACE if shaped else TEXT, "annotations": [], "logprobs": []}
    return {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [part]}


def _response(body: dict[str, Any], output: list[Any], status: str) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1_700_000_000,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "metadata": {},
        "model": body["model"],
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "temperature": 1.0,
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": body.get("tools") or [],
        "top_p": 1.0,
        "usage": RESPONSE_USAGE if status == "completed" else None,
    }


async def _respond(request: Request) -> Response:
    body = await request.json()
    given = body["input"]
    asked = given if isinstance(given, str) else _text_of([m for m in given if m.get("role") == "user"][-1]["content"])
    if (refused := _refused(asked)) is not None:
        return refused
    if not body.get("stream"):
        return JSONResponse(_response(body, [_item(body)], "completed"), headers=LIMITS)
    events = (
        f"event: {event['type']}\ndata: {json.dumps({**event, 'sequence_number': number})}\n\n"
        for number, event in enumerate(_events(body))
    )
    return StreamingResponse(events, media_type="text/event-stream", headers=LIMITS)


def _events(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    item = _item(body)
    for kind in ("created", "in_progress"):
        yield {"type": f"response.{kind}", "response": _response(body, [], "in_progress")}
    place = {"item_id": item["id"], "output_index": 0}
    if item["type"] == "function_call":
        begun = {**item, "status": "in_progress", "arguments": ""}
        yield {"type": "response.output_item.added", "output_index": 0, "item": begun}
        for start in range(0, len(item["arguments"]), 5):
            piece = item["arguments"][start : start + 5]
            yield {"type": "response.function_call_arguments.delta", **place, "delta": piece}
        done = {"name": item["name"], "arguments": item["arguments"]}
        yield {"type": "response.function_call_arguments.done", **place, **done}
    else:
        (part,) = item["content"]
        begun = {**item, "status": "in_progress", "content": []}
        yield {"type": "response.output_item.added", "output_index": 0, "item": begun}
        place |= {"content_index": 0}
        yield {"type": "response.content_part.added", **place, "part": {**part, "text": ""}}
        for start in range(0, len(part["text"]), 7):
            piece = part["text"][start : start + 7]
            yield {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
        yield {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []}
        yield {"type": "response.content_part.done", **place, "part": part}
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield {"type": "response.completed", "response": _response(body, [item], "completed")}


# ---- the rest ----


async def _models(_: Request) -> Response:
    return JSONResponse(
        {"object": "list", "data": [{"id": "small", "object": "model", "created": 1, "owned_by": "upstream"}]}
    )


async def _embed(request: Request) -> Response:
    body = await request.json()
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    # openai-python asks for base64 unless it is told otherwise: four bytes of 0.5, twice.
    vector: Any = "AAAAPwAAAD8=" if body.get("encoding_format") == "base64" else [0.5, 0.5]
    found = [{"object": "embedding", "index": i, "embedding": vector} for i in range(len(texts))]
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    return JSONResponse({"object": "list", "data": found, "model": body["model"], "usage": usage})


async def _complete(request: Request) -> Response:
    body = await request.json()
    choice = {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1_700_000_000, "model": body["model"]}
    return JSONResponse({**head, "choices": [choice], "usage": USAGE})


async def _moderate(request: Request) -> Response:
    result = {"flagged": False, "categories": {"hate": False}, "category_scores": {"hate": 0.1}}
    return JSONResponse({"id": "modr-1", "model": "m", "results": [result]})
