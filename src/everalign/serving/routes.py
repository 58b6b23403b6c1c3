"""Routes for chat completions, Responses, models, feedback, health and metrics."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from everalign.errors import EveralignError
from everalign.serving.chat_request import ALIGNED, ChatRequest, RequestContext, ResponsesRequest, read_json
from everalign.serving.decide import PENDING, summary_before
from everalign.serving.eligibility import Api
from everalign.serving.errors import GatewayError, overloaded, refused
from everalign.serving.gateway import Gateway
from everalign.serving.limits import aside, read_body
from everalign.serving.middleware import json_response
from everalign.serving.settings import MODES
from everalign.serving.store.records import MOST_TAGS, Feedback, UnknownExchange
from everalign.serving.stream_response import FrameQueue, cancel_on_disconnect, stream_response
from everalign.serving.telemetry import CONTENT_TYPE
from everalign.serving.upstream import Upstream

LONGEST_EDIT = 200_000
"""Characters of an edited text."""

_MOST_BYTES = 1 << 20
_JUDGEMENTS = ("rating", "preferred", "edited_text", "tags", "comment")


def _storable(text: str) -> str:
    if "\0" in text or (not text.isascii() and text != text.encode(errors="ignore").decode()):
        raise ValueError("holds NUL or half a surrogate pair, which databases cannot keep")
    return text


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; leave it out")
    return text


_Text = Annotated[str, AfterValidator(_not_empty), AfterValidator(_storable)]


class FeedbackBody(BaseModel):
    """Feedback on the answer `id`; it replaces earlier feedback of the same `user`.

    At least one of `rating`, `preferred`, `edited_text`, `tags` and `comment` is required.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_storable)]
    rating: Annotated[int, Field(ge=-1, le=1)] | None = None
    preferred: Literal["original", "corrected", "neither"] | None = None
    edited_text: Annotated[_Text, Field(max_length=LONGEST_EDIT)] | None = None
    tags: Annotated[list[Annotated[_Text, Field(max_length=50)]], Field(max_length=MOST_TAGS)] = []
    comment: Annotated[_Text, Field(max_length=5_000)] | None = None
    user: Annotated[_Text, Field(max_length=200)] | None = None


def feedback_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/feedback",
        responses=error_replies(400, 404, 408, 413, 415, 429, 499, 503),
        openapi_extra=json_body(FeedbackBody),
        summary="Rate an answer",
    )
    async def feedback(request: Request) -> Response:
        with gateway.limiter.enter(request.state.key_id):
            content = await read_body(request, _MOST_BYTES)
            said = await aside(content, lambda: read_feedback(read_json(content), request.state.key_id))
            return json_response({"id": said.exchange, "new": await store_feedback(gateway, said)})

    return router


def read_feedback(content: dict[str, Any], key_id: str) -> Feedback:
    """Return the feedback of a JSON body; raises GatewayError that names the field."""
    try:
        said = FeedbackBody.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "body"
        raise refused(f"{field}: {first['msg']}", field, "invalid_value") from None
    if all(not getattr(said, name) and getattr(said, name) != 0 for name in _JUDGEMENTS):
        raise refused(f"the feedback is empty: give at least one of {', '.join(_JUDGEMENTS)}", code="empty_feedback")
    given = said.model_dump(exclude={"id", "tags"})
    return Feedback(said.id, key_id, tags=tuple(said.tags), created=datetime.now(timezone.utc), **given)


_log = logging.getLogger(__name__)


