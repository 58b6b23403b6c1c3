"""Client for OpenAI-compatible servers: one request or thousands, with retries, limits and typed replies."""

import json
import math
import os
import random
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import anyio
import httpx
from anyio.from_thread import start_blocking_portal

from everalign.deadlines import Deadline, DeadlineOver, current
from everalign.errors import EveralignError, InputError

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable that holds the key of the server that is asked alone."""


def checked_url(text: str) -> str:
    """The address below which `chat/completions` is."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise InputError(f"the server's address cannot be read: {error}") from None
    if url.userinfo or url.query or url.fragment:
        # Not repeated: this is where people put passwords.
        raise InputError(
            f"{url.scheme}://{url.host}: the server's address must be without user, '?' and '#'; "
            f"a key belongs in the environment variable {KEY_VARIABLE}"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"{text}: the address must begin with http:// or https://, such as http://127.0.0.1:8000/v1")
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    # Some servers have another version, or more, at the end of the path.
    versioned = re.search(r"/v\d", path)
    return str(url.copy_with(path=path if versioned else f"{path}/v1"))


def checked_model(model: str) -> str:
    """A model's name that is not empty."""
    if not model.strip():
        raise InputError("model: is empty; name a model as the server knows it")
    return model


def checked_key(key: str, variable: str = KEY_VARIABLE) -> str:
    """A key, from an environment variable, as a header can hold it; a header's own error would print it."""
    key = key.strip()
    if re.search(r"[^\x21-\x7e]", key):
        raise InputError(f"the API key ({variable}) has characters other than letters, digits and signs of ASCII")
    return key


def check_limits(timeout: float, retries: int, concurrency: int, requests_per_minute: float) -> None:
    """Refuse limits that no client can keep."""
    if not (math.isfinite(timeout) and timeout > 0):
        raise InputError(f"timeout: must be above 0 seconds, found {timeout}")
    if retries < 0:
        raise InputError(f"retries: must be at least 0, found {retries}")
    if concurrency < 1:
        raise InputError(f"concurrency: must be at least 1, found {concurrency}")
    if not (math.isfinite(requests_per_minute) and requests_per_minute >= 0):
        raise InputError(f"requests per minute: must be at least 0, found {requests_per_minute}")


LONGEST_WAIT = 120.0
"""Seconds: a server that asks for a longer pause is asked again after this."""

_SHOWN = 300
_RETRIED = (408, 409, 429)


@dataclass(frozen=True)
class Completion:
    """What a model answered.

    Args:
        text: the answer; may be empty.
        prompt_tokens: tokens of the conversation sent, None where the server does not tell.
        completion_tokens: tokens of the answer, None where the server does not tell.
        finish_reason: why the answer ended: `stop`, or `length` for one that was cut; None where the server does
            not tell.
    """

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None


class Refused(EveralignError):  # noqa: N818 (what is wrong is in the name)
    """A request that its server refused, with a status from 400 to 499: it is there, and it is not its fault."""


class TryAgain(Exception):  # noqa: N818 (no error as long as attempts are left)
    """An attempt failed in a way that may pass.

    Args:
        message: how.
        wait: the pause in seconds that the server asked for, if any.
        refused: whether the server refused, as in `Refused`.
    """

    def __init__(self, message: str, wait: float | None = None, refused: bool = False) -> None:
        super().__init__(message)
        self.wait, self.refused = wait, refused


def read_completion(body: bytes, content_type: str, chat: bool = True) -> Completion:
    """Return the first choice of a successful reply.

    Args:
        body: the reply.
        content_type: its `content-type` header, for messages.
        chat: whether a conversation was sent; else a text, and the choice has its continuation without a message.

    Raises:
        EveralignError: the reply is no JSON, or holds no text; says what it holds instead.
    """
    content = _json(body)
    if not isinstance(content, Mapping):
        given = content_type or "no content type"
        raise EveralignError(f"the reply is no JSON object ({given}): {_said(body)}; is this the address of an API?")
    choices = content.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise EveralignError(f"the reply has no choices: {_said(body)}")
    usage = content.get("usage")
    counts = usage if isinstance(usage, Mapping) else {}
    reason = choices[0].get("finish_reason")
    return Completion(
        _text(choices[0]) if chat else _continuation(choices[0]),
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
        reason if isinstance(reason, str) else None,
    )


