"""Client for OpenAI-compatible servers: one request or thousands, with retries, rate limits, deadlines and streaming.

client = ChatClient("http://127.0.0.1:8000/v1", "qwen2.5", concurrency=16)
client.complete([{"role": "user", "content": "Hello"}]).text
for index, completion in client.complete_many(conversations, temperature=0): ...
"""

# Built on httpx, because the openai SDK does not promise what long unattended runs need: its timeout bounds a single
# read (a server that drips one byte a second is never given up), it reads replies of any size, follows redirects,
# takes any JSON for a completion, does not repeat a stream that breaks before its first word, and quotes the key.

import json
import math
import os
import random
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import anyio
import httpx
from anyio.from_thread import start_blocking_portal

from everalign.deadlines import DeadlineOver, current
from everalign.errors import EveralignError, InputError, system_error
from everalign.llm_reply import (
    LARGEST_REPLY,
    AttemptFailed,
    Completion,
    bounded,
    make_completion,
    read_completion,
    shortened,
    status_failure,
    stream_events,
)

__all__ = ["ChatClient", "ChatError", "Completion", "Usage"]

Conversation = Sequence[Mapping[str, str]]

KEY_VARIABLE = "OPENAI_API_KEY"
_FIRST_BACKOFF, _LONGEST_BACKOFF = 1.0, 60.0  # seconds, doubled from attempt to attempt
_CHAT, _TEXT = "chat/completions", "completions"
_RESERVED = ("model", "messages", "prompt", "stream", "n")