async def store_feedback(gateway: Gateway, said: Feedback) -> bool:
    """Store feedback; return whether it is new. Raises GatewayError if it cannot be stored."""
    if gateway.store is None:
        message = "this server has no store for feedback; its operator can give it one with --store sqlite:///FILE"
        raise GatewayError(503, message, code="no_store", headers={"x-should-retry": "false"})
    try:
        new = await gateway.store.add_feedback(said)
    except UnknownExchange:
        message = (
            f"id {said.exchange[:100]!r}: no answer of that id was kept for this key; "
            "ask with store: true, and give the id of the completion"
        )
        raise refused(message, "id", "unknown_exchange", 404) from None
    except (EveralignError, OSError, RuntimeError) as error:
        _log.error("feedback on %s could not be kept: %s", said.exchange, error)
        raise overloaded(f"the store cannot be written ({type(error).__name__})", "store_failed", status=503) from None
    gateway.metrics.feedback.labels(str(new).lower()).inc()
    return new


_FRESH_SECONDS = 10.0
_READY_SECONDS = 3.0

_DESCRIPTIONS = {
    408: "The body did not arrive in time.",
    409: "The upstream reports a conflict.",
    422: "Strict mode: the answer cannot be checked. Or the upstream refuses the request.",
    499: "The client disconnected.",
    503: "Unavailable: overloaded, the upstream unreachable, or no correction where one is required.",
}
_ANSWER_ERRORS = (400, 404, 408, 409, 413, 415, 422, 429, 499, 502, 503, 504)


class _Error(BaseModel):
    model_config = ConfigDict(title="Error")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """An error, as OpenAI's."""

    error: _Error


class ChatReply(BaseModel):
    """A chat completion, as OpenAI's."""

    id: str
    choices: list[dict[str, Any]]


class ResponsesReply(BaseModel):
    """A response, as OpenAI's."""

    id: str
    output: list[dict[str, Any]]


