"""The chat client: what it sends, what it tries again, what it says of bad replies, and never the key."""

import asyncio
import json
import os
import signal
import threading
import time
from datetime import datetime, timedelta, timezone

import pytest

from chat_server_for_tests import ChatServer, Reply, answer, in_turn, refused
from everalign import llm_client as chat_client
from everalign.errors import EveralignError, InputError
from everalign.llm_client import ChatClient, ChatError
from everalign.llm_reply import Completion, retry_after, shortened

ASKED = [{"role": "user", "content": "hello"}]
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No key or proxy of the machine's, and short pauses."""
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(chat_client, "_FIRST_BACKOFF", 0.01)


def client(server, **arguments):
    return ChatClient(server.url, "small", **{"timeout": 5.0, **arguments})


def many(count):
    return [[{"role": "user", "content": str(number)}] for number in range(count)]


def echo(messages):
    return messages[-1]["content"]


# ---- what is sent and returned ----


def test_a_conversation_is_asked_as_openai_does_and_answered(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    with ChatServer(lambda _: "Hi, ½!") as server:
        found = client(server).complete(ASKED, temperature=0, max_tokens=5)
    assert found == Completion("Hi, ½!", 7, 2, "stop")
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["content-type"] == "application/json"
    assert request.body == {"model": "small", "messages": ASKED, "temperature": 0, "max_tokens": 5}


def test_without_a_key_none_is_sent():
    with ChatServer(lambda _: "") as server:
        assert client(server).complete(ASKED).text == ""
    assert "authorization" not in server.requests[0].headers


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    with ChatServer(lambda _: "x") as server:
        client(server, api_key=KEY).complete(ASKED)
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("https://host/v1/chat/completions", "https://host/v1"),
        ("https://host/api", "https://host/api/v1"),
        ("https://host/v1beta/openai/", "https://host/v1beta/openai"),
        ("HTTP://host/v1", "http://host/v1"),
    ],
)
def test_the_address_may_end_in_v1_or_not(given, used):
    assert ChatClient(given, "m").base_url == used


def test_usage_is_summed_and_may_be_missing():
    odd = {"prompt_tokens": "many", "completion_tokens": True}
    replies = in_turn(answer("a"), refused(500), answer("b", usage=None), answer("c", usage=odd), answer("d", usage=3))
    with ChatServer(replies) as server:
        asked = client(server, concurrency=1)
        found = [completion for _, completion in asked.complete_many(many(4))]
    assert [completion.prompt_tokens for completion in found] == [7, None, None, None]
    assert asked.usage == chat_client.Usage(requests=5, prompt_tokens=7, completion_tokens=2, untold=3)


# ---- many ----


def test_many_are_asked_a_few_at_once_and_come_as_they_finish():
    def slow_first(messages):
        return Reply({"choices": [{"message": {"content": echo(messages)}}]}, delay=0.3 * (echo(messages) == "0"))

    with ChatServer(slow_first, seconds=0.02) as server:
        found = list(client(server, concurrency=3).complete_many(many(12)))
    assert sorted((index, completion.text) for index, completion in found) == sorted((i, str(i)) for i in range(12))
    assert found[-1][0] == 0
    assert server.most_at_once == 3
    assert len(server.requests) == 12


def test_none_are_no_work():
    assert list(ChatClient("http://127.0.0.1:9", "m").complete_many([])) == []


def test_a_failing_request_loses_no_finished_one_and_begins_no_other():
    def reply(messages):
        return refused(400, "too long") if echo(messages) == "2" else answer(echo(messages))

    found = []
    with ChatServer(reply, seconds=0.05) as server, pytest.raises(ChatError, match="status 400: too long") as caught:
        found.extend(client(server, concurrency=2).complete_many(many(50)))
    assert caught.value.index == 2
    assert {0, 1} <= {index for index, _ in found} <= {0, 1, 3, 4}
    assert len(found) == len(server.requests) - 1


def test_attempts_go_on_behind_a_request_that_failed():
    def reply(messages):
        return refused(400, "never") if messages[0]["content"] == "1" else messages[0]["content"]

    with ChatServer(reply) as server:
        client = ChatClient(server.url, "m", "", concurrency=1)
        found = dict(client.attempt_many([[{"role": "user", "content": str(i)}] for i in range(4)]))
    assert isinstance(found[1], ChatError)
    assert found[1].index == 1
    assert "status 400: never" in str(found[1])
    assert [found[i].text for i in (0, 2, 3)] == ["0", "2", "3"]
    with pytest.raises(InputError, match="'n': the client sets it"):
        client.attempt_many([], n=2)


