"""Who is let in, what is let through, how large and how much: and what never crosses the gateway."""

import json
import socket
import threading
import time

import pytest

from everalign.errors import InputError
from everalign.serving.errors import GatewayError
from everalign.serving.security import Keys
from everalign.serving.settings import GatewaySettings, Limits, UpstreamSettings, checked_upstream
from upstream_for_tests import HTTP, Fake, Script, UpstreamServer, serving

BODY = {"model": "small", "messages": [{"role": "user", "content": "?"}]}
KEY = "sk-client-one"
ROUTES = ["/v1/chat/completions", "/v1/models", "/v1/models/small", "/v1/feedback", "/ready", "/metrics",
          "/openapi.json", "/nowhere", "/"]  # fmt: skip


@pytest.fixture(scope="module")
def upstream():
    with UpstreamServer() as server:
        yield server


@pytest.fixture(scope="module")
def locked(upstream):
    with serving(upstream, keys=(KEY, "sk-two"), corrector=Fake()) as running:
        yield running


@pytest.fixture(scope="module")
def open_(upstream):
    with serving(upstream, corrector=Fake(), limits=Limits(body_bytes=10_000, messages=3, choices=2)) as running:
        yield running


def post(gateway, *, path="/chat/completions", body=BODY, **more):
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    return HTTP.post(f"{gateway.url}{path}", **given, **more)


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_needs_a_key(path, locked):
    root = locked.url[:-3]
    for method in ("GET", "POST", "OPTIONS"):
        for key in ({}, {"authorization": "Bearer sk-other"}, {"authorization": KEY}, {"authorization": "Bearer"}):
            reply = HTTP.request(method, f"{root}{path}", headers=key)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
            assert reply.headers["x-should-retry"] == "false"
    reply = HTTP.get(f"{root}{path}", headers={"authorization": f"Bearer {KEY}"})
    assert reply.status_code != 401


def test_keys_are_held_as_hashes_and_tell_clients_apart(locked):
    keys = Keys([KEY, "b"])
    assert KEY not in repr(vars(keys))
    assert KEY not in repr(locked.gateway.settings)
    one, two = (keys.identify({"authorization": f"Bearer {key}"}, None) for key in (KEY, "b"))
    assert len(one) == 12
    assert one != two


@pytest.mark.parametrize("keys", [[""], ["a", ""], ["ä"], ["a b"], ["a\n"]])
def test_keys_that_no_header_holds(keys):
    with pytest.raises(InputError, match="EVERALIGN_API_KEYS"):
        Keys(keys)


@pytest.mark.parametrize(
    ("peer", "headers", "served"),
    [
        ("127.0.0.1", {"host": "127.0.0.1:8080"}, True),
        ("127.0.0.1", {"host": "localhost:8080"}, True),
        ("::1", {"host": "[::1]:8080"}, True),
        ("::ffff:127.0.0.1", {"host": "localhost"}, True),
        ("192.168.1.7", {"host": "127.0.0.1"}, False),
        (None, {"host": "127.0.0.1"}, False),
        ("127.0.0.1", {"host": "evil.example"}, False),
        ("127.0.0.1", {"host": "localhost.evil.example"}, False),
        ("127.0.0.1", {}, False),
        ("127.0.0.1", {"host": "localhost", "x-forwarded-for": "127.0.0.1"}, False),
        ("127.0.0.1", {"host": "localhost", "forwarded": "for=1.2.3.4"}, False),
    ],
)
def test_without_keys_only_this_machine_is_served(peer, headers, served):
    if served:
        assert Keys().identify(headers, peer) == "local"
        return
    with pytest.raises(GatewayError) as caught:
        Keys().identify(headers, peer)
    assert (caught.value.status, caught.value.code) == (403, "not_local")