def error_replies(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI `responses` of errors, those of authentication included."""
    every = sorted({401, 403, 405, 500, *statuses})
    return {
        one: {"model": ErrorReply, "description": _DESCRIPTIONS.get(one) or HTTPStatus(one).phrase} for one in every
    }


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI `requestBody` of a model; for routes that read their body themselves, with limits."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return inline(definitions[value["$ref"].rpartition("/")[2]])
            return {name: inline(inner) for name, inner in value.items()}
        return [inline(inner) for inner in value] if isinstance(value, list) else value

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inline(schema)}}}}


def chat_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    async def answer(request: Request, api: Api) -> Response:
        key_id = request.state.key_id
        with gateway.limiter.enter(key_id) as place:
            content = await read_body(request, gateway.settings.limits.body_bytes)
            about = request.headers.items(), key_id, gateway.has_corrector, api, request.state.deployment
            context = await aside(content, lambda: gateway.parser.parse(content, *about))
            if not context.streams:
                completed = await cancel_on_disconnect(request.receive, gateway.completions.complete(context))
                return json_response(completed.body, completed.headers)
            return await streamed(gateway, request, context, place, partial(gateway.completions.stream, context))

    mode = {"name": "x-everalign-mode", "in": "header", "required": False}
    parameters = [{**mode, "schema": {"type": "string", "enum": list(MODES)}}]
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
    events = {"text/event-stream": {"schema": event}}

    @router.post(
        "/v1/chat/completions",
        responses={
            200: {
                "model": ChatReply,
                "description": "The answer; or with `stream`, events with its chunks, then `[DONE]`.",
                "content": events,
            },
            **error_replies(*_ANSWER_ERRORS),
        },
        openapi_extra={**json_body(ChatRequest), "parameters": parameters},
        summary="Answer a conversation",
    )
    async def chat(request: Request) -> Response:
        return await answer(request, "chat")

    @router.post(
        "/v1/responses",
        responses={
            200: {
                "model": ResponsesReply,
                "description": "The answer; or with `stream`, events, the last one with the whole answer.",
                "content": events,
            },
            **error_replies(*_ANSWER_ERRORS),
        },
        openapi_extra={**json_body(ResponsesRequest), "parameters": parameters},
        summary="Answer a conversation (OpenAI's Responses API)",
    )
    async def responses(request: Request) -> Response:
        return await answer(request, "responses")

    return router


async def streamed(
    gateway: Gateway,
    request: Request,
    context: RequestContext,
    place: ExitStack,
    work: Callable[[FrameQueue], Coroutine[Any, Any, object]],
) -> Response:
    """Return the response that streams what `work` writes, and holds the request's `place` until it ends.

    Raises GatewayError if the work fails before it has written anything; the place is then still the caller's.
    """
    late, held = (summary_before(context) or PENDING).headers(context), ExitStack()
    streaming = stream_response(work, late, gateway.settings.keepalive, held.close)
    response = await cancel_on_disconnect(request.receive, streaming)
    held.push(place.pop_all())
    return response


@dataclass(eq=False)
class Catalogue:
    """The models of all upstreams, cached for a few seconds."""

    gateway: Gateway
    _known: dict[str, tuple[float, list[dict[str, Any]]]] = field(default_factory=dict, init=False)

    async def models(self) -> list[dict[str, Any]]:
        """Return the models under the names that clients use; an upstream that fails is left out, unless all fail."""
        upstreams = self.gateway.upstreams
        found = await asyncio.gather(*(self._of(name) for name in upstreams), return_exceptions=True)
        failures = [one for one in found if isinstance(one, BaseException)]
        for failure in failures:
            if len(failures) == len(found) or not isinstance(failure, GatewayError):
                raise failure
        listed = []
        for name, models in zip(upstreams, found, strict=True):
            prefix = f"{name}/" if len(upstreams) > 1 else ""
            listed += [{**one, "id": prefix + one["id"]} for one in models] if isinstance(models, list) else []
        aligned = [{**one, "id": one["id"] + ALIGNED} for one in listed] if self.gateway.has_corrector else []
        return listed + aligned

    async def _of(self, name: str) -> list[dict[str, Any]]:
        asked, models = self._known.get(name, (-_FRESH_SECONDS, []))
        if time.monotonic() - asked > _FRESH_SECONDS:
            models = await self.gateway.upstreams[name].models()
            self._known[name] = time.monotonic(), models
        return models


def model_routes(gateway: Gateway) -> APIRouter:
    router, catalogue = APIRouter(), Catalogue(gateway)

    @router.get("/v1/models", responses=error_replies(429, 502, 503, 504), summary="List the models")
    async def models() -> Response:
        return json_response({"object": "list", "data": await catalogue.models()})

    @router.get("/v1/models/{model:path}", responses=error_replies(404, 429, 502, 503, 504), summary="Show one model")
    async def model(model: str) -> Response:
        for known in await catalogue.models():
            if known["id"] == model:
                return json_response(known)
        message = f"model {model[:100]!r}: no such model; see /v1/models"
        raise refused(message, "model", "model_not_found", 404)

    return router


def status_routes(gateway: Gateway) -> APIRouter:
    """Return the routes for probes and monitoring; all but `/health` need a key."""
    router = APIRouter()

    @router.get("/health", responses=error_replies(), summary="Whether the process answers")
    async def health() -> Response:
        return json_response({"status": "ok"})

    async def reachable(upstream: Upstream) -> bool:
        try:
            await asyncio.wait_for(upstream.models(), _READY_SECONDS)
        except GatewayError as error:
            return error.status < 500  # a server without a list of models is reachable, too
        except asyncio.TimeoutError:
            return False
        return True

    @router.get("/ready", responses=error_replies(503), summary="Whether requests can be answered")
    async def ready() -> Response:
        reached = await asyncio.gather(*map(reachable, gateway.upstreams.values()))
        about = {
            "status": "ready" if any(reached) else "not ready",
            "upstreams": dict(zip(gateway.upstreams, reached, strict=True)),
            "corrector": gateway.corrections.version,
            "template": gateway.corrections.in_service.template,
            "circuits": gateway.circuits(),
            "store": gateway.store is not None,
        }
        return json_response(about, status=200 if any(reached) else 503)

    @router.get("/metrics", responses=error_replies(), summary="Counters for Prometheus")
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE)

    return router