def failure(status: int, headers: Mapping[str, str], body: bytes) -> TryAgain | EveralignError:
    """What a reply with a status other than success comes to: `TryAgain` where the request may succeed later."""
    if 300 <= status < 400:
        target = shortened(headers.get("location", "nowhere"))
        return EveralignError(f"status {status} leads to {target}, which is not followed; give the final address")
    message = f"status {status}: {_said(body)}"
    if _may_retry(status, headers):
        return TryAgain(message, asked_wait(headers), refused=status < 500)
    return Refused(message) if status < 500 else EveralignError(message)


def asked_wait(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that a server asks to wait for, at most `LONGEST_WAIT`; None where it asks for nothing.

    Args:
        headers: of the reply: `retry-after-ms` (milliseconds), or `retry-after` (seconds, or a date).
        now: the time, for dates.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        seconds = _number(headers.get(name)) * unit
        if seconds >= 0:
            return min(seconds, LONGEST_WAIT)
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
        seconds = (date - (now or datetime.now(timezone.utc))).total_seconds()
    except (ValueError, TypeError):
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)


def shortened(text: str, most: int = _SHOWN) -> str:
    """Return text for one line of a message: at most so many characters, none that would move a terminal's cursor."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line if len(line) <= most else f"{line[:most]}…"


def _may_retry(status: int, headers: Mapping[str, str]) -> bool:
    """Whether a failed request may succeed later: the server's own word, or what its status says."""
    asked = headers.get("x-should-retry", "").lower()
    if asked in ("true", "false"):
        return asked == "true"
    return status in _RETRIED or status >= 500


def _said(body: bytes) -> str:
    """What a reply says in words, shortened: its error message, or the text as it is."""
    content = _json(body)
    for name in ("error", "detail", "message"):
        if isinstance(content, Mapping) and content.get(name):
            content = content[name]
    text = content if isinstance(content, str) else body.decode(errors="replace")
    return shortened(text) or "(nothing)"


def _json(body: bytes) -> Any:
    """The value that JSON text holds, None where it is none; deep nesting is damage too."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _continuation(choice: Mapping[str, Any]) -> str:
    text = choice.get("text")
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        raise EveralignError(f"the reply's first choice must have a text, found {found}")
    return text


def _text(choice: Mapping[str, Any]) -> str:
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise EveralignError("the reply's first choice has no message")
    text = message.get("content")
    if isinstance(text, str):
        return text
    ended = f"finish_reason {shortened(str(choice.get('finish_reason')), 40)}"
    if message.get("tool_calls") or message.get("function_call"):
        raise EveralignError(f"the model calls a tool instead of answering with text ({ended}); ask without tools")
    if message.get("refusal"):
        raise EveralignError(f"the model refused to answer: {shortened(str(message['refusal']))}")
    found = "null" if text is None else type(text).__name__
    raise EveralignError(f"the answer must be text, found {found} ({ended})")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _number(text: str | None) -> float:
    """A header's number, NaN where it has none."""
    try:
        return float(text) if text is not None else math.nan
    except ValueError:
        return math.nan


__all__ = ["ChatClient", "ChatError", "Completion", "Usage"]

Conversation = Sequence[Mapping[str, str]]

TIMEOUT = 60.0
CONCURRENCY = 8

_FIRST_WAIT = 1.0  # seconds, doubled from attempt to attempt
_LONGEST_BACKOFF = 60.0
_LARGEST_REPLY = 16 << 20  # bytes
_LARGEST_STREAM = 64 << 20  # each token has its own JSON around it
_CHAT = "chat/completions"
_RESERVED = ("model", "messages", "prompt", "stream", "n")


class ChatError(EveralignError):
    """A request that failed for good.

    Args:
        message: what failed.
        index: which conversation of `complete_many` it was.
        refused: whether the server refused it, with a status from 400 to 499; else the server failed.
    """

    def __init__(self, message: str, index: int = 0, refused: bool = False) -> None:
        super().__init__(message)
        self.index, self.refused = index, refused


_Found = tuple[int, Completion | ChatError]


