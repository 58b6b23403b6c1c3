"""What upstreams and correctors do wrong, and what the client learns of it; circuit breakers, timeouts, keepalives."""

import gzip
import json
import socket
import threading
import time
from contextlib import suppress

import openai
import pytest

from everalign.serving.settings import Limits, Timeouts, UpstreamSettings
from everalign.serving.upstream_transport import CircuitBreaker, Circuits
from upstream_for_tests import HTTP, QUICK, Fake, Script, UpstreamServer, serving

BODY = {"model": "small", "messages": [{"role": "user", "content": "?"}]}


@pytest.fixture(scope="module")
def upstream():
    with UpstreamServer() as server:
        yield server


def post(gateway, *, mode=None, timeout=10, **more):
    headers = {} if mode is None else {"x-everalign-mode": mode}
    return HTTP.post(f"{gateway.url}/chat/completions", json={**BODY, **more}, headers=headers, timeout=timeout)


def last(reply):
    """The last event of a stream."""
    return reply.text.strip().split("\n\n")[-1].removeprefix("data: ")


FAULTS = {
    "hang": (Script(delay=5), 504, "upstream_timeout"),
    "cut": (Script("a long answer", cut=3), 502, "upstream_cut"),
    "no json": (Script(raw=b"<html>"), 502, "upstream_malformed"),
    "another kind of json": (Script(raw=b"[1]"), 502, "upstream_malformed"),
    "no number": (Script(raw=b'{"choices": NaN}'), 502, "upstream_malformed"),
    "deep": (Script(raw=b'{"a":' + b"[" * 100_000), 502, "upstream_malformed"),
    "no choices": (Script(raw=b'{"choices": []}'), 502, "upstream_malformed"),
    "huge": (Script("x" * 300_000, piece=10_000), 502, "upstream_too_large"),
    "a bomb": (
        Script(raw=gzip.compress(b"[" + b" " * 50_000_000), headers={"content-encoding": "gzip"}),
        502,
        "upstream_too_large",
    ),
    "badly compressed": (Script(raw=b"nothing", headers={"content-encoding": "gzip"}), 502, "upstream_malformed"),
    "brotli": (Script(raw=b"nothing", headers={"content-encoding": "br"}), 502, "upstream_error"),
    "redirect": (Script(raw=b"", status=307, headers={"location": "http://169.254.169.254/"}), 502, "upstream_error"),
}


@pytest.fixture(scope="module")
def gateway(upstream):
    with serving(
        upstream,
        corrector=Fake(),
        timeouts=QUICK,
        retries=0,
        breaker_failures=10**6,
        limits=Limits(answer_bytes=200_000),
    ) as running:
        yield running


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("mode", ["off", "correct"])
def test_a_fault_is_an_error_that_says_which(name, mode, gateway, upstream):
    script, status, code = FAULTS[name]
    upstream.answer = lambda _: script
    reply = post(gateway, mode=mode)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


