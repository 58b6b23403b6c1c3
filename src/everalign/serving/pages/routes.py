"""Routes of all pages, of signing in and out, and of style sheet and script."""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from everalign.serving.errors import GatewayError
from everalign.serving.gateway import Gateway
from everalign.serving.limits import Limiter
from everalign.serving.middleware import SIGN_IN, cookie_name
from everalign.serving.pages.base import Pages, read_form
from everalign.serving.pages.dashboard import dashboard_routes
from everalign.serving.pages.playground import playground_routes
from everalign.serving.security import Keys, Sessions

_MOST_BYTES = 10_000
# Sign-ins have places of their own, so that clients without a key cannot block the others.
_SIGN_INS = 20
_SECONDS = 5.0  # for a form with just a key
_ASSETS = {"style.css": "text/css; charset=utf-8", "script.js": "text/javascript; charset=utf-8"}


def sign_in_routes(pages: Pages, keys: Keys) -> APIRouter:
    """Return the routes of signing in and out, and of the files that this page loads."""
    router, places = APIRouter(include_in_schema=False), Limiter(_SIGN_INS, _SIGN_INS, shared=True)

    @router.get(SIGN_IN)
    async def ask_for_key(request: Request) -> Response:
        if not keys.needed or request.state.key_id:
            return RedirectResponse(f"{request.state.root}/", 303)
        return pages.page(request, "login.html.j2", {"error": None})

    @router.post(SIGN_IN)
    async def sign_in(request: Request) -> Response:
        with places.enter(request.client.host if request.client else ""):
            try:
                fields = await read_form(request, pages.sessions, _MOST_BYTES, _SECONDS)
            except GatewayError as error:
                return pages.page(request, "login.html.j2", {"error": error.message}, error.status)
        key_id = keys.id_of(fields.get("key", "").strip()) if keys.needed else None
        if key_id is None:
            message = "This key is not known here. Keys are set by the operator of the gateway."
            return pages.page(request, "login.html.j2", {"error": message}, 401)
        response = RedirectResponse(f"{request.state.root}/", 303)
        # A new session, since somebody could know the cookie of the former one (session fixation).
        pages.send_cookie(request, response, pages.sessions.begin(key_id))
        return response

    @router.post("/logout")
    async def sign_out(request: Request) -> Response:
        await read_form(request, pages.sessions, _MOST_BYTES)
        pages.sessions.end(request.state.session)
        response = RedirectResponse(request.state.root + (SIGN_IN if keys.needed else "/"), 303)
        response.delete_cookie(cookie_name(request.scope), httponly=True, samesite="strict")
        return response

    @router.get("/assets/{name}")
    async def asset(name: str) -> Response:
        if name not in _ASSETS:
            raise GatewayError(404, "there is no such file", "invalid_request_error", "unknown_url")
        content = (files("everalign.serving.pages") / "assets" / name).read_bytes()
        return Response(content, media_type=_ASSETS[name])

    return router


def page_routes(gateway: Gateway, keys: Keys, sessions: Sessions, run: Path | None) -> APIRouter:
    """Return the routes of all pages; `run` is None if the corrector comes from no run.

    Any key opens them; without keys, they are open to this machine.
    """
    router, pages = APIRouter(include_in_schema=False), Pages(sessions, keys.needed)
    router.include_router(playground_routes(gateway, pages))
    router.include_router(dashboard_routes(gateway, pages, run))
    router.include_router(sign_in_routes(pages, keys))
    return router
