"""One upstream: requests with its own key, a time limit over all attempts, and a circuit for each model."""

import asyncio
import random
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from everalign.llm_client import retry_after
from everalign.serving.errors import GatewayError, bad_upstream, overloaded, refused
from everalign.serving.headers import USUAL, HeaderRules
from everalign.serving.settings import Timeouts, UpstreamSettings
from everalign.serving.sse import EventParser, json_bytes
from everalign.serving.upstream_errors import answer_of, event_of, failure, follow, inflated, parsed, whole_object
from everalign.serving.upstream_transport import CircuitBreaker, Circuits, Connections, Permit

# 429 is the client's to repeat: it knows how long it can wait, and its own repetitions would multiply with these.
_REPEATED = (502, 503, 504)
_FIRST_WAIT = 0.25  # seconds, doubled from attempt to attempt
_QUOTED_BYTES = 64 << 10  # of the body of an error
_DONE = "[DONE]"
_CONTENT = (
    *("content-type", "content-encoding", "content-length", "content-disposition", "content-range", "content-language"),
    *("accept-ranges", "etag", "last-modified"),
)


@dataclass(frozen=True)
class Asked:
    """A request to an upstream.

    Args:
        method: of HTTP.
        path: behind the upstream's address.
        payload: its JSON; None for no body.
        headers: of the client, as they may be passed on; text of latin-1, as ASGI has it.
        model: whose circuit counts it.
        key_id: the client's.
        repeated: whether the client repeats requests by itself.
        quoted: whether the upstream's messages of errors may be passed on.
        begun: when its time began, in seconds that only grow; another upstream that is asked instead has what is left.
    """

    method: str
    path: str
    payload: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    key_id: str = ""
    repeated: bool = False
    quoted: bool = True
    begun: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Answered:
    """A whole answer: its JSON, and its headers as they may be passed on."""

    body: dict[str, Any]
    headers: dict[str, str]


@dataclass(frozen=True)
class Streamed:
    """A stream that has begun: the JSON of events, as many at once as came at once, and the headers."""

    events: AsyncIterator[list[dict[str, Any]]]
    headers: dict[str, str]


@dataclass(frozen=True)
class Passed:
    """A reply that is passed on: its status, its headers as the client gets them, its bytes, and how to end it."""

    status: int
    headers: dict[str, str]
    parts: AsyncIterator[bytes]
    aclose: Callable[[], Awaitable[None]]


