"""Upstream servers: chat requests with retries, deadlines, circuit breakers, token counting and a fallback.

Each request carries the upstream's own key, is bounded in time over all its attempts, and counts for the circuit
breaker of its model.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import httpx

from everalign.llm_reply import retry_after
from everalign.serving.errors import (
    GatewayError,
    UsageRefused,
    bad_upstream,
    check_answer,
    overloaded,
    refused,
    upstream_failure,
)
from everalign.serving.limits import Allowances, tokens_of
from everalign.serving.settings import USUAL, HeaderRules, Timeouts, UpstreamSettings
from everalign.serving.sse import BrokenEvents, EventParser, json_bytes
from everalign.serving.upstream_transport import (
    CircuitBreaker,
    Circuits,
    Permit,
    UpstreamTransport,
    json_object,
    read_to_end,
)

RESPONSE_ENDS = ("response.completed", "response.incomplete", "response.failed", "response.cancelled", "error")
"""The events that may be the last one of a streamed response."""

# 429 is the client's to repeat: it knows how long it can wait, and its own retries would multiply with these.
_RETRIED = (502, 503, 504)
_FIRST_WAIT = 0.25  # seconds, doubled from attempt to attempt
# The fallback is asked after these, and any status from 500 on; not after a timeout, which used up the answer's time.
_AWAY = ("upstream_unreachable", "upstream_unavailable", "upstream_cut", "upstream_malformed", "upstream_auth")
_CONTENT_HEADERS = (
    *("content-type", "content-encoding", "content-length", "content-disposition", "content-range", "content-language"),
    *("accept-ranges", "etag", "last-modified"),
)


@dataclass(frozen=True)
class UpstreamRequest:
    """A request to an upstream.

    Args:
        method: HTTP method.
        path: below the upstream's address.
        payload: JSON body, if any.
        headers: the client's headers that may pass; latin-1 text, as in ASGI.
        model: whose circuit breaker counts it.
        key_id: of the client's key.
        retried_by_client: whether the client itself repeats requests that failed.
        quoted: whether the upstream's error messages may be passed on.
        begun: monotonic seconds; a fallback has what is left of the time.
    """

    method: str
    path: str
    payload: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    key_id: str = ""
    retried_by_client: bool = False
    quoted: bool = True
    begun: float = field(default_factory=time.monotonic)


def asks_usage(payload: Mapping[str, Any] | None) -> bool:
    """Whether a request's JSON asks for the usage at the end of a stream."""
    options = (payload or {}).get("stream_options")
    return isinstance(options, Mapping) and bool(options.get("include_usage"))


@dataclass(frozen=True)
class UpstreamReply:
    """A whole answer: its JSON, and the headers that may be passed on."""

    body: dict[str, Any]
    headers: dict[str, str]


@dataclass(frozen=True)
class UpstreamStream:
    """A stream that has begun.

    Args:
        events: JSON of the events, in lists of those that came at once.
        headers: that may be passed on.
        usage_added: whether the usage was asked for although the client did not ask for it.
    """

    events: AsyncIterator[list[dict[str, Any]]]
    headers: dict[str, str]
    usage_added: bool = False


@dataclass(frozen=True)
class RawReply:
    """A reply that is passed on byte by byte: its status, headers for the client, body, and how to close it."""

    status: int
    headers: dict[str, str]
    parts: AsyncIterator[bytes]
    aclose: Callable[[], Awaitable[None]]


