"""Chat completion and Responses requests: their validation, the upstream and model they name, and their mode.

The pydantic models check, and document in the OpenAPI schema, the fields that the gateway itself reads. They are never
serialized: the upstream gets the request's own JSON, so that fields the gateway does not know reach it unchanged.
"""

import json
import math
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from everalign.serving.eligibility import Api, chosen_mode, offers_tools, question_of, request_rule
from everalign.serving.errors import refused
from everalign.serving.limits import MOST_VALUES, too_many_values
from everalign.serving.settings import USUAL, HeaderRules, Keep, Limits, Mode, StrictStructured
from everalign.serving.structured import Structure, structure_of
from everalign.serving.upstream import Upstream, UpstreamRequest

if TYPE_CHECKING:
    from everalign.data.messages import Message

ALIGNED = ":aligned"
_RETRYING_CLIENT = re.compile(r"\b(openai|ai-sdk|litellm)\b", re.IGNORECASE)
_Object = dict[Any, Any]


def _check_model(name: str) -> str:
    if not name.strip():
        raise ValueError("must be the name of a model")
    return name


_About = Field(description="One of /v1/models; MODEL:aligned is corrected.", json_schema_extra={"pattern": r"\S"})


class _Request(BaseModel):
    model_config = ConfigDict(strict=True)

    model: Annotated[str, AfterValidator(_check_model), _About]
    stream: bool | None = None
    store: Annotated[bool | None, Field(description="Whether the exchange may be kept for feedback.")] = None


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(strict=True)

    role: str
    content: str | list[Any] | None = None


class ChatRequest(_Request):
    """A request as OpenAI's; fields that are not listed here are passed to the upstream unchanged."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream_options: _Object | None = None
    n: Annotated[int, Field(ge=1, json_schema_extra={"maximum": Limits().choices})] | None = None
    logprobs: bool | None = None
    response_format: _Object | None = None


class ResponsesRequest(_Request):
    """A request as OpenAI's; fields that are not listed here are passed to the upstream unchanged."""

    input: str | list[_Object] | None = None
    instructions: Any = Field(None, json_schema_extra={"type": ["string", "null"]})
    background: bool | None = None
    text: _Object | None = None
    reasoning: _Object | None = None


@dataclass(frozen=True)
class RequestContext:
    """A validated request and what the gateway decided about it.

    Args:
        api: whether it is a chat completion or a response.
        id: of the exchange.
        key_id: of the client's key.
        payload: the request's JSON, with the upstream's name of the model.
        messages: its conversation as chat messages.
        upstream: the server that answers.
        mode: what is done with the answer.
        headers: the client's headers that the upstream gets.
        keep: whether the exchange is to be stored.
        question: the conversation as the corrector reads it; None if no answer can be corrected.
        rule: why not; see `eligibility`.
        retried_by_client: whether the client itself repeats requests that failed.
        structure: what a strict answer may be besides prose; None for nothing else.
        started: seconds of `time.perf_counter`.
    """

    api: Api
    id: str
    key_id: str
    payload: dict[str, Any]
    messages: Sequence[dict[str, Any]]
    upstream: Upstream
    mode: Mode
    headers: dict[str, str]
    keep: bool
    question: "tuple[Message, ...] | None"
    rule: str | None
    retried_by_client: bool = False
    structure: Structure | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def model(self) -> str:
        """The upstream's name of the model."""
        return str(self.payload["model"])

    @property
    def streams(self) -> bool:
        return bool(self.payload.get("stream"))

    @property
    def reports_storage(self) -> bool:
        """Whether the reply says if the exchange was stored: the server or the client asked for that."""
        return self.keep or self.payload.get("store") is True

    @property
    def corrects(self) -> bool:
        """Whether the answer waits for its correction."""
        return self.mode in ("correct", "strict")

    def upstream_request(self) -> UpstreamRequest:
        return UpstreamRequest(
            "POST",
            "chat/completions" if self.api == "chat" else "responses",
            self.payload,
            self.headers,
            model=self.model,
            key_id=self.key_id,
            retried_by_client=self.retried_by_client,
            quoted=self.mode != "strict",
        )


