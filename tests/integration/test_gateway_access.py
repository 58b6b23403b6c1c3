"""How a gateway in the open is reached: whose keys go where, which headers cross, by which paths."""

import time

import pytest

from everalign.cli.correct_run import load_corrector, make_approver
from everalign.errors import EveralignError, InputError
from everalign.serving.errors import GatewayError
from everalign.serving.middleware import Meant, meant
from everalign.serving.security import Keys, read_key_file
from everalign.serving.server import check_host, read_upstreams
from everalign.serving.settings import Access, GatewaySettings, HeaderRules, UpstreamSettings
from pages_for_tests import Browser
from upstream_for_tests import HTTP, Fake, Script, UpstreamServer, serving

BODY = {"model": "small", "messages": [{"role": "user", "content": "?"}]}
KEY = "sk-client-one"
BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def upstream():
    with UpstreamServer() as server:
        yield server


@pytest.fixture(scope="module")
def locked(upstream):
    access = Access(root_path="/behind/proxy", headers=HeaderRules(("x-tenant-*", "baggage"), ("x-region",)))
    with serving(upstream, keys=(KEY, "sk-two"), corrector=Fake(), access=access) as running:
        yield running


# --- keys of servers


def test_each_server_is_sent_its_own_key(monkeypatch):
    for name in ("OPENAI", "CORRECTOR", "APPROVER", "FAST"):
        monkeypatch.setenv(f"{name}_API_KEY", f"{name.lower()}-key")
    with UpstreamServer(lambda _: Script("nonsense")) as server:
        corrector = load_corrector(f"{server.url}#m", "aligner-1", {})
        with pytest.raises(EveralignError, match="text"):  # the scripted server answers chats, and corrections are none
            corrector.correct("?", "an answer")
        corrected = server.requests[-1].headers["authorization"]
        approver = make_approver(f"{server.url}#judge", None)
        with pytest.raises(EveralignError, match="not a verdict"):
            approver.approve(["?"], ["an answer"], ["a better answer"])
        judged = {seen.headers["authorization"] for seen in server.requests[1:]}
    assert corrected == "Bearer corrector-key"
    assert judged == {"Bearer approver-key"}
    environment = {"OPENAI_API_KEY": "openai-key", "FAST_API_KEY": "fast-key", "CORRECTOR_API_KEY": "corrector-key"}
    found = read_upstreams(
        ["http://127.0.0.1:1/v1", "fast=http://127.0.0.1:2/v1", "bare=http://127.0.0.1:3"], environment
    )
    assert [one.key for one in found] == ["openai-key", "fast-key", ""]


def test_a_corrector_without_a_key_of_its_own_is_sent_none(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "openai-key")
    monkeypatch.delenv("CORRECTOR_API_KEY", raising=False)
    with UpstreamServer() as server:
        with pytest.raises(EveralignError, match="text"):
            load_corrector(f"{server.url}#m", "aligner-1", {}).correct("?", "an answer")
        assert "authorization" not in server.requests[0].headers


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["http://127.0.0.1:1", "openai=http://127.0.0.1:2"],
            "OPENAI_API_KEY, which is that of the upstream 'default'",
        ),
        (["my-a=http://127.0.0.1:1", "my_a=http://127.0.0.1:2"], "MY_A_API_KEY, which is that of the upstream 'my-a'"),
        (["Corrector=http://127.0.0.1:1"], "CORRECTOR_API_KEY is another server's key"),
        (["approver=http://127.0.0.1:1"], "APPROVER_API_KEY is another server's key"),
    ],
)
def test_no_two_servers_share_a_key_by_accident(flags, expected):
    with pytest.raises(InputError, match=expected):
        read_upstreams(flags, {})


# --- headers

PROXIES = (
    *("ocp-apim-subscription-key", "cf-access-jwt-assertion", "x-goog-iap-jwt-assertion", "x-amzn-oidc-data"),
    *("x-goog-iap-id-token", "x-ms-client-principal", "cf-connecting-ip", "true-client-ip", "x-forwarded-client-cert"),
    *("x-auth-request-email", "remote-user", "x-amzn-trace-id", "x-tailscale-user", "x-custom", "x-session", "dpop"),
    *("cookie", "x-api-key", "api-key", "openai-organization", "openai-project", "x-everalign-mode", "x-real-ip"),
)


