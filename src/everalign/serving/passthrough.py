"""Endpoints that are not chat: passed on to the upstream, and its replies back, byte by byte.

Nothing is corrected here. In strict mode whatever writes text is refused, since the corrector would not see it. Clients
share the upstream's account: what one of them uploads, the others can list, where the upstream lets them.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from everalign.serving.chat_request import read_json
from everalign.serving.eligibility import chosen_mode
from everalign.serving.errors import GatewayError, refused
from everalign.serving.fallback import Answering, Passed
from everalign.serving.gateway import Gateway
from everalign.serving.limits import JSON, aside, body_deadline, read_body
from everalign.serving.middleware import ENDPOINTS
from everalign.serving.settings import Mode
from everalign.serving.sse import json_bytes
from everalign.serving.stream_response import cancel_on_disconnect, ended, unless, until_gone

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
# What an operator does with the upstream is not for whoever has a client's key.
_ADMINISTRATION = ("organization", "organizations", "admin", "load_lora_adapter", "unload_lora_adapter", "feedback")
# No text that a model wrote is in what these give.
_WITHOUT_TEXT = re.compile(r"(embeddings|moderations|rerank|score|classify|tokenize|pooling|audio/speech|models)(/.*)?")
_SENT = ("content-type", "content-encoding", "accept", "range", "if-none-match", "if-modified-since")
_UPSTREAM_HEADER = "x-everalign-upstream"

_log = logging.getLogger(__name__)


def passthrough_routes(gateway: Gateway) -> APIRouter:
    """Return the route, which has to come behind all others."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/v1/{path:path}", methods=_METHODS)
    async def forwarded_headers(path: str, request: Request) -> Response:
        mode = _checked(gateway, path, request)
        ticket = gateway.limiter.enter(request.state.key_id)
        try:
            passed = await _passed(gateway, path, request, quoted=mode != "strict")
            if gateway.allowances.counts_tokens(request.state.key_id):
                sent = request.headers.get("content-length", "0")
                size = int(sent) if sent.isascii() and sent.isdigit() else 0
                passed = replace(passed, parts=gateway.allowances.metered(request.state.key_id, passed.parts, size))
            about = {"x-everalign-mode": mode, "x-everalign-correction": "skipped; reason=passthrough"}
            gateway.metrics.requests.labels(mode, "skipped", "passthrough").inc()
            return _Relayed(passed, about, gateway.settings.timeouts.total, ticket.release)
        except BaseException:
            ticket.release()
            raise

    return router


def _checked(gateway: Gateway, path: str, request: Request) -> Mode:
    """Return the mode of a request that may pass; raises GatewayError for one that may not."""
    settings = gateway.settings
    first = path.partition("/")[0]
    request.state.route = f"/v1/{first}" if first in ENDPOINTS else "/v1/..."
    offered = settings.passthrough == "all" or first in {one.strip() for one in settings.passthrough.split(",")}
    odd = any(part in ("", ".", "..") for part in path.split("/")) or re.search(r"[\x00-\x20\x7f\\]", path)
    if odd or not offered or first in _ADMINISTRATION:
        raise refused(
            f"/v1/{path[:100]}: this gateway does not offer it; see --passthrough, or ask the upstream itself",
            code="endpoint_not_offered",
            status=404,
        )
    mode = chosen_mode(request.headers.get("x-everalign-mode"), gateway.desk.mode, False, gateway.has_corrector)
    if mode == "strict" and not _WITHOUT_TEXT.fullmatch(path):
        message = f"mode 'strict': the corrector does not see what /v1/{path[:100]} writes, so this gateway refuses it"
        raise refused(message, code="strict_passthrough")
    return mode


