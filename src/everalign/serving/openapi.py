"""What the routes take and give, as their OpenAPI schema says it; the gateway checks requests by hand."""

from typing import Any

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MEANINGS = {
    400: "The request is wrong.",
    401: "No valid key.",
    403: "Only this machine is served.",
    404: "There is no such thing.",
    405: "Another method is needed.",
    408: "The body did not come in time.",
    409: "The upstream says that something is in the way.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    422: "Strict mode: the answer cannot be checked. Or the upstream refuses the request.",
    429: "Too many requests.",
    499: "The client is gone.",
    500: "The gateway or the upstream failed.",
    502: "The upstream failed.",
    503: "Not at the moment: overloaded, the upstream away, or no correction where one is needed.",
    504: "The upstream took too long.",
}


def replies(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the errors that a route may give; those of the way in are always among them."""
    content = {"application/json": {"schema": _ERROR}}
    every = sorted({401, 403, 405, 500, *statuses})
    return {status: {"description": _MEANINGS[status], "content": content} for status in every}


def body(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a route's extra for a JSON body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string"},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {}}, {"type": "null"}]},
    },
    "additionalProperties": True,
}
_FLAG = {"type": ["boolean", "null"]}

CHAT: dict[str, Any] = {
    "type": "object",
    "required": ["model", "messages"],
    "properties": {
        "model": {"type": "string", "pattern": r"\S", "description": "Of /v1/models; MODEL:aligned is corrected."},
        "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
        "stream": _FLAG,
        "stream_options": {"type": ["object", "null"]},
        "store": {**_FLAG, "description": "Whether the exchange may be kept for feedback."},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 16},
        "logprobs": _FLAG,
        "response_format": {"type": ["object", "null"]},
    },
    "additionalProperties": True,
    "description": "As OpenAI's; fields that are not named here are passed on as they are.",
}
RESPONSE_REQUEST: dict[str, Any] = {
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": {"type": "string", "pattern": r"\S", "description": "Of /v1/models; MODEL:aligned is corrected."},
        "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]},
        "instructions": {"type": ["string", "null"]},
        "stream": _FLAG,
        "store": {**_FLAG, "description": "Whether the exchange may be kept for feedback."},
        "background": _FLAG,
        "text": {"type": ["object", "null"]},
        "reasoning": {"type": ["object", "null"]},
    },
    "additionalProperties": True,
    "description": "As OpenAI's; fields that are not named here are passed on as they are.",
}
MODE = {
    "name": "x-everalign-mode",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "enum": ["off", "shadow", "correct", "strict"]},
}


def _answer(description: str, items: str) -> dict[str, Any]:
    """An answer whole, with a list of `items`, and in events."""
    whole = {
        "type": "object",
        "required": ["id", items],
        "properties": {"id": {"type": "string"}, items: {"type": "array", "items": {"type": "object"}}},
    }
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
    content = {"application/json": {"schema": whole}, "text/event-stream": {"schema": event}}
    return {"description": description, "content": content}


ANSWER = _answer("The answer; or with `stream`, events with its chunks, at last `[DONE]`.", "choices")
RESPONSE = _answer("The answer; or with `stream`, events, at last one with the whole answer.", "output")
