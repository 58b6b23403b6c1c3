"""Endpoints that are not chat reach the upstream untouched and come back so, and strict mode lets no text by."""

import asyncio
import hashlib
import json
import threading
import time

import httpx
import pytest

from everalign.errors import InputError
from everalign.serving.settings import Access, GatewaySettings, Limits, UpstreamSettings
from upstream_for_tests import HTTP, Fake, ServedUpstream, serving

KEY = "sk-client-one"
BEARER = {"authorization": f"Bearer {KEY}"}


class Echo(ServedUpstream):
    """An upstream that says what reached it; by its path it also fails, streams, hangs or breaks off."""

    def __init__(self):
        self.seen, self.gone = [], threading.Event()
        super().__init__()

    async def app(self, scope, receive, send):
        digest, size = hashlib.sha256(), 0
        while (message := await receive())["type"] == "http.request":
            digest.update(message["body"])
            size += len(message["body"])
            if not message["more_body"]:
                break
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        seen = {"method": scope["method"], "path": scope["path"], "query": scope["query_string"].decode(),
                "headers": headers, "sha256": digest.hexdigest(), "size": size}  # fmt: skip
        if message["type"] == "http.disconnect":
            return
        if scope["path"] != "/v1/models":  # asked for when a gateway begins
            self.seen.append(seen)
        kind = scope["path"].rpartition("/")[2]
        special = {"hang": self.hang, "sse": self.stream, "cut": self.cut, "binary": self.binary}
        if kind in special:
            await special[kind](receive, send)
        elif kind.isdigit():
            await self.reply(send, int(kind), b'{"error": {"message": "no, upstream-key", "metadata": {"a": 1}}}')
        else:
            await self.reply(send, 200, json.dumps(seen).encode())

    async def hang(self, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone.set()

    async def stream(self, receive, send):
        await send(start(200, "text/event-stream"))
        for i in range(3):
            await send({"type": "http.response.body", "body": b'data: {"n": %d}\n\n' % i, "more_body": True})
            await asyncio.sleep(0.25)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def cut(self, receive, send):
        await send(start(200, "application/octet-stream"))
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ConnectionError("cut by the test")

    async def binary(self, receive, send):
        headers = {"content-range": "bytes 0-3/9", "content-disposition": "attachment", "set-cookie": "a=b"}
        await send(start(206, "audio/mpeg", {**headers, "x-request-id": "r"}))
        await send({"type": "http.response.body", "body": b"\xff\x00\xfe\x01"})

    async def reply(self, send, status, content):
        headers = {"retry-after": "3", "x-ratelimit-remaining-requests": "0", "location": "http://elsewhere/"}
        await send(start(status, "application/json", headers))
        await send({"type": "http.response.body", "body": content})


def start(status, kind, headers=None):
    found = {"content-type": kind, **(headers or {})}
    return {"type": "http.response.start", "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in found.items()]}  # fmt: skip


@pytest.fixture(scope="module")
def echo():
    with Echo() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(echo):
    limits = Limits(body_bytes=100_000, upload_bytes=3_000_000)
    with serving(echo.settings, keys=(KEY,), corrector=Fake(), limits=limits) as running:
        yield running


@pytest.fixture(scope="module")
def strict(echo):
    with serving(echo.settings, keys=(KEY,), corrector=Fake(), mode="strict") as running:
        yield running


def ask(gateway, path, method="POST", headers=BEARER, **more):
    return HTTP.request(method, f"{gateway.url}/{path}", headers=headers, **more)


@pytest.mark.parametrize(
    "path",
    ["embeddings", "completions", "moderations", "images/generations", "audio/speech", "files", "batches", "rerank",
     "uploads/up-1/parts", "vector_stores/vs-1/files", "fine_tuning/jobs", "assistants", "threads/t/runs", "videos",
     "something/new"],
)  # fmt: skip
def test_the_rest_of_the_api_passes_untouched(path, gateway):
    content = b'{"model":"m",  "input":"caf\xc3\xa9", "input":"twice", "n":1.0}'
    reply = ask(gateway, path, content=content, headers={**BEARER, "content-type": "application/json"})
    seen = reply.json()
    assert (reply.status_code, seen["method"], seen["path"]) == (200, "POST", f"/v1/{path}")
    assert seen["sha256"] == hashlib.sha256(content).hexdigest()
    assert seen["headers"]["authorization"] == "Bearer upstream-key"
    assert KEY not in str(seen)
    assert reply.headers["x-everalign-correction"] == "skipped; reason=passthrough"


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "PATCH", "HEAD"])
def test_every_method_and_query_passes(method, gateway, echo):
    reply = ask(gateway, "files/f-1?after=a%2Fb&limit=2", method)
    assert reply.status_code == 200
    seen = echo.seen[-1]
    assert (seen["method"], seen["path"], seen["query"]) == (method, "/v1/files/f-1", "after=a%2Fb&limit=2")
    assert reply.content == b"" if method == "HEAD" else reply.json()