def test_a_caller_may_stop_early_and_requests_under_way_end_at_once():

    def slow(messages):
        return Reply(delay=30) if echo(messages) != "0" else answer("0")

    started = time.perf_counter()
    with ChatServer(slow) as server:
        for _, completion in client(server, timeout=60.0).complete_many(many(8)):
            assert completion.text == "0"
            break
    assert time.perf_counter() - started < 5


def test_a_caller_may_have_an_event_loop():
    async def ask(server):
        return client(server).complete(ASKED).text

    with ChatServer(lambda _: "x") as server:
        assert asyncio.run(ask(server)) == "x"


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: a process that a shell started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupting_ends_at_once():
    # Once the questions have arrived: by then whoever asks is waiting and nothing else.
    fired = []

    def fire():
        fired.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    interrupt = threading.Timer(0.3, fire)
    arrived = threading.Barrier(4, action=interrupt.start)

    def hang(_):
        arrived.wait(timeout=20)
        return Reply(delay=30)

    with ChatServer(hang) as server:
        with pytest.raises(KeyboardInterrupt):
            list(client(server, timeout=60.0).complete_many(many(4)))
        assert time.perf_counter() - fired[0] < 5


def test_requests_are_spaced():
    with ChatServer(lambda _: "x") as server:
        started = time.perf_counter()
        list(client(server, requests_per_minute=600).complete_many(many(4)))
    assert time.perf_counter() - started >= 0.3
    assert server.most_at_once <= 2


# ---- trying again ----


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_what_may_pass_is_tried_again(status):
    with ChatServer(in_turn(refused(status), refused(status), "fine")) as server:
        assert client(server).complete(ASKED).text == "fine"
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "fault", [Reply(delay=20), Reply({"a": "long"}, drip=0.2), answer("x" * 100)], ids=["hangs", "drips", "cut"]
)
def test_a_reply_that_does_not_arrive_whole_is_asked_for_again(fault):
    if not fault.delay and not fault.drip:
        fault.cut = 20
    with ChatServer(in_turn(fault, "fine")) as server:
        assert client(server, timeout=0.3).complete(ASKED).text == "fine"
    assert len(server.requests) == 2


def test_attempts_end():
    with ChatServer(lambda _: refused(500, "broken")) as server:
        with pytest.raises(ChatError, match=r"/v1 \(small\): status 500: broken; 3 attempts made"):
            client(server, retries=2).complete(ASKED)
        assert len(server.requests) == 3
        with pytest.raises(ChatError, match="1 attempts made"):
            client(server, retries=0).complete(ASKED)
    match = r"no answer within 0\.2 seconds; 2 attempts made"
    with ChatServer(lambda _: Reply(delay=20)) as server, pytest.raises(ChatError, match=match):
        client(server, timeout=0.2, retries=1).complete(ASKED)
    with pytest.raises(ChatError, match=r"http://127.0.0.1:\d+/v1 \(small\): cannot be reached .* attempts made"):
        client(server, retries=1).complete(ASKED)


@pytest.mark.parametrize("headers", [{"retry_after": "0.2"}, {"retry_after_ms": "200", "retry_after": "50"}])
def test_the_pause_that_the_server_asks_for_is_kept(headers):
    with ChatServer(in_turn(refused(429, **headers), "fine")) as server:
        started = time.perf_counter()
        client(server).complete(ASKED)
    assert 0.2 <= time.perf_counter() - started < 3


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after": "86400"}, 120.0),
        ({"retry-after": "inf"}, 120.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 06:00:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 09:00:00 GMT"}, 120.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 -0000"}, None),
    ],
)
def test_pauses_are_read_and_bounded(headers, seconds):
    now = datetime(2015, 10, 21, 7, 28, tzinfo=timezone(timedelta(0)))
    assert retry_after(headers, now) == seconds


def test_the_servers_word_on_trying_again_counts():
    replies = in_turn(refused(500, x_should_retry="false"), "fine")
    with ChatServer(replies) as server, pytest.raises(ChatError, match=r"status 500: no$"):
        client(server).complete(ASKED)
    with ChatServer(in_turn(refused(400, x_should_retry="true"), "fine")) as server:
        assert client(server).complete(ASKED).text == "fine"


