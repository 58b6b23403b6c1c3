"""What operators set: what keys may use, the log of requests, and who answers when the upstream is away."""

import json
import logging
import time
from collections import Counter
from contextlib import contextmanager

import pytest

from everalign.serving.errors import GatewayError
from everalign.serving.limits import Allowances, tokens_of
from everalign.serving.security import Allowance
from everalign.serving.settings import Access, UpstreamSettings
from everalign.serving.telemetry import write_access_log
from upstream_for_tests import HTTP, SECRET, USAGE, Fake, Script, UpstreamServer, serving

BODY = {"model": "small", "messages": [{"role": "user", "content": SECRET}]}


@pytest.fixture(scope="module")
def upstream():
    with UpstreamServer() as server:
        yield server


def ask(gateway, *, key="one", path="chat/completions", **more):
    return HTTP.post(f"{gateway.url}/{path}", json={**BODY, **more}, headers={"authorization": f"Bearer {key}"})


# --- what keys may use


def test_a_key_may_begin_so_many_requests_a_minute():
    now = [100.0]
    allowances = Allowances({"b": Allowance(6)}.get, Allowance(2), clock=lambda: now[0])
    for _ in range(2):
        allowances.enter("a")
    with pytest.raises(GatewayError) as caught:
        allowances.enter("a")
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.headers["retry-after"] == "30"
    for _ in range(6):
        allowances.enter("b")
    now[0] += 30.1
    allowances.enter("a")
    with pytest.raises(GatewayError):
        allowances.enter("a")
    now[0] += 3600
    for _ in range(2):  # what was not used does not add up
        allowances.enter("a")
    with pytest.raises(GatewayError):
        allowances.enter("a")


def test_a_key_may_use_so_many_tokens_a_day():
    now = [86400.0 * 7 + 80000]
    allowances = Allowances(lambda _: None, Allowance(None, 10), now=lambda: now[0])
    allowances.enter("a")
    allowances.spend("a", 10)
    allowances.enter("b")
    with pytest.raises(GatewayError) as caught:
        allowances.enter("a")
    assert (caught.value.code, caught.value.headers["x-should-retry"]) == ("insufficient_quota", "false")
    assert caught.value.headers["retry-after"] == "6401"
    now[0] += 6401
    allowances.enter("a")


@pytest.mark.parametrize("usage", [None, {}, {"total_tokens": "7"}, {"total_tokens": -1}, [7]])
def test_an_answer_that_tells_no_tokens_is_counted_by_its_length(usage):
    assert tokens_of(usage, 400) == 100
    assert tokens_of({"total_tokens": 7}, 400) == 7


@pytest.mark.parametrize("mode", ["off", "correct", "strict"])
@pytest.mark.parametrize("usage", [USAGE, None])
@pytest.mark.parametrize("stream", [False, True])
def test_every_way_to_an_answer_counts_its_tokens(upstream, mode, usage, stream):
    upstream.answer = lambda _: Script("four " * 20, usage=usage)
    access = Access(allowance=Allowance(None, 10))
    with serving(upstream, keys=("one", "two"), corrector=Fake(), mode=mode, access=access) as gateway:
        first = ask(gateway, stream=stream)
        assert first.status_code == 200
        assert not stream or '"usage"' not in first.text  # the client did not ask for it
        over = ask(gateway, stream=stream)
        assert (over.status_code, over.json()["error"]["code"]) == (429, "insufficient_quota")
        assert ask(gateway, key="two").status_code == 200


def test_a_client_that_leaves_its_stream_has_used_it_all_the_same(upstream):
    upstream.answer = lambda _: Script("four " * 200, drip=0.01)
    access = Access(allowance=Allowance(None, 10))
    with serving(upstream, keys=("one",), access=access) as gateway:
        headers = {"authorization": "Bearer one"}
        with HTTP.stream(
            "POST", f"{gateway.url}/chat/completions", json={**BODY, "stream": True}, headers=headers
        ) as reply:
            next(reply.iter_lines())
        while gateway.gateway.limiter.in_flight:
            pass
        assert ask(gateway).status_code == 429


def test_what_is_passed_on_is_counted_too(upstream):
    told = b'{"data": "\\"total_tokens\\": 1", "usage": {"prompt_tokens": 11, "total_tokens": 11}}'
    for raw in (told, b"x" * 100):
        upstream.answer = lambda _, raw=raw: Script(raw=raw)
        with serving(upstream, keys=("one",), access=Access(allowance=Allowance(None, 11))) as gateway:
            assert ask(gateway, path="embeddings").status_code == 200
            assert ask(gateway, path="embeddings").status_code == 429


def test_a_file_s_line_wins(upstream, tmp_path):
    upstream.answer = lambda _: Script()
    file = tmp_path / "keys"
    file.write_text("one requests_per_minute=1\ntwo\n")
    access = Access(keys_file=file, allowance=Allowance(2))
    with serving(upstream, access=access) as gateway:
        assert [ask(gateway, key="one").status_code for _ in range(2)] == [200, 429]
        assert [ask(gateway, key="two").status_code for _ in range(3)] == [200, 200, 429]


