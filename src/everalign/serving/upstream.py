"""One upstream: requests with its own key, time limits, bounded repetition, and a circuit breaker."""

import random
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx

from everalign.chat_reply import asked_wait
from everalign.serving.circuit import CircuitBreaker
from everalign.serving.connections import Connections
from everalign.serving.errors import GatewayError, bad_upstream, overloaded
from everalign.serving.headers import USUAL, HeaderRules
from everalign.serving.settings import Timeouts, UpstreamSettings
from everalign.serving.sse import EventParser, json_bytes
from everalign.serving.upstream_reading import event_of, follow, inflated, parsed, whole_object
from everalign.serving.upstream_replies import failure

_REPEATED = (429, 502, 503, 504)
_FIRST_WAIT = 0.25  # seconds, doubled from attempt to attempt
_QUOTED_BYTES = 64 << 10  # of the body of an error
_DONE = "[DONE]"


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


class Upstream:
    """A server that answers. Used in one event loop.

    Args:
        settings: name, address and key; checked.
        timeouts: how long things may take.
        retries: how often a request is repeated, as long as no byte of its reply has come.
        longest_wait: seconds; where a longer pause is asked for, the request is not repeated.
        breaker: counts failures.
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
        breaker: CircuitBreaker,
        largest: int,
        headers: HeaderRules = USUAL,
    ) -> None:
        self._headers = headers
        self.name, self.breaker = settings.name, breaker
        self.reports_usage = True
        self._url, self._key, self._timeouts = settings.url, settings.key, timeouts
        self._retries, self._longest_wait, self._largest = retries, longest_wait, largest
        key = {"authorization": f"Bearer {settings.key}"} if settings.key else {}
        self._own = {**key, "content-type": "application/json", "accept-encoding": "identity"}
        # No client around it: that would keep one user's cookies for the next, follow redirects, and look for proxies
        # and passwords in the environment.
        self._connections = Connections()

    async def close(self) -> None:
        """Close all connections."""
        await self._connections.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """Return its models as it lists them; raises GatewayError."""
        async with self._reply("GET", "models", None, {}, self._timeouts.first_byte, quoted=True) as response:
            content = await whole_object(await self._whole(response))
        data = content.get("data")
        if not isinstance(data, list):
            raise bad_upstream("the upstream's list of models has no data", "upstream_malformed")
        return [model for model in data if isinstance(model, dict) and isinstance(model.get("id"), str)]

    async def chat(self, payload: Mapping[str, Any], headers: Mapping[str, str], quoted: bool = True) -> Answered:
        """Return a whole answer.

        Args:
            payload: the request's JSON.
            headers: of the client, as they may be passed on.
            quoted: whether the upstream's messages of errors may be passed on.

        Raises:
            GatewayError: it did not come; or is no JSON object.
        """
        with _deadline(self._timeouts.total, self.breaker):
            # A server that does not stream sends its first byte when all is done.
            reply = self._reply("POST", "chat/completions", payload, headers, self._timeouts.total, quoted)
            async with reply as response:
                content = await whole_object(await self._whole(response))
                return Answered(content, self._headers.returned(response.headers, self._key))

    @asynccontextmanager
    async def stream(
        self, payload: Mapping[str, Any], headers: Mapping[str, str], quoted: bool = True
    ) -> AsyncIterator[Streamed]:
        """Open a streamed answer; arguments and errors as in `chat`, and also where the stream breaks off."""
        # A slow client can be why a stream takes too long, and must not speak against the upstream.
        with _deadline(self._timeouts.total):
            reply = self._reply("POST", "chat/completions", payload, headers, self._timeouts.first_byte, quoted)
            async with reply as response:
                kind = response.headers.get("content-type", "")
                if kind.partition(";")[0].strip().lower() != "text/event-stream":
                    raise bad_upstream("the upstream does not stream: its reply is no text/event-stream", again=False)
                # The dictionary is the one that the connection reads its limits from.
                response.extensions["limits"]["read"] = self._timeouts.idle
                yield Streamed(self._events(response, quoted), self._headers.returned(response.headers, self._key))

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

    @asynccontextmanager
    async def _reply(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None,
        headers: Mapping[str, str],
        first_byte: float,
        quoted: bool,
    ) -> AsyncIterator[httpx.Response]:
        """Open a successful reply; what goes wrong while it is read counts as the upstream's failure too."""
        content = None if payload is None else json_bytes(payload)
        response = await self._opened(method, path, content, {**headers, **self._own}, first_byte, quoted)
        try:
            yield response
        except httpx.TimeoutException:
            self.breaker.failed()
            raise bad_upstream("the upstream's answer stopped coming", "upstream_timeout", 504) from None
        except httpx.HTTPError:
            self.breaker.failed()
            raise bad_upstream("the upstream's answer breaks off in the middle", "upstream_cut") from None
        except GatewayError as error:
            # What is too large, or refused in the middle, is so because of what was asked.
            if error.code in ("upstream_cut", "upstream_malformed"):
                self.breaker.failed()
            else:
                self.breaker.succeeded()
            raise
        except BaseException:
            self.breaker.abandoned()
            raise
        else:
            self.breaker.succeeded()
        finally:
            await response.aclose()

    async def _opened(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str], first_byte: float, quoted: bool
    ) -> httpx.Response:
        """Return a reply whose status is success, after as many attempts as are allowed."""
        attempt = 0
        while True:
            self._admit()
            failed = await self._attempt(method, path, content, headers, first_byte, quoted)
            if isinstance(failed, httpx.Response):
                return failed
            if attempt == self._retries or failed.wait > self._longest_wait or not failed.again:
                raise failed.error
            await anyio.sleep(max(failed.wait, _FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.0)))
            attempt += 1

    def _admit(self) -> None:
        if not self.breaker.admits():
            message = f"the upstream {self.name!r} failed again and again and is left alone for a while"
            raise overloaded(message, "upstream_unavailable", max(1.0, self.breaker.wait), 503)

    async def _attempt(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str], first_byte: float, quoted: bool
    ) -> "httpx.Response | _Failed":
        """Return a successful reply, whose body is not read; or what came instead."""
        limits = httpx.Timeout(first_byte, connect=self._timeouts.connect, pool=self._timeouts.connect)
        request = httpx.Request(
            method, f"{self._url}/{path}", content=content, headers=headers, extensions={"timeout": limits.as_dict()}
        )
        try:
            response = await self._connections.handle_async_request(request)
            if response.is_success:
                return response
            body = await self._beginning(response)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            self.breaker.failed()
            raise bad_upstream("the upstream did not begin to answer in time", "upstream_timeout", 504) from None
        except httpx.HTTPError:
            # Nothing of an answer has come: also the way in which an idle connection turns out to be closed.
            self.breaker.failed()
            return _Failed(bad_upstream("the upstream cannot be reached", "upstream_unreachable"), 0.0, True)
        except BaseException:
            self.breaker.abandoned()
            raise
        self._count(response.status_code)
        error = failure(response.status_code, response.headers, body, self._key, quoted)
        wanted = response.headers.get("x-should-retry", "").lower() != "false"
        return _Failed(error, asked_wait(response.headers) or 0.0, wanted and response.status_code in _REPEATED)

    def _count(self, status: int) -> None:
        """Refusals are no failures: who refuses is there."""
        if status >= 500:
            self.breaker.failed()
        else:
            self.breaker.succeeded()

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
    """An attempt that came to nothing; `wait` are the seconds that the upstream asks for, `again` whether it may be."""

    error: GatewayError
    wait: float
    again: bool


@contextmanager
def _deadline(seconds: float, breaker: CircuitBreaker | None = None) -> Iterator[None]:
    """Bound what happens inside, however slowly it goes on."""
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError:
        if breaker is not None:
            breaker.failed()
        message = f"the upstream's answer was not whole after {seconds:g} seconds"
        raise bad_upstream(message, "upstream_timeout", 504) from None
