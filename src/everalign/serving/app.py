"""The gateway as an ASGI application, and the endpoints other than chat, which it passes through.

app = create_app(GatewaySettings(upstreams=(UpstreamSettings("default", "http://127.0.0.1:8000/v1"),)))
uvicorn.run(app)

What is passed through goes to the upstream, and its replies back, byte by byte. Nothing is corrected there. Strict mode
refuses whatever writes text, since the corrector would not see it. Clients share the upstream's account: what one of
them uploads, others can list if the upstream lets them.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from everalign.serving.chat_request import read_json
from everalign.serving.corrector_reload import CorrectorReloader
from everalign.serving.corrector_service import CorrectionService
from everalign.serving.eligibility import chosen_mode
from everalign.serving.errors import INTERNAL, ClientGone, GatewayError, refused
from everalign.serving.gateway import Gateway
from everalign.serving.limits import JSON, aside, body_deadline, content_type, read_body
from everalign.serving.middleware import ENDPOINTS, AuthMiddleware, error_response
from everalign.serving.pages.base import Pages, sign_in_routes
from everalign.serving.pages.dashboard import dashboard_routes
from everalign.serving.pages.playground import playground_routes
from everalign.serving.routes import chat_routes, feedback_routes, model_routes, status_routes
from everalign.serving.security import Sessions
from everalign.serving.settings import GatewaySettings, Mode, UpstreamSettings
from everalign.serving.sse import json_bytes
from everalign.serving.stream_response import cancel, cancel_on_disconnect
from everalign.serving.telemetry import AccessLog
from everalign.serving.upstream import RawReply, Upstream

if TYPE_CHECKING:
    from everalign.serving.store import FeedbackStore

_log = logging.getLogger(__name__)

_PROBE_SECONDS = 3.0
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
# What an operator does with the upstream is not for a client's key.
_ADMINISTRATION = ("organization", "organizations", "admin", "load_lora_adapter", "unload_lora_adapter", "feedback")
# The replies of these have no text that a model wrote.
_WITHOUT_TEXT = re.compile(r"(embeddings|moderations|rerank|score|classify|tokenize|pooling|audio/speech|models)(/.*)?")
_REQUEST_HEADERS = ("content-type", "content-encoding", "accept", "range", "if-none-match", "if-modified-since")
_UPSTREAM_HEADER = "x-everalign-upstream"


def create_app(
    settings: GatewaySettings,
    *,
    store: "FeedbackStore | None" = None,
    corrections: CorrectionService | None = None,
    reloader: CorrectorReloader | None = None,
) -> FastAPI:
    """Return a gateway; its parts are at `app.state.gateway`, and `app.state.ready` is called when it starts.

    Args:
        settings: of the gateway.
        store: stores exchanges and feedback; closed at the end.
        corrections: the corrector in service; closed at the end. None for feedback alone.
        reloader: puts a run's promoted versions in service.

    Raises:
        InputError: the mode needs a corrector.
    """
    gateway = Gateway(settings, store, corrections or CorrectionService())
    access = settings.access

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        background = [] if reloader is None else [asyncio.create_task(reloader.run(gateway.corrections))]
        app.state.ready()
        background.append(asyncio.create_task(_probe_upstreams(gateway, app.state.warn)))
        try:
            yield
        finally:
            await cancel(*background)
            await gateway.close()

    servers: dict[str, Any] = {"servers": [{"url": access.root_path}]} if access.root_path else {}
    # No documentation pages: they would load scripts from other sites.
    app = FastAPI(title="Everalign gateway", lifespan=lifespan, docs_url=None, redoc_url=None, **servers)
    app.state.gateway, app.state.ready, app.state.warn = gateway, lambda: None, _log.warning
    for routes in (chat_routes, model_routes, feedback_routes, status_routes):
        app.include_router(routes(gateway))
    sessions = Sessions()
    # Any key opens the pages; without keys, they are open to this machine.
    pages, run = Pages(sessions, gateway.keys.needed), None if reloader is None else reloader.path
    app.include_router(playground_routes(gateway, pages))
    app.include_router(dashboard_routes(gateway, pages, run))
    app.include_router(sign_in_routes(pages, gateway.keys))
    app.include_router(passthrough_routes(gateway))  # last: it takes all other paths
    for kind in (GatewayError, HTTPException, Exception):
        app.add_exception_handler(kind, _error_reply)

    # The middleware that is added last comes first.
    app.add_middleware(AuthMiddleware, keys=gateway.keys, sessions=sessions, root=access.root_path)
    if access.cors_origins:
        # Before authentication: a browser's preflight has no key. No credentials: pages send keys, not cookies.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
            max_age=600,
        )
    app.add_middleware(AccessLog)
    if access.trusted_proxies:
        # Only these are believed about the client's address.
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(access.trusted_proxies))
    return app


async def _probe_upstreams(gateway: Gateway, warn: Callable[[str], None]) -> None:
    """Warn at the start about upstreams that do not answer: not started yet, or at a wrong address."""

    async def probe(settings: UpstreamSettings) -> None:
        try:
            await asyncio.wait_for(gateway.upstreams[settings.name].models(), _PROBE_SECONDS)
            return
        except asyncio.TimeoutError:
            trouble = f"it did not answer within {_PROBE_SECONDS:g} seconds"
        except GatewayError as error:
            # A server without a list of models answers, too.
            if error.status < 500 or error.status == 501 or error.code == "upstream_malformed":
                return
            trouble = error.message
        warn(f"the upstream {settings.name!r}, {settings.url}, does not answer: {trouble}")

    await asyncio.gather(*map(probe, gateway.settings.upstreams))


async def _error_reply(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # there is no such path, or not with that method
        found = refused(str(error.detail), code="unknown_url", status=error.status_code)
        found.headers.update(error.headers or {})
        return error_response(found)
    if isinstance(error, GatewayError):
        return error_response(error)
    # Not its message, which may quote the request; the server logs the traceback.
    _log.error("a request failed: %s", type(error).__name__)
    return error_response(GatewayError(500, INTERNAL, code="internal_error"))


def passthrough_routes(gateway: Gateway) -> APIRouter:
    """Return the route for all other endpoints, to be included last."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/v1/{path:path}", methods=_METHODS)
    async def pass_through(path: str, request: Request) -> Response:
        mode = _allowed_mode(gateway, path, request)
        key_id = request.state.key_id
        with gateway.limiter.enter(key_id) as place:
            reply = await _send(gateway, path, request, quoted=mode != "strict")
            if gateway.allowances.counts_tokens(key_id):
                parts = gateway.allowances.metered(key_id, reply.parts, _content_length(request))
                reply = replace(reply, parts=parts)
            headers = {"x-everalign-mode": mode, "x-everalign-correction": "skipped; reason=passthrough"}
            gateway.metrics.requests.labels(mode, "skipped", "passthrough").inc()
            return _RawResponse(reply, headers, gateway.settings.timeouts.total, place.pop_all().close)

    return router