# --- the log of requests


@contextmanager
def written(file):
    """Let requests be logged to a file."""
    write_access_log(str(file))
    log = logging.getLogger("everalign.access")
    try:
        yield
    finally:
        log.handlers.clear()
        log.setLevel(logging.NOTSET)
        log.propagate = True


def test_a_line_says_who_and_how_and_never_what(upstream, tmp_path):
    file = tmp_path / "access.jsonl"
    upstream.answer = lambda _: Script(SECRET)
    with written(file), serving(upstream, keys=("one",), corrector=Fake()) as gateway:
        ask(gateway)
        ask(gateway, stream=True)
        ask(gateway, key="nobody")
        ask(gateway, path=f"files/{SECRET}?x={SECRET}")
        HTTP.get(f"{gateway.url}/models/{SECRET}", headers={"authorization": "Bearer one"})
        HTTP.get(f"{gateway.url[:-3]}/{SECRET}", headers={"authorization": "Bearer one"})
        HTTP.get(f"{gateway.url[:-3]}/health")
    text = file.read_text()
    assert SECRET not in text
    assert "Bearer" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    # In no order: a line is written when the last byte has left, which the client may have read before.
    assert Counter((line["method"], line["route"], line["status"]) for line in lines) == {
        ("POST", "/v1/chat/completions", 200): 2, ("POST", None, 401): 1, ("POST", "/v1/files", 200): 1,
        ("GET", "/v1/models/{model:path}", 404): 1, ("GET", None, 404): 1, ("GET", "/health", 200): 1,
    }  # fmt: skip
    first = lines[0]
    assert (first["mode"], first["correction"]) == ("correct", "applied")
    assert (first["client"], first["whole"]) == ("127.0.0.1", True)
    assert len(first["key"]) == 12
    assert first["received"] > 50
    assert first["sent"] > 50
    assert first["seconds"] >= 0
    assert next(line for line in lines if line["status"] == 401)["key"] is None


@pytest.mark.parametrize(("trusted", "expected"), [((), "127.0.0.1"), (("127.0.0.0/8",), "203.0.113.9")])
def test_only_a_trusted_proxy_says_who_the_client_is(upstream, tmp_path, trusted, expected):
    file = tmp_path / "access.jsonl"
    with serving(upstream, keys=("one",), access=Access(trusted_proxies=trusted)) as gateway, written(file):
        headers = {"authorization": "Bearer one", "x-forwarded-for": "198.51.100.1, 203.0.113.9"}
        assert HTTP.get(f"{gateway.url}/models", headers=headers).status_code == 200
        until = time.monotonic() + 2
        while not file.read_text() and time.monotonic() < until:
            time.sleep(0.01)
    assert json.loads(file.read_text())["client"] == expected


# --- who answers when the upstream is away


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["off", "correct", "strict"])
def test_another_server_answers_where_the_upstream_fails(upstream, mode, stream):
    with UpstreamServer(lambda _: Script("from afar")) as other:
        fallback = UpstreamSettings("fallback", other.url, "fallback-key")
        how = {"fallback": fallback, "fallback_model": "far-model", "corrector": Fake(), "mode": mode, "retries": 0}
        with serving(upstream, **how) as gateway:
            for status, answers in ((500, True), (503, True), (400, False), (404, False), (429, False)):
                upstream.answer = lambda _, status=status: Script(raw=b'{"error": {"message": "no"}}', status=status)
                reply = ask(gateway, stream=stream)
                assert reply.status_code == (200 if answers else status)
                assert ("x-everalign-upstream" in reply.headers) == (answers and mode != "strict")
            got = other.requests[-1]
            assert (got.headers["authorization"], got.body["model"]) == ("Bearer fallback-key", "far-model")
            assert len(other.requests) == 2
        away = UpstreamSettings("default", "http://127.0.0.1:9/v1", "upstream-key")
        with serving(away, **how) as gateway:
            assert ask(gateway, stream=stream).status_code == 200
            assert "upstream-key" not in str(other.requests[-1].headers)
            for _ in range(8):  # its circuit is open now
                assert ask(gateway, stream=stream).status_code == 200
            circuits = gateway.gateway.circuits()
            assert (circuits["upstream:default"], circuits["fallback"]) == ("open", "closed")


def test_a_stream_that_has_begun_is_nobody_else_s(upstream):
    upstream.answer = lambda _: Script("four " * 5, cut=3)
    with UpstreamServer(lambda _: Script("from afar")) as other:
        with serving(upstream, fallback=UpstreamSettings("fallback", other.url)) as gateway:
            assert "upstream_cut" in ask(gateway, stream=True).text
        assert other.requests == []
