"""What one client, one model or one server does must not stop the others: headers, circuits, deadlines, queues."""

import asyncio
import json
import threading
import time

import httpx
import pytest

from chat_server_for_tests import ChatServer, Reply, refused
from everalign.chat_client import ChatClient, ChatError
from everalign.correction.corrector import Corrector
from everalign.correction.engines import EndpointEngine
from everalign.correction.templates import get_template
from everalign.deadlines import Deadline, DeadlineOver
from everalign.serving.correcting import CorrectionFailed, CorrectionService
from everalign.serving.fair_queue import FairQueue
from upstream_for_tests import HTTP, Fake, Script, UpstreamServer, serving

QUESTION = [{"role": "user", "content": "?"}]


@pytest.fixture(scope="module")
def upstream():
    with UpstreamServer() as server:
        yield server


def post(gateway, key=None, model="small", headers=(), **more):
    given = [(name, value) for name, value in headers]
    if key is not None:
        given.append(("authorization", f"Bearer {key}"))
    body = {"model": model, "messages": QUESTION, **more}
    return HTTP.post(f"{gateway.url}/chat/completions", json=body, headers=given)


VALUES = ["Café".encode(), "Caf\xe9".encode("latin-1"), "日本".encode(), bytes(range(0x80, 0x100)), b"tab\there"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("value", VALUES)
def test_any_byte_of_a_header_passes_both_ways(value, stream, upstream):
    upstream.answer = lambda _: Script("4", headers={"x-request-id": value})
    with serving(upstream, breaker_failures=1) as gateway:
        reply = post(gateway, headers=[(b"x-title", value)], stream=stream)
        assert reply.status_code == 200
        assert upstream.requests[-1].headers["x-title"].encode("latin-1") == value
        assert dict(reply.headers.raw)[b"x-request-id"] == value
        upstream.answer = lambda _: Script(raw=b"", status=500, headers={"x-request-id": value})
        failed = post(gateway, headers=[(b"x-title", value)], stream=stream)
        assert (failed.status_code, dict(failed.headers.raw)[b"x-request-id"]) == (500, value)


def test_a_header_of_the_trial_does_not_lock_the_upstream_out(upstream):
    with serving(upstream, retries=0, breaker_failures=1, breaker_seconds=0.05) as gateway:
        upstream.answer = lambda _: Script(raw=b"", status=500)
        assert [post(gateway).status_code for _ in range(2)] == [500, 503]
        time.sleep(0.06)
        upstream.answer = lambda _: Script()
        asked = post(gateway, headers=[(b"x-title", b"\xff\x01"), (b"x-title", "Café".encode())])
        assert asked.status_code in (200, 400)
        assert post(gateway).status_code == 200


def test_a_stream_that_is_the_trial_holds_nobody_up(upstream):
    with serving(upstream, retries=0, breaker_failures=1, breaker_seconds=0.05) as gateway:
        upstream.answer = lambda _: Script(raw=b"", status=500)
        post(gateway)
        time.sleep(0.06)
        upstream.answer = lambda body: Script("long " * 40, drip=0.02) if body.get("stream") else Script()
        with httpx.stream(
            "POST", f"{gateway.url}/chat/completions", json={"model": "small", "messages": QUESTION, "stream": True}
        ) as streamed:
            next(streamed.iter_lines())
            assert post(gateway).status_code == 200


def test_one_model_and_one_key_close_no_other_out(upstream):
    upstream.answer = lambda body: Script(raw=b"", status=500) if body["model"] == "bad" else Script()
    with serving(upstream, retries=0, breaker_failures=2, keys=("one", "two")) as gateway:
        assert [post(gateway, "one", "bad").status_code for _ in range(3)] == [500, 500, 503]
        assert post(gateway, "one").status_code == 200
        assert post(gateway, "two", "bad").status_code == 500


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429])
def test_refusals_open_no_circuit(status, upstream):
    upstream.answer = lambda _: Script(raw=b"{}", status=status)
    with serving(upstream, breaker_failures=1) as gateway:
        assert 503 not in [post(gateway).status_code for _ in range(3)]
        assert gateway.gateway.circuits()["upstream:default"] == "closed"


def test_a_request_counts_once_however_often_it_is_repeated(upstream):
    upstream.answer = lambda _: Script(raw=b"", status=503)
    with serving(upstream, retries=3, breaker_failures=2, longest_wait=1) as gateway:
        assert post(gateway).status_code == 503
        assert gateway.gateway.circuits()["upstream:default"] == "closed"


