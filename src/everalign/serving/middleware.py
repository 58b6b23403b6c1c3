"""Middleware in front of all routes: paths of different clients led to one, authentication, and response headers.

| requested | route |
|---|---|
| `/chat/completions`, and others without `/v1` | `/v1/chat/completions` |
| `/v1/v1/...`, from a client that adds `/v1` to a base URL that has it | `/v1/...` |
| `/openai/v1/...`, `/openai/...?api-version=...` (Azure) | `/v1/...` |
| `/openai/deployments/NAME/chat/completions?api-version=...` (Azure) | `/v1/chat/completions` of the model NAME |
| one with `//`, or a `/` at its end, from a base URL that ends with `/` | the same without |
| any of them behind the path of `--root-path` | the same without it |
"""

import re
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from everalign.serving.errors import GatewayError, refused
from everalign.serving.security import Keys, Session, Sessions
from everalign.serving.sse import json_bytes

ENDPOINTS = (
    *("assistants", "audio", "batches", "chat", "classify", "completions", "containers", "conversations", "embeddings"),
    *("evals", "feedback", "files", "fine_tuning", "images", "messages", "models", "moderations", "realtime", "rerank"),
    *("responses", "score", "threads", "tokenize", "uploads", "vector_stores", "videos"),
)
"""First words of OpenAI's paths and those of similar servers; none is a page of the gateway."""

SIGN_IN = "/login"
HEALTH = "/health"
"""Open to everybody, since probes have no key; it says only that the process answers."""

_DEPLOYMENT = re.compile(
    r"/openai/deployments/(?P<model>.+?)/(?P<rest>(?:chat/)?completions|(?:embeddings|images|audio)(?:/.*)?)", re.DOTALL
)
_AZURE = re.compile(r"/openai(?:/v1)?/(?P<rest>.+)")
_REPEATED = re.compile(r"(?:/v1){2,}(?=/)")
# Open without a key: the sign-in page and what it loads.
_OPEN_PAGES = (SIGN_IN, "/assets/style.css", "/assets/script.js")
_PAGES = ("/", "/dashboard", "/logout")
_ANSWERS = "/answers/"
_RESPONSE_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Meant:
    """The route that a path leads to.

    Args:
        path: the gateway's own path.
        model: the model that the path names instead of the body, if any.
        azure: whether it is one of Azure's paths, whose `api-version` other servers do not know.
    """

    path: str
    model: str | None = None
    azure: bool = False


def meant(path: str, root: str = "") -> Meant:
    """Return the route of a path; a proxy may have removed `root`, which it serves the gateway under, or not."""
    plain = re.sub(r"//+", "/", path).rstrip("/")
    if root and plain.startswith(f"{root}/"):
        plain = plain[len(root) :]
    if plain.startswith(("/v1/", "/openai/")) or plain[1:].partition("/")[0] in ENDPOINTS:
        path = plain
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :] or "/"
    if found := _DEPLOYMENT.fullmatch(path):
        return Meant(f"/v1/{found['rest']}", found["model"], azure=True)
    if found := _AZURE.fullmatch(path):
        return Meant(f"/v1/{found['rest']}", azure=True)
    path = _REPEATED.sub("/v1", path, count=1) if path.startswith("/v1/v1/") else path
    return Meant(f"/v1{path}" if path[1:].partition("/")[0] in ENDPOINTS else path)


@dataclass(eq=False)
class AuthMiddleware:
    """Authenticates every request, and resolves its path.

    A session's cookie opens the pages only: no page of another site can use it for the API.

    `root` is the path that a proxy serves the gateway under, if any.
    """

    app: ASGIApp
    keys: Keys
    sessions: Sessions
    root: str = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        route = meant(scope["path"], self.root)
        # HEAD is answered as GET without the body; who asks an upstream in turn uses HEAD there, too.
        state["head"] = scope["method"] == "HEAD"
        state["deployment"], state["azure"], state["root"] = route.model, route.azure, self.root
        scope = {**scope, "path": route.path, "method": "GET" if state["head"] else scope["method"]}

        async def complete(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in _RESPONSE_HEADERS.items():
                    headers.setdefault(name, value)
                if "x-request-id" not in headers:
                    headers["x-request-id"] = headers.get("x-everalign-id") or f"req_{uuid.uuid4().hex}"
            elif state["head"] and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        headers = Headers(scope=scope)
        try:
            state["session"], state["key_id"] = self._authenticate(scope, headers)
        except GatewayError as error:
            response = error_response(error)
            if error.status == 401 and "text/html" in headers.get("accept", "") and is_page(scope["path"]):
                response = RedirectResponse(self.root + SIGN_IN, 303)
            await response(scope, receive, complete)
            return
        try:
            await self.app(scope, receive, complete)
        finally:
            # For the access log: the route's pattern, not the path, which may hold anybody's words.
            state.setdefault("route", getattr(scope.get("route"), "path", None))

    def _authenticate(self, scope: Scope, headers: Headers) -> tuple[Session | None, str]:
        """Return the browser's session, if any, and the id of the client's key, empty where none is needed.

        Raises:
            GatewayError: a key is needed, or the request comes from a page of another site.
        """
        if scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers:
            # A preflight that the CORS middleware has not answered; it has no key, and could not have one.
            message = "pages of other sites may not use this gateway; its operator can let them, with --cors-origin"
            raise refused(message, code="origin_refused", status=403)
        session = None
        if is_page(scope["path"]) and "cookie" in headers:
            session = self.sessions.read(cookie_parser(headers["cookie"]).get(cookie_name(scope), ""))
        if scope["path"] == HEALTH:
            return session, ""
        if self.keys.needed:
            if session is not None and session.key_id and self.keys.knows(session.key_id):
                return session, session.key_id
            if scope["path"] in _OPEN_PAGES:
                return session, ""
        peer = scope.get("client")
        return session, self.keys.identify(headers, peer[0] if peer else None, scope.get("http_version", "1.1"))


def is_page(path: str) -> bool:
    return path in _PAGES or path in _OPEN_PAGES or path.startswith(_ANSWERS)


def cookie_name(scope: Scope) -> str:
    """Return the name of the session cookie; with the port, since cookies are shared by all ports of a machine."""
    server = scope.get("server")
    return f"everalign_session_{server[1] if server else 0}"


def json_response(content: Any, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    return Response(json_bytes(content), status, headers, "application/json")


def error_response(error: GatewayError) -> Response:
    # The rest of a body that is too large or too slow would be read, and thrown away, as long as it comes.
    close = {"connection": "close"} if error.status in (408, 413) else {}
    return json_response(error.body(), {**error.headers, **close}, error.status)
