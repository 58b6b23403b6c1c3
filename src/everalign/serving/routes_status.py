"""`GET /health`, `/ready` and `/metrics`."""

import asyncio

from fastapi import APIRouter
from fastapi.responses import Response

from everalign.serving.answering import Answering
from everalign.serving.errors import GatewayError
from everalign.serving.front import json_response
from everalign.serving.gateway import Gateway
from everalign.serving.metrics import CONTENT_TYPE
from everalign.serving.openapi import replies

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