def test_polls_of_readiness_open_no_circuit(upstream):
    from everalign.serving.settings import UpstreamSettings

    with serving(UpstreamSettings("default", "http://127.0.0.1:9/v1"), breaker_failures=1, retries=0) as gateway:
        for _ in range(3):
            ready = HTTP.get(f"{gateway.url[:-3]}/ready")
            assert (ready.status_code, ready.json()["circuits"]["upstream:default"]) == (503, "closed")
        assert post(gateway).json()["error"]["code"] == "upstream_unreachable"
        assert post(gateway).json()["error"]["code"] == "upstream_unavailable"


def corrected(text, **how):
    return Reply({"choices": [{"text": text, "finish_reason": "stop"}]}, **how)


def remote(server, timeout=60.0, retries=4):
    client = ChatClient(server.url, "c", "", timeout=timeout, retries=retries)
    return Corrector(EndpointEngine(client, get_template("everalign-1")))


def test_a_corrector_s_refusals_do_not_cost_others_their_corrections(upstream):
    upstream.answer = lambda body: Script(body["messages"][0]["content"])

    with ChatServer(lambda prompt: refused(400) if "BAD" in prompt else corrected("It is four.")) as server:
        corrections = CorrectionService(remote(server), batch=1, threads=4)
        with serving(upstream, corrections=corrections, keys=("one", "two")) as gateway:
            for _ in range(8):
                spoilt = post(gateway, "one", messages=[{"role": "user", "content": "BAD"}])
                assert spoilt.headers["x-everalign-correction"] == "skipped; reason=corrector_error"
            for key in ("one", "two"):
                assert post(gateway, key).headers["x-everalign-correction"] == "applied"


def test_a_corrector_that_fails_for_one_key_is_still_asked_for_others():
    failing = Fake(lambda answer: RuntimeError("out of memory") if answer == "huge" else f"{answer}!")

    async def work():
        service = CorrectionService(failing)
        for _ in range(7):
            with pytest.raises(CorrectionFailed) as caught:
                await service.correct("q", "huge", "one")
        assert caught.value.reason == "corrector_down"
        assert (await service.correct("q", "a", "two")).text == "a!"
        await service.close()

    asyncio.run(work())


def test_a_deadline_holds_over_all_tries_and_nobody_s_requests_end():
    with ChatServer(lambda _: corrected("x", delay=3)) as server:
        deadline = Deadline(0.2)
        started = time.monotonic()
        with deadline.held(), pytest.raises(DeadlineOver):
            remote(server).correct("q", "a")
        assert time.monotonic() - started < 1
        deadline = Deadline(60)
        threading.Timer(0.1, deadline.cancel).start()
        with deadline.held(), pytest.raises(DeadlineOver):
            remote(server).correct("q", "a")
        assert time.monotonic() - started < 2
    with ChatServer(lambda _: refused(500)) as server:
        client = ChatClient(server.url, "c", "")
        with Deadline(10, retries=0).held(), pytest.raises(ChatError):
            list(client.continue_many(["a"]))
        assert len(server.requests) == 1


def test_a_corrector_that_hangs_holds_no_thread_and_no_other_key(upstream):
    upstream.answer = lambda body: Script(body["messages"][0]["content"])

    def reply(prompt):
        return corrected("never", delay=5) if "HANG" in prompt else corrected("fine")

    def ask(gateway, key, text):
        return post(gateway, key, messages=[{"role": "user", "content": text}]).headers["x-everalign-correction"]

    with ChatServer(reply) as server:
        corrections = CorrectionService(remote(server), batch=1, threads=4, timeout=0.6)
        with serving(upstream, corrections=corrections, keys=("one", "two")) as gateway:
            found = []
            asking = [threading.Thread(target=lambda: found.append(ask(gateway, "one", "HANG"))) for _ in range(12)]
            for thread in asking:
                thread.start()
            time.sleep(0.15)
            started = time.monotonic()
            assert ask(gateway, "two", "works") == "applied"
            assert time.monotonic() - started < 0.4
            for thread in asking:
                thread.join()
            assert set(found) <= {"skipped; reason=corrector_timeout", "skipped; reason=corrector_down"}
            assert time.monotonic() - started < 2
            assert ask(gateway, "two", "works again") == "applied"
            assert not corrections._stuck