def test_a_web_page_cannot_ask_a_keyless_gateway(open_):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = post(open_, body=json.dumps(BODY).encode(), headers={"content-type": kind})
        assert reply.status_code == 415
    reply = HTTP.options(f"{open_.url}/chat/completions", headers={"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("mode", ["off", "correct"])
@pytest.mark.parametrize("stream", [False, True])
def test_neither_side_s_secrets_cross(mode, stream, locked, upstream):
    secrets = {"cookie": "c=1", "x-api-key": "s1", "api-key": "s2", "openai-organization": "o", "x-auth-token": "s3"}
    upstream.answer = lambda _: Script(
        "4",
        headers={"set-cookie": "a=b", "x-echo": "upstream-key", "x-ratelimit-remaining-requests": "9",
                 "openai-processing-ms": "5", "access-control-allow-origin": "*"},
    )  # fmt: skip
    headers = {"authorization": f"Bearer {KEY}", "x-everalign-mode": mode, "x-title": "kept", **secrets}
    reply = post(locked, body={**BODY, "stream": stream}, headers=headers)
    assert reply.status_code == 200
    got = upstream.requests[-1].headers
    assert got["authorization"] == "Bearer upstream-key"
    assert got["x-title"] == "kept"
    assert not any(name in got for name in (*secrets, "x-everalign-mode", "x-forwarded-for"))
    assert KEY not in str(got)
    assert "upstream-key" not in reply.text + str(reply.headers)
    assert not {"set-cookie", "x-echo", "access-control-allow-origin"} & set(reply.headers)
    assert (reply.headers["x-ratelimit-remaining-requests"], reply.headers["openai-processing-ms"]) == ("9", "5")
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in reply.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"[]", 400, None),
        (b'{"a": NaN}', 400, None),
        (b'{"a": 1e999}', 400, None),
        (b'{"a": ' + b"9" * 5000 + b"}", 400, None),
        (b"[" * 9000, 400, None),
        (b"\xff\xfe", 400, None),
        (b" " * 10_001, 413, None),
        ({}, 400, "model"),
        ({**BODY, "model": " "}, 400, "model"),
        ({**BODY, "model": ["x"]}, 400, "model"),
        ({**BODY, "model": ":aligned"}, 400, "model"),
        ({**BODY, "messages": []}, 400, "messages"),
        ({**BODY, "messages": "hello"}, 400, "messages"),
        ({**BODY, "messages": BODY["messages"] * 4}, 400, "messages"),
        ({**BODY, "messages": [1]}, 400, "messages[0]"),
        ({**BODY, "messages": [{"role": 1}]}, 400, "messages[0]"),
        ({**BODY, "messages": [{"role": "user", "content": 1}]}, 400, "messages[0].content"),
        ({**BODY, "n": 3}, 400, "n"),
        ({**BODY, "n": 0}, 400, "n"),
        ({**BODY, "n": True}, 400, "n"),
        ({**BODY, "stream": "yes"}, 400, "stream"),
        ({**BODY, "store": 1}, 400, "store"),
        ({**BODY, "stream_options": []}, 400, "stream_options"),
        ({**BODY, "response_format": "json"}, 400, "response_format"),
    ],
)
def test_bad_requests_name_the_field(body, status, param, open_, upstream):
    upstream.requests.clear()
    reply = post(open_, body=body, headers={"content-type": "application/json"})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert upstream.requests == []


def test_a_missing_model_is_said_in_words_and_any_name_of_one_passes(open_, upstream):
    upstream.answer = lambda _: Script()
    content = {"content-type": "application/json"}
    error = post(open_, body={**BODY, "model": " "}, headers=content).json()["error"]
    assert error["message"] == "model: must be the name of a model"
    odd = json.dumps({**BODY, "model": "half \ud800"}).encode()
    assert post(open_, body=odd, headers=content).status_code == 200
    assert upstream.requests[-1].body["model"] == "half \ud800"