def test_what_proxies_say_of_a_client_stays_here(locked, upstream):
    sent = {**dict.fromkeys(PROXIES, "secret"), **BEARER, "x-everalign-mode": "off"}
    passed = {"x-title": "App", "openai-beta": "assistants=v2", "traceparent": "00-1-2-03", "idempotency-key": "i",
              "x-tenant-id": "7", "baggage": "a=b", "user-agent": "tests"}  # fmt: skip
    reply = HTTP.post(f"{locked.url}/chat/completions", json=BODY, headers={**sent, **passed})
    assert reply.status_code == 200
    got = upstream.requests[-1].headers
    assert not set(PROXIES) & set(got)
    assert {name: got[name] for name in passed} == passed
    assert got["authorization"] == "Bearer upstream-key"


def test_what_the_connection_names_is_the_connection_s():
    assert HeaderRules().forwarded([("connection", "close, X-Title"), ("x-title", "App"), ("prefer", "wait")]) == {
        "prefer": "wait"
    }


def test_what_an_upstream_says_of_itself_stays_here(locked, upstream):
    own = {"openai-organization": "org-1", "openai-project": "p", "set-cookie": "a=b", "x-served-by": "host-7",
           "via": "1.1 inner", "server": "inner", "x-amz-cf-id": "1", "authorization": "upstream-key"}  # fmt: skip
    passed = {"x-request-id": "req-7", "x-ratelimit-limit-tokens": "9", "openai-processing-ms": "5", "x-region": "eu"}
    upstream.answer = lambda _: Script(headers={**own, **passed})
    try:
        reply = HTTP.post(f"{locked.url}/chat/completions", json=BODY, headers=BEARER)
    finally:
        upstream.answer = lambda _: Script()
    assert {name: reply.headers[name] for name in passed} == passed
    assert not {name for name in own if reply.headers.get(name) == own[name]}


@pytest.mark.parametrize("name", ["authorization", "Cookie", "x-api-key", "x y", "*", "", "x-everalign-*", "host"])
def test_headers_that_nobody_can_let_cross(name):
    with pytest.raises(InputError, match="--forward-header"):
        HeaderRules((name,))
    with pytest.raises(InputError, match="--return-header"):
        HeaderRules((), (name,))


def test_a_prefix_lets_no_credentials_cross():
    assert HeaderRules(("x-*",)).forwarded([("x-api-key", "s"), ("x-a", "b"), ("x-everalign-mode", "off")]) == {
        "x-a": "b"
    }


# --- keys of clients


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer  {KEY}"}, 200),
        ({"api-key": KEY}, 200),
        ({"x-api-key": KEY}, 200),
        ({"x-api-key": KEY, "authorization": "Bearer unused"}, 200),
        ({"x-api-key": "other"}, 401),
        ({"api-key": ""}, 401),
        ({"authorization": KEY}, 401),
        ({"x-goog-api-key": KEY}, 401),
    ],
)
def test_where_a_key_may_stand(headers, status, locked):
    assert HTTP.post(f"{locked.url}/chat/completions", json=BODY, headers=headers).status_code == status


def test_keys_are_read_again_without_a_restart(tmp_path, caplog):
    file, now = tmp_path / "keys", [0.0]
    file.write_text("one # of the app\n\ntwo requests_per_minute=5 tokens_per_day=100\n")
    keys = Keys(["zero"], file, clock=lambda: now[0])
    assert keys.count == 3
    two = keys.id_of("two")
    assert keys.allowance(two).requests_per_minute == 5
    assert keys.allowance(keys.id_of("one")) is None

    def known(*offered):
        now[0] += 2
        found = []
        for key in offered:
            try:
                found.append(bool(keys.identify({"x-api-key": key}, None)))
            except GatewayError:
                found.append(False)
        return found

    file.write_text("two\nthree\n")
    assert known("zero", "one", "two", "three") == [True, False, True, True]
    for broken in ("", "two spoons\n", "twö\n", "# all gone\n"):
        file.write_text(broken)
        assert known("zero", "one", "two", "three") == [True, False, True, True], broken
    file.unlink()
    assert known("two", "four") == [True, False]
    assert "the previous keys stay in use" in caplog.text
    assert "two" not in caplog.text
    file.write_text("four\n")
    assert known("two", "four") == [False, True]
    assert not keys.knows(two)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no keys"),
        ("a b", "line 1: a key may be followed by"),
        ("a\nb requests_per_minute=0", "line 2: requests_per_minute must be a whole number of at least 1"),
        ("a tokens_per_day=1 tokens_per_day=2", "each once"),
        ("secret\nsecret", "line 2: is the key of an earlier line"),
        ("sécret", "line 1: a key"),
    ],
)
def test_files_of_keys_that_cannot_be_used(text, expected, tmp_path):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        read_key_file(file)
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_key_file(tmp_path / "none")