def _allowed_mode(gateway: Gateway, path: str, request: Request) -> Mode:
    """Return the mode of a request; raises GatewayError if it may not pass."""
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
    mode = chosen_mode(request.headers.get("x-everalign-mode"), gateway.parser.mode, False, gateway.has_corrector)
    if mode == "strict" and not _WITHOUT_TEXT.fullmatch(path):
        message = f"mode 'strict': the corrector does not see what /v1/{path[:100]} writes, so this gateway refuses it"
        raise refused(message, code="strict_passthrough")
    return mode


async def _send(gateway: Gateway, path: str, request: Request, quoted: bool) -> RawReply:
    """Send a request to its upstream, and return the reply, its body unread; raises GatewayError."""
    upstream, content = await _route(gateway, request)
    headers = gateway.settings.access.headers.forwarded(request.headers.items())
    headers |= {name: request.headers[name] for name in _REQUEST_HEADERS if name in request.headers}
    query = request.url.query
    if request.state.azure:
        query = "&".join(part for part in query.split("&") if not part.startswith("api-version="))
    target = quote(path, safe="/:@!$&'()*+,;=~") + (f"?{query}" if query else "")
    method = "HEAD" if request.state.head else request.method
    if content is not None:
        return await cancel_on_disconnect(request.receive, upstream.send(method, target, headers, content, quoted))
    if "content-length" in request.headers:
        headers["content-length"] = request.headers["content-length"]
    limits = gateway.settings.limits
    most = limits.body_bytes if content_type(request) == JSON else limits.upload_bytes
    if _content_length(request) > most:
        raise _too_large(most)
    read = asyncio.Event()  # while the body is read, its reader notices that the client disconnects
    sending = upstream.send(method, target, headers, _upload(request, most, read), quoted)
    return await cancel_on_disconnect(request.receive, sending, after=read)


