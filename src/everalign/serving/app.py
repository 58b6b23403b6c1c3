"""The gateway as an ASGI application.

app = create_app(GatewaySettings((UpstreamSettings("default", "http://127.0.0.1:8000/v1"),)))
uvicorn.run(app)
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from everalign.serving.corrector_reload import CorrectorReloader
from everalign.serving.corrector_service import CorrectionService
from everalign.serving.errors import GatewayError, refused
from everalign.serving.feedback_route import feedback_routes
from everalign.serving.gateway import Gateway
from everalign.serving.middleware import Front, error_response
from everalign.serving.pages.routes import page_routes
from everalign.serving.passthrough import passthrough_routes
from everalign.serving.request_log import Store
from everalign.serving.responses_route import response_routes
from everalign.serving.routes import chat_routes, model_routes, status_routes
from everalign.serving.security import Keys, Sessions
from everalign.serving.settings import GatewaySettings, UpstreamSettings
from everalign.serving.stream_response import INTERNAL
from everalign.serving.telemetry import AccessLog

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 3.0


def create_app(
    settings: GatewaySettings,
    *,
    store: Store | None = None,
    corrections: CorrectionService | None = None,
    followed: CorrectorReloader | None = None,
) -> FastAPI:
    """Return a gateway; its parts are at `app.state.gateway`, and `app.state.ready` is called when it begins.

    Args:
        settings: how it is set up.
        store: keeps exchanges and feedback; closed at the end.
        corrections: the corrector in service; closed at the end. None for feedback alone.
        followed: the run whose promoted versions are put in service as they come.

    Raises:
        InputError: the mode needs a corrector.
    """
    gateway = Gateway.make(settings, store, corrections or CorrectionService())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = None if followed is None else asyncio.create_task(followed.follow(gateway.corrections))
        app.state.ready()
        looking = asyncio.create_task(_look_for_upstreams(gateway, app.state.warn))
        try:
            yield
        finally:
            looking.cancel()
            with suppress(asyncio.CancelledError):
                await looking
            if following is not None:
                following.cancel()
                with suppress(asyncio.CancelledError):
                    await following
            await gateway.close()

    servers: dict[str, Any] = {"servers": [{"url": settings.access.root_path}]} if settings.access.root_path else {}
    # The pages of the documentation would be fetched from elsewhere.
    app = FastAPI(title="Everalign gateway", lifespan=lifespan, docs_url=None, redoc_url=None, **servers)
    app.state.gateway, app.state.ready, app.state.warn = gateway, lambda: None, _log.warning
    for routes in (chat_routes, response_routes, model_routes, feedback_routes, status_routes):
        app.include_router(routes(gateway))
    access = settings.access
    keys, sessions = gateway.keys, Sessions()
    app.include_router(page_routes(gateway, keys, sessions, None if followed is None else followed.path))
    app.include_router(passthrough_routes(gateway))
    app.add_exception_handler(GatewayError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_path)
    app.add_exception_handler(Exception, _fail)
    app.add_middleware(_front, keys=keys, sessions=sessions, root=access.root_path)
    if access.cors_origins:
        # Outside of the front: a browser asks without a key what it may send. No cookie: keys are sent by pages.
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
        app.add_middleware(_proxied, trusted=list(access.trusted_proxies))
    return app


async def _look_for_upstreams(gateway: Gateway, warn: Callable[[str], None]) -> None:
    """Say at the start which upstreams do not answer: a server may be started before them, or with a wrong address."""

    async def look(settings: UpstreamSettings) -> None:
        try:
            await asyncio.wait_for(gateway.upstreams[settings.name].models(), _LOOK_SECONDS)
            return
        except asyncio.TimeoutError:
            trouble = f"it did not answer within {_LOOK_SECONDS:g} seconds"
        except GatewayError as error:
            # One without a list of models is there too.
            if error.status < 500 or error.code == "upstream_malformed":
                return
            trouble = error.message
        warn(f"the upstream {settings.name!r}, {settings.url}, does not answer: {trouble}")

    await asyncio.gather(*(look(one) for one in gateway.settings.upstreams))


def _front(app: ASGIApp, keys: Keys, sessions: Sessions, root: str) -> ASGIApp:
    return Front(app, keys, sessions, root)


def _proxied(app: ASGIApp, trusted: list[str]) -> ASGIApp:
    """Take from these alone, and from nobody else, what they say of who came by them."""
    return ProxyHeadersMiddleware(app, trusted)  # type: ignore[arg-type,return-value]


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return error_response(error)


async def _refuse_path(_: Request, error: Exception) -> Response:
    """There is no such path, or not by that method."""
    assert isinstance(error, HTTPException)
    found = refused(str(error.detail), code="unknown_url", status=error.status_code)
    found.headers.update(error.headers or {})
    return error_response(found)


async def _fail(_: Request, error: Exception) -> Response:
    # Not its message: it may quote what was asked. The traceback is the server's to log.
    _log.error("a request failed: %s", type(error).__name__)
    return error_response(GatewayError(500, INTERNAL, code="internal_error"))
