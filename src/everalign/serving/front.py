"""What every request passes first: who it comes from, and what every reply has."""

import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everalign.serving.auth import Keys
from everalign.serving.errors import GatewayError
from everalign.serving.sse import json_bytes

_ALWAYS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


class Front:
    """Lets in who may be let in, to every route there is.

    Args:
        app: what is behind it.
        keys: the clients'.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                _complete(message)
            await send(message)

        peer = scope.get("client")
        try:
            key_id = self._keys.identify(Headers(scope=scope), peer[0] if peer else None)
        except GatewayError as error:
            await error_response(error)(scope, receive, sent)
            return
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["key_id"] = key_id
        await self._app(scope, receive, sent)


def _complete(message: Message) -> None:
    headers = MutableHeaders(raw=message.setdefault("headers", []))
    for name, value in _ALWAYS.items():
        headers.setdefault(name, value)
    if "x-request-id" not in headers:
        headers["x-request-id"] = headers.get("x-everalign-id") or f"req_{uuid.uuid4().hex}"


def json_response(content: Any, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    """Return a reply in JSON."""
    return Response(json_bytes(content), status, headers, "application/json")


def error_response(error: GatewayError) -> Response:
    """Return an error as OpenAI's clients read it."""
    return json_response(error.body(), error.headers, error.status)