# ---- streams ----


def stream(*events, **reply):
    lines = "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)
    return Reply(lines.encode(), kind="text/event-stream", **reply)


def piece(text, reason=None):
    return {"choices": [{"text": text, "finish_reason": reason}]}


def test_a_stream_is_yielded_in_pieces_and_counted():
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    with ChatServer(lambda _: stream(piece("a½"), piece("b", "stop"), usage, "[DONE]", "ignored")) as server:
        asked = client(server)
        found = list(asked.stream_continuation("x", max_tokens=3))
    assert found == ["a½", "b", Completion("a½b", 3, 2, "stop")]
    assert asked.usage == chat_client.Usage(1, 3, 2, 0)
    assert server.requests[0].path == "/v1/completions"
    assert server.requests[0].body["stream_options"] == {"include_usage": True}


def test_a_server_that_does_not_stream_gives_the_whole():
    with ChatServer(lambda _: Reply({"choices": [{"text": "all"}]})) as server:
        assert list(client(server).stream_continuation("x")) == [Completion("all", None, None, None)]


@pytest.mark.parametrize("fault", [{"cut": 5}, {"drip": 0.02}], ids=["cut", "hangs"])
def test_a_stream_is_asked_for_again_only_before_its_first_text(fault):
    with ChatServer(in_turn(stream(piece(""), **fault), stream(piece("b", "stop")))) as server:
        assert next(client(server, timeout=0.5).stream_continuation("x")) == "b"
    begun = stream(piece("a"), piece("b" * 99), **fault)
    with ChatServer(lambda _: begun) as server:
        pieces = client(server, timeout=2.5).stream_continuation("x")
        assert next(pieces) == "a"
        with pytest.raises(ChatError, match="breaks off in the middle"):
            next(pieces)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (["nothing"], "an event that is not a JSON object"),
        ([{"choices": [1]}], "a choice that is not a JSON object"),
        ([{"error": {"message": f"bad {KEY}"}}], r"holds an error: .*bad \*\*\*"),
        ([piece("a"), "[DONE]"], "ends before the text does"),
    ],
)
def test_a_bad_stream_is_told_and_not_asked_for_again(events, message):
    with ChatServer(lambda _: stream(*events)) as server, pytest.raises(ChatError, match=message):
        list(client(server, api_key=KEY).stream_continuation("x"))
    assert len(server.requests) == 1


def test_a_huge_stream_is_refused(monkeypatch):
    monkeypatch.setattr("everalign.llm_reply.LARGEST_STREAM", 1 << 20)
    huge = stream(piece("x" * (2 << 20)))
    with ChatServer(lambda _: huge) as server, pytest.raises(ChatError, match="larger than 1 MiB"):
        list(client(server).stream_continuation("x"))


# ---- bad replies ----


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refused(401, "wrong key"), "status 401: wrong key$"),
        (refused(404, "no model 'small'"), "status 404: no model 'small'$"),
        (Reply(b"plain \x1b[31m\nwords", 400, kind="text/plain"), r"status 400: plain \[31m words$"),
        (Reply({"detail": "wrong field"}, 422), "status 422: wrong field$"),
        (Reply({"error": "only text"}, 403), "status 403: only text$"),
        (Reply({"error": ["odd"]}, 403), r'status 403: \{"error": \["odd"\]\}$'),
        (Reply(b"", 400), r"status 400: \(nothing\)$"),
        (Reply(b"x" * 5000, 400), "status 400: x{300}…$"),
        (Reply(b"", 307, {"location": "http://elsewhere/v1"}), "307 leads to http://elsewhere/v1, which is not foll"),
        (Reply(b"", 302), "status 302 leads to nowhere"),
        (
            Reply(b'{"choices": [', 200),
            r"not a JSON object \(application/json\): \{\"choices\": \[; is this the address",
        ),
        (Reply(b"[" * 100_000), "not a JSON object"),
        (
            Reply(b"<html>", kind="text/html"),
            r"not a JSON object \(text/html\): <html>; is this the address of an API\?",
        ),
        (Reply(b"[1]"), "not a JSON object"),
        (Reply({"choices": []}), r'no choices: \{"choices": \[\]\}$'),
        (Reply({"error": {"message": "no money"}}), "no choices: no money$"),
        (Reply({"choices": [1]}), "no choices"),
        (Reply({"choices": [{"text": "x"}]}), "first choice has no message"),
        (answer(None), r"must be text, found null \(finish_reason stop\)"),
        (answer(None, "content_filter"), "found null .finish_reason content_filter"),
        (answer([{"type": "text", "text": "x"}]), "must be text, found list"),
        (answer(None, "tool_calls", tool_calls=[{"id": "1"}]), "calls a tool instead of answering"),
        (answer(None, refusal="I will not"), "refused to answer: I will not$"),
    ],
)
def test_a_bad_reply_is_told_and_not_asked_for_again(reply, message):
    with ChatServer(lambda _: reply) as server, pytest.raises(ChatError, match=message) as caught:
        client(server).complete(ASKED)
    assert len(server.requests) == 1
    assert isinstance(caught.value, EveralignError)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_a_huge_reply_is_refused(monkeypatch):
    monkeypatch.setattr(chat_client, "LARGEST_REPLY", 1 << 20)
    with ChatServer(lambda _: "x" * (3 << 20)) as server, pytest.raises(ChatError, match="larger than 1 MiB"):
        client(server).complete(ASKED)


