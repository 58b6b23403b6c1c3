"""Parse and check a chat completion request, as far as the gateway needs it; everything else passes untouched."""

import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from everalign.serving.eligibility import GRAMMARS, chosen_mode, offers_tools, question_of, request_rule
from everalign.serving.errors import not_found, refused
from everalign.serving.headers import USUAL, HeaderRules
from everalign.serving.limits import MOST_VALUES, too_many_values
from everalign.serving.settings import Keep, Limits, Mode, StrictStructured
from everalign.serving.structured import Structure, structure_of

if TYPE_CHECKING:
    from everalign.data.messages import Message
    from everalign.serving.fallback import Answering
    from everalign.serving.upstream import Asked

ALIGNED = ":aligned"
_REPEATING = re.compile(r"\b(openai|ai-sdk|litellm)\b", re.IGNORECASE)
_FLAGS = ("stream", "store", "logprobs")


@dataclass(frozen=True)
class ChatRequest:
    """A request.

    Args:
        id: of the completion that answers it.
        key_id: whose it is.
        body: its JSON, with the upstream's name of the model.
        upstream: who answers.
        mode: what is done with the answer.
        headers: that the upstream gets.
        keep: whether the exchange is kept.
        question: its conversation as a corrector reads it; None where answers are not corrected.
        rule: why they are not.
        repeated: whether its client repeats what failed by itself.
        structure: what a strict answer may be besides prose; None for nothing else.
        started: when it began, in seconds that only grow.
    """

    id: str
    key_id: str
    body: dict[str, Any]
    upstream: "Answering"
    mode: Mode
    headers: dict[str, str]
    keep: bool
    question: "tuple[Message, ...] | None"
    rule: str | None
    repeated: bool = False
    structure: Structure | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def streams(self) -> bool:
        """Whether the client wants events."""
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        """Whether the client wants the usage at the end of a stream."""
        options = self.body.get("stream_options")
        return isinstance(options, Mapping) and bool(options.get("include_usage"))

    @property
    def wants_storing(self) -> bool:
        """Whether somebody asked for the exchange to be kept: then it is said whether it is."""
        return self.keep or self.body.get("store") is True

    @property
    def corrects(self) -> bool:
        """Whether the answer waits for its correction."""
        return self.mode in ("correct", "strict")

    def asked(self, with_usage: bool = False) -> "Asked":
        """Return what the upstream is asked; for its usage too, if that is of use."""
        from everalign.serving.upstream import Asked

        payload = self.body
        if with_usage and self.streams:
            options = self.body.get("stream_options")
            known = options if isinstance(options, Mapping) else {}
            payload = {**self.body, "stream_options": {**known, "include_usage": True}}
        return Asked(
            "POST",
            "chat/completions",
            payload,
            self.headers,
            model=self.body["model"],
            key_id=self.key_id,
            repeated=self.repeated,
            quoted=self.mode != "strict",
        )


