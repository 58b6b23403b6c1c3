"""`GET /v1/models`: what the upstreams have, each also as `MODEL:aligned` where there is a corrector."""

import asyncio
import time
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from everalign.serving.errors import GatewayError, not_found
from everalign.serving.front import json_response
from everalign.serving.gateway import Gateway
from everalign.serving.openapi import replies
from everalign.serving.requests import ALIGNED

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