@dataclass(frozen=True)
class RequestParser:
    """Parses requests; `mode` is the server's, for requests that name none."""

    upstreams: Mapping[str, Upstream]
    mode: Mode
    keep: Keep
    limits: Limits
    headers: HeaderRules = USUAL
    structured: StrictStructured = "refuse"

    def parse(
        self,
        content: bytes,
        headers: Iterable[tuple[str, str]],
        key_id: str,
        has_corrector: bool,
        api: Api = "chat",
        deployment: str | None = None,
    ) -> RequestContext:
        """Return a request, of a `deployment` if the path names the model instead of the body.

        Raises:
            GatewayError: the request cannot be answered; names the field.
        """
        headers, body = list(headers), read_json(content)
        if deployment is not None:
            body["model"] = deployment
        _validate(ChatRequest if api == "chat" else ResponsesRequest, body)
        most = self.limits.choices
        if api == "chat" and (body.get("n") or 1) > most:
            raise refused(f"n: must be a whole number from 1 to {most}", "n", "invalid_value")
        messages = body["messages"] if api == "chat" else _conversation(body)
        if len(messages) > self.limits.messages:
            message = f"messages: at most {self.limits.messages}, found {len(messages)}"
            raise refused(message, "messages", "too_many_messages")

        upstream, model, aligned = self.route(body["model"], has_corrector)
        asked = next((value for name, value in headers if name == "x-everalign-mode"), None)
        mode = chosen_mode(asked, self.mode, aligned, has_corrector)
        form = body.get("response_format") if api == "chat" else (body.get("text") or {}).get("format")
        question = question_of(messages)
        rule = request_rule(api, body, form) or (None if question else "no_question")
        structure = None
        if mode == "strict":
            unchecked = rule or ("tools" if offers_tools(body) else None)
            if unchecked in ("json", "tools") and self.structured != "refuse":
                structure = structure_of(body, form, self.structured == "correct-strings")
            if unchecked is not None and structure is None:
                message = f"mode 'strict': an answer to this request cannot be checked ({unchecked}); leave that out"
                raise refused(message, code=f"strict_{unchecked}")

        store = body.get("store")
        return RequestContext(
            api=api,
            id=f"chatcmpl-{uuid.uuid4().hex}",
            key_id=key_id,
            payload={**body, "model": model},
            messages=messages,
            upstream=upstream,
            mode=mode,
            headers=self.headers.forwarded(headers),
            keep=store is not False and self.keep != "none" and (store is True or self.keep == "all"),
            question=None if (rule and not structure) or mode == "off" else question,
            rule=rule,
            # OpenAI's SDKs, and those built on them, repeat requests by themselves.
            retried_by_client=any(
                name.startswith("x-stainless-") or (name == "user-agent" and _RETRYING_CLIENT.search(value))
                for name, value in headers
            ),
            structure=structure,
        )

    def route(self, name: str, has_corrector: bool) -> tuple[Upstream, str, bool]:
        """Return the upstream, its name of the model, and whether `:aligned` was asked for; raises GatewayError."""
        model, aligned = name.removesuffix(ALIGNED), name.endswith(ALIGNED)
        if aligned and not has_corrector:
            raise refused(f"model {name[:100]!r}: this server has no corrector", "model", "model_not_found", 404)
        if len(self.upstreams) == 1:
            (upstream,) = self.upstreams.values()
        else:
            first, _, model = model.partition("/")
            if first not in self.upstreams or not model:
                names = ", ".join(f"{known}/MODEL" for known in self.upstreams)
                raise refused(f"model {name[:100]!r}: must be one of {names}", "model", "model_not_found", 404)
            upstream = self.upstreams[first]
        if not model:
            raise refused("model: is empty", "model", "invalid_value")
        return upstream, model, aligned


def read_json(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a request's body; called in the event loop for small bodies only (see `aside`).

    Raises:
        GatewayError: it is not strict JSON, not an object, or takes long to read.
    """
    if too_many_values(content):
        raise refused(f"the body has more than {MOST_VALUES} values", code="too_many_values", status=413)
    try:
        # A key that is given twice is kept once: the upstream reads the same request that was checked here.
        body = json.loads(content.decode("utf-8-sig"), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise refused(f"the body is not valid JSON{where}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise refused("the body must be a JSON object", code="invalid_json")
    return body


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _validate(model: type[BaseModel], body: Mapping[str, Any]) -> None:
    """Check a request's fields; raises the first error in the shape that OpenAI's clients read."""
    try:
        model.model_validate(body)
    except ValidationError as failed:
        # Each type of a union has its error: the deepest one says most.
        error = max(failed.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
        first, *rest = error["loc"]
        param = str(first) + "".join(f"[{part}]" for part in rest if isinstance(part, int))
        param += ".content" if "content" in rest else ""
        code = "invalid_value" if param in ("model", "messages", "n") else "invalid_type"
        raise refused(f"{param}: {error['msg'].removeprefix('Value error, ')}", param, code) from None


def _conversation(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the chat messages that a Responses request holds."""
    found: list[dict[str, Any]] = []
    if isinstance(body.get("instructions"), str) and body["instructions"].strip():
        found.append({"role": "system", "content": body["instructions"]})
    items = body.get("input")
    if isinstance(items, str):
        return [*found, {"role": "user", "content": items}]
    for item in items or ():
        kind = str(item.get("type", "message"))
        if kind == "message":
            content = item.get("content")
            found.append({"role": str(item.get("role", "user")), "content": content if content is not None else ""})
        elif kind.endswith("_call_output"):
            output = item.get("output")
            found.append({"role": "tool", "content": output if isinstance(output, str | list) else ""})
    return found