@dataclass(frozen=True)
class RequestParser:
    """Reads requests.

    Args:
        upstreams: by name.
        mode: the server's.
        keep: which exchanges are kept.
        limits: of requests.
        headers: that cross.
        structured: what strict mode does with requests for JSON and with tools.
    """

    upstreams: "Mapping[str, Answering]"
    mode: Mode
    keep: Keep
    limits: Limits
    headers: HeaderRules = USUAL
    structured: StrictStructured = "refuse"

    def call(
        self,
        content: bytes,
        headers: Iterable[tuple[str, str]],
        key_id: str,
        has_corrector: bool,
        model: str | None = None,
    ) -> ChatRequest:
        """Return a request, of a `model` if the path names one; raises GatewayError that names the field."""
        body = read_json(content)
        body = body if model is None else {**body, "model": model}
        _check(body, self.limits)
        form, grammars = body.get("response_format"), any(body.get(name) for name in GRAMMARS)
        structure = partial(structure_of, body, form, grammars, body.get("tools"))
        return self.read(body, headers, key_id, has_corrector, request_rule(body), offers_tools(body), structure)

    def read(
        self,
        body: dict[str, Any],
        headers: Iterable[tuple[str, str]],
        key_id: str,
        has_corrector: bool,
        rule: str | None,
        tools: bool,
        structure: Callable[[bool], Structure | None],
    ) -> ChatRequest:
        """Return a request that is checked; raises GatewayError.

        Args:
            body: its model and conversation.
            headers: of the client.
            key_id: of the client's key.
            has_corrector: whether answers can be corrected.
            rule: why answers are not corrected; None where they may be.
            tools: whether they may call tools.
            structure: tells what they may be, by whether texts in JSON are corrected.
        """
        given = list(headers)
        if len(body["messages"]) > self.limits.messages:
            found = len(body["messages"])
            raise refused(f"messages: at most {self.limits.messages}, found {found}", "messages", "too_many_messages")
        upstream, model, aligned = self.routed(body["model"], has_corrector)
        asked = next((value for name, value in given if name == "x-everalign-mode"), None)
        mode = chosen_mode(asked, self.mode, aligned, has_corrector)
        question = question_of(body["messages"])
        rule = rule or (None if question else "no_question")
        allowed = None
        if mode == "strict" and (rule in (None, "json") and (rule or tools)):
            allowed = None if self.structured == "refuse" else structure(self.structured == "correct-strings")
        if mode == "strict" and allowed is None:
            _check_strict(rule or ("tools" if tools else None))
        body = {**body, "model": model}
        return ChatRequest(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            key_id=key_id,
            body=body,
            upstream=upstream,
            mode=mode,
            headers=self.headers.forwarded(given),
            keep=self._keeps(body.get("store")),
            question=None if (rule and not allowed) or mode == "off" else question,
            rule=rule,
            repeated=repeats_itself(given),
            structure=allowed,
        )

    def routed(self, name: str, has_corrector: bool) -> "tuple[Answering, str, bool]":
        """Return upstream, its name of the model, and whether `:aligned` was asked for; raises GatewayError."""
        model, aligned = name.removesuffix(ALIGNED), name.endswith(ALIGNED)
        if aligned and not has_corrector:
            raise not_found(f"model {_shown(name)}: this server has no corrector", "model_not_found", "model")
        if len(self.upstreams) == 1:
            (upstream,) = self.upstreams.values()
        else:
            first, _, model = model.partition("/")
            if first not in self.upstreams or not model:
                names = ", ".join(f"{known}/MODEL" for known in self.upstreams)
                raise not_found(f"model {_shown(name)}: must be one of {names}", "model_not_found", "model")
            upstream = self.upstreams[first]
        if not model:
            raise refused("model: is empty", "model", "invalid_value")
        return upstream, model, aligned

    def _keeps(self, store: bool | None) -> bool:
        if store is False or self.keep == "none":
            return False
        return store is True or self.keep == "all"


def repeats_itself(headers: Iterable[tuple[str, str]]) -> bool:
    """Whether a request's client repeats what failed, as OpenAI's SDKs and those built on them do."""
    return any(
        name.startswith("x-stainless-") or (name == "user-agent" and _REPEATING.search(value))
        for name, value in headers
    )


def read_json(content: bytes) -> dict[str, Any]:
    """Return a request's JSON object; raises GatewayError for anything that could be read in two ways, or takes long.

    Called in the event loop for small bodies alone (see `aside`).
    """
    if too_many_values(content):
        raise refused(f"the body has more than {MOST_VALUES} values", code="too_many_values", status=413)
    try:
        # Written anew, it has each key once: what is decided here and what the upstream reads are the same.
        body = json.loads(content.decode("utf-8-sig"), parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise refused(f"the body is no JSON that can be read{where}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise refused("the body must be a JSON object", code="invalid_json")
    return body


def _no_number(text: str) -> float:
    raise ValueError(text)


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _check(body: Mapping[str, Any], limits: Limits) -> None:
    model, messages = body.get("model"), body.get("messages")
    if not isinstance(model, str) or not model.strip():
        raise refused("model: must be the name of a model", "model", "invalid_value")
    if not isinstance(messages, list) or not messages:
        raise refused("messages: must be a list of at least one message", "messages", "invalid_value")
    for i, message in enumerate(messages):
        _check_message(message, f"messages[{i}]")
    for name in _FLAGS:
        if not isinstance(body.get(name), bool | None):
            raise refused(f"{name}: must be true or false", name, "invalid_type")
    if not isinstance(body.get("stream_options"), dict | None):
        raise refused("stream_options: must be an object", "stream_options", "invalid_type")
    if not isinstance(body.get("response_format"), dict | None):
        raise refused("response_format: must be an object", "response_format", "invalid_type")
    _check_choices(body.get("n"), limits.choices)


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise refused(f"{where}: must be an object with a role", where, "invalid_type")
    if not isinstance(message.get("content"), str | list | None):
        raise refused(f"{where}.content: must be text, a list of parts, or null", f"{where}.content", "invalid_type")


def _check_choices(n: Any, most: int) -> None:
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= most):
        raise refused(f"n: must be a whole number from 1 to {most}", "n", "invalid_value")


def _check_strict(rule: str | None) -> None:
    if rule is not None:
        message = f"mode 'strict': answers to this request could not be checked ({rule}); leave that out"
        raise refused(message, code=f"strict_{rule}")


def _shown(name: str) -> str:
    return repr(name[:100])
