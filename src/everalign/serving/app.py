"""The gateway as an ASGI application.

app = create_app(GatewaySettings(upstreams=(UpstreamSettings("default", "http://127.0.0.1:8000/v1"),)))
uvicorn.run(app)
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from everalign.serving.corrector_reload import CorrectorReloader
from everalign.serving.corrector_service import CorrectionService
from everalign.serving.errors import INTERNAL, GatewayError, refused
from everalign.serving.gateway import Gateway
from everalign.serving.middleware import AuthMiddleware, error_response
from everalign.serving.pages.routes import page_routes
from everalign.serving.passthrough import passthrough_routes
from everalign.serving.routes import chat_routes, feedback_routes, model_routes, status_routes
from everalign.serving.security import Sessions
from everalign.serving.settings import GatewaySettings, UpstreamSettings
from everalign.serving.stream_response import cancel
from everalign.serving.telemetry import AccessLog

if TYPE_CHECKING:
    from everalign.serving.store import FeedbackStore

_log = logging.getLogger(__name__)

_PROBE_SECONDS = 3.0


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
    app.include_router(page_routes(gateway, gateway.keys, sessions, None if reloader is None else reloader.path))
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
