"""A scripted OpenAI-compatible server, faults included, and a gateway in front of it; both real ones, in threads.

with UpstreamServer(lambda body: Script("4")) as upstream, serving(upstream, corrector=Fake()) as gateway:
    openai.OpenAI(base_url=gateway.url, api_key="none").chat.completions.create(...)
    upstream.requests[0].body
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from everalign.correction.corrector import Corrected
from everalign.correction.engines import Begun
from everalign.correction.templates import get_template
from everalign.serving.app import create_app
from everalign.serving.corrector_service import CorrectionService
from everalign.serving.gateway import make_corrections
from everalign.serving.settings import GatewaySettings, Limits, Timeouts, UpstreamSettings


class _ShortSleeps:
    """`asyncio` to uvicorn, which looks ten times a second whether it is to stop: five times as often here."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.02))


uvicorn.server.asyncio = _ShortSleeps()
SECRET = "persimmon"
HTTP = httpx.Client(trust_env=False, timeout=10)  # to make one takes longer than a request
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


@dataclass
class Script:
    """What the upstream answers.

    Args:
        text: the answer; a list for several choices, None for none.
        status: of HTTP.
        headers: besides the usual ones.
        message: further fields of the message, or of a delta.
        finish: why it ends.
        usage: as it is told.
        delay: seconds before anything is sent.
        drip: seconds between two chunks of a stream.
        held: what a stream waits for before its fourth chunk.
        cut: chunks after which the connection is closed.
        raw: sent in the place of an answer.
        kind: content type of it.
        piece: characters of a chunk.
        done: whether the stream ends with [DONE].
        lingers: seconds between that and the end of the reply's body.
    """

    text: Any = "ok"
    status: int = 200
    headers: dict[str, Any] = field(default_factory=dict)
    message: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, Any] = field(default_factory=dict)
    finish: str = "stop"
    usage: Any = field(default_factory=lambda: dict(USAGE))
    delay: float = 0.0
    drip: float = 0.0
    held: threading.Event | None = None
    cut: int | None = None
    raw: bytes | None = None
    kind: str | None = None
    piece: int = 3
    done: bool = True
    lingers: float = 0.0

    @property
    def texts(self) -> list[Any]:
        return self.text if isinstance(self.text, list) else [self.text]

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, **self.message},
                "finish_reason": self.finish,
                **self.choice,
            }
            for i, text in enumerate(self.texts)
        ]
        return {"id": "up-1", "object": "chat.completion", "created": 11, "model": body.get("model"),
                "choices": choices, "usage": self.usage, "unknown": {"kept": True}}  # fmt: skip

    def chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        head = {"id": "up-1", "object": "chat.completion.chunk", "created": 11, "model": body.get("model")}
        for i, text in enumerate(self.texts):
            deltas = [{"role": "assistant", "content": "" if text is not None else None, **self.message}]
            deltas += [{"content": text[k : k + self.piece]} for k in range(0, len(text or ""), self.piece)]
            for delta in deltas:
                yield {**head, "choices": [{"index": i, "delta": delta, "finish_reason": None, **self.choice}]}
            yield {**head, "choices": [{"index": i, "delta": {}, "finish_reason": self.finish}]}
        if (body.get("stream_options") or {}).get("include_usage") and self.usage is not None:
            yield {**head, "choices": [], "usage": self.usage}


@dataclass(frozen=True)
class Seen:
    """What the upstream got."""

    headers: dict[str, str]
    body: dict[str, Any]
    port: int  # of the connection's other end


class ServedUpstream:
    """What every upstream of a test is: an ASGI `app` that runs while the `with` block does."""

    def __init__(self) -> None:
        self.running = Running(self.app)

    def __enter__(self):
        self.running.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running.stop()

    @property
    def settings(self) -> UpstreamSettings:
        return UpstreamSettings("default", self.running.url, "upstream-key")


class UpstreamServer:
    """Answers chat completions by a function from a request's JSON to a `Script`."""

    def __init__(self, answer: Callable[[dict[str, Any]], Script] = lambda _: Script()) -> None:
        self.answer, self.requests, self.abandoned = answer, list[Seen](), 0
        self._server = Running(self._app)

    def __enter__(self) -> "UpstreamServer":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    @property
    def url(self) -> str:
        return self._server.url

    async def _app(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        content = b""
        while (message := await receive())["type"] == "http.request":
            content += message["body"]
            if not message["more_body"]:
                break
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] == "/v1/models":
            models = {"object": "list", "data": [{"id": "small", "object": "model", "created": 1, "owned_by": "me"}]}
            await _reply(send, 200, "application/json", json.dumps(models).encode(), {})
            return
        body = json.loads(content)
        self.requests.append(Seen(headers, body, scope["client"][1]))
        writing = asyncio.ensure_future(self._write(self.answer(body), body, send))
        gone = asyncio.ensure_future(_gone(receive))
        await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            self.abandoned += 1
            writing.cancel()
        gone.cancel()
        if writing.done() and not writing.cancelled():
            writing.result()

    async def _write(self, script: Script, body: dict[str, Any], send) -> None:
        await asyncio.sleep(script.delay)
        if script.raw is not None:
            kind = script.kind or ("text/event-stream" if body.get("stream") else "application/json")
            await _reply(send, script.status, kind, script.raw, script.headers)
        elif not body.get("stream"):
            content = json.dumps(script.whole(body)).encode()
            await _reply(send, script.status, "application/json", content, script.headers, script.cut is not None)
        else:
            await self._stream(script, body, send)

    async def _stream(self, script: Script, body: dict[str, Any], send) -> None:
        await send(_start(script.status, "text/event-stream", script.headers))
        for i, chunk in enumerate(script.chunks(body)):
            if i == script.cut:
                raise ConnectionError("cut by the test")
            await asyncio.sleep(script.drip)
            while i == 3 and script.held is not None and not script.held.is_set():
                await asyncio.sleep(0.01)
            await send({"type": "http.response.body", "body": b"data: %s\n\n" % json.dumps(chunk).encode(),
                        "more_body": True})  # fmt: skip
        end = b"data: [DONE]\n\n" if script.done else b""
        await send({"type": "http.response.body", "body": end, "more_body": script.lingers > 0})
        if script.lingers:
            await asyncio.sleep(script.lingers)
            await send({"type": "http.response.body"})