@dataclass
class Usage:
    """What a client has used so far.

    Args:
        requests: requests sent, repeated ones included.
        prompt_tokens: tokens sent, as far as the server told.
        completion_tokens: tokens answered, as far as the server told.
        untold: answers whose tokens the server did not tell.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    untold: int = 0


class ChatClient:
    """Asks one model of one server. May be used by several threads.

    Args:
        base_url: http or https, with or without `/v1` at its end.
        model: the model's name as the server knows it.
        api_key: what the server asks for, if anything; OPENAI_API_KEY when None.
        timeout: seconds for one attempt, from connecting to the last byte.
        retries: how often a request is repeated after connection errors, timeouts and the statuses 408, 409, 429 and
            from 500 on; after a growing pause, or the one that the server asks for.
        concurrency: requests that `complete_many` has under way at once.
        requests_per_minute: at most so many are begun, evenly spaced, repeated ones included; 0 for no limit.

    Raises:
        InputError: an argument cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        retries: int = 4,
        concurrency: int = CONCURRENCY,
        requests_per_minute: float = 0,
    ) -> None:
        self.base_url = checked_url(base_url)
        self.model = checked_model(model)
        self.usage = Usage()
        self._key = checked_key(os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key)
        check_limits(timeout, retries, concurrency, requests_per_minute)
        self._timeout, self._retries, self._concurrency = timeout, retries, concurrency
        self._spacing = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next_start = 0.0
        self._lock = threading.Lock()
        self._trusted: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return f"ChatClient({self.base_url!r}, {self.model!r})"

    def complete(self, messages: Conversation, **parameters: Any) -> Completion:
        """Return the model's answer to one conversation; arguments and errors as in `complete_many`."""
        ((_, completion),) = self.complete_many([messages], **parameters)
        return completion

    def complete_many(
        self, conversations: Sequence[Conversation], **parameters: Any
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the model's answers with the conversations' indices from 0, in the order in which they are finished.

        Requests begin with the first answer asked for, and end with the iterator. After a request that failed for
        good none is begun; those under way are finished and yielded before the error is raised.

        Args:
            conversations: each a list of messages with `role` and `content`.
            parameters: further fields of the requests, such as `temperature`.

        Raises:
            InputError: a request cannot be written, or a parameter is one that the client sets.
            ChatError: a request failed for good: no attempt is left, the server refused it, or the reply holds no text.
        """
        bodies = self._conversations(conversations, parameters)
        return _until_failure(self._answers(_CHAT, bodies, go_on=False))

    def attempt_many(
        self, conversations: Sequence[Conversation], **parameters: Any
    ) -> Iterator[tuple[int, Completion | ChatError]]:
        """Yield the model's answers as `complete_many` does, and go on behind a request that failed for good.

        Such a one yields its error in the place of an answer.
        """
        return self._answers(_CHAT, self._conversations(conversations, parameters), go_on=True)

    def continue_many(self, prompts: Sequence[str], **parameters: Any) -> Iterator[tuple[int, Completion]]:
        """Yield what the model writes behind texts, by the older `completions` of the same servers.

        Args:
            prompts: texts, taken as they are: no chat template is around them.
            parameters: further fields of the requests; order and errors as in `complete_many`.
        """
        contents = [{"prompt": prompt} for prompt in prompts]
        return _until_failure(self._answers("completions", self._bodies("prompt", contents, parameters), go_on=False))

    def continue_in_pieces(self, prompt: str, **parameters: Any) -> Iterator[str | Completion]:
        """Yield what the model writes behind a text while it comes, and at last all of it.

        A server that does not stream gives it at once. Errors as in `complete_many`; a stream that has begun is not
        asked for again.
        """
        (body,) = self._bodies("prompt", [{"prompt": prompt}], parameters)
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        streamed = json.dumps({**json.loads(body), **usage}, ensure_ascii=False).encode()
        for item in self._answers("completions", [streamed], go_on=False):
            if isinstance(item, str):
                yield item
            elif isinstance(item[1], ChatError):
                raise item[1]
            else:
                yield item[1]

    def _answers(self, path: str, bodies: Sequence[bytes], *, go_on: bool) -> Iterator[Any]:
        """Yield what becomes of each request; unless it is to `go_on`, none is begun after a failure.

        Of one that is streamed also the pieces, as text.
        """
        finished: SimpleQueue[_Found | str | None] = SimpleQueue()
        deadline = current()
        retries = self._retries if deadline is None else min(self._retries, deadline.retries)
        # Leaving this block early, as Ctrl-C or a caller's break does, cancels what is under way.
        with start_blocking_portal() as portal:
            running = portal.start_task_soon(self._run, path, deque(enumerate(bodies)), finished, go_on, retries)
            running.add_done_callback(lambda _: finished.put(None))
            with nullcontext() if deadline is None else deadline.calling(running.cancel):
                while (item := _next_of(finished, deadline)) is not None:
                    yield item
            if deadline is not None:
                deadline.check()
            running.result()

    async def _run(
        self, path: str, waiting: deque[tuple[int, bytes]], finished: SimpleQueue[Any], go_on: bool, retries: int
    ) -> None:
        async def work() -> None:
            while waiting:
                index, body = waiting.popleft()
                try:
                    finished.put((index, await self._ask(session, path, body, retries, finished)))
                except EveralignError as error:
                    if not go_on:
                        waiting.clear()
                    said = self._clean(f"{self.base_url} ({self.model}): {error}")
                    finished.put((index, ChatError(said, index, isinstance(error, Refused))))

        key = {"authorization": f"Bearer {self._key}"} if self._key else {}
        headers = {"content-type": "application/json", **key}
        limits = httpx.Limits(max_connections=self._concurrency)
        async with (
            httpx.AsyncClient(
                headers=headers, timeout=None, limits=limits, follow_redirects=False, verify=self._certificates()
            ) as session,
            anyio.create_task_group() as group,
        ):
            for _ in range(min(self._concurrency, len(waiting))):
                group.start_soon(work)

    async def _ask(
        self, session: httpx.AsyncClient, path: str, body: bytes, retries: int, pieces: SimpleQueue[Any]
    ) -> Completion:
        attempt = 0
        while True:
            await self._turn()
            try:
                with anyio.fail_after(self._timeout):
                    return await self._attempt(session, path, body, pieces)
            except TimeoutError:
                again = TryAgain(f"no answer within {self._timeout:g} seconds")
            except httpx.RequestError as error:
                again = TryAgain(f"cannot be reached ({shortened(str(error)) or type(error).__name__})")
            except TryAgain as error:
                again = error
            if attempt == retries:
                family = Refused if again.refused else EveralignError
                raise family(f"{again}; {attempt + 1} attempts made")
            await anyio.sleep(_backoff(attempt) if again.wait is None else again.wait)
            attempt += 1

    async def _attempt(
        self, session: httpx.AsyncClient, path: str, body: bytes, pieces: SimpleQueue[Any]
    ) -> Completion:
        with self._lock:
            self.usage.requests += 1
        async with session.stream("POST", f"{self.base_url}/{path}", content=body) as response:
            streams = response.headers.get("content-type", "").startswith("text/event-stream")
            if response.is_success and streams:
                return await self._read_stream(response, pieces)
            content = await _read(response)
        if not response.is_success:
            raise failure(response.status_code, response.headers, self._masked(content))
        kind = response.headers.get("content-type", "")
        try:
            completion = read_completion(content, kind, path == _CHAT)
        except EveralignError:
            completion = read_completion(self._masked(content), kind, path == _CHAT)
        self._count(completion)
        return completion

    async def _read_stream(self, response: httpx.Response, pieces: SimpleQueue[Any]) -> Completion:
        """Hand on the pieces of a text, and return all of it; raises EveralignError where it breaks off."""
        text, reason = list[str](), None
        usage: dict[str, Any] = {}
        try:
            async for event in _events(response):
                error = event.get("error")
                if error:
                    raise EveralignError(f"the stream holds an error: {shortened(self._clean(str(error)))}")
                known = event.get("usage")
                usage = known if isinstance(known, dict) else usage
                choices = event.get("choices")
                for choice in choices if isinstance(choices, list) else ():
                    if not isinstance(choice, dict):
                        raise EveralignError("the stream has a choice that is none")
                    if isinstance(choice.get("text"), str) and choice["text"]:
                        text.append(choice["text"])
                        pieces.put(choice["text"])
                    reason = choice.get("finish_reason") or reason
        except (httpx.RequestError, TryAgain) as error:
            if text:
                raise EveralignError("the stream breaks off in the middle") from error
            raise
        if reason is None:
            raise EveralignError("the stream ends before the text does")
        told = {"choices": [{"text": "".join(text), "finish_reason": reason}], "usage": usage}
        completion = read_completion(json.dumps(told).encode(), "text/event-stream", chat=False)
        self._count(completion)
        return completion

    def _certificates(self) -> ssl.SSLContext | bool:
        """What https trusts. To read it takes longer than a request, and http needs none."""
        if not self.base_url.startswith("https://"):
            return False
        with self._lock:
            if self._trusted is None:
                self._trusted = httpx.create_ssl_context()
            return self._trusted

    async def _turn(self) -> None:
        """Wait until the next request may begin."""
        if not self._spacing:
            return
        with self._lock:
            start = max(self._next_start, time.monotonic())
            self._next_start = start + self._spacing
        await anyio.sleep(max(0.0, start - time.monotonic()))

    def _count(self, completion: Completion) -> None:
        with self._lock:
            self.usage.prompt_tokens += completion.prompt_tokens or 0
            self.usage.completion_tokens += completion.completion_tokens or 0
            self.usage.untold += completion.prompt_tokens is None or completion.completion_tokens is None

    def _conversations(self, conversations: Sequence[Conversation], parameters: Mapping[str, Any]) -> list[bytes]:
        contents = [{"messages": [dict(message) for message in messages]} for messages in conversations]
        return self._bodies("conversation", contents, parameters)

    def _bodies(self, kind: str, contents: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]) -> list[bytes]:
        """The requests as JSON, with the parameters that all share."""
        if clash := [name for name in _RESERVED if name in parameters]:
            raise InputError(f"parameter {clash[0]!r}: the client sets it; leave it out")
        bodies = []
        for number, content in enumerate(contents, start=1):
            whole = {"model": self.model, **content, **parameters}
            try:
                bodies.append(json.dumps(whole, ensure_ascii=False, allow_nan=False).encode())
            except (TypeError, ValueError) as error:
                raise InputError(self._clean(f"{kind} {number}: cannot be sent as JSON: {error}")) from None
        return bodies

    def _clean(self, message: str) -> str:
        """A message without the key, which servers like to repeat."""
        return message.replace(self._key, "***") if self._key else message

    def _masked(self, content: bytes) -> bytes:
        """A reply to be quoted, without the key; an excerpt could end in the middle of it."""
        return content.replace(self._key.encode(), b"***") if self._key else content


def _next_of(finished: SimpleQueue[Any], deadline: Deadline | None) -> Any:
    """Return what is finished next, None at the end; raises DeadlineOver."""
    try:
        return finished.get(timeout=None if deadline is None else deadline.left)
    except Empty:
        raise DeadlineOver("the time for this work is over") from None


def _until_failure(found: Iterator[_Found]) -> Iterator[tuple[int, Completion]]:
    """Yield the answers; at the end, raise the first failure."""
    failures = []
    for index, item in found:
        if isinstance(item, ChatError):
            failures.append(item)
        else:
            yield index, item
    if failures:
        raise failures[0]


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of a stream's events, one line each as all servers write them, until it ends."""
    waiting, size = b"", 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > _LARGEST_STREAM:
            raise EveralignError(f"the stream is larger than {_LARGEST_STREAM >> 20} MiB; ask for fewer tokens")
        *lines, waiting = (waiting + part).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or not data:
                continue
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except (ValueError, RecursionError):
                event = None
            if not isinstance(event, dict):
                raise EveralignError("the stream has an event that is no JSON object")
            yield event


async def _read(response: httpx.Response) -> bytes:
    content = bytearray()
    async for part in response.aiter_bytes():
        content += part
        if len(content) > _LARGEST_REPLY:
            raise EveralignError(f"the reply is larger than {_LARGEST_REPLY >> 20} MiB; ask for fewer tokens")
    return bytes(content)


def _backoff(attempt: int) -> float:
    """Seconds before an attempt is repeated; random, so that requests that failed together do not return together."""
    return float(min(_LONGEST_BACKOFF, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0))


@dataclass(frozen=True)
class ChatOptions:
    """How a server is asked; None stands for the default.

    Args:
        concurrency: requests under way at once.
        requests_per_minute: at most so many requests are begun.
        timeout: seconds for one attempt.
    """

    concurrency: int | None = None
    requests_per_minute: float | None = None
    timeout: float | None = None

    def client(self, name: str, whom: str, api_key: str | None = None) -> ChatClient:
        """Return a client for a name such as `http://127.0.0.1:8000/v1#qwen2.5`: the server's address, # and the model.

        Args:
            name: address and model.
            whom: who is named, such as `a judge`, for messages.
            api_key: what the server asks for, empty for nothing; OPENAI_API_KEY when None.

        Raises:
            InputError: the name lacks a part, or an option cannot be used.
        """
        address, _, model = name.partition("#")
        if not model.strip():
            raise InputError(
                f"{whom} is named URL#MODEL, such as http://127.0.0.1:8000/v1#qwen2.5; the model is missing"
            )
        return ChatClient(
            address,
            model,
            api_key,
            timeout=TIMEOUT if self.timeout is None else self.timeout,
            concurrency=CONCURRENCY if self.concurrency is None else self.concurrency,
            requests_per_minute=self.requests_per_minute or 0,
        )


def read_instructions(path: Path, whose: str, what: str) -> str:
    """Return the text of a file of instructions.

    Args:
        path: the file.
        whose: instructions they are, such as `the judge's`, for messages.
        what: they should say, for messages.

    Raises:
        InputError: there is no such file, or it is no text, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {whose} instructions cannot be read: {error}") from error
    if not text.strip():
        raise InputError(f"{path}: is empty; say {what}")
    return text
