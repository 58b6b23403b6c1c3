"""A local server that speaks OpenAI's chat completions as a test tells it to, faults included.

    with ChatServer(lambda messages: "4") as server:
        ChatClient(server.url, "judge").complete(...)
        server.requests[0].messages

A test's function gets the messages and returns the answer as text, or a `Reply`.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 7, "completion_tokens": 2}


@dataclass
class Reply:
    """What the server sends.

    Args:
        body: the bytes of the reply, or a value to be sent as JSON.
        status: of HTTP.
        headers: besides the content type and length.
        delay: seconds before anything is sent.
        cut: bytes of the body that are left out, though its length promises them.
        drip: seconds between the single bytes of the body.
        kind: the content type.
    """

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int = 0
    drip: float = 0.0
    kind: str = "application/json"


@dataclass(frozen=True)
class Request:
    """What the server got, header names in small letters."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def messages(self) -> Any:
        """Of a chat, or the text to be continued."""
        return self.body["messages"] if "messages" in self.body else self.body["prompt"]


def answer(text: Any, finish_reason: str = "stop", usage: Any = USAGE, **message: Any) -> Reply:
    """A reply as OpenAI's servers send it."""
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    return Reply({"choices": [choice], **({} if usage is None else {"usage": usage})})


def refused(status: int, message: str = "no", **headers: str) -> Reply:
    """An error as OpenAI's servers send it; underscores in the headers' names stand for hyphens."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply({"error": {"message": message, "code": "x"}}, status, names)


def in_turn(*replies: Any) -> Callable[[Any], Any]:
    """Sends replies one after another, the last one for good."""
    lock, left = threading.Lock(), list(replies)

    def reply(_: Any) -> Any:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return reply


class ChatServer:
    """Serves while it is entered.

    Args:
        reply: what is answered to a request's messages: text, or a `Reply`.
        seconds: how long every answer takes.
    """

    def __init__(self, reply: Callable[[Sequence[dict[str, str]]], Any], seconds: float = 0.0) -> None:
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._reply, self._seconds, self._now = reply, seconds, 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._server = _QuietServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self, request: Request) -> Reply:
        """Return the reply to one request when it is time to send it."""
        with self._lock:
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        reply = self._reply(request.messages)
        reply = reply if isinstance(reply, Reply) else answer(reply)
        # A client that has left is no reason to wait to the end.
        self._closed.wait(self._seconds + reply.delay)
        with self._lock:
            self._now -= 1
        return reply


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Clients that leave in the middle are part of the tests."""


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            self._send(server.serve(Request(self.path, headers, content)))

        def _send(self, reply: Reply) -> None:
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                for name, value in {"content-type": reply.kind, **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                for part in _parts(body[: len(body) - reply.cut], reply.drip):
                    self.wfile.write(part)
            except ConnectionError:
                return
            self.close_connection = bool(reply.cut)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler


def _parts(body: bytes, drip: float) -> Iterator[bytes]:
    if not drip:
        yield body
        return
    for byte in body:
        time.sleep(drip)
        yield bytes([byte])