STREAM_FAULTS = {
    "hang": (Script(delay=5), "upstream_timeout"),
    "cut": (Script("a long answer", cut=3), "upstream_cut"),
    "no end": (Script(raw=b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'), "upstream_cut"),
    "nothing": (Script(raw=b""), "upstream_cut"),
    "malformed": (Script(raw=b"data: {\n\n"), "upstream_malformed"),
    "no utf-8": (Script(raw=b"data: \xff\n\n"), "upstream_malformed"),
    "odd choices": (Script(raw=b'data: {"choices": [1]}\n\n'), "upstream_malformed"),
    "another kind": (Script(raw=b"{}", kind="application/json"), "upstream_error"),
    "an error inside": (Script(raw=b'data: {"error": {"message": "full", "code": "c"}}\n\n'), "c"),
    "drips for ever": (Script("x" * 90, drip=0.1), "upstream_timeout"),
    "stops dripping": (Script("xxxx", drip=0.6), "upstream_timeout"),
    "huge": (Script("x" * 300_000, piece=10_000), "upstream_too_large"),
}


@pytest.mark.parametrize("name", STREAM_FAULTS)
@pytest.mark.parametrize("mode", ["off", "correct"])
def test_a_fault_of_a_stream_is_an_error_too_and_never_a_silent_end(name, mode, gateway, upstream):
    script, code = STREAM_FAULTS[name]
    upstream.answer = lambda _: script
    reply = post(gateway, mode=mode, stream=True)
    error = json.loads(last(reply)) if reply.status_code == 200 else reply.json()
    assert error["error"]["code"] == code
    assert "[DONE]" not in reply.text
    begun = mode == "off" and name in ("cut", "no end", "drips for ever", "stops dripping", "huge")
    if mode == "correct" or begun:
        assert (reply.status_code == 200) == begun


def test_the_sdk_raises_what_happens_in_the_middle_of_a_stream(gateway, upstream):
    upstream.answer = lambda _: Script("a long answer", cut=3)
    client = openai.OpenAI(base_url=gateway.url, api_key="none", max_retries=0)
    asked = client.chat.completions.create(**BODY, stream=True, extra_headers={"x-everalign-mode": "off"})
    with pytest.raises(openai.APIError, match="breaks off"):
        list(asked)


def test_a_silent_upstream_does_not_close_the_connection(upstream):
    upstream.answer = lambda _: Script("It is 4.", delay=0.5)
    with serving(upstream, corrector=Fake(), keepalive=0.1) as gateway:
        reply = post(gateway, stream=True)
        assert reply.text.startswith(": ping\n\n")
        assert 2 <= reply.text.count(": ping\n\n") <= 5
        assert reply.headers["cache-control"] == "no-cache, no-transform"
        assert reply.headers["x-accel-buffering"] == "no"
        assert reply.headers["x-everalign-correction"] == "pending"
        upstream.answer = lambda _: Script(raw=b"", status=500, delay=0.3)
        reply = post(gateway, stream=True)
        assert reply.status_code == 200
        assert "status 500" in json.loads(last(reply))["error"]["message"]


def test_an_upstream_that_is_away_is_left_alone_and_found_again(upstream):
    upstream.answer = lambda _: Script(raw=b"", status=500)
    with serving(upstream, retries=0, breaker_failures=3, breaker_seconds=0.3) as gateway:
        assert [post(gateway).status_code for _ in range(4)] == [500, 500, 500, 503]
        reply = post(gateway)
        assert (reply.json()["error"]["code"], reply.headers["retry-after"]) == ("upstream_unavailable", "1")
        before = len(upstream.requests)
        upstream.answer = lambda _: Script()
        post(gateway)
        assert len(upstream.requests) == before
        time.sleep(0.35)
        assert [post(gateway).status_code for _ in range(2)] == [200, 200]


def test_an_upstream_that_hangs_up_without_an_answer():
    """It was reached: another word than for an address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up():
            with suppress(OSError):  # the listener is closed in the end
                while True:
                    connection, _ = listener.accept()
                    connection.recv(65536)
                    connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with serving(UpstreamSettings("default", address), retries=0, timeouts=QUICK) as gateway:
            error = post(gateway).json()["error"]
    assert error["code"] == "upstream_unreachable"
    assert error["message"] == "the upstream closed the connection before it answered"


def test_an_upstream_that_is_not_there():
    with serving(_nobody(), retries=1, timeouts=QUICK) as gateway:
        reply = post(gateway)
        assert (reply.status_code, reply.json()["error"]["code"]) == (502, "upstream_unreachable")
        assert HTTP.get(f"{gateway.url[:-3]}/ready").status_code == 503
        assert HTTP.get(f"{gateway.url[:-3]}/health").status_code == 200


def _nobody():
    return UpstreamSettings("default", "http://127.0.0.1:9/v1")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("policy", ["open", "closed"])
def test_a_corrector_that_fails(policy, stream, upstream):
    upstream.answer = lambda _: Script("It is 4.")
    broken = Fake(lambda _: RuntimeError("secret question"))
    with serving(upstream, corrector=broken, on_failure=policy, breaker_failures=2) as gateway:
        replies = [post(gateway, stream=stream) for _ in range(4)]
        if policy == "closed":
            assert [reply.status_code for reply in replies] == [503] * 4
            codes = [reply.json()["error"]["code"] for reply in replies]
            assert codes == ["uncorrected_corrector_error"] * 2 + ["uncorrected_corrector_down"] * 2
        else:
            told = [reply.headers["x-everalign-correction"] for reply in replies]
            assert told == ["skipped; reason=corrector_error"] * 2 + ["skipped; reason=corrector_down"] * 2
            assert all("4." in reply.text for reply in replies)
        assert "secret" not in "".join(reply.text for reply in replies)


def test_a_corrector_that_hangs_or_has_too_much_to_do(upstream):
    upstream.answer = lambda _: Script("It is 4.")
    release = threading.Event()
    slow = Fake(lambda answer: (release.wait(5), f"{answer}!")[1])
    quick = Timeouts(correction=0.4)
    try:
        with serving(upstream, corrector=slow, timeouts=quick, limits=Limits(waiting=1)) as gateway:
            replies = []
            threads = [threading.Thread(target=lambda: replies.append(post(gateway))) for _ in range(4)]
            for thread in threads:
                thread.start()
                time.sleep(0.03)
            for thread in threads:
                thread.join()
            told = sorted(reply.headers["x-everalign-correction"] for reply in replies)
            assert told == ["skipped; reason=corrector_timeout"] * 2 + ["skipped; reason=queue_full"] * 2
            release.set()
            time.sleep(0.1)
            assert post(gateway).headers["x-everalign-correction"] == "applied"
    finally:
        release.set()


def opened(breaker, *keys):
    for key in keys:
        breaker.enter(key).failed()


def test_a_circuit_is_tried_once_a_second_when_its_pause_is_over_and_closed_by_a_good_beginning():
    now = [0.0]
    breaker = CircuitBreaker(2, 10, lambda: now[0])
    opened(breaker, "a", "a")
    assert (breaker.state, breaker.wait, breaker.enter("a")) == ("open", 10, None)
    now[0] = 10
    assert breaker.state == "half-open"
    trial = breaker.enter("a")
    assert breaker.enter("a") is None
    trial.abandoned()
    trial = breaker.enter("a")
    assert breaker.enter("a") is None
    now[0] = 11.5
    another = breaker.enter("a")  # the first may take minutes
    another.failed()
    assert breaker.state == "open"
    now[0] = 22
    breaker.enter("a").answered()  # its body may take minutes, too
    assert breaker.state == "closed"
    trial.failed()  # of the time before
    assert breaker.state == "closed"


def test_a_server_that_begins_well_and_breaks_off_is_left_alone_too():
    breaker = CircuitBreaker(2, 10, lambda: 0.0)
    for _ in range(2):
        permit = breaker.enter()
        permit.answered()
        permit.failed()
        permit.failed()
    assert breaker.state == "open"


def test_one_key_s_failures_close_nobody_else_out():
    breaker = CircuitBreaker(3, 10, lambda: 0.0)
    opened(breaker, "a", "a", "a")
    assert breaker.enter("a") is None
    assert breaker.enter("b") is not None
    opened(breaker, "b", "b")
    assert breaker.enter("c") is None  # it was not the key's requests
    unreachable = CircuitBreaker(3, 10, lambda: 0.0)
    for _ in range(3):
        unreachable.enter("a").failed(everybody=True)
    assert unreachable.enter("b") is None


def test_circuits_of_models_are_apart_and_bounded():
    circuits = Circuits(lambda: CircuitBreaker(1, 10))
    circuits.of("broken").enter().failed()
    assert (circuits.of("broken").state, circuits.of("works").state, circuits.state) == ("open", "closed", "open")
    for number in range(3000):
        circuits.of(f"invented {number}")
    assert circuits.of("broken").state == "open"
    assert len(circuits.known) <= 1001