async def _route(gateway: Gateway, request: Request) -> tuple[Upstream, bytes | None]:
    """Return the upstream, and the body if it had to be read for the model's name; raises GatewayError.

    Of several upstreams, the model's name tells which one, as in chat; else a header; else it is the first one.
    """
    upstreams = gateway.upstreams
    named = request.headers.get(_UPSTREAM_HEADER, next(iter(upstreams)))
    if named not in upstreams:
        names = ", ".join(upstreams)
        raise refused(f"{_UPSTREAM_HEADER}: must be one of {names}", _UPSTREAM_HEADER, "unknown_upstream")
    bodiless = request.method in ("GET", "DELETE") and "content-length" not in request.headers
    if bodiless and "transfer-encoding" not in request.headers:
        return upstreams[named], b""
    if content_type(request) != JSON or (len(upstreams) == 1 and request.state.deployment is None):
        return upstreams[named], None
    content = await read_body(request, gateway.settings.limits.body_bytes)
    body: dict[str, Any] = await aside(content, lambda: read_json(content))
    model = request.state.deployment or body.get("model")
    if not isinstance(model, str):
        return upstreams[named], json_bytes(body)
    upstream, own, _ = gateway.parser.route(model, gateway.has_corrector)
    return upstream, json_bytes({**body, "model": own})


async def _upload(request: Request, most: int, read: asyncio.Event) -> AsyncIterator[bytes]:
    """Yield a request's body and set `read` at its end; raises GatewayError if it is too large, or stops coming."""
    size = 0
    stream = request.stream()
    while True:
        with body_deadline():
            try:
                part = await anext(stream)
            except StopAsyncIteration:
                break
            except ClientDisconnect:
                raise ClientGone from None
        size += len(part)
        if size > most:
            raise _too_large(most)
        if part:
            yield part
    read.set()


def _content_length(request: Request) -> int:
    length = request.headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdigit() else 0


def _too_large(most: int) -> GatewayError:
    return refused(f"the body is larger than {most} bytes", code="body_too_large", status=413)


class _RawResponse(Response):
    """An upstream's reply, passed on within a time limit; `release` is called at its end."""

    def __init__(self, reply: RawReply, headers: dict[str, str], seconds: float, release: Callable[[], None]) -> None:
        super().__init__(status_code=reply.status, headers={**reply.headers, **headers})
        if "content-length" not in reply.headers:
            del self.headers["content-length"]  # of the empty body that a Response begins with
        self._reply, self._seconds, self._release = reply, seconds, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pass_on() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for part in self._reply.parts:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except httpx.HTTPError as error:
                # No end is sent: the client's connection breaks off as the upstream's did.
                _log.error("a reply that is passed on broke off: %s", type(error).__name__)
                return
            # Before the end is sent: a client that asks again at once must find its place free.
            self._release()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            with suppress(ClientGone, asyncio.TimeoutError):
                await asyncio.wait_for(cancel_on_disconnect(receive, pass_on()), self._seconds)
        finally:
            await self._reply.aclose()
            self._release()