async def _passed(gateway: Gateway, path: str, request: Request, quoted: bool) -> Passed:
    """Return the upstream's reply, whose body is not read; raises GatewayError."""
    upstream, content = await _routed(gateway, request)
    headers = gateway.settings.access.headers.forwarded(request.headers.items())
    headers |= {name: request.headers[name] for name in _SENT if name in request.headers}
    query = request.url.query
    if request.state.azure:
        query = "&".join(part for part in query.split("&") if not part.startswith("api-version="))
    target = quote(path, safe="/:@!$&'()*+,;=~") + (f"?{query}" if query else "")
    method = "HEAD" if request.state.head else request.method
    if content is not None:
        return await cancel_on_disconnect(request.receive, upstream.send(method, target, headers, content, quoted))
    if "content-length" in request.headers:
        headers["content-length"] = request.headers["content-length"]
    upload = _Upload(request, gateway.settings.limits.upload_bytes, gateway.settings.limits.body_bytes)
    return await upload.sent(upstream.send(method, target, headers, upload.parts(), quoted))


async def _routed(gateway: Gateway, request: Request) -> tuple[Answering, bytes | None]:
    """Return who is asked, and the body if it had to be read, since the model's name is in it; raises GatewayError.

    Several upstreams are told apart by the model's name, as in chat; where there is none, by a header, else the first
    one is meant.
    """
    upstreams, limits = gateway.upstreams, gateway.settings.limits
    named = request.headers.get(_UPSTREAM_HEADER, next(iter(upstreams)))
    if named not in upstreams:
        names = ", ".join(upstreams)
        raise refused(f"{_UPSTREAM_HEADER}: must be one of {names}", _UPSTREAM_HEADER, "unknown_upstream")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    bodiless = request.method in ("GET", "DELETE") and "content-length" not in request.headers
    if bodiless and "transfer-encoding" not in request.headers:
        return upstreams[named], b""
    if kind != JSON or (len(upstreams) == 1 and request.state.deployment is None):
        return upstreams[named], None
    content = await read_body(request, limits.body_bytes)
    body: dict[str, Any] = await aside(content, lambda: read_json(content))
    model = request.state.deployment or body.get("model")
    if not isinstance(model, str):
        return upstreams[named], json_bytes(body)
    upstream, own, _ = gateway.desk.routed(model, gateway.has_corrector)
    return upstream, json_bytes({**body, "model": own})


class _Upload:
    """A body on its way to the upstream, piece by piece.

    Args:
        request: whose body it is.
        most: bytes of it.
        most_json: bytes of it where it is JSON.
    """

    def __init__(self, request: Request, most: int, most_json: int) -> None:
        self._request, self._over = request, asyncio.Event()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        self._most = most_json if kind == JSON else most
        length = request.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > self._most:
            raise self._too_large()

    def _too_large(self) -> GatewayError:
        return refused(f"the body is larger than {self._most} bytes", code="body_too_large", status=413)

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield the body; raises GatewayError where it is too large, or stops coming."""
        size = 0
        stream = self._request.stream()
        while True:
            with body_deadline():
                try:
                    part = await anext(stream)
                except StopAsyncIteration:
                    break
                except ClientDisconnect:
                    raise GatewayError(499, "the client is gone", code="client_gone") from None
            size += len(part)
            if size > self._most:
                raise self._too_large()
            if part:
                yield part
        self._over.set()

    async def sent(self, sending: Coroutine[Any, Any, Passed]) -> Passed:
        """Return what sending it comes to, unless the client is gone before."""

        async def gone() -> None:
            await self._over.wait()  # as long as the body comes, its reader sees that the client goes
            await until_gone(self._request.receive)

        return await unless(gone(), sending)


class _Relayed(Response):
    """An upstream's reply on its way to the client.

    Args:
        passed: the reply.
        headers: besides the reply's own.
        seconds: that it may take.
        released: called at the end, however it comes.
    """

    def __init__(self, passed: Passed, headers: dict[str, str], seconds: float, released: Callable[[], None]) -> None:
        super().__init__(status_code=passed.status, headers={**passed.headers, **headers})
        if "content-length" not in passed.headers:
            del self.headers["content-length"]  # of the empty body that a Response begins with
        self._passed, self._seconds, self._released = passed, seconds, released

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, as ASGI has it."""
        sender, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({sender, gone}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            await ended(sender, gone)
            await self._passed.aclose()
            self._released()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for part in self._passed.parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except httpx.HTTPError as error:
            # Its end is not sent: the client's connection breaks off as the upstream's did.
            _log.error("a reply that is passed on broke off: %s", type(error).__name__)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