def test_a_compressed_body_is_not_read(open_):
    reply = post(open_, body=b"x", headers={"content-type": "application/json", "content-encoding": "gzip"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_encoding")


def test_a_key_that_is_given_twice_is_read_in_one_way(open_, upstream):
    upstream.answer = lambda _: Script()
    messages = json.dumps(BODY["messages"]).encode()
    twice = b'{"model": "a", "model": "small", "messages": %s, "stream": true, "stream": false}' % messages
    assert post(open_, body=twice, headers={"content-type": "application/json"}).status_code == 200
    assert (upstream.requests[-1].body["model"], upstream.requests[-1].body["stream"]) == ("small", False)


def test_too_many_at_once(upstream):
    upstream.answer = lambda _: Script(delay=0.4)
    with serving(upstream, keys=(KEY, "sk-two"), limits=Limits(concurrency=3, per_key=2)) as gateway:

        def ask(key, found):
            found.append(post(gateway, headers={"authorization": f"Bearer {key}"}).status_code)

        found, other = [], []
        threads = [threading.Thread(target=ask, args=(KEY, found)) for _ in range(3)]
        threads += [threading.Thread(target=ask, args=("sk-two", other)) for _ in range(2)]
        for thread in threads:
            thread.start()
            time.sleep(0.03)
        for thread in threads:
            thread.join()
        assert (sorted(found), sorted(other)) == ([200, 200, 429], [200, 503])
        assert gateway.gateway.limiter.in_flight == 0


@pytest.mark.parametrize(
    "url",
    ["ftp://host/v1", "file:///etc/passwd", "http://", "//host", "http://user:pass@host/v1", "http://host/v1?key=1",
     "http://host/v1#x", "http://169.254.169.254/v1", "http://[::ffff:169.254.169.254]/v1", "http://[fe80::1]/",
     "http://[64:ff9b::a9fe:a9fe]/", "http://[2002:a9fe:a9fe::]/", "http://metadata.google.internal/",
     "http://METADATA.google.internal./", "http://100.100.100.200/", "http://0.0.0.0:8000/v1", "http://hö.example/",
     "http://a b/", "http://[fd00:ec2::254]/"],
)  # fmt: skip
def test_addresses_that_no_operator_means(url):
    with pytest.raises(InputError):
        checked_upstream(url, lambda _: [])


def test_names_that_lead_to_credentials_and_numbers_in_disguise():
    with pytest.raises(InputError, match="metadata service"):
        checked_upstream("http://innocent.example/v1", lambda _: ["93.184.216.34", "169.254.169.254"])
    for disguised in ("http://2852039166/v1", "http://0xa9fea9fe/v1"):
        with pytest.raises(InputError, match="metadata service"):
            checked_upstream(disguised)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://10.0.0.7/v1/", "https://api.example/openai/v1"])
def test_addresses_that_operators_do_use(url):
    assert checked_upstream(url, lambda _: []).endswith("/v1")


def test_a_redirect_is_not_followed_and_a_body_cannot_name_an_upstream(open_, upstream):
    with socket.create_server(("127.0.0.1", 0)) as trap:
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/v1"
        upstream.answer = lambda _: Script(raw=b"", status=307, headers={"location": address})
        assert post(open_).status_code == 502
        upstream.answer = lambda _: Script()
        assert post(open_, body={**BODY, "api_base": address, "base_url": address}).status_code == 200
        trap.settimeout(0.05)
        with pytest.raises(TimeoutError):
            trap.accept()


@pytest.mark.parametrize(
    "settings",
    [{"upstreams": ()}, {"mode": "loud"}, {"on_failure": "maybe"}, {"keep": "some"}, {"retries": -1},
     {"keepalive": 0}, {"keepalive": float("nan")}, {"breaker_failures": 0}, {"keys": ("",)},
     {"upstreams": (UpstreamSettings("1x", "http://127.0.0.1/v1"),)},
     {"upstreams": (UpstreamSettings("a", "http://127.0.0.1/v1"), UpstreamSettings("a", "http://127.0.0.2/v1"))},
     {"upstreams": (UpstreamSettings("a", "http://127.0.0.1/v1", "kéy"),)}],
)  # fmt: skip
def test_settings_that_no_gateway_can_have(settings):
    with pytest.raises(InputError):
        GatewaySettings(**{"upstreams": (UpstreamSettings("a", "http://127.0.0.1/v1"),), **settings})
