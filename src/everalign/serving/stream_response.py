"""Events on their way to a client: kept alive in silence, ended with an error, given up when it is gone."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from everalign.serving.errors import GatewayError
from everalign.serving.headers import STREAM_HEADERS
from everalign.serving.sse import PING

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_MOST_WAITING = 256 << 10  # bytes that wait for a slow client before more are read from the upstream

INTERNAL = "the gateway failed; its log says more"


class Channel:
    """Frames from one task to another, as many at once as wait."""

    def __init__(self) -> None:
        self.headers: asyncio.Future[Mapping[str, str]] = asyncio.get_running_loop().create_future()
        self._frames: list[bytes] = []
        self._size, self._closed = 0, False
        self._ready, self._room = asyncio.Event(), asyncio.Event()

    def open(self, headers: Mapping[str, str]) -> None:
        """Give the headers of the reply; after `keepalive` of waiting they come too late, and are not sent."""
        if not self.headers.done():
            self.headers.set_result(headers)

    async def send(self, frame: bytes) -> None:
        """Hand on a frame; waits where the client does not read."""
        self._put(frame)
        while self._size > _MOST_WAITING:
            self._room.clear()
            await self._room.wait()

    def ping(self) -> None:
        """Hand on a comment, unless something else waits."""
        if not self._frames:
            self._put(PING)

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        self._ready.set()

    async def take(self) -> bytes:
        """Return what waits, at least one frame; nothing at the end."""
        while not self._frames and not self._closed:
            self._ready.clear()
            await self._ready.wait()
        found = b"".join(self._frames)
        self._frames.clear()
        self._size = 0
        self._room.set()
        return found

    def _put(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._size += len(frame)
        self._ready.set()


class EventResponse(Response):
    """Sends what comes through a channel.

    Args:
        channel: where frames come from.
        task: sends them there; cancelled when the client is gone.
        headers: of the reply.
        keepalive: seconds of silence before a comment is sent.
        released: called at the end, however it comes.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        channel: Channel,
        task: "asyncio.Task[None]",
        headers: Mapping[str, str],
        keepalive: float,
        released: Callable[[], None],
    ) -> None:
        super().__init__(headers={**headers, **STREAM_HEADERS})
        del self.headers["content-length"]  # of the empty body that a Response begins with
        self._channel, self._task, self._keepalive, self._released = channel, task, keepalive, released
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        task.add_done_callback(lambda _: channel.close())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream, as ASGI has it."""
        sender = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({sender, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._released()
            await ended(sender, gone, self._task)

    async def _send(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._last = loop.time()
        self._tick()
        if not self._channel.headers.done():
            self._channel.ping()  # there was silence already
        while content := await self._channel.take():
            self._last = loop.time()
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": _ending(self._task), "more_body": False})

    def _tick(self) -> None:
        """Break a silence, and look again when the next one would be too long."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self._last + self._keepalive:
            self._channel.ping()
            self._last = loop.time()
        self._timer = loop.call_at(self._last + self._keepalive, self._tick)


def _ending(task: "asyncio.Task[None]") -> bytes:
    """What a stream ends with: nothing, or the error that broke it off."""
    error = None if task.cancelled() else task.exception()
    if error is None:
        return b""
    if not isinstance(error, GatewayError):
        _log.error("a stream failed: %s", type(error).__name__, exc_info=error)
        error = GatewayError(500, INTERNAL, code="internal_error")
    return error.frame()


async def deliver(
    work: Callable[[Channel], Coroutine[Any, Any, None]],
    late: Mapping[str, str],
    keepalive: float,
    released: Callable[[], None],
) -> Response:
    """Return a stream's reply as soon as it has begun; raises what fails before, GatewayError among it.

    Args:
        work: gives the channel its headers and frames.
        late: headers where they are not known after `keepalive` seconds of silence.
        keepalive: seconds.
        released: called at the end, unless this raises.
    """
    channel = Channel()
    task = asyncio.create_task(work(channel))
    try:
        waited: set[asyncio.Future[Any]] = {task, channel.headers}
        await asyncio.wait(waited, timeout=keepalive, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not channel.headers.done():
            task.result()
    except BaseException:
        await ended(task)
        raise
    headers = channel.headers.result() if channel.headers.done() else late
    return EventResponse(channel, task, headers, keepalive, released)


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return what work comes to; when the client is gone before, cancel it and raise GatewayError."""
    return await unless(until_gone(receive), work)


async def unless(leaving: Coroutine[Any, Any, None], work: Coroutine[Any, Any, _Result]) -> _Result:
    """Runs `work`; raises as `cancel_on_disconnect` does where `leaving`, which waits for the client, ends first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leaving)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise GatewayError(499, "the client is gone", code="client_gone")
    finally:
        await ended(task, gone)


async def until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def ended(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