@dataclass
class Usage:
    """What a client has used so far.

    Args:
        requests: requests sent, retries included.
        prompt_tokens: tokens sent, as far as the server reports them.
        completion_tokens: tokens received, as far as the server reports them.
        untold: replies whose tokens the server did not report.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    untold: int = 0


class ChatError(EveralignError):
    """A request that failed for good.

    Args:
        message: what failed.
        index: the request's position in `complete_many`.
        refused: True if the server refused it (status 400 to 499), False if the server itself failed.
    """

    def __init__(self, message: str, index: int = 0, refused: bool = False) -> None:
        super().__init__(message)
        self.index, self.refused = index, refused


class ChatClient:
    """Calls one model on one server. Threads may share it.

    Args:
        base_url: http or https, with or without `/v1` at its end.
        model: the model's name on the server.
        api_key: the server's key, empty for none; OPENAI_API_KEY when None.
        timeout: seconds for one attempt, from connecting to the last byte.
        retries: how often a request is repeated after a connection error, a timeout, or the status 408, 409, 429 or
            500 and above; after a growing pause, or the one that the server asks for.
        concurrency: requests that `complete_many` has in flight at once.
        requests_per_minute: most requests started a minute, evenly spaced and counting retries; 0 for no limit.

    Raises:
        InputError: an argument cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        requests_per_minute: float = 0,
    ) -> None:
        self.base_url, self.model, self.usage = checked_url(base_url), model, Usage()
        self._key = checked_key(os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key)
        if not model.strip():
            raise InputError("model: is empty; name a model as the server knows it")
        if not (math.isfinite(timeout) and timeout > 0):
            raise InputError(f"timeout: must be above 0 seconds, found {timeout}")
        if retries < 0:
            raise InputError(f"retries: must be at least 0, found {retries}")
        if concurrency < 1:
            raise InputError(f"concurrency: must be at least 1, found {concurrency}")
        if not (math.isfinite(requests_per_minute) and requests_per_minute >= 0):
            raise InputError(f"requests per minute: must be at least 0, found {requests_per_minute}")
        self._timeout, self._retries, self._concurrency = timeout, retries, concurrency
        self._spacing = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next_start = 0.0
        self._lock = threading.Lock()
        self._certificates: ssl.SSLContext | bool = False

    @classmethod
    def from_name(cls, name: str, role: str, api_key: str | None = None, **options: Any) -> "ChatClient":
        """Return a client for a name such as `http://127.0.0.1:8000/v1#qwen2.5`: the server's address, # and the model.

        Args:
            name: address and model.
            role: what the model is for, such as `a judge`; used in the error.
            api_key: as for the class.
            options: further arguments of the class; None stands for the default.

        Raises:
            InputError: the name lacks a part, or an option cannot be used.
        """
        address, _, model = name.partition("#")
        if not model.strip():
            raise InputError(
                f"{role} is named URL#MODEL, such as http://127.0.0.1:8000/v1#qwen2.5; the model is missing"
            )
        return cls(address, model, api_key, **{key: value for key, value in options.items() if value is not None})

    def __repr__(self) -> str:
        return f"ChatClient({self.base_url!r}, {self.model!r})"

    def complete(self, messages: Conversation, **parameters: Any) -> Completion:
        """Return the reply to one conversation; arguments and errors as in `complete_many`."""
        ((_, completion),) = self.complete_many([messages], **parameters)
        return completion

    def complete_many(
        self, conversations: Sequence[Conversation], **parameters: Any
    ) -> Iterator[tuple[int, Completion]]:
        """Yield `(index, completion)` for every conversation, in the order in which the replies arrive.

        Requests start when the first item is asked for, and are cancelled when the iterator is closed. After a failure
        no request is started; those in flight are finished and yielded before the error is raised.

        Args:
            conversations: each a list of messages with `role` and `content`.
            parameters: further fields of the requests, such as `temperature`.

        Raises:
            InputError: a request is no JSON, or a parameter is one that the client sets.
            ChatError: a request failed for good: no retry is left, the server refused it, or the reply holds no text.
        """
        return _raise_at_end(self._run(_CHAT, self._chat_bodies(conversations, parameters), keep_going=False))

    def attempt_many(
        self, conversations: Sequence[Conversation], **parameters: Any
    ) -> Iterator[tuple[int, Completion | ChatError]]:
        """Like `complete_many`, but yield `(index, error)` for a request that failed for good, and go on."""
        return self._run(_CHAT, self._chat_bodies(conversations, parameters), keep_going=True)

    def continue_many(self, prompts: Sequence[str], **parameters: Any) -> Iterator[tuple[int, Completion]]:
        """Yield the continuation of each text, from the older `completions` endpoint.

        Args:
            prompts: texts, sent without a chat template around them.
            parameters: further fields of the requests; order and errors as in `complete_many`.
        """
        bodies = self._bodies("prompt", [{"prompt": prompt} for prompt in prompts], parameters)
        return _raise_at_end(self._run(_TEXT, bodies, keep_going=False))

    def stream_continuation(self, prompt: str, **parameters: Any) -> Iterator[str | Completion]:
        """Yield the pieces of one text's continuation, and at last the completion as a whole.

        From a server that does not stream, only the completion. Errors as in `complete_many`; a stream that has yielded
        text is not repeated.
        """
        stream = {"prompt": prompt, "stream": True, "stream_options": {"include_usage": True}}
        for item in self._run(_TEXT, self._bodies("prompt", [stream], parameters), keep_going=False):
            if isinstance(item, str):
                yield item
            elif isinstance(item[1], ChatError):
                raise item[1]
            else:
                yield item[1]

    def _chat_bodies(self, conversations: Sequence[Conversation], parameters: Mapping[str, Any]) -> list[bytes]:
        contents = [{"messages": [dict(message) for message in messages]} for messages in conversations]
        return self._bodies("conversation", contents, parameters)

    def _bodies(self, kind: str, contents: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]) -> list[bytes]:
        """Return the requests as JSON, all with the same parameters."""
        if clash := [name for name in _RESERVED if name in parameters]:
            raise InputError(f"parameter {clash[0]!r}: the client sets it; leave it out")
        bodies = []
        for number, content in enumerate(contents, start=1):
            body = {"model": self.model, **content, **parameters}
            try:
                bodies.append(json.dumps(body, ensure_ascii=False, allow_nan=False).encode())
            except (TypeError, ValueError) as error:
                raise InputError(self._masked(f"{kind} {number}: cannot be sent as JSON: {error}")) from None
        return bodies

    def _run(self, path: str, bodies: Sequence[bytes], *, keep_going: bool) -> Iterator[Any]:
        """Send requests from an event loop in another thread; yield what comes of them, and streamed text.

        The caller's deadline bounds the work, and allows fewer retries.
        """
        if self.base_url.startswith("https://"):
            with self._lock:  # reading the certificates takes longer than a request
                self._certificates = self._certificates or httpx.create_ssl_context()
        finished: SimpleQueue[Any] = SimpleQueue()
        deadline = current()
        retries = self._retries if deadline is None else min(self._retries, deadline.retries)
        # Leaving this block early, as Ctrl-C or a caller's break does, cancels the requests in flight.
        with start_blocking_portal() as portal:
            running = portal.start_task_soon(self._send_all, path, bodies, retries, keep_going, finished.put)
            running.add_done_callback(lambda _: finished.put(None))
            with nullcontext() if deadline is None else deadline.calling(running.cancel):
                while True:
                    try:
                        item = finished.get(timeout=None if deadline is None else deadline.left)
                    except Empty:
                        raise DeadlineOver("the time for this work is over") from None
                    if item is None:
                        break
                    yield item
            if deadline is not None:
                deadline.check()
            running.result()

    async def _send_all(
        self, path: str, bodies: Sequence[bytes], retries: int, keep_going: bool, emit: Callable[[Any], None]
    ) -> None:
        waiting = deque(enumerate(bodies))

        async def worker() -> None:
            while waiting:
                index, body = waiting.popleft()
                try:
                    emit((index, await self._send(session, path, body, retries, emit)))
                except AttemptFailed as error:
                    if not keep_going:
                        waiting.clear()
                    message = self._masked(f"{self.base_url} ({self.model}): {error}")
                    emit((index, ChatError(message, index, error.refused)))

        headers = {"content-type": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=self._concurrency)
        # No timeout: `_send` bounds whole attempts. No redirects: they would carry the key elsewhere.
        async with (
            httpx.AsyncClient(headers=headers, timeout=None, limits=limits, verify=self._certificates) as session,
            anyio.create_task_group() as group,
        ):
            for _ in range(min(self._concurrency, len(waiting))):
                group.start_soon(worker)

    async def _send(
        self, session: httpx.AsyncClient, path: str, body: bytes, retries: int, emit: Callable[[Any], None]
    ) -> Completion:
        """Send one request until it succeeds, cannot succeed, or no retry is left."""
        begun = False

        def emit_text(text: str) -> None:
            nonlocal begun
            begun = True
            emit(text)

        for attempt in count():
            if self._spacing:
                with self._lock:
                    start = max(self._next_start, time.monotonic())
                    self._next_start = start + self._spacing
                await anyio.sleep(max(0.0, start - time.monotonic()))
            with self._lock:
                self.usage.requests += 1
            try:
                with anyio.fail_after(self._timeout):
                    async with session.stream("POST", f"{self.base_url}/{path}", content=body) as response:
                        return await self._read(response, path, emit_text)
            except TimeoutError:
                failed = AttemptFailed(f"no answer within {self._timeout:g} seconds", retry=True)
            except httpx.RequestError as error:
                reason = shortened(str(error)) or type(error).__name__
                failed = AttemptFailed(f"cannot be reached ({reason})", retry=True)
            except AttemptFailed as error:
                failed = error
            if not failed.retry:
                raise failed
            if begun:
                raise AttemptFailed(f"the stream breaks off in the middle: {failed}")
            if attempt == retries:
                raise AttemptFailed(f"{failed}; {attempt + 1} attempts made", refused=failed.refused)
            # Random, so that requests that failed together do not come back together.
            backoff = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**attempt) * random.uniform(0.5, 1.0)
            await anyio.sleep(backoff if failed.wait is None else failed.wait)
        raise AssertionError("unreachable")

    async def _read(self, response: httpx.Response, path: str, emit_text: Callable[[str], None]) -> Completion:
        """Return a reply's completion and count its tokens; raises AttemptFailed for any other reply."""
        kind = response.headers.get("content-type", "")
        if response.is_success and kind.startswith("text/event-stream"):
            completion = await self._read_stream(response, emit_text)
        else:
            content = b"".join([part async for part in bounded(response, LARGEST_REPLY, "reply")])
            # Whatever is quoted is masked before it is cut: an excerpt could end in the middle of the key.
            quotable = content.replace(self._key.encode(), b"***") if self._key else content
            if not response.is_success:
                raise status_failure(response.status_code, response.headers, quotable)
            try:
                completion = read_completion(content, kind, path == _CHAT)
            except AttemptFailed:
                completion = read_completion(quotable, kind, path == _CHAT)
        with self._lock:
            self.usage.prompt_tokens += completion.prompt_tokens or 0
            self.usage.completion_tokens += completion.completion_tokens or 0
            self.usage.untold += completion.prompt_tokens is None or completion.completion_tokens is None
        return completion

    async def _read_stream(self, response: httpx.Response, emit_text: Callable[[str], None]) -> Completion:
        """Emit the text of a stream of server-sent events."""
        text, reason, usage = list[str](), None, None
        async for event in stream_events(response):
            if event.get("error"):
                raise AttemptFailed(f"the stream holds an error: {shortened(self._masked(str(event['error'])))}")
            usage = event.get("usage") or usage
            choices = event.get("choices")
            for choice in choices if isinstance(choices, list) else ():
                if not isinstance(choice, Mapping):
                    raise AttemptFailed("the stream has a choice that is not a JSON object")
                if isinstance(choice.get("text"), str) and choice["text"]:
                    text.append(choice["text"])
                    emit_text(choice["text"])
                reason = choice.get("finish_reason") or reason
        if reason is None:
            raise AttemptFailed("the stream ends before the text does")
        return make_completion("".join(text), usage, reason)

    def _masked(self, message: str) -> str:
        """Return a message without the key, which servers like to repeat."""
        return message.replace(self._key, "***") if self._key else message