def test_messages_hold_one_printable_line():
    assert shortened("a\n\t b\x07\x1b]0;c\u202e ") == "a b ]0;c"
    assert shortened("é" * 10, 3) == "ééé…"


# ---- the key ----


@pytest.mark.parametrize(
    "reply",
    [
        refused(401, f"Incorrect API key provided: {KEY}"),
        refused(500, f"cannot use {KEY}"),
        Reply(f"{'x' * 290} {KEY}".encode(), 400),
        Reply(f"{'x' * 290} {KEY}".encode()),
        Reply({"choices": KEY}),
        answer(None, KEY),
        Reply(b"", 302, {"location": f"http://host/{KEY}"}),
    ],
)
def test_the_key_is_never_shown(reply, capsys):
    with ChatServer(lambda _: reply) as server, pytest.raises(ChatError) as caught:
        client(server, api_key=KEY, retries=1).complete(ASKED)
    shown = [str(caught.value), repr(caught.value), repr(client(server, api_key=KEY)), *capsys.readouterr()]
    assert not any(KEY[:6] in text for text in shown)


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-a b", "sk-ключ"])
def test_a_key_that_no_header_holds_is_refused_unseen(key):
    with pytest.raises(InputError, match="OPENAI_API_KEY") as caught:
        ChatClient("http://host", "m", key)
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("url", [f"https://me:{KEY}@host/v1", f"https://host/v1?key={KEY}", f"https://host/#{KEY}"])
def test_an_address_with_a_secret_is_refused_unseen(url):
    with pytest.raises(InputError, match="https://host: the server's address must be without user") as caught:
        ChatClient(url, "m")
    assert KEY not in str(caught.value)


# ---- bad arguments ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "ftp://host"}, "must begin with http:// or https://"),
        ({"base_url": "host:8000"}, "must begin with http:// or https://"),
        ({"base_url": ""}, "must begin with http:// or https://"),
        ({"base_url": "http://"}, "must begin with http:// or https://"),
        ({"base_url": "http://host:port"}, "cannot be read"),
        ({"model": " "}, "model: is empty"),
        ({"timeout": 0}, "timeout: must be above 0"),
        ({"timeout": float("nan")}, "timeout: must be above 0"),
        ({"retries": -1}, "retries: must be at least 0"),
        ({"concurrency": 0}, "concurrency: must be at least 1"),
        ({"requests_per_minute": -1}, "requests per minute: must be at least 0"),
        ({"requests_per_minute": float("inf")}, "requests per minute"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ChatClient(**{"base_url": "http://host", "model": "m", **arguments})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"stream": True}, "parameter 'stream': the client sets it"),
        ({"temperature": float("nan")}, "conversation 1: cannot be sent as JSON"),
        ({"stop": {1}}, "conversation 1: cannot be sent as JSON"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is(parameters, message):
    with pytest.raises(InputError, match=message):
        ChatClient("http://127.0.0.1:9", "m").complete(ASKED, **parameters)


def test_half_a_surrogate_pair_names_its_conversation():
    with pytest.raises(InputError, match="conversation 2: cannot be sent"):
        ChatClient("http://127.0.0.1:9", "m").complete_many([ASKED, [{"role": "user", "content": "\ud800"}]])
