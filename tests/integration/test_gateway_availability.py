"""What one client, one model or one server does must not stop the others: headers, circuits, deadlines, queues."""

import asyncio
import json
import threading
import time

import pytest

from chat_server_for_tests import ChatServer, Reply, refused
from everalign.correction.corrector import Corrector
from everalign.correction.engines import EndpointEngine
from everalign.correction.templates import get_template
from everalign.deadlines import Deadline, DeadlineOver
from everalign.llm_client import ChatClient, ChatError
from everalign.serving.corrector_service import CorrectionFailed, CorrectionService
from everalign.serving.limits import FairQueue
from everalign.serving.settings import Timeouts, UpstreamSettings
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
        with HTTP.stream(
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


def test_a_request_counts_once_however_often_it_is_repeated(upstream, monkeypatch):
    monkeypatch.setattr("everalign.serving.upstream._FIRST_WAIT", 0.01)
    upstream.answer = lambda _: Script(raw=b"", status=503)
    with serving(upstream, retries=3, breaker_failures=2, longest_wait=1) as gateway:
        assert post(gateway).status_code == 503
        assert gateway.gateway.circuits()["upstream:default"] == "closed"


def test_polls_of_readiness_open_no_circuit(upstream):
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
    monkeypatch.setattr("everalign.serving.corrector_service._GRACE", 0.05)
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


STREAMED = {"stream": True}


def events_of(reply):
    return [json.loads(event[6:]) for event in reply.text.strip().split("\n\n") if event.startswith("data: {")]


@pytest.mark.parametrize(
    "asked",
    [
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"messages": [*QUESTION, {"role": "assistant", "content": "I"}]},
    ],
)
def test_a_stream_that_stays_as_it_is_is_passed_on_from_its_first_byte(asked, upstream):
    upstream.answer = lambda _: Script("abcdef", drip=0.2)
    body = {"model": "small", "messages": QUESTION, **STREAMED, **asked}
    with serving(upstream, corrector=Fake()) as gateway:
        started = time.monotonic()
        with HTTP.stream("POST", f"{gateway.url}/chat/completions", json=body) as reply:
            assert reply.headers["x-everalign-correction"].startswith("skipped; reason=")
            lines = reply.iter_lines()
            next(line for line in lines if line.startswith("data:"))
            assert time.monotonic() - started < 0.6
            last = [line for line in lines if "everalign" in line]
        assert len(last) == 1
        assert json.loads(last[0][6:])["everalign"]["correction"] == "skipped"


@pytest.mark.parametrize("remotely", [False, True])
def test_a_streamed_correction_says_what_it_is_before_it_comes_and_comes_in_pieces(remotely, upstream):
    upstream.answer = lambda _: Script("It is five.")
    text = "It is four, since two and two are four, as everybody can count on their fingers."
    with ChatServer(lambda _: corrected(text)) as server:
        corrector = remote(server) if remotely else Fake(lambda _: text)
        with serving(upstream, corrector=corrector) as gateway:
            reply = post(gateway, **STREAMED)
    assert reply.headers["x-everalign-correction"] == "applied"
    pieces = [event["choices"][0]["delta"].get("content") for event in events_of(reply)]
    assert "".join(piece for piece in pieces if piece) == text
    assert len([piece for piece in pieces if piece]) > 3


