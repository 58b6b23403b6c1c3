"""`POST /v1/chat/completions`."""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from everalign.serving.delivery import Channel, deliver, unless_gone
from everalign.serving.exchanges import known_before, origin, whole_answer
from everalign.serving.front import json_response
from everalign.serving.gateway import Gateway
from everalign.serving.json_size import aside
from everalign.serving.limits import read_body
from everalign.serving.openapi import ANSWER, CHAT, MODE, body, replies
from everalign.serving.requests import ChatCall
from everalign.serving.streaming import PENDING

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
                return await unless_gone(request.receive, _streamed(gateway, call, ticket.release))
            answering = whole_answer(call, gateway.judge, gateway.recorder)
            answered = await unless_gone(request.receive, answering)
        except BaseException:
            ticket.release()
            raise
        ticket.release()
        return json_response(answered.body, answered.headers)

    return router


async def _streamed(gateway: Gateway, call: ChatCall, released: Callable[[], None]) -> Response:
    def write(channel: Channel) -> Coroutine[Any, Any, None]:
        return gateway.streams.write(call, channel)

    return await deliver(write, origin(call, known_before(call) or PENDING), gateway.settings.keepalive, released)
