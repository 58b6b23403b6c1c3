"""Routes for chat completions, models, health and metrics."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from everalign.serving.chat_request import ALIGNED, ChatRequest
from everalign.serving.complete import complete, known_before, origin
from everalign.serving.errors import GatewayError, not_found
from everalign.serving.fallback import Answering
from everalign.serving.gateway import Gateway
from everalign.serving.limits import aside, read_body
from everalign.serving.middleware import json_response
from everalign.serving.openapi import ANSWER, CHAT, MODE, body, replies
from everalign.serving.stream import PENDING
from everalign.serving.stream_response import Channel, cancel_on_disconnect, deliver
from everalign.serving.telemetry import CONTENT_TYPE

_FRESH_SECONDS = 10.0


class Catalogue:
    """The models of all upstreams, asked for anew every few seconds.

    Args:
        gateway: whose upstreams they are.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._known: dict[str, tuple[float, list[dict[str, Any]]]] = {}

    async def models(self) -> list[dict[str, Any]]:
        """Return them as clients know them; those of an upstream that fails are left out, unless all fail."""
        upstreams = self._gateway.upstreams
        found = await asyncio.gather(*(self._of(name) for name in upstreams), return_exceptions=True)
        failures = [one for one in found if isinstance(one, BaseException)]
        for failure in failures:
            if len(failures) == len(found) or not isinstance(failure, GatewayError):
                raise failure
        listed = []
        for name, models in zip(upstreams, found, strict=True):
            prefix = f"{name}/" if len(upstreams) > 1 else ""
            listed += [{**one, "id": prefix + one["id"]} for one in models] if isinstance(models, list) else []
        aligned = [{**one, "id": one["id"] + ALIGNED} for one in listed] if self._gateway.has_corrector else []
        return listed + aligned

    async def _of(self, name: str) -> list[dict[str, Any]]:
        asked, models = self._known.get(name, (-_FRESH_SECONDS, []))
        if time.monotonic() - asked > _FRESH_SECONDS:
            models = await self._gateway.upstreams[name].models()
            self._known[name] = time.monotonic(), models
        return models


def model_routes(gateway: Gateway) -> APIRouter:
    """Return the routes."""
    router, catalogue = APIRouter(), Catalogue(gateway)

    @router.get("/v1/models", responses=replies(429, 502, 503, 504), summary="List the models")
    async def models() -> Response:
        return json_response({"object": "list", "data": await catalogue.models()})

    @router.get("/v1/models/{model:path}", responses=replies(404, 429, 502, 503, 504), summary="Show one model")
    async def model(model: str) -> Response:
        for known in await catalogue.models():
            if known["id"] == model:
                return json_response(known)
        raise not_found(
            f"model {model[:100]!r}: there is none of that name; see /v1/models", "model_not_found", "model"
        )

    return router


_READY_SECONDS = 3.0


def status_routes(gateway: Gateway) -> APIRouter:
    """Return the routes; all but `/health` need a key."""
    router = APIRouter()

    @router.get("/health", responses=replies(), summary="Whether the process answers")
    async def health() -> Response:
        return json_response({"status": "ok"})

    @router.get("/ready", responses=replies(503), summary="Whether requests can be answered")
    async def ready() -> Response:
        reached = await asyncio.gather(*(_answers(one) for one in gateway.upstreams.values()))
        about = {
            "status": "ready" if any(reached) else "not ready",
            "upstreams": dict(zip(gateway.upstreams, reached, strict=True)),
            "corrector": gateway.corrections.version,
            "template": gateway.corrections.template,
            "circuits": gateway.circuits(),
            "store": gateway.keeper is not None,
        }
        return json_response(about, status=200 if any(reached) else 503)

    @router.get("/metrics", responses=replies(), summary="Counters for Prometheus")
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE)

    return router


async def _answers(upstream: Answering) -> bool:
    """Whether an upstream says anything but that it fails; one without a list of models is there too."""
    try:
        await asyncio.wait_for(upstream.models(), _READY_SECONDS)
    except GatewayError as error:
        return error.status < 500
    except asyncio.TimeoutError:
        return False
    return True


_STATUSES = (400, 404, 408, 409, 413, 415, 422, 429, 499, 502, 503, 504)


def chat_routes(gateway: Gateway) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        responses={200: ANSWER, **replies(*_STATUSES)},
        openapi_extra={**body(CHAT), "parameters": [MODE]},
        summary="Answer a conversation",
    )
    async def chat(request: Request) -> Response:
        ticket = gateway.limiter.enter(request.state.key_id)
        try:
            content = await read_body(request, gateway.settings.limits.body_bytes)
            headers = request.headers.items()
            key_id, model = request.state.key_id, request.state.deployment
            reading = partial(gateway.desk.call, content, headers, key_id, gateway.has_corrector, model)
            call = await aside(content, reading)
            if call.streams:
                return await cancel_on_disconnect(request.receive, _streamed(gateway, call, ticket.release))
            answering = complete(call, gateway.judge, gateway.recorder)
            answered = await cancel_on_disconnect(request.receive, answering)
        except BaseException:
            ticket.release()
            raise
        ticket.release()
        return json_response(answered.body, answered.headers)

    return router


async def _streamed(gateway: Gateway, call: ChatRequest, released: Callable[[], None]) -> Response:
    def write(channel: Channel) -> Coroutine[Any, Any, None]:
        return gateway.streams.write(call, channel)

    return await deliver(write, origin(call, known_before(call) or PENDING), gateway.settings.keepalive, released)