def test_silence_before_the_first_event_is_like_silence_before_a_whole_answer(upstream):
    quick = Timeouts(total=0.6)
    with serving(upstream, timeouts=quick, breaker_failures=100) as gateway:
        for delay, status in ((0.3, 200), (2, 504)):
            upstream.answer = lambda _, delay=delay: Script(delay=delay)
            assert [post(gateway, stream=stream).status_code for stream in (False, True)] == [status, status]
        upstream.answer = lambda _: Script("ab", drip=0.12)  # no limit between two events but that of all
        assert "[DONE]" in post(gateway, **STREAMED).text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("finish", "reason"),
    [("error", "finish_reason"), (None, "finish_reason"), ("max_tokens", "length"), ("weird", "finish_reason")],
)
def test_what_did_not_end_well_is_not_corrected_and_not_said_to_have_stopped(finish, reason, stream, upstream):
    upstream.answer = lambda _: Script("It is", finish=finish)
    with serving(upstream, corrector=Fake()) as gateway:
        reply = post(gateway, stream=stream)
        assert reply.headers["x-everalign-correction"] == f"skipped; reason={reason}"
        found = events_of(reply)[-1] if stream else reply.json()
        assert found["choices"][0]["finish_reason"] == finish
        assert "fake" not in reply.text
        strict = post(gateway, stream=stream, headers=[("x-everalign-mode", "strict")])
        assert (strict.status_code, strict.json()["error"]["code"]) == (422, f"uncorrected_{reason}")


class SlowStore:
    """A store that hangs while it is told to."""

    def __init__(self):
        self.hangs, self.kept = threading.Event(), []

    def add_exchange(self, exchange):
        self._hang()
        self.kept.append(exchange.id)

    def add_feedback(self, feedback):
        self._hang()
        return True

    def exchange(self, id, key_id=None):
        self._hang()

    def stats(self):
        self._hang()

    def close(self):
        self._hang()

    def _hang(self):
        until = time.monotonic() + 5
        while self.hangs.is_set() and time.monotonic() < until:
            time.sleep(0.01)