def test_azure_s_version_stays_here_and_its_deployment_is_the_model(gateway, echo):
    root = gateway.url.removesuffix("/v1")
    path = "/openai/deployments/emb/embeddings?api-version=2024-10-21&x=1"
    reply = HTTP.post(root + path, json={"input": "a"}, headers={"api-key": KEY})
    assert (reply.status_code, reply.json()["query"]) == (200, "x=1")
    assert reply.json()["sha256"] == hashlib.sha256(b'{"input":"a","model":"emb"}').hexdigest()


def test_uploads_pass_in_pieces_and_untouched(gateway):
    file = bytes(range(256)) * 8000
    reply = ask(gateway, "files", files={"file": ("a.bin", file)}, data={"purpose": "batch"})
    seen = reply.json()
    assert seen["size"] > len(file)
    assert seen["headers"]["content-type"].startswith("multipart/form-data; boundary=")

    def pieces():
        yield b"a" * 10
        yield b"b" * 10

    seen = ask(gateway, "audio/transcriptions", content=pieces()).json()
    assert (seen["size"], seen["headers"]["transfer-encoding"]) == (20, "chunked")


def test_what_is_too_large_is_refused_before_and_while_it_comes(gateway, echo):
    def endless():
        while True:
            yield b"x" * 100_000

    json_type = {**BEARER, "content-type": "application/json"}
    before = len(echo.seen)
    for content, headers in ((b"x" * 100_001, json_type), (b"x" * 3_000_001, BEARER), (endless(), BEARER)):
        try:
            reply = ask(gateway, "files", content=content, headers=headers)
        except httpx.WriteError:
            continue  # the gateway has refused it, and reads no more
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert len(echo.seen) == before
    assert gateway.gateway.limiter.in_flight == 0


def test_replies_come_back_byte_by_byte(gateway):
    reply = ask(gateway, "audio/binary")
    assert (reply.status_code, reply.content) == (206, b"\xff\x00\xfe\x01")
    assert reply.headers["content-type"] == "audio/mpeg"
    assert (reply.headers["content-range"], reply.headers["content-disposition"]) == ("bytes 0-3/9", "attachment")
    assert reply.headers["x-request-id"] == "r"
    assert "set-cookie" not in reply.headers


def test_streams_pass_from_the_first_byte(gateway):
    started, times = time.monotonic(), []
    with HTTP.stream("POST", f"{gateway.url}/completions/sse", headers=BEARER, json={"stream": True}) as reply:
        lines = [line for line in reply.iter_lines() if line and not times.append(time.monotonic() - started)]
    assert lines == ['data: {"n": 0}', 'data: {"n": 1}', 'data: {"n": 2}', "data: [DONE]"]
    assert times[0] < 0.2 < times[-1]


@pytest.mark.parametrize(("said", "status"), [(400, 400), (404, 404), (429, 429), (500, 500), (503, 503), (401, 502),
                                              (302, 502)])  # fmt: skip
def test_errors_pass_whole_but_for_the_key(said, status, gateway):
    reply = ask(gateway, f"embeddings/{said}", json={})
    assert reply.status_code == status
    assert "upstream-key" not in reply.text
    assert "location" not in reply.headers
    if said == status:
        assert reply.json() == {"error": {"message": "no, ***", "metadata": {"a": 1}}}
        assert (reply.headers["retry-after"], reply.headers["x-ratelimit-remaining-requests"]) == ("3", "0")


def test_a_reply_that_breaks_off_breaks_off(gateway):
    with pytest.raises(httpx.RemoteProtocolError):
        ask(gateway, "files/cut", "GET")
    assert gateway.gateway.limiter.in_flight == 0


@pytest.mark.parametrize("upload", [False, True])
def test_a_client_that_leaves_is_not_waited_for(upload, gateway, echo):
    echo.gone.clear()
    with pytest.raises(httpx.ReadTimeout):
        ask(gateway, "images/hang", content=b"x" if upload else None, timeout=0.2)
    assert echo.gone.wait(2)
    deadline = time.monotonic() + 2
    while gateway.gateway.limiter.in_flight and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gateway.gateway.limiter.in_flight == 0


def test_an_upstream_that_is_away(echo):
    with serving(UpstreamSettings("default", "http://127.0.0.1:9/v1")) as gateway:
        for more in ({"json": {}}, {"files": {"file": b"x"}}):
            reply = ask(gateway, "embeddings", headers={}, **more)
            assert (reply.status_code, reply.json()["error"]["code"]) == (502, "upstream_unreachable")
        assert gateway.gateway.limiter.in_flight == 0