def test_what_nobody_waits_for_is_not_corrected():
    release, seen = threading.Event(), []

    def rewrite(answer):
        seen.append(answer)
        release.wait(5)
        return f"{answer}!"

    async def work():
        service = CorrectionService(Fake(rewrite), batch=1)
        asked = [asyncio.ensure_future(service.correct("q", str(n), "one")) for n in range(4)]
        await asyncio.sleep(0.05)
        for one in asked[1:]:
            one.cancel()
        await asyncio.sleep(0)
        release.set()
        assert (await asked[0]).text == "0!"
        assert (await service.correct("q", "last", "one")).text == "last!"
        await service.close()

    asyncio.run(work())
    assert seen == ["0", "last"]


def test_a_thread_that_never_ends_is_left(monkeypatch):
    monkeypatch.setattr("everalign.serving.correcting._GRACE", 0.05)
    release = threading.Event()

    def rewrite(answer):
        if answer == "hang":
            release.wait(10)
        return f"{answer}!"

    async def work():
        service = CorrectionService(Fake(rewrite), timeout=0.2)
        for _ in range(2):
            with pytest.raises(CorrectionFailed, match="corrector_timeout"):
                await service.correct("q", "hang", "one")
        assert (await asyncio.wait_for(service.correct("q", "works", "two"), 1)).text == "works!"
        release.set()
        await asyncio.sleep(0.05)
        assert service._stuck == 0
        await service.close()

    asyncio.run(work())


class Item:
    def __init__(self, key, name, gone=False):
        self.key, self.name, self.gone = key, name, gone


def test_keys_take_turns_and_the_one_with_most_gives_way():
    queue = FairQueue[Item](4)
    for n in range(4):
        assert queue.put(Item("a", f"a{n}")) is None
    last = Item("a", "a4")
    assert queue.put(last) is last
    assert queue.put(Item("b", "b0")).name == "a3"
    assert queue.put(Item("c", "c0")).name == "a2"
    taken = [queue.take(lambda _: True).name for _ in range(4)]
    assert taken == ["a0", "b0", "c0", "a1"]
    assert queue.take(lambda _: True) is None
    queue.put(Item("a", "gone", gone=True))
    queue.put(Item("a", "a5"))
    assert queue.take(lambda item: item.key != "a") is None
    assert (queue.take(lambda _: True).name, len(queue)) == ("a5", 0)


ERROR = {
    "error": {"message": "slow upstream-key", "type": "t", "code": 429, "param": None,
              "innererror": {"a": [1, "upstream-key"]}, "metadata": {"provider": "x"}, "failed_generation": "{"},
    "request": "r1",
}  # fmt: skip
KEPT = json.loads(json.dumps(ERROR).replace("upstream-key", "***"))


@pytest.mark.parametrize("mode", ["off", "correct", "strict"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [200, 400, 429, 500, 529])
def test_an_error_keeps_what_it_carries(status, stream, mode, upstream):
    content = json.dumps(ERROR).encode()
    limits = {"x-ratelimit-remaining-requests": "7", "retry-after": "3"}
    upstream.answer = lambda _: Script(raw=content, status=status, kind="application/json", headers=limits)
    with serving(upstream, corrector=Fake(), retries=0) as gateway:
        reply = post(gateway, stream=stream, headers=[("x-everalign-mode", mode)])
    assert reply.status_code == (status if status != 200 else 429)
    if mode == "strict":
        assert "innererror" not in reply.text
    else:
        assert reply.json() == KEPT
    if status != 200:
        assert reply.headers["retry-after"] == "3"
        assert ("x-ratelimit-remaining-requests" in reply.headers) == (mode != "strict")


@pytest.mark.parametrize("mode", ["off", "correct"])
def test_an_error_inside_of_a_stream_keeps_what_it_carries(mode, upstream):
    upstream.answer = lambda _: Script(raw=b"data: %s\n\n" % json.dumps(ERROR).encode())
    with serving(upstream, corrector=Fake()) as gateway:
        reply = post(gateway, stream=True, headers=[("x-everalign-mode", mode)])
    said = reply.json() if reply.status_code != 200 else json.loads(reply.text.strip().split("\n\n")[-1][6:])
    assert said == KEPT
    assert "[DONE]" not in reply.text