@pytest.mark.parametrize("mode", ["off", "correct"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_store_that_hangs_hangs_no_answer_and_it_is_said(stream, mode, upstream):
    upstream.answer = lambda _: Script("It is 4.")
    store = SlowStore()
    given = {"store": True, "stream": stream, "headers": [("x-everalign-mode", mode)]}

    def stored(reply):
        assert reply.status_code == 200
        assert not stream or reply.text.endswith("data: [DONE]\n\n")
        told = reply.headers.get("x-everalign-stored")
        if stream:
            (told_at_last,) = [event["everalign"]["stored"] for event in events_of(reply) if "everalign" in event]
            assert told in (None, str(told_at_last).lower())
            return told_at_last
        return told == "true"

    with serving(upstream, corrector=Fake(), store=store, timeouts=Timeouts(store=0.2)) as gateway:
        assert stored(post(gateway, **given))
        store.hangs.set()
        started = time.monotonic()
        assert [stored(post(gateway, **given)) for _ in range(8)] == [False] * 8
        assert time.monotonic() - started < 1.5  # it is left alone after three
        feedback = HTTP.post(f"{gateway.url}/feedback", json={"id": "x", "rating": 1})
        assert (feedback.status_code, feedback.json()["error"]["code"]) == (503, "store_failed")
        assert HTTP.get(f"{gateway.url[:-3]}/dashboard").status_code == 200
        store.hangs.clear()
        time.sleep(0.3)
        assert stored(post(gateway, **given))


def test_without_a_store_a_client_that_asks_for_it_is_told(upstream):
    upstream.answer = lambda _: Script("It is 4.")
    with serving(upstream) as gateway:
        assert post(gateway, store=True).headers["x-everalign-stored"] == "false"
        assert "x-everalign-stored" not in post(gateway).headers


def stream_of(*texts, finish="stop", end=b"data: [DONE]\n\n"):
    """A corrector's stream, a piece at a time."""
    choices = [{"text": text, "index": 0, "finish_reason": None} for text in texts]
    choices += [{"text": "", "index": 0, "finish_reason": finish}] if finish else []
    events = [b"data: %s\n\n" % json.dumps({"choices": [choice]}, ensure_ascii=False).encode() for choice in choices]
    return Reply(b"".join(events) + end, kind="text/event-stream")


def test_a_corrector_s_stream_is_followed_while_it_comes():
    words = [f"wörd{n}\u2028 " for n in range(40)]
    with ChatServer(lambda _: stream_of(*words)) as server:
        found = list(remote(server).stream_events("q", "".join(words[:30]) + "another end"))
        assert server.requests[0].body["stream"] is True
    assert found[-1].text == "".join(words)
    assert len(found) > 5
    same = "".join(found[:-1])
    assert "".join(words[:30]).startswith(same)  # what is behind may yet be refused
    assert len(same) > 100


BROKEN = {
    "cut": stream_of("a", finish=None, end=b""),
    "an error inside": stream_of("a", finish=None, end=b'data: {"error": {"message": "full"}}\n\n'),
    "no JSON": stream_of("a", finish=None, end=b"data: {\n\n"),
    "no object": stream_of("a", finish=None, end=b"data: [1]\n\n"),
    "html": Reply(b"<html>"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_corrector_s_stream_that_breaks_off_is_no_correction(name):
    with ChatServer(lambda _: BROKEN[name]) as server, pytest.raises(ChatError):
        list(remote(server, retries=0).stream_events("q", "another answer"))


@pytest.mark.parametrize(("finish", "reason"), [("stop", None), ("length", "unfinished"), ("error", "unfinished")])
def test_a_correction_that_did_not_end_by_itself_is_not_applied(finish, reason):
    with ChatServer(lambda _: stream_of("four, I think", finish=finish)) as server:
        (*_, streamed) = remote(server).stream_events("q", "It is five, I think.")
        assert streamed.reason == reason
    whole = Reply({"choices": [{"text": "four, I think", "finish_reason": finish}]})
    with ChatServer(lambda _: whole) as server:
        assert remote(server).correct("q", "It is five, I think.").reason == reason


def test_a_corrector_that_refuses_to_stream_is_asked_for_all_of_it():
    replies = iter([refused(400), corrected("It is four.")])
    with ChatServer(lambda _: next(replies)) as server:
        (*_, found) = remote(server).stream_events("q", "It is five.")
        assert found.text == "It is four."
        assert "stream" not in server.requests[1].body


def test_a_late_stream_says_what_was_known_of_it_all_the_time(upstream):
    upstream.answer = lambda _: Script("It is 4.", delay=0.2)
    with serving(upstream, corrector=Fake(), keepalive=0.05) as gateway:
        told = [
            post(gateway, stream=True, headers=[("x-everalign-mode", mode)], **more).headers["x-everalign-correction"]
            for mode, more in (("off", {}), ("correct", {"logprobs": True}), ("correct", {}))
        ]
    assert told == ["skipped; reason=off", "skipped; reason=logprobs", "pending"]


OTHER_ERRORS = [
    ({"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}, 200, 400),
    ({"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}, 400, 400),
    ({"detail": "too long"}, 422, 422),
    ({"error": "too long"}, 413, 413),
    ({"error": {"message": "too long", "code": "insufficient_quota"}}, 200, 502),
]


@pytest.mark.parametrize(("body", "status", "expected"), OTHER_ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_other_shapes_say_what_they_say(body, status, expected, stream, upstream):
    upstream.answer = lambda _: Script(raw=json.dumps(body).encode(), status=status, kind="application/json")
    with serving(upstream, retries=0) as gateway:
        reply = post(gateway, stream=stream)
    assert (reply.status_code, reply.json()["error"]["message"]) == (expected, "too long")
    assert all(reply.json()[name] == value for name, value in body.items() if name != "error")


@pytest.mark.parametrize("stream", [False, True])
def test_a_fallback_has_what_is_left_of_the_time(stream, upstream):
    upstream.answer = lambda _: Script(raw=b"", status=500, delay=0.3)
    with UpstreamServer(lambda _: Script(delay=5)) as instead:
        fallback = UpstreamSettings("fallback", instead.url)
        with serving(upstream, timeouts=Timeouts(total=0.6), retries=0, fallback=fallback) as gateway:
            started = time.monotonic()
            assert post(gateway, stream=stream).json()["error"]["code"] == "upstream_timeout"
            assert 0.5 < time.monotonic() - started < 0.85
            assert len(instead.requests) == 1