class Upstream:
    """A server that answers. Used in one event loop.

    Args:
        settings: name, address and key; checked.
        timeouts: in seconds.
        retries: how often a request is repeated, as long as no byte of its reply has come.
        longest_wait: seconds; if the server asks for a longer pause, the request is not repeated.
        circuits: circuit breakers by model.
        largest: most bytes of an answer.
        headers: which of its headers clients get.
        allowances: count the tokens of keys.
        fallback: asked if this server is away or fails before its answer begins.
        fallback_model: the fallback's name of the model; None for the same name.
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
        allowances: Allowances | None = None,
        fallback: "Upstream | None" = None,
        fallback_model: str | None = None,
    ) -> None:
        self.name, self.circuits = settings.name, circuits
        self._key, self._timeouts = settings.key, timeouts
        self._retries, self._longest_wait = retries, longest_wait
        self._headers, self._allowances = headers, allowances
        self._fallback, self._fallback_model = fallback, fallback_model
        self._reports_usage = True
        self._listing: asyncio.Task[list[dict[str, Any]]] | None = None
        self._transport = UpstreamTransport(settings.url, settings.key, timeouts.connect, timeouts.total, largest)

    async def close(self) -> None:
        if self._listing is not None:
            self._listing.cancel()
        await self._transport.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """Return the models that it lists; concurrent callers share one request. Raises GatewayError."""
        if self._listing is None or self._listing.done():
            self._listing = asyncio.ensure_future(self._list_models())
            self._listing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._listing)

    async def _list_models(self) -> list[dict[str, Any]]:
        permit = CircuitBreaker().enter()  # its own: the list of models says nothing about answers
        assert permit is not None
        with _deadline(self._timeouts.models):
            async with self._reply(UpstreamRequest("GET", "models"), permit) as response:
                data = (await self._transport.read_json(response)).get("data")
        if not isinstance(data, list):
            raise bad_upstream("the upstream's list of models has no data", "upstream_malformed")
        return [model for model in data if isinstance(model, dict) and isinstance(model.get("id"), str)]

    async def chat(self, request: UpstreamRequest) -> UpstreamReply:
        """Return a whole answer; raises GatewayError if none came, or it is an error or not a JSON object."""
        try:
            permit = self._admit(request)
            with _deadline(self._timeouts.total, permit, request.begun):
                async with self._reply(request, permit) as response:
                    content = check_answer(await self._transport.read_json(response), self._key, request.quoted)
                    reply = UpstreamReply(content, self._headers.returned(response.headers, self._key))
        except GatewayError as error:
            fallback, instead = self._instead(request, error)
            reply = await fallback.chat(instead)
            reply = replace(reply, headers={**reply.headers, "x-everalign-upstream": "fallback"})
        if self._allowances is not None and self._allowances.counts_tokens(request.key_id):
            size = len(json_bytes(request.payload)) + len(json_bytes(reply.body))
            self._allowances.spend(request.key_id, tokens_of(reply.body.get("usage"), size))
        return reply

    @asynccontextmanager
    async def stream(self, request: UpstreamRequest, with_usage: bool = False) -> AsyncIterator[UpstreamStream]:
        """Open a streamed answer; errors as in `chat`, and also if the stream breaks off.

        Args:
            request: what is asked.
            with_usage: whether the usage is asked for even if the client did not; some servers refuse that.
        """
        counts = self._allowances is not None and self._allowances.counts_tokens(request.key_id)
        with_usage = (with_usage or counts) and not asks_usage(request.payload) and request.path == "chat/completions"
        async with AsyncExitStack() as stack:
            streamed = None
            try:
                if with_usage and self._reports_usage:
                    options = (request.payload or {}).get("stream_options")
                    options = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
                    asking = replace(request, payload={**(request.payload or {}), "stream_options": options})
                    try:
                        streamed = await stack.enter_async_context(self._stream(asking))
                        streamed = replace(streamed, usage_added=True)
                    except UsageRefused:
                        self._reports_usage = False
                if streamed is None:
                    streamed = await stack.enter_async_context(self._stream(request))
            except GatewayError as error:
                fallback, instead = self._instead(request, error)
                streamed = await stack.enter_async_context(fallback.stream(instead, with_usage))
                streamed = replace(streamed, headers={**streamed.headers, "x-everalign-upstream": "fallback"})
            yield replace(streamed, events=self._count_tokens(request, streamed.events)) if counts else streamed

    def _instead(self, request: UpstreamRequest, error: GatewayError) -> "tuple[Upstream, UpstreamRequest]":
        """Return the fallback and what it is asked after an error; raises the error if it is not asked."""
        away = error.code != "upstream_timeout" and (error.code in _AWAY or error.status >= 500)
        if self._fallback is None or not away:
            raise error
        if self._fallback_model is not None and request.payload is not None:
            payload = {**request.payload, "model": self._fallback_model}
            request = replace(request, payload=payload, model=self._fallback_model)
        return self._fallback, request

    async def _count_tokens(
        self, request: UpstreamRequest, events: AsyncIterator[list[dict[str, Any]]]
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield events, and count their tokens when they end, however they end."""
        assert self._allowances is not None
        usage, size = None, len(json_bytes(request.payload))
        try:
            async for some in events:
                for event in some:
                    response = event.get("response")
                    usage = event.get("usage") or (isinstance(response, dict) and response.get("usage")) or usage
                    size += len(json_bytes(event.get("choices") or event.get("delta") or ""))
                yield some
        finally:
            self._allowances.spend(request.key_id, tokens_of(usage, size))

    def _admit(self, request: UpstreamRequest) -> Permit:
        """Return leave to send a request, for all its attempts; raises GatewayError."""
        breaker = self.circuits.of(request.model)
        permit = breaker.enter(request.key_id)
        if permit is None:
            message = f"the upstream {self.name!r} keeps failing and gets no requests for a while"
            raise overloaded(message, "upstream_unavailable", max(1.0, breaker.wait), 503)
        return permit

    @asynccontextmanager
    async def _stream(self, request: UpstreamRequest) -> AsyncIterator[UpstreamStream]:
        permit = self._admit(request)
        silent = True

        async def noticed(events: AsyncIterator[list[dict[str, Any]]]) -> AsyncIterator[list[dict[str, Any]]]:
            nonlocal silent
            async for some in events:
                silent = False
                yield some

        try:
            with _deadline(self._timeouts.total, begun=request.begun):
                async with self._reply(request, permit) as response:
                    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                    if kind == "application/json":
                        check_answer(await self._transport.read_json(response), self._key, request.quoted)
                    if kind != "text/event-stream":
                        raise bad_upstream(
                            "the upstream does not stream: its reply is not text/event-stream", again=False
                        )
                    events = noticed(self._events(response, request.quoted))
                    yield UpstreamStream(events, self._headers.returned(response.headers, self._key))
        except GatewayError as error:
            # After the first event, a slow client can be why a stream takes too long.
            if error.code == "upstream_timeout" and silent:
                permit.failed()
            raise

    async def _events(self, response: httpx.Response, quoted: bool) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield events until the stream says that it ended; raises GatewayError if it breaks off before."""
        parser = EventParser()
        finished: dict[Any, bool] = {}  # by index of the choice, or of the whole response
        parts = self._transport.parts(response)
        async for part in parts:
            try:
                texts = parser.feed(part)
            except BrokenEvents as error:
                raise bad_upstream(f"the upstream's stream cannot be read: {error}", "upstream_malformed") from None
            ended = "[DONE]" in texts
            events = [
                check_answer(json_object(text), self._key, quoted)
                for text in (texts[: texts.index("[DONE]")] if ended else texts)
            ]
            for event in events:
                if str(event.get("type")).startswith("response.") or event.get("type") == "error":
                    finished["response"] = finished.get("response", False) or event["type"] in RESPONSE_ENDS
                choices = event.get("choices")
                for choice in choices if isinstance(choices, list) else ():
                    if not isinstance(choice, dict) or not isinstance(choice.get("index", 0), int):
                        raise bad_upstream(
                            "the upstream's stream has a choice that is not an object", "upstream_malformed"
                        )
                    index = choice.get("index", 0)
                    finished[index] = finished.get(index, False) or choice.get("finish_reason") is not None
            if events:
                yield events
            if ended:
                await read_to_end(parts)
                return
        # Some servers leave out the last event: an answer is whole if each of its choices has ended.
        if not finished or not all(finished.values()):
            raise bad_upstream("the upstream's answer breaks off in the middle", "upstream_cut")

    @asynccontextmanager
    async def _reply(self, request: UpstreamRequest, permit: Permit) -> AsyncIterator[httpx.Response]:
        """Open a successful reply; what goes wrong while it is read counts as the upstream's failure too."""
        try:
            response = await self._open(request, permit)
        except BaseException:
            permit.abandoned()
            raise
        try:
            permit.answered()
            yield response
        except httpx.TimeoutException:
            permit.failed()
            raise bad_upstream("the upstream's answer stalled", "upstream_timeout", 504) from None
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

    async def _open(self, request: UpstreamRequest, permit: Permit) -> httpx.Response:
        """Return a successful reply, its body unread, after as many attempts as allowed; raises GatewayError.

        If the client repeats requests itself, its retries would multiply with these: only a connection that failed is
        tried again, once.
        """
        content = b"" if request.payload is None else json_bytes(request.payload)
        headers = {**request.headers, "content-type": "application/json"}
        most = min(self._retries, 1) if request.retried_by_client else self._retries
        for attempt in itertools.count():
            status, wait, again = None, 0.0, False
            try:
                response = await self._transport.send(request.method, request.path, headers, content)
                if response.is_success:
                    return response
                body = await self._transport.beginning(response)
            except httpx.LocalProtocolError:
                message = "a header of the request has characters that HTTP does not allow; leave it out"
                raise refused(message, code="invalid_header") from None
            except (httpx.ReadTimeout, httpx.WriteTimeout):
                error = bad_upstream("the upstream did not begin to answer in time", "upstream_timeout", 504)
            except httpx.HTTPError as failed:
                # No byte of an answer has come; an idle connection that the server has closed shows like this, too.
                error, again = _unreachable(failed), True
            else:
                status, wait = response.status_code, retry_after(response.headers) or 0.0
                passed = self._headers.returned(response.headers, self._key)
                error = upstream_failure(status, passed, body, self._key, request.quoted)
                again = status in _RETRIED and response.headers.get("x-should-retry", "").lower() != "false"
            waited_for = again and wait <= self._longest_wait and not (request.retried_by_client and status)
            if attempt >= most or not waited_for:
                # A server that refuses works.
                if status is None or status >= 500:
                    permit.failed(everybody=status is None and again)
                else:
                    permit.succeeded()
                raise error
            await anyio.sleep(max(wait, _FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.0)))
        raise AssertionError("the attempts are endless")

    async def send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        content: bytes | AsyncIterator[bytes],
        quoted: bool = True,
    ) -> RawReply:
        """Return the reply to a request that is passed through unchanged, whatever its status.

        It is sent once and counts for no circuit breaker: it says nothing about answers to chats. Unless `quoted`, the
        upstream's own headers and error messages are left out.

        Raises:
            GatewayError: no reply came, or one that is about the gateway's own key or redirects.
        """
        try:
            response = await self._transport.send(method, path, headers, content)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            raise bad_upstream("the upstream did not begin to answer in time", "upstream_timeout", 504) from None
        except httpx.LocalProtocolError:
            message = "the request has a header that HTTP does not allow, or a body of another length than it says"
            raise refused(message, code="invalid_request") from None
        except httpx.HTTPError as failed:
            raise _unreachable(failed) from None
        status = response.status_code
        back = self._headers.returned(response.headers, self._key) if quoted else {}
        back |= {name: response.headers[name] for name in _CONTENT_HEADERS if name in response.headers}
        if status < 400 and (status < 300 or status == 304):
            return RawReply(status, back, response.aiter_raw(), response.aclose)
        body = await self._transport.beginning(response)
        if status < 400 or status in (401, 403, 407) or not quoted:
            raise upstream_failure(status, back, body, self._key, quoted)
        for name in ("content-length", "content-encoding"):
            back.pop(name, None)
        masked = body.replace(self._key.encode(), b"***") if self._key else body
        return RawReply(status, back, aiter(httpx.ByteStream(masked)), response.aclose)


@contextmanager
def _deadline(seconds: float, permit: Permit | None = None, begun: float | None = None) -> Iterator[None]:
    """Bound a request in time, over all its attempts and however slowly its answer comes."""
    spent = 0.0 if begun is None else time.monotonic() - begun
    try:
        with anyio.fail_after(max(0.0, seconds - spent)):
            yield
    except TimeoutError:
        if permit is not None:
            permit.failed()
        message = f"the upstream's answer was not whole after {seconds:g} seconds"
        raise bad_upstream(message, "upstream_timeout", 504) from None


def _unreachable(error: httpx.HTTPError) -> GatewayError:
    hung_up = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError)
    message = "the upstream closed the connection before it answered" if hung_up else "the upstream cannot be reached"
    return bad_upstream(message, "upstream_unreachable")
