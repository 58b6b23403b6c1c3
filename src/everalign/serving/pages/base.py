"""What all pages need: rendering, session cookies, forms with CSRF tokens; and the page to sign in, with its files."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from everalign.serving.errors import GatewayError, refused
from everalign.serving.limits import BODY_SECONDS, FORM, Limiter, aside, read_body
from everalign.serving.middleware import SIGN_IN, cookie_name
from everalign.serving.security import Keys, Session, Sessions

# Nothing inline, nothing from other sites, forms only to this one.
CONTENT_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_MOST_FIELDS = 40
_MOST_BYTES = 10_000
# Sign-ins have places of their own, so that clients without a key cannot block the others.
_SIGN_INS = 20
_SECONDS = 5.0  # for a form with just a key
_ASSETS = {"style.css": "text/css; charset=utf-8", "script.js": "text/javascript; charset=utf-8"}


class Pages:
    """Renders pages; users have to sign in if they are `locked`."""

    def __init__(self, sessions: Sessions, locked: bool) -> None:
        self.sessions, self._locked = sessions, locked
        self._templates = Environment(
            loader=PackageLoader("everalign.serving.pages"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def page(self, request: Request, template: str, values: Mapping[str, Any], status: int = 200) -> Response:
        """Return a page; a browser without a session of its key gets a new one."""
        session = request.state.session
        known = session is not None and session.key_id == request.state.key_id
        if not known:
            session = self.sessions.begin(request.state.key_id)
        common = {
            "token": self.sessions.token(session),
            "path": request.url.path,
            "root": request.state.root,
            "may_leave": self._locked and bool(session.key_id),
        }
        text = self._templates.get_template(template).render({**common, **values})
        # An upstream may have sent half a surrogate pair, which no encoding has.
        content = text.encode(errors="replace")
        response = Response(content, status, {"content-security-policy": CONTENT_POLICY}, "text/html; charset=utf-8")
        if not known:
            self.send_cookie(request, response, session)
        return response

    def send_cookie(self, request: Request, response: Response, session: Session) -> None:
        """Set a browser's session cookie; one set over https is never sent over http."""
        response.set_cookie(
            cookie_name(request.scope),
            self.sessions.cookie(session),
            max_age=self.sessions.seconds,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )


async def read_form(request: Request, sessions: Sessions, most: int, seconds: float = BODY_SECONDS) -> dict[str, str]:
    """Return a form's fields, once its CSRF token is checked.

    Raises:
        GatewayError: the form cannot be read; or it comes from another site, or its session is over (403).
    """
    content = await read_body(request, most, FORM, seconds)
    fields = await aside(content, lambda: parsed(content))
    session = request.state.session
    own = session is not None and session.key_id == request.state.key_id
    if not own or not sessions.is_token(session, fields.get("token", "")):
        message = "this form has expired or comes from another site; nothing was done: please send it again"
        raise GatewayError(403, message, "invalid_request_error", "form_expired")
    return fields


def parsed(content: bytes) -> dict[str, str]:
    """Return the fields of a form's body, with line feeds as line ends; raises GatewayError."""
    try:
        found = parse_qsl(content.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS)
    except ValueError:
        raise refused("the form cannot be read", code="invalid_form") from None
    return {name: value.replace("\r\n", "\n") for name, value in found}


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