# --- without keys

HERE = {"host": "127.0.0.1:8080"}


@pytest.mark.parametrize(
    "name",
    ["via", "x-forwarded-proto", "x-forwarded-host", "cf-connecting-ip", "true-client-ip", "x-real-ip", "x-client-ip",
     "fly-client-ip", "x-envoy-external-address", "x-amzn-trace-id", "x-original-url", "cdn-loop", "cf-ray",
     "x-goog-iap-jwt-assertion", "remote-user", "x-original-forwarded-for"],
)  # fmt: skip
def test_without_keys_nothing_is_served_that_a_proxy_passed_on(name):
    with pytest.raises(GatewayError, match="--no-auth"):
        Keys().identify({**HERE, name: "1"}, "127.0.0.1")
    assert Keys(no_auth=True).identify({**HERE, name: "1"}, "203.0.113.7") == "local"


def test_without_keys_old_proxies_and_pages_of_other_sites_are_turned_away():
    with pytest.raises(GatewayError):
        Keys().identify(HERE, "127.0.0.1", "1.0")
    for origin in ("https://evil.example", "null", "http://[", "http://127.0.0.1.evil.example"):
        with pytest.raises(GatewayError):
            Keys().identify({**HERE, "origin": origin}, "127.0.0.1")
    for origin in ("http://127.0.0.1:3000", "http://localhost:8080", "https://app.example"):
        assert Keys(origins=["https://app.example"]).identify({**HERE, "origin": origin}, "127.0.0.1") == "local"


def test_who_is_open_to_everybody_has_said_so():
    with pytest.raises(InputError, match=r"--host 0.0.0.0: without keys .* --no-auth"):
        check_host("0.0.0.0", keyless=True, no_auth=False)
    check_host("0.0.0.0", keyless=True, no_auth=True)
    check_host("0.0.0.0", keyless=False, no_auth=False)
    upstreams = (UpstreamSettings("default", "http://127.0.0.1:1/v1"),)
    for access in ({"trusted_proxies": ("10.0.0.1",)}, {"root_path": "/x"}, {"cors_origins": ("*",)}):
        with pytest.raises(InputError, match="--no-auth"):
            GatewaySettings(upstreams=upstreams, access=Access(**access))
        GatewaySettings(upstreams=upstreams, access=Access(**access, no_auth=True))
        GatewaySettings(upstreams=upstreams, keys=("k",), access=Access(**access))
    with pytest.raises(InputError, match="there are keys"):
        GatewaySettings(upstreams=upstreams, keys=("k",), access=Access(no_auth=True))


@pytest.mark.parametrize(
    "access",
    [{"cors_origins": ("app.example",)}, {"cors_origins": ("https://app.example/",)}, {"trusted_proxies": ("proxy",)},
     {"root_path": "everalign"}, {"root_path": "/a b"}, {"root_path": "//a"}],
)  # fmt: skip
def test_ways_in_that_cannot_be(access):
    with pytest.raises(InputError, match="--"):
        Access(**access)


# --- paths


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/chat/completions", Meant("/v1/chat/completions")),
        ("/chat/completions", Meant("/v1/chat/completions")),
        ("/embeddings", Meant("/v1/embeddings")),
        ("/v1//models", Meant("/v1/models")),
        ("//v1/chat/completions/", Meant("/v1/chat/completions")),
        ("/", Meant("/")),
        ("/behind/proxy/", Meant("/")),
        ("/v1/v1/models", Meant("/v1/models")),
        ("/openai/v1/responses", Meant("/v1/responses", azure=True)),
        ("/openai/files/f-1", Meant("/v1/files/f-1", azure=True)),
        ("/openai/deployments/gpt-x/chat/completions", Meant("/v1/chat/completions", "gpt-x", True)),
        ("/openai/deployments/fast/gpt:aligned/embeddings", Meant("/v1/embeddings", "fast/gpt:aligned", True)),
        ("/openai/deployments/w/audio/transcriptions", Meant("/v1/audio/transcriptions", "w", True)),
        ("/behind/proxy/v1/models", Meant("/v1/models")),
        ("/behind/proxy", Meant("/")),
        ("/behind/proxyv1/models", Meant("/behind/proxyv1/models")),
        ("/dashboard", Meant("/dashboard")),
        ("/health", Meant("/health")),
    ],
)
def test_what_paths_mean(path, expected):
    assert meant(path, "/behind/proxy") == expected


