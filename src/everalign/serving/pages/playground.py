"""`/`: ask, see what the corrector made of the answer, and say what it is worth; `/answers/ID`: the same, later."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from everalign.correction.word_diff import diff_html, word_diff
from everalign.errors import EveralignError
from everalign.serving.delivery import unless_gone
from everalign.serving.errors import GatewayError, not_found, overloaded, refused
from everalign.serving.exchanges import whole_answer
from everalign.serving.gateway import Gateway
from everalign.serving.json_size import aside
from everalign.serving.pages.answers import AnswerView, digest, view_of, view_of_kept
from everalign.serving.pages.forms import read_form
from everalign.serving.pages.rendering import Pages
from everalign.serving.requests import ALIGNED
from everalign.serving.routes_feedback import keep_feedback, read_feedback
from everalign.serving.routes_models import Catalogue
from everalign.serving.store.records import Exchange, Feedback

# An edited text of the greatest length, each letter of it written as %XX four times, and some more.
_MOST_BYTES = 4 << 20
_SENT_ALONG = ("user-agent", "accept-language")
_BLANK = {"model": "", "system": "", "question": ""}


@dataclass(frozen=True)
class Said:
    """Feedback on a page: what was sent, and what came of it.

    Args:
        fields: of the form, to be shown again.
        error: what is wrong with it, if anything is.
        words: what was kept, if it was.
        edit: the differences between the answer and its edited text; empty for none.
    """

    fields: Mapping[str, str]
    error: str | None = None
    words: tuple[str, ...] = ()
    edit: str = ""


class Playground:
    """What the routes do.

    Args:
        gateway: answers.
        pages: makes pages.
    """

    def __init__(self, gateway: Gateway, pages: Pages) -> None:
        self._gateway, self._pages = gateway, pages
        self._catalogue = Catalogue(gateway)

    @property
    def _mode(self) -> str:
        """Of what is asked here: as strict as the server is, and corrected where it can be."""
        if self._gateway.desk.mode == "strict":
            return "strict"
        return "correct" if self._gateway.has_corrector else "off"

    @property
    def _unkept(self) -> str | None:
        """Why nothing that is asked here can be judged; None where it can be."""
        if self._gateway.keeper is None:
            return "Nothing asked here is kept, and feedback is off: the gateway has no store (serve --store)."
        if self._gateway.settings.keep == "none":
            return "Nothing asked here is kept, and feedback is off: the gateway was told to keep none (serve --keep)."
        return None

    async def form(self, request: Request) -> Response:
        """The page with an empty form."""
        return await self._page(request, _BLANK)

    async def ask(self, request: Request) -> Response:
        """The page with an answer, or with what went wrong."""
        fields = dict(_BLANK)
        try:
            with self._place(request):
                fields |= await read_form(request, self._pages.sessions, self._gateway.settings.limits.body_bytes)
                view = await unless_gone(request.receive, self._answer(request, fields))
        except GatewayError as error:
            return await self._page(request, fields, error=error)
        return await self._page(request, fields, view=view)

    async def kept(self, request: Request, id: str) -> Response:
        """The page of an answer that the store has."""
        try:
            exchange = await self._exchange(request, id)
        except GatewayError as error:
            return await self._page(request, _BLANK, error=error)
        return await self._answer_page(request, exchange, Said({}))

    async def judge(self, request: Request, id: str) -> Response:
        """The page of an answer with what was said of it, kept in the store."""
        try:
            with self._place(request):
                exchange = await self._exchange(request, id)
                fields = await read_form(request, self._pages.sessions, _MOST_BYTES)
        except GatewayError as error:
            return await self._page(request, _BLANK, error=error)
        try:
            feedback = read_feedback(_content(id, fields), request.state.key_id)
            new = await keep_feedback(self._gateway, feedback)
        except GatewayError as error:
            return await self._answer_page(request, exchange, Said(fields, error=error.message), error.status)
        edit = feedback.edited_text
        marked = "" if edit is None else await asyncio.to_thread(_marked, exchange.returned, edit)
        return await self._answer_page(request, exchange, Said(fields, words=_words(feedback, new), edit=marked))

    @contextmanager
    def _place(self, request: Request) -> Iterator[None]:
        """A place among the requests under way; raises GatewayError where there is none."""
        ticket = self._gateway.limiter.enter(request.state.key_id)
        try:
            yield
        finally:
            ticket.release()

    async def _answer(self, request: Request, fields: Mapping[str, str]) -> AnswerView:
        if not fields["question"].strip():
            raise refused("the question is empty: write one", "question", "invalid_value")
        messages = [{"role": "user", "content": fields["question"]}]
        if fields["system"].strip():
            messages.insert(0, {"role": "system", "content": fields["system"]})
        body = {"model": fields["model"].strip(), "messages": messages, "store": True}
        headers = [(name, value) for name, value in request.headers.items() if name in _SENT_ALONG]
        content, headers = json.dumps(body).encode(), [*headers, ("x-everalign-mode", self._mode)]
        reading = partial(self._gateway.desk.call, content, headers, request.state.key_id, self._gateway.has_corrector)
        call = await aside(content, reading)
        answered = await whole_answer(call, self._gateway.judge, self._gateway.recorder)
        return await asyncio.to_thread(view_of, answered)

    async def _exchange(self, request: Request, id: str) -> Exchange:
        keeper = self._gateway.keeper
        try:
            found = None if keeper is None else await keeper.exchange(id, request.state.key_id)
        except (EveralignError, OSError, RuntimeError) as error:
            message = f"the store cannot be read ({type(error).__name__})"
            raise overloaded(message, "store_failed", status=503) from None
        if found is None:
            raise not_found("no answer of this name is kept for your key", "unknown_exchange")
        return found

    async def _answer_page(self, request: Request, exchange: Exchange, said: Said, status: int = 200) -> Response:
        view = await asyncio.to_thread(view_of_kept, exchange, self._gateway.desk.mode == "strict")
        values = {"view": view, "said": said, "unkept": None, "failed": None}
        return self._pages.page(request, "answer.html.j2", values, status)

    async def _page(
        self,
        request: Request,
        fields: Mapping[str, str],
        *,
        view: AnswerView | None = None,
        error: GatewayError | None = None,
    ) -> Response:
        models, trouble = await self._models()
        values = {
            "fields": fields,
            "models": models,
            "trouble": trouble,
            "view": view,
            "said": Said({}),
            "failed": None if error is None else error.message,
            "unkept": self._unkept,
            "mode": self._mode,
        }
        return self._pages.page(request, "playground.html.j2", values, 200 if error is None else error.status)

    async def _models(self) -> tuple[list[str], str | None]:
        """The upstreams' models, and why there are none; one can then be named by hand."""
        try:
            listed = await self._catalogue.models()
        except GatewayError as error:
            return [], error.message
        return [name for one in listed if not (name := str(one["id"])).endswith(ALIGNED)], None