# --- what does not pass


@pytest.mark.parametrize(
    "path",
    ["organization/admin_api_keys", "feedback", "load_lora_adapter", "files/%2e%2e/organization/x",
     "files/..%2f..%2fadmin", "files/a%5c..%5cb", "files/a%00b", ""],
)  # fmt: skip
def test_what_is_never_passed_on(path, gateway, echo):
    before = len(echo.seen)
    reply = ask(gateway, path, "GET")
    assert reply.status_code == 404
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert len(echo.seen) == before


@pytest.mark.parametrize(("passthrough", "passed"), [("none", ()), ("embeddings, files", ("embeddings", "files"))])
def test_only_what_the_operator_offers(passthrough, passed, echo):
    with serving(echo.settings, passthrough=passthrough) as gateway:
        for path in ("embeddings", "files", "completions", "responses/r-1"):
            reply = ask(gateway, path, headers={}, json={})
            assert reply.status_code == (200 if path in passed else 404)
            if path not in passed:
                error = reply.json()["error"]
                assert error["code"] == "endpoint_not_offered"
                assert "this gateway does not offer it" in error["message"]
    with pytest.raises(InputError, match="--passthrough"):
        GatewaySettings(upstreams=(echo.settings,), passthrough="embeddings,,")


@pytest.mark.parametrize(
    ("path", "method", "passes"),
    [
        *[(path, "POST", True) for path in ("embeddings", "moderations", "rerank", "audio/speech", "tokenize")],
        *[(path, "POST", False) for path in ("completions", "images/generations", "audio/transcriptions", "messages")],
        *[(path, "POST", False) for path in ("batches", "threads/runs", "files", "audio/speech2", "something")],
        *[(path, "GET", False) for path in ("files/f/content", "chat/completions", "chat/completions/c-1/messages")],
    ],
)
def test_in_strict_mode_no_text_passes_the_corrector_by(path, method, passes, strict, gateway, echo):
    before = len(echo.seen)
    replies = [ask(strict, path, method), ask(gateway, path, method, headers={**BEARER, "x-everalign-mode": "strict"})]
    for reply in replies:
        assert reply.status_code == (200 if passes else 400)
        assert passes or reply.json()["error"]["code"] == "strict_passthrough"
    assert len(echo.seen) == before + (2 if passes else 0)
    assert ask(strict, path, method, headers={**BEARER, "x-everalign-mode": "off"}).status_code == 400


def test_in_strict_mode_an_error_says_nothing_of_the_upstream_s(strict):
    reply = ask(strict, "embeddings/429", json={})
    assert (reply.status_code, "metadata" in reply.text, "***" in reply.text) == (429, False, False)
    assert "x-ratelimit-remaining-requests" not in ask(strict, "embeddings", json={}).headers


def test_every_key_is_needed(gateway):
    assert ask(gateway, "embeddings", headers={}).status_code == 401


def test_a_page_of_another_site_cannot_send_forms_to_a_keyless_gateway(echo):
    with serving(echo.settings) as keyless:
        for origin, status in (("https://evil.example", 403), ("null", 403), ("http://127.0.0.1:3000", 200)):
            files = {"file": b"x"}
            assert ask(keyless, "files", headers={"origin": origin}, files=files).status_code == status
    with serving(echo.settings, access=Access(no_auth=True)) as opened:
        assert ask(opened, "files", headers={"x-forwarded-for": "1.2.3.4"}, files=files).status_code == 200


def test_several_upstreams_are_told_apart(echo):
    with Echo() as other:
        second = UpstreamSettings("second", other.running.url, "second-key")
        first = UpstreamSettings("first", echo.running.url, "upstream-key")
        with serving(first, second) as gateway:
            for model, server in (("first/m", echo), ("second/m", other)):
                assert ask(gateway, "embeddings", headers={}, json={"model": model}).status_code == 200
                assert server.seen[-1]["sha256"] == hashlib.sha256(b'{"model":"m"}').hexdigest()
            assert ask(gateway, "embeddings", headers={}, json={"model": "m"}).status_code == 404
            files = {"file": b"x"}
            assert ask(gateway, "files", headers={}, files=files).json()["headers"]["host"] in echo.running.url
            chosen = {"x-everalign-upstream": "second"}
            assert ask(gateway, "files", headers=chosen, files=files).json()["headers"]["host"] in other.running.url
            assert other.seen[-1]["headers"]["authorization"] == "Bearer second-key"
            assert "x-everalign-upstream" not in other.seen[-1]["headers"]
            unknown = ask(gateway, "files", headers={"x-everalign-upstream": "third"})
            assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, "unknown_upstream")
