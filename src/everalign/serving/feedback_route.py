"""`POST /v1/feedback`: rate, edit or comment on an answer."""

from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from everalign.errors import EveralignError
from everalign.serving.chat_request import read_json
from everalign.serving.errors import GatewayError, not_found, overloaded, refused
from everalign.serving.gateway import Gateway
from everalign.serving.limits import aside, read_body
from everalign.serving.middleware import json_response
from everalign.serving.routes import error_replies, json_body
from everalign.serving.store.records import MOST_TAGS, Feedback, UnknownExchange

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
    """Return the router of the feedback endpoint."""
    router = APIRouter()

    @router.post(
        "/v1/feedback",
        responses=error_replies(400, 404, 408, 413, 415, 429, 499, 503),
        openapi_extra=json_body(FeedbackBody),
        summary="Say what an answer is worth",
    )
    async def feedback(request: Request) -> Response:
        slot = gateway.limiter.enter(request.state.key_id)
        try:
            content = await read_body(request, _MOST_BYTES)
            said = await aside(content, lambda: read_feedback(read_json(content), request.state.key_id))
            return json_response({"id": said.exchange, "new": await store_feedback(gateway, said)})
        finally:
            slot.release()

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
    return Feedback(
        exchange=said.id,
        key_id=key_id,
        user=said.user,
        rating=said.rating,
        preferred=said.preferred,
        edited_text=said.edited_text,
        tags=tuple(said.tags),
        comment=said.comment,
        created=datetime.now(timezone.utc),
    )


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
        raise not_found(message, "unknown_exchange", "id") from None
    except (EveralignError, OSError, RuntimeError) as error:
        raise overloaded(f"the store cannot be written ({type(error).__name__})", "store_failed", status=503) from None
    gateway.metrics.feedback.labels(str(new).lower()).inc()
    return new