def _content(id: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """A form as `POST /v1/feedback` has it; what was not filled in, and an answer that was not edited, is left out."""
    content: dict[str, Any] = {"id": id}
    rating = {"good": 1, "bad": -1}.get(fields.get("rating", ""))
    tags = [tag.strip() for tag in fields.get("tags", "").split(",") if tag.strip()]
    edited = fields.get("edited_text")
    given = {
        "rating": rating,
        "preferred": fields.get("preferred") or None,
        "edited_text": None if edited is None or digest(edited) == fields.get("digest") else edited,
        "tags": tags or None,
        "comment": fields.get("comment", "").strip() or None,
    }
    return content | {name: value for name, value in given.items() if value is not None}


def _marked(before: str, after: str) -> str:
    return diff_html(word_diff(before, after))


def _words(feedback: Feedback, new: bool) -> tuple[str, ...]:
    """What was kept, in words."""
    said = {
        "rated good": feedback.rating == 1,
        "rated bad": feedback.rating == -1,
        f"preferred: {feedback.preferred}": feedback.preferred is not None,
        "edited": feedback.edited_text is not None,
        f"tags: {', '.join(feedback.tags)}": bool(feedback.tags),
        "commented": feedback.comment is not None,
        "it takes the place of what you said before": not new,
    }
    return tuple(words for words, holds in said.items() if holds)


def playground_routes(gateway: Gateway, pages: Pages) -> APIRouter:
    """Return the routes."""
    router, playground = APIRouter(include_in_schema=False), Playground(gateway, pages)

    @router.get("/")
    async def form(request: Request) -> Response:
        return await playground.form(request)

    @router.post("/")
    async def ask(request: Request) -> Response:
        return await playground.ask(request)

    @router.get("/answers/{id}")
    async def kept(request: Request, id: str) -> Response:
        return await playground.kept(request, id)

    @router.post("/answers/{id}")
    async def judge(request: Request, id: str) -> Response:
        return await playground.judge(request, id)

    return router