async def _gone(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _start(status: int, kind: str, headers: dict[str, str], length: int | None = None) -> dict[str, Any]:
    found = {"content-type": kind, **headers, **({} if length is None else {"content-length": str(length)})}
    return {"type": "http.response.start", "status": status,
            "headers": [(name.encode(), _bytes(value)) for name, value in found.items()]}  # fmt: skip


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


async def _reply(send, status: int, kind: str, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
    await send(_start(status, kind, headers, len(content)))
    half = content[: len(content) // 2] if cut else content
    await send({"type": "http.response.body", "body": half, "more_body": cut})
    if cut:
        raise ConnectionError("cut by the test")


class Running:
    """A uvicorn in a thread, on a free port."""

    def __init__(self, app: Any, lifespan: str = "off") -> None:
        # By its protocol, asyncio knows that small packets must not wait for one another.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(512)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        config = uvicorn.Config(
            app,
            log_level="critical",
            interface="asgi3",
            lifespan=lifespan,
            timeout_graceful_shutdown=1,
            proxy_headers=False,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()


class Fake:
    """A corrector that does what a function says, at once: text for a correction, an error to be raised."""

    def __init__(
        self, rewrite: Callable[[str], Any] | None = None, name: str = "fake", reason: str | None = None
    ) -> None:
        self.rewrite = rewrite or (lambda answer: f"{answer} ({name})")
        self.template, self.fingerprint, self.reason = get_template("everalign-1"), name, reason
        self.batches: list[int] = []
        self.questions: list[Any] = []

    def correct_batch(self, pairs: Any, begun: Any = None) -> list[Corrected]:
        self.batches.append(len(pairs))
        if begun is None:
            return [self._one(*pair) for pair in pairs]
        return [self._continued(*pair, one) for pair, one in zip(pairs, begun, strict=True)]

    def check_continues(self) -> None:
        """It always does."""

    def _continued(self, question: Any, answer: str, begun: Begun) -> Corrected:
        """What was begun, and the rest of the answer rewritten by itself."""
        rest = self._one(question, answer[begun.covers :])
        text = begun.text + rest.text
        return replace(rest, text=text, changed=text != answer)

    def stream_events(self, question: Any, answer: str) -> Iterator[Any]:
        found = self._one(question, answer)
        for start in range(0, len(found.text), 4):
            yield found.text[start : start + 4]
        yield found

    def _one(self, question: Any, answer: str) -> Corrected:
        self.questions.append(question)
        text = self.rewrite(answer)
        if isinstance(text, Exception):
            raise text
        if self.reason is not None:
            return Corrected(answer, False, self.reason)
        return Corrected(text, text != answer, None, 2, 3, 1, 4)


@dataclass(frozen=True)
class IdleReloader:
    """A run that promotes nothing."""

    path: Path

    async def run(self, service: CorrectionService) -> None:
        await asyncio.Event().wait()


@dataclass(frozen=True)
class Serving:
    """A running gateway."""

    url: str
    app: Any

    @property
    def gateway(self) -> Any:
        return self.app.state.gateway


QUICK = Timeouts(connect=0.5, total=0.8, models=0.5, correction=1.0)


@contextmanager
def serving(
    *upstreams: UpstreamServer | UpstreamSettings,
    corrector: Any = None,
    store: Any = None,
    corrections: CorrectionService | None = None,
    timeouts: Timeouts = Timeouts(),  # noqa: B008 (frozen)
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    reloader: Any = None,
    **settings: Any,
) -> Iterator[Serving]:
    """A gateway before some upstreams, on a free port of this machine."""
    named = tuple(
        one if isinstance(one, UpstreamSettings) else UpstreamSettings("default", one.url, "upstream-key")
        for one in upstreams
    )
    made = GatewaySettings(upstreams=named, timeouts=timeouts, limits=limits, **settings)
    if corrections is None and corrector is not None:
        corrections = make_corrections(made, corrector, "v1")
    app = create_app(made, store=store, corrections=corrections, reloader=reloader)
    running = Running(app, "on")
    running.start()
    try:
        yield Serving(running.url, app)
    finally:
        running.stop()