class Upstream:
    """A server that answers. Used in one event loop.

    Args:
        settings: name, address and key; checked.
        timeouts: how long things may take.
        retries: how often a request is repeated, as long as no byte of its reply has come.
        longest_wait: seconds; where a longer pause is asked for, the request is not repeated.
        circuits: count the failures of each model.
        largest: bytes of an answer.
        headers: of its replies that clients get.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        timeouts: Timeouts,
        *,
        retries: int,
        longest_wait: float,
        circuits: Circuits,
        largest: int,
        headers: HeaderRules = USUAL,
    ) -> None:
        self._headers = headers
        self.name, self.circuits = settings.name, circuits
        self.reports_usage = True
        self._listing: asyncio.Task[list[dict[str, Any]]] | None = None
        self._url, self._key, self._timeouts = settings.url, settings.key, timeouts
        self._retries, self._longest_wait, self._largest = retries, longest_wait, largest
        key = {"authorization": f"Bearer {settings.key}"} if settings.key else {}
        self._own = {**key, "content-type": "application/json", "accept-encoding": "identity"}
        # No client around it: that would keep one user's cookies for the next, follow redirects, and look for proxies
        # and passwords in the environment.
        self._connections = Connections()

    async def close(self) -> None:
        """Close all connections."""
        if self._listing is not None:
            self._listing.cancel()
        await self._connections.aclose()

    async def send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        content: bytes | AsyncIterator[bytes],
        quoted: bool = True,
    ) -> Passed:
        """Return the reply to a request that is passed on as it is, whatever its status.

        It is sent once, and counts for no circuit: what comes of it says nothing of answers to chats.

        Args:
            method: of HTTP.
            path: behind the upstream's address, with its query.
            headers: that the upstream gets besides its key.
            content: the body, at once or in pieces.
            quoted: whether what the upstream says of itself may be passed on: its headers, and messages of errors.

        Raises:
            GatewayError: no reply came, or one that is about the gateway's own key or leads elsewhere.
        """
        limits = httpx.Timeout(self._timeouts.total, connect=self._timeouts.connect)
        own = [(name.encode(), value.encode()) for name, value in self._own.items() if name != "content-type"]
        request = httpx.Request(
            method,
            f"{self._url}/{path}",
            content=content,
            headers=[*((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()), *own],
            extensions={"timeout": limits.as_dict()},
        )
        try:
            response = await self._connections.handle_async_request(request)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise bad_upstream("the upstream did not begin to answer in time", "upstream_timeout", 504) from None
        except httpx.LocalProtocolError:
            message = "the request has a header that HTTP does not allow, or a body of another length than it says"
            raise refused(message, code="invalid_request") from None
        except httpx.HTTPError:
            raise bad_upstream("the upstream cannot be reached", "upstream_unreachable") from None
        response.headers.encoding = "latin-1"  # as ASGI wants them back
        status = response.status_code
        back = self._headers.returned(response.headers, self._key) if quoted else {}
        back |= {name: response.headers[name] for name in _CONTENT if name in response.headers}
        if status < 400 and (status < 300 or status == 304):
            return Passed(status, back, response.aiter_raw(), response.aclose)
        body = await self._beginning(response)
        if status < 400 or status in (401, 403, 407) or not quoted:
            raise failure(status, back, body, self._key, quoted)

        async def scrubbed_body() -> AsyncIterator[bytes]:
            yield body.replace(self._key.encode(), b"***") if self._key else body

        for name in ("content-length", "content-encoding"):
            back.pop(name, None)
        return Passed(status, back, scrubbed_body(), response.aclose)

    async def models(self) -> list[dict[str, Any]]:
        """Return its models as it lists them; raises GatewayError. Whoever asks meanwhile gets the same list."""
        if self._listing is None or self._listing.done():
            self._listing = asyncio.ensure_future(self._models())
            self._listing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._listing)

    async def _models(self) -> list[dict[str, Any]]:
        # What comes of it says nothing of answers: it counts for no circuit.
        permit = CircuitBreaker().enter()
        assert permit is not None  # a new one is closed
        with _deadline(self._timeouts.models):
            async with self._reply(Asked("GET", "models"), permit) as response:
                content = await whole_object(await self._whole(response))
        data = content.get("data")
        if not isinstance(data, list):
            raise bad_upstream("the upstream's list of models has no data", "upstream_malformed")
        return [model for model in data if isinstance(model, dict) and isinstance(model.get("id"), str)]

    async def chat(self, asked: Asked) -> Answered:
        """Return a whole answer; raises GatewayError where it did not come, is an error, or is no JSON object."""
        permit = self._admitted(asked)
        with _deadline(self._timeouts.total, permit, asked.begun):
            async with self._reply(asked, permit) as response:
                content = answer_of(await whole_object(await self._whole(response)), self._key, asked.quoted)
                return Answered(content, self._headers.returned(response.headers, self._key))

    @asynccontextmanager
    async def stream(self, asked: Asked) -> AsyncIterator[Streamed]:
        """Open a streamed answer; errors as in `chat`, and also where the stream breaks off."""
        permit = self._admitted(asked)
        silent = True

        async def heard(events: AsyncIterator[list[dict[str, Any]]]) -> AsyncIterator[list[dict[str, Any]]]:
            nonlocal silent
            async for found in events:
                silent = False
                yield found

        try:
            with _deadline(self._timeouts.total, begun=asked.begun):
                async with self._reply(asked, permit) as response:
                    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                    if kind == "application/json":
                        answer_of(await whole_object(await self._whole(response)), self._key, asked.quoted)
                    if kind != "text/event-stream":
                        raise bad_upstream(
                            "the upstream does not stream: its reply is no text/event-stream", again=False
                        )
                    events = heard(self._events(response, asked.quoted))
                    yield Streamed(events, self._headers.returned(response.headers, self._key))
        except GatewayError as error:
            # Behind the first event, a slow client can be why a stream takes too long.
            if error.code == "upstream_timeout" and silent:
                permit.failed()
            raise

    async def _events(self, response: httpx.Response, quoted: bool) -> AsyncIterator[list[dict[str, Any]]]:
        parser, ended = EventParser(), False
        finished: dict[Any, bool] = {}
        async for part in self._parts(response):
            found = []
            for data in parsed(parser, part):
                ended = ended or data == _DONE
                if not ended:
                    found.append(event_of(data, self._key, quoted))
                    follow(found[-1], finished)
            if found:
                yield found
            if ended:
                return
        # Some servers leave out the last event: an answer is whole if each of its choices has ended.
        if not finished or not all(finished.values()):
            raise bad_upstream("the upstream's answer breaks off in the middle", "upstream_cut")

    def _admitted(self, asked: Asked) -> Permit:
        """Return leave to send a request, all its attempts together; raises GatewayError."""
        breaker = self.circuits.of(asked.model)
        permit = breaker.enter(asked.key_id)
        if permit is None:
            message = f"the upstream {self.name!r} failed again and again and is left alone for a while"
            raise overloaded(message, "upstream_unavailable", max(1.0, breaker.wait), 503)
        return permit

    @asynccontextmanager
    async def _reply(self, asked: Asked, permit: Permit) -> AsyncIterator[httpx.Response]:
        """Open a successful reply; what goes wrong while it is read counts as the upstream's failure too."""
        try:
            response = await self._opened(asked, permit)
        except BaseException:
            permit.abandoned()
            raise
        try:
            permit.answered()
            yield response
        except httpx.TimeoutException:
            permit.failed()
            raise bad_upstream("the upstream's answer stopped coming", "upstream_timeout", 504) from None
        except httpx.HTTPError:
            permit.failed()
            raise bad_upstream("the upstream's answer breaks off in the middle", "upstream_cut") from None
        except GatewayError as error:
            # What is too large, or refused in the middle, is so because of what was asked.
            if error.code in ("upstream_cut", "upstream_malformed"):
                permit.failed()
            else:
                permit.succeeded()
            raise
        except BaseException:
            permit.abandoned()
            raise
        else:
            permit.succeeded()
        finally:
            await response.aclose()

    async def _opened(self, asked: Asked, permit: Permit) -> httpx.Response:
        """Return a reply whose status is success, after as many attempts as are allowed; raises GatewayError.

        Where the client repeats by itself, its repetitions would multiply with these: only a connection that failed is
        made once more.
        """
        content = None if asked.payload is None else json_bytes(asked.payload)
        # Bytes as they came: HTTP's headers are no text of any encoding, and ASGI gives them in this one.
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in asked.headers.items()]
        headers += [(name.encode(), value.encode()) for name, value in self._own.items()]
        most = min(self._retries, 1) if asked.repeated else self._retries
        attempt = 0
        while True:
            failed = await self._attempt(asked, content, headers)
            if isinstance(failed, httpx.Response):
                return failed
            again = attempt < most and failed.again and not (asked.repeated and failed.status)
            if not again or failed.wait > self._longest_wait:
                # Refusals are no failures: who refuses is there.
                if failed.status is None or failed.status >= 500:
                    permit.failed(everybody=failed.status is None and failed.again)
                else:
                    permit.succeeded()
                raise failed.error
            await anyio.sleep(max(failed.wait, _FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.0)))
            attempt += 1

    async def _attempt(
        self, asked: Asked, content: bytes | None, headers: list[tuple[bytes, bytes]]
    ) -> "httpx.Response | _Failed":
        """Return a successful reply, whose body is not read; or what came instead."""
        limits = httpx.Timeout(self._timeouts.total, connect=self._timeouts.connect)
        request = httpx.Request(
            asked.method,
            f"{self._url}/{asked.path}",
            content=content,
            headers=headers,
            extensions={"timeout": limits.as_dict()},
        )
        try:
            response = await self._connections.handle_async_request(request)
            response.headers.encoding = "latin-1"  # as ASGI wants them back
            if response.is_success:
                return response
            body = await self._beginning(response)
        except httpx.LocalProtocolError:
            message = "a header of the request has characters that HTTP does not allow; leave it out"
            raise refused(message, code="invalid_header") from None
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            return _Failed(bad_upstream("the upstream did not begin to answer in time", "upstream_timeout", 504), None)
        except httpx.HTTPError:
            # Nothing of an answer has come: also the way in which an idle connection turns out to be closed.
            return _Failed(bad_upstream("the upstream cannot be reached", "upstream_unreachable"), None, again=True)
        status = response.status_code
        error = failure(status, self._headers.returned(response.headers, self._key), body, self._key, asked.quoted)
        wanted = response.headers.get("x-should-retry", "").lower() != "false"
        return _Failed(error, status, retry_after(response.headers) or 0.0, wanted and status in _REPEATED)

    async def _beginning(self, response: httpx.Response) -> bytes:
        """Return the first bytes of an error's body, as far as they can be had at once."""
        content = bytearray()
        try:
            with anyio.move_on_after(self._timeouts.connect):
                async for part in self._parts(response):
                    content += part
                    if len(content) > _QUOTED_BYTES:
                        break
        except (httpx.HTTPError, GatewayError):
            pass  # the status says what there is to say
        finally:
            await response.aclose()
        return bytes(content[:_QUOTED_BYTES])

    async def _whole(self, response: httpx.Response) -> bytes:
        return b"".join([part async for part in self._parts(response)])

    async def _parts(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """Yield the body, decompressed, until it is too large: a small body can hold gigabytes."""
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "gzip", "deflate", ""):
            raise bad_upstream(f"the upstream's reply is compressed by {encoding[:20]!r}, which was not asked for")
        inflater = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding in ("gzip", "deflate") else None
        left = self._largest
        async for part in response.aiter_raw():
            plain = part if inflater is None else inflated(inflater, part, left + 1)
            left -= len(plain)
            if left < 0:
                message = f"the upstream's answer is larger than {self._largest} bytes"
                raise bad_upstream(message, "upstream_too_large", again=False)
            yield plain


@dataclass(frozen=True)
class _Failed:
    """An attempt that came to nothing.

    Args:
        error: what the client is told.
        status: that came; None where none did.
        wait: seconds that the upstream asks for.
        again: whether it may be repeated.
    """

    error: GatewayError
    status: int | None
    wait: float = 0.0
    again: bool = False


@contextmanager
def _deadline(seconds: float, permit: Permit | None = None, begun: float | None = None) -> Iterator[None]:
    """Bound what happens inside, all attempts together, however slowly it goes on."""
    spent = 0.0 if begun is None else time.monotonic() - begun
    try:
        with anyio.fail_after(max(0.0, seconds - spent)):
            yield
    except TimeoutError:
        if permit is not None:
            permit.failed()
        message = f"the upstream's answer was not whole after {seconds:g} seconds"
        raise bad_upstream(message, "upstream_timeout", 504) from None
