"""Server-sent-event response with keep-alive pings, back-pressure, and cancellation when the client disconnects."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from everalign.serving.errors import INTERNAL, ClientGone, GatewayError
from everalign.serving.sse import PING, data_frame

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_MOST_WAITING = 256 << 10  # bytes that wait for a slow client before more are read from the upstream
# Proxies must neither cache nor buffer nor compress a stream.
_STREAM_HEADERS = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}


class FrameQueue:
    """Frames from the task that makes them to the response that sends them, with the headers of the reply."""

    def __init__(self) -> None:
        self.headers: asyncio.Future[Mapping[str, str]] = asyncio.get_running_loop().create_future()
        self._frames: list[bytes] = []
        self._size, self._closed = 0, False
        self._ready, self._room = asyncio.Event(), asyncio.Event()

    def open(self, headers: Mapping[str, str]) -> None:
        """Set the headers of the reply; ignored if it has begun."""
        if not self.headers.done():
            self.headers.set_result(headers)

    async def send(self, frame: bytes) -> None:
        """Add a frame; waits while the client does not read."""
        self._frames.append(frame)
        self._size += len(frame)
        self._ready.set()
        while self._size > _MOST_WAITING:
            self._room.clear()
            await self._room.wait()

    def ping(self) -> None:
        """Add a comment, unless something else waits."""
        if not self._frames:
            self._frames.append(PING)
            self._ready.set()

    def close(self) -> None:
        self._closed = True
        self._ready.set()

    async def take(self) -> bytes:
        """Return all frames that wait, at least one; empty at the end."""
        while not self._frames and not self._closed:
            self._ready.clear()
            await self._ready.wait()
        found = b"".join(self._frames)
        self._frames.clear()
        self._size = 0
        self._room.set()
        return found


async def stream_response(
    work: Callable[[FrameQueue], Coroutine[Any, Any, object]],
    late: Mapping[str, str],
    keepalive: float,
    release: Callable[[], None],
) -> Response:
    """Return a streaming response as soon as it has headers; raises what fails before, with its own status.

    Args:
        work: writes headers and frames to the queue.
        late: headers if `work` has set none after `keepalive` seconds.
        keepalive: seconds of silence before a comment is sent.
        release: called when the response has ended, unless this raises.
    """
    queue = FrameQueue()
    task = asyncio.create_task(work(queue))
    try:
        waited: set[asyncio.Future[Any]] = {task, queue.headers}
        await asyncio.wait(waited, timeout=keepalive, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not queue.headers.done():
            task.result()
    except BaseException:
        await cancel(task)
        raise
    headers = queue.headers.result() if queue.headers.done() else late
    return _EventResponse(queue, task, headers, keepalive, release)


class _EventResponse(Response):
    media_type = "text/event-stream"

    def __init__(
        self,
        queue: FrameQueue,
        task: "asyncio.Task[object]",
        headers: Mapping[str, str],
        keepalive: float,
        release: Callable[[], None],
    ) -> None:
        super().__init__(headers={**headers, **_STREAM_HEADERS})
        del self.headers["content-length"]  # of the empty body that a Response begins with
        self._queue, self._task, self._keepalive, self._release = queue, task, keepalive, release
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        task.add_done_callback(lambda _: queue.close())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGone):
                await cancel_on_disconnect(receive, self._send(send))
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._release()
            await cancel(self._task)

    async def _send(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._last = loop.time()
        self._break_silence()
        if not self._queue.headers.done():
            self._queue.ping()  # there was silence already
        while content := await self._queue.take():
            self._last = loop.time()
            await send({"type": "http.response.body", "body": content, "more_body": True})

        error = None if self._task.cancelled() else self._task.exception()
        if error is not None and not isinstance(error, GatewayError):
            _log.error("a stream failed: %s", type(error).__name__, exc_info=error)
            error = GatewayError(500, INTERNAL, code="internal_error")
        end = b"" if error is None else data_frame(error.body())
        # Before the end is sent: a client that asks again at once must find its place free.
        self._release()
        await send({"type": "http.response.body", "body": end, "more_body": False})

    def _break_silence(self) -> None:
        """Send a comment after `keepalive` seconds of silence, and look again when the next one would be due."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self._last + self._keepalive:
            self._queue.ping()
            self._last = loop.time()
        self._timer = loop.call_at(self._last + self._keepalive, self._break_silence)


async def cancel_on_disconnect(
    receive: Receive, work: Coroutine[Any, Any, _Result], after: asyncio.Event | None = None
) -> _Result:
    """Return the result of work; if the client disconnects before, cancel it and raise ClientGone.

    `after` is that of `until_gone`.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive, after))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await cancel(task, gone)


async def until_gone(receive: Callable[[], Awaitable[Any]], after: asyncio.Event | None = None) -> None:
    """Return when the client has disconnected.

    The connection's messages are read once `after` is set; until then somebody else reads the request's body from them.
    """
    if after is not None:
        await after.wait()
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
