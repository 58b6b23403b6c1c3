"""Connections to an upstream, of which each is found at once however many there are.

httpx's own pool looks at all its connections for each of them with every request, which at a hundred takes longer than
all the rest. Here each transport has a single connection, and the ones that are free lie on a stack.
"""

import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from functools import cache
from types import TracebackType

import httpx

_KEEP_SECONDS = 4.0  # uvicorn, and so vLLM, closes idle connections after 5
_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_KEEP_SECONDS)


@cache
def _certificates() -> ssl.SSLContext:
    """Return those of all connections: reading them takes longer than a request. None from the environment."""
    return httpx.create_ssl_context(trust_env=False)


class Connections(httpx.AsyncBaseTransport):
    """A transport that sends every request through a free connection, or a new one. Used in one event loop."""

    def __init__(self) -> None:
        self._certificates = _certificates()
        self._free: deque[tuple[float, httpx.AsyncHTTPTransport]] = deque()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; its connection is free again when the response is closed."""
        if self._free:
            _, transport = self._free.pop()
        else:
            transport = httpx.AsyncHTTPTransport(verify=self._certificates, limits=_ONE, trust_env=False)
        try:
            response = await transport.handle_async_request(request)
        except BaseException:
            self.release(transport)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Released(response.stream, transport, self)
        await self._forget()
        return response

    def release(self, transport: httpx.AsyncHTTPTransport) -> None:
        """Take a connection back."""
        self._free.append((time.monotonic(), transport))

    async def _forget(self) -> None:
        """Close those that have lain there longest, and that their servers have closed by now."""
        while self._free and self._free[0][0] < time.monotonic() - _KEEP_SECONDS:
            await self._free.popleft()[1].aclose()

    async def aclose(self) -> None:
        """Close those that are free; the others close with their responses."""
        while self._free:
            await self._free.popleft()[1].aclose()

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        await self.aclose()


class _Released(httpx.AsyncByteStream):
    """A response's bytes, behind which its connection is free."""

    def __init__(
        self, stream: httpx.AsyncByteStream, transport: httpx.AsyncHTTPTransport, connections: Connections
    ) -> None:
        self._stream, self._transport, self._connections = stream, transport, connections
        self._held = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            if self._held:
                self._held = False
                self._connections.release(self._transport)
