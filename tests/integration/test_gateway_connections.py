"""Connections that are of no use: slow heads and bodies, silence, clients that read nothing, and too many of them."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from everalign.serving.app import create_app
from everalign.serving.errors import GatewayError
from everalign.serving.limits import Limiter
from everalign.serving.server import bound_socket, make_server
from everalign.serving.settings import GatewaySettings, Limits, Timeouts, UpstreamSettings
from everalign.serving.upstream import Upstream
from upstream_for_tests import HTTP, Script, UpstreamServer

QUESTION = {"model": "small", "messages": [{"role": "user", "content": "?"}]}


@pytest.fixture(scope="module")
def upstream():
    with UpstreamServer() as server:
        yield server


@contextmanager
def serving(upstream, keys=(), **limits):
    """The gateway in the server that `everalign serve` runs."""
    timeouts = Timeouts(head=0.4, stalled=0.4)
    named = (UpstreamSettings("default", upstream.url),)
    app = create_app(GatewaySettings(upstreams=named, keys=keys, timeouts=timeouts, limits=Limits(**limits)))
    listening = bound_socket("127.0.0.1", 0)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(5)
        listening.close()


def connected(base):
    return socket.create_connection(("127.0.0.1", int(base.rpartition(":")[2])), 5)


def closed_after(connection, seconds):
    """What came, and whether the connection was closed in that time."""
    connection.settimeout(seconds)
    content = b""
    try:
        while part := connection.recv(65536):
            content += part
    except TimeoutError:
        return content, False
    except ConnectionError:
        return content, True
    return content, True


def drip(connection, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        connection.sendall(b"G")
        time.sleep(0.05)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat", HEAD])
def test_a_head_that_does_not_come_is_not_waited_for(sent, upstream):
    with serving(upstream) as base, connected(base) as connection:
        connection.sendall(sent)
        assert closed_after(connection, 2)[1]


def test_a_head_that_drips_is_not_waited_for_either_and_neither_is_the_next_one(upstream):
    with serving(upstream) as base, connected(base) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionError):
            drip(connection, 2)


def test_a_head_without_end_is_refused(upstream):
    with serving(upstream) as base, connected(base) as connection:
        try:
            for _ in range(40):
                connection.sendall(b"x-a: " + b"a" * 8000 + b"\r\n" if _ else b"GET / HTTP/1.1\r\n")
        except ConnectionError:
            return
        assert closed_after(connection, 1)[1]


def test_a_request_under_way_is_not_cut_off(upstream):
    upstream.answer = lambda _: Script("slow", delay=1.0)
    with serving(upstream) as base:
        assert HTTP.post(f"{base}/v1/chat/completions", json=QUESTION).status_code == 200
    upstream.answer = lambda _: Script()


def test_a_client_that_reads_nothing_is_left(upstream):
    upstream.answer = lambda _: Script("x" * 4_000_000, piece=100_000)
    body = b'{"model": "small", "stream": true, "messages": [{"role": "user", "content": "?"}]}'
    with serving(upstream) as base, connected(base) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        in_flight = []
        for _ in range(60):
            in_flight.append(b"everalign_in_flight 0.0" not in HTTP.get(f"{base}/metrics").content)
            if True in in_flight and not in_flight[-1]:
                break
            time.sleep(0.05)
        assert in_flight[-1] is False
        assert True in in_flight
    upstream.answer = lambda _: Script()


def test_idle_connections_make_room_and_busy_ones_are_kept(upstream):
    upstream.answer = lambda _: Script(delay=0.6)
    with serving(upstream, connections_per_address=3) as base:
        silent = [connected(base) for _ in range(12)]
        assert HTTP.get(f"{base}/health").status_code == 200
        replies = []

        def ask():
            try:
                replies.append(HTTP.post(f"{base}/v1/chat/completions", json=QUESTION, headers={"connection": "close"}))
            except ConnectionError:
                replies.append(None)

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        time.sleep(0.2)
        with connected(base) as fourth:
            content, closed = closed_after(fourth, 0.3)
            assert closed
            assert b"503" in content
            assert b"too_many_connections" in content
        for thread in asking:
            thread.join()
        assert [reply.status_code for reply in replies] == [200] * 3
        for one in silent:
            one.close()
    upstream.answer = lambda _: Script()


def test_a_slow_form_holds_no_place_of_others(upstream, monkeypatch):
    monkeypatch.setattr("everalign.serving.pages.base._SECONDS", 0.3)
    head = b"POST /login HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-www-form-urlencoded\r\n"
    with serving(upstream, keys=("one",)) as base, connected(base) as connection:
        connection.sendall(head + b"content-length: 100\r\n\r\nkey=")
        content, _ = closed_after(connection, 1)
        assert b"408" in content.split(b"\r\n")[0]


def test_places_are_shared_between_keys():
    limiter = Limiter(9, 9, shared=True)

    for key, places in (("a", 5), ("b", 2), ("c", 1)):
        for _ in range(places):
            limiter.enter(key)
        with pytest.raises(GatewayError) as caught:
            limiter.enter(key)
        assert caught.value.status == 429
    limiter.enter("d")
    with pytest.raises(GatewayError) as caught:
        limiter.enter("e")
    assert caught.value.status == 503
    alone = Limiter(9, 9)
    for _ in range(9):
        alone.enter("a")


def test_a_refusal_is_read_by_who_is_still_sending(upstream):
    body = b"x" * 3_000_000
    with serving(upstream, keys=("one",)) as base, connected(base) as connection:
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body))
        time.sleep(0.1)
        connection.sendall(body)
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")


def test_connections_that_change_their_protocol_are_let_go(upstream):
    upgrade = b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    upgrade += b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    with serving(upstream, connections_per_address=2) as base:
        for _ in range(5):
            with connected(base) as connection:
                connection.sendall(upgrade)
                connection.recv(4096)
        # Two that nobody let go would be all that this address may have.
        answers = [HTTP.get(f"{base}/health", headers={"connection": "close"}).status_code for _ in range(5)]
        assert answers == [200] * 5


def test_many_who_ask_for_the_models_are_one_question(upstream, monkeypatch):
    asked = []
    whole = Upstream._list_models

    async def counted(self):
        asked.append(1)
        await asyncio.sleep(0.1)
        return await whole(self)

    monkeypatch.setattr(Upstream, "_list_models", counted)
    with serving(upstream) as base:
        threads = [threading.Thread(target=HTTP.get, args=(f"{base}/ready",)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 1 <= len(asked) < 6


def test_streams_share_their_connection_to_the_upstream(upstream):
    before = len(upstream.requests)
    with serving(upstream) as base:
        for _ in range(3):
            reply = HTTP.post(f"{base}/v1/chat/completions", json={**QUESTION, "stream": True})
            assert reply.text.endswith("data: [DONE]\n\n")
    assert len({seen.port for seen in upstream.requests[before:]}) == 1


def test_an_upstream_that_does_not_end_a_stream_after_its_last_event_holds_nobody_up():
    with UpstreamServer(lambda _: Script(lingers=8)) as upstream, serving(upstream) as base:
        began = time.monotonic()
        for _ in range(2):
            reply = HTTP.post(f"{base}/v1/chat/completions", json={**QUESTION, "stream": True})
            assert reply.text.endswith("data: [DONE]\n\n")
        assert time.monotonic() - began < 5