def test_long_paths_are_read_in_no_time():
    started = time.process_time()
    for path in ("/openai/deployments/" + "audio/" * 10_000 + "\n", "/v1" * 20_000, "/" * 60_000, "/openai/" * 8000):
        meant(path, "/behind")
    assert time.process_time() - started < 0.1


def test_chat_by_azure_s_path_and_without_v1(locked, upstream):
    root = locked.url.removesuffix("/v1")
    body = {"messages": BODY["messages"]}
    path = "/openai/deployments/large/chat/completions?api-version=2024-10-21"
    reply = HTTP.post(root + path, json=body, headers={"api-key": KEY})
    assert reply.status_code == 200
    assert upstream.requests[-1].body["model"] == "large"
    for path in ("/chat/completions", "/behind/proxy/v1/chat/completions", "/openai/v1/chat/completions"):
        assert HTTP.post(root + path, json=BODY, headers=BEARER).status_code == 200
    assert HTTP.get(f"{root}/models", headers=BEARER).json()["data"][0]["id"] == "small"


# --- proxies, probes, browsers


def test_pages_behind_a_proxy_s_path(locked):
    with Browser(locked) as browser:
        page = browser.get("/behind/proxy/login")
        assert 'action="/behind/proxy/login"' in page.text
        assert 'href="/behind/proxy/assets/style.css"' in page.text
        assert browser.get("/behind/proxy/assets/style.css").status_code == 200
        assert browser.get("/dashboard", headers={"accept": "text/html"}).headers["location"] == "/behind/proxy/login"


def test_a_probe_needs_no_key_and_learns_nothing(locked, upstream):
    root = locked.url.removesuffix("/v1")
    for path in ("/health", "/behind/proxy/health"):
        reply = HTTP.get(root + path)
        assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
        assert HTTP.head(root + path).status_code == 200
    for path in ("/ready", "/metrics", "/openapi.json", "/health/x"):
        assert HTTP.get(root + path).status_code == 401
    with serving(upstream) as keyless:
        assert HTTP.get(keyless.url[:-3] + "/health", headers={"host": "10.1.2.3"}).status_code == 200
        assert HTTP.get(keyless.url[:-3] + "/ready", headers={"host": "10.1.2.3"}).status_code == 403


def test_head_is_get_without_its_body(locked):
    for path in ("/models", "/models/small"):
        got, head = (HTTP.request(method, locked.url + path, headers=BEARER) for method in ("GET", "HEAD"))
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == got.headers["content-length"]
    assert HTTP.head(f"{locked.url[:-3]}/logout", headers=BEARER).status_code == 405
    assert HTTP.head(f"{locked.url}/models").status_code == 401


PREFLIGHT = {"origin": "https://app.example", "access-control-request-method": "POST",
             "access-control-request-headers": "authorization,content-type,x-stainless-os"}  # fmt: skip


def test_pages_of_a_site_that_the_operator_names_may_ask(upstream):
    access = Access(cors_origins=("https://app.example",))
    with serving(upstream, keys=(KEY,), access=access) as gateway:
        url = f"{gateway.url}/chat/completions"
        reply = HTTP.options(url, headers=PREFLIGHT)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in reply.headers["access-control-allow-headers"]
        origin = {"origin": "https://app.example"}
        answered = HTTP.post(url, json=BODY, headers={**BEARER, **origin})
        refused = HTTP.post(url, json=BODY, headers=origin)
        for reply, status in ((answered, 200), (refused, 401)):
            assert reply.status_code == status  # a page reads errors too
            assert reply.headers["access-control-allow-origin"] == "https://app.example"
            assert "access-control-allow-credentials" not in reply.headers
        other = HTTP.options(url, headers={**PREFLIGHT, "origin": "https://evil.example"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers


def test_without_such_a_site_a_preflight_is_refused_and_told_why(locked):
    reply = HTTP.options(f"{locked.url}/chat/completions", headers=PREFLIGHT)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "origin_refused")
    assert "access-control-allow-origin" not in reply.headers
    assert HTTP.options(f"{locked.url}/chat/completions").status_code == 401


def test_a_session_ends_with_its_key(upstream, tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\nother\n")
    with serving(upstream, access=Access(keys_file=file)) as gateway, Browser(gateway) as browser:
        browser.sign_in(KEY)
        assert browser.get("/dashboard").status_code == 200
        file.write_text("other\n")
        time.sleep(1.1)
        assert browser.get("/dashboard").status_code in (303, 401)