def _raise_at_end(results: Iterator[tuple[int, Completion | ChatError]]) -> Iterator[tuple[int, Completion]]:
    """Yield the completions, then raise the first error."""
    errors = []
    for index, result in results:
        if isinstance(result, ChatError):
            errors.append(result)
        else:
            yield index, result
    if errors:
        raise errors[0]


def checked_url(text: str) -> str:
    """Return the base address below which `chat/completions` is; raises InputError that shows no password."""
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


def checked_key(key: str, variable: str = KEY_VARIABLE) -> str:
    """Return the key of an environment variable if a header can hold it; a header's own error would print it."""
    key = key.strip()
    if re.search(r"[^\x21-\x7e]", key):
        raise InputError(f"the API key ({variable}) may only have letters, digits and punctuation of ASCII")
    return key


def read_instructions(path: Path, whose: str, what: str) -> str:
    """Return the text of a file of instructions for a model.

    Args:
        path: the file.
        whose: such as `the judge's`; used in errors.
        what: what the instructions should say; used in errors.

    Raises:
        InputError: the file is missing, empty or no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {whose} instructions cannot be read: {system_error(error, named=False)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {whose} instructions cannot be read: {error}") from error
    if not text.strip():
        raise InputError(f"{path}: is empty; say {what}")
    return text
