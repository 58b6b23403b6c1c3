"""What clients call the gateway's paths, all of them led to one: `/v1/...`.

| asked for | meant |
|---|---|
| `/chat/completions`, and others without `/v1` | `/v1/chat/completions` |
| `/v1/v1/...`, as where a client adds `/v1` to a base URL that has it | `/v1/...` |
| `/openai/v1/...`, `/openai/...?api-version=...` (Azure) | `/v1/...` |
| `/openai/deployments/NAME/chat/completions?api-version=...` (Azure) | `/v1/chat/completions` of the model NAME |
| one with `//`, or a `/` at its end, as clients make them of a base URL that ends so | the same without |
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

# The first words of OpenAI's paths, and of those that servers like it have; the gateway's own pages are none of them.
ENDPOINTS = (
    *("assistants", "audio", "batches", "chat", "classify", "completions", "containers", "conversations", "embeddings"),
    *("evals", "feedback", "files", "fine_tuning", "images", "messages", "models", "moderations", "realtime", "rerank"),
    *("responses", "score", "threads", "tokenize", "uploads", "vector_stores", "videos"),
)
_DEPLOYMENT = re.compile(
    r"/openai/deployments/(?P<model>.+?)/(?P<rest>(?:chat/)?completions|(?:embeddings|images|audio)(?:/.*)?)", re.DOTALL
)
_AZURE = re.compile(r"/openai(?:/v1)?/(?P<rest>.+)")
_REPEATED = re.compile(r"(?:/v1){2,}(?=/)")


@dataclass(frozen=True)
class Meant:
    """Where a request leads.

    Args:
        path: that the gateway's routes know.
        model: that the path names in the place of the body; None where it names none.
        azure: whether it is one of Azure's paths, whose `api-version` says nothing to others.
    """

    path: str
    model: str | None = None
    azure: bool = False


def meant(path: str, root: str = "") -> Meant:
    """Return where a path leads.

    Args:
        path: of the request, without its query.
        root: what a proxy has in front; a proxy may have taken it away.
    """
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


_ALWAYS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}

SIGN_IN = "/login"
HEALTH = "/health"
"""Says that the process answers, and nothing else: probes have no key."""
# All that is told without a key: how to sign in, and what that page looks like.
_UNLOCKED = (SIGN_IN, "/assets/style.css", "/assets/script.js")
_PAGES = ("/", "/dashboard", "/logout")
_ANSWERS = "/answers/"


class Front:
    """Lets in who may be let in, to every route there is.

    A session's cookie opens the pages, and nothing else: no page of another site can use it for the API.

    Args:
        app: what is behind it.
        keys: the clients'.
        sessions: of browsers.
        root: what a proxy has in front of the gateway's paths; empty for nothing.
    """

    def __init__(self, app: ASGIApp, keys: Keys, sessions: Sessions, root: str = "") -> None:
        self._app, self._keys, self._sessions, self._root = app, keys, sessions, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        found = meant(scope["path"], self._root)
        # GET's answer without its body is what HEAD asks for; whoever asks others in its turn does so by HEAD.
        state["head"] = scope["method"] == "HEAD"
        state["deployment"], state["azure"], state["root"] = found.model, found.azure, self._root
        scope = {**scope, "path": found.path, "method": "GET" if state["head"] else scope["method"]}

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                _complete(message)
            elif state["head"] and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        headers = Headers(scope=scope)
        try:
            _check_preflight(scope["method"], headers)
            state["session"] = self._session(scope, headers)
            state["key_id"] = self._key_id(scope, headers, state["session"])
        except GatewayError as error:
            await self._turned_away(scope, headers, error)(scope, receive, sent)
            return
        try:
            await self._app(scope, receive, sent)
        finally:
            # Of the route, not of the request: nobody's words are in it.
            state.setdefault("route", getattr(scope.get("route"), "path", None))

    def _session(self, scope: Scope, headers: Headers) -> Session | None:
        if not is_page(scope["path"]) or "cookie" not in headers:
            return None
        return self._sessions.read(cookie_parser(headers["cookie"]).get(cookie_name(scope), ""))

    def _key_id(self, scope: Scope, headers: Headers, session: Session | None) -> str:
        peer = scope.get("client")
        if scope["path"] == HEALTH:
            return ""
        if self._keys.needed:
            if session is not None and session.key_id and self._keys.knows(session.key_id):
                return session.key_id
            if scope["path"] in _UNLOCKED:
                return ""
        return self._keys.identify(headers, peer[0] if peer else None, scope.get("http_version", "1.1"))

    def _turned_away(self, scope: Scope, headers: Headers, error: GatewayError) -> Response:
        reads = "text/html" in headers.get("accept", "")
        if error.status == 401 and reads and is_page(scope["path"]):
            return RedirectResponse(self._root + SIGN_IN, 303)
        return error_response(error)


def _check_preflight(method: str, headers: Headers) -> None:
    """Answer a browser that asks what a page of another site may do here, if nobody has before: nothing.

    It has no key, and could not be given one.
    """
    if method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers:
        message = "pages of other sites may not use this gateway; its operator can let them, with --cors-origin"
        raise refused(message, code="origin_refused", status=403)


def is_page(path: str) -> bool:
    """Whether a path is one of the pages."""
    return path in _PAGES or path in _UNLOCKED or path.startswith(_ANSWERS)


def cookie_name(scope: Scope) -> str:
    """Return what a session's cookie is called: browsers have one set of cookies for all ports of a machine."""
    server = scope.get("server")
    return f"everalign_session_{server[1] if server else 0}"


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
    # What is left of a body that is too large or too slow would be read, and thrown away, as long as it comes.
    close = {"connection": "close"} if error.status in (408, 413) else {}
    return json_response(error.body(), {**error.headers, **close}, error.status)
