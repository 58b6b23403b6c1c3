"""An answer as a page shows it: what was asked, both texts with their differences, and what the correction cost."""

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from markupsafe import Markup, escape

from everalign.correction.edits import diff_html, word_diff
from everalign.errors import EveralignError
from everalign.serving.chat_request import ALIGNED
from everalign.serving.complete import Completed
from everalign.serving.eligibility import question_of
from everalign.serving.errors import GatewayError, not_found, overloaded, refused
from everalign.serving.feedback_route import LONGEST_EDIT, read_feedback, store_feedback
from everalign.serving.gateway import Gateway
from everalign.serving.limits import aside
from everalign.serving.pages.base import Pages, read_form
from everalign.serving.routes import Catalogue
from everalign.serving.store.records import Exchange, Feedback
from everalign.serving.stream_response import cancel_on_disconnect

_UNKNOWN = "–"
_REASONS = {
    "corrector_error": "the corrector failed",
    "corrector_timeout": "the corrector took too long",
    "corrector_down": "the corrector failed several times and is left alone for a while",
    "queue_full": "too many answers wait for the corrector",
    "length": "the answer was cut at the limit of tokens",
    "content_filter": "the upstream's filter cut the answer",
    "too_long": "the answer is longer than the corrector is given",
    "refusal": "the upstream refused to answer",
    "empty": "there was nothing to correct",
    "gate": "the corrector finds it likely enough as it is",
    "not_better": "the correction was not found better",
    "unfinished": "the correction did not come to an end",
    "echo": "the correction repeated its instructions",
    "growth": "the correction grew out of bounds",
    "code": "the correction would have lost code",
    "url": "the correction would have lost a link",
}


@dataclass(frozen=True)
class AnswerView:
    """An answer on a page.

    Args:
        id: of the exchange.
        question: roles and texts.
        model: that answered.
        original: the upstream's text with what was taken out marked; None where there is none to show beside.
        returned: what the client got, with what was put in marked.
        text: the same without marks.
        verdict: what became of the answer, in a sentence.
        figures: names and values of what it took.
        kept: whether the store has it, so that it can be judged.
    """

    id: str
    question: Sequence[tuple[str, str]]
    model: str
    original: Markup | None
    returned: Markup
    text: str
    verdict: str
    figures: Sequence[tuple[str, str]]
    kept: bool

    @property
    def digest(self) -> str:
        """Names the text, so that an edit that changes nothing is known."""
        return digest(self.text)

    @property
    def editable(self) -> bool:
        """Whether it is short enough to be edited."""
        return len(self.text) <= LONGEST_EDIT


def digest(text: str) -> str:
    """Return 64 hexadecimal digits that name a text; the same as it stands here and as a browser sends it back."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return hashlib.sha256(lines.encode(errors="replace")).hexdigest()


def view_of(answered: Completed) -> AnswerView:
    """Return the view of an answer that was just given; blocks while long texts are compared."""
    request, found = answered.request, answered.summary
    seconds = {
        "seconds in the corrector": answered.corrector_seconds if answered.corrector_seconds else None,
        "seconds in the upstream": answered.upstream_seconds,
    }
    return _view(
        request.id,
        request.messages,
        request.model,
        _sides(answered.original, answered.returned, found.outcome, request.mode),
        answered.returned,
        _verdict(found.outcome, found.reason, request.mode),
        figures(answered.usage, seconds, found.version, found.template),
        bool(found.stored),
    )


def view_of_kept(exchange: Exchange, strict: bool) -> AnswerView:
    """Return the view of an answer that the store has; blocks while long texts are compared.

    Args:
        exchange: from the store.
        strict: whether this server gives nothing uncorrected.
    """
    mode = "strict" if strict else exchange.mode
    return _view(
        exchange.id,
        exchange.messages,
        exchange.model,
        _sides(exchange.original, exchange.returned, exchange.outcome, mode),
        exchange.returned,
        _verdict(exchange.outcome, exchange.reason, exchange.mode),
        figures(exchange.usage, {}, exchange.corrector, exchange.template),
        True,
    )


def _view(
    id: str,
    messages: Sequence[Mapping[str, Any]],
    model: str,
    sides: tuple[Markup | None, Markup],
    text: str,
    verdict: str,
    found: Sequence[tuple[str, str]],
    kept: bool,
) -> AnswerView:
    question = [(one["role"], one["content"]) for one in question_of(messages) or ()]
    return AnswerView(id, question, model, *sides, text, verdict, found, kept)


def _sides(original: str, returned: str, outcome: str, mode: str) -> tuple[Markup | None, Markup]:
    """Both texts with their changes marked; in strict mode, where nothing uncorrected leaves, the second alone."""
    if outcome != "applied" or mode == "strict":
        return None, escape(returned)
    segments = word_diff(original, returned)
    first = diff_html(one for one in segments if one.kind != "added")
    return first, diff_html(one for one in segments if one.kind != "removed")


def _verdict(outcome: str, reason: str | None, mode: str) -> str:
    why = "" if reason is None else _REASONS.get(reason, reason.replace("_", " "))
    if outcome == "applied":
        hidden = " What the upstream said is not shown: nothing uncorrected leaves a strict server."
        return f"The corrector changed the answer.{hidden if mode == 'strict' else ''}"
    if outcome == "unchanged":
        return f"The corrector left the answer as it was{f': {why}' if why else ''}."
    if mode in ("off", "shadow"):
        return "The upstream's answer as it is: nothing was corrected."
    return f"The upstream's answer as it is, uncorrected: {why or 'it was not to be corrected'}."


def figures(
    usage: Mapping[str, Any] | None, seconds: Mapping[str, float | None], version: str | None, template: str | None
) -> list[tuple[str, str]]:
    """Return names and values of what an answer took; those that nobody told are left out.

    Args:
        usage: the upstream's tokens, with the corrector's as `corrector`.
        seconds: by name; None where there were none.
        version: of the corrector; None where none was asked.
        template: that it read.
    """
    told = usage or {}
    found = {"tokens of the question": told.get("prompt_tokens"), "tokens of the answer": told.get("completion_tokens")}
    own = told.get("corrector")
    effort: dict[str, Any] = {}
    if version is not None and isinstance(own, Mapping):
        details = own.get("completion_tokens_details")
        draft = details if isinstance(details, Mapping) else {}
        effort = {
            "corrector's tokens": own.get("completion_tokens"),
            "draft tokens accepted": draft.get("accepted_prediction_tokens"),
            "draft tokens rejected": draft.get("rejected_prediction_tokens"),
            "forward passes": own.get("forward_passes"),
        }
    names = [("corrector", version), ("template", template)]
    return [
        *((name, _number(value)) for name, value in effort.items()),
        *((name, f"{value:.3f}") for name, value in seconds.items() if value is not None),
        *((name, _number(value)) for name, value in found.items() if value is not None),
        *((name, value) for name, value in names if value is not None),
    ]


def _number(value: Any) -> str:
    return f"{value:,}".replace(",", "\u202f") if type(value) is int else _UNKNOWN


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
        if self._gateway.parser.mode == "strict":
            return "strict"
        return "correct" if self._gateway.has_corrector else "off"

    @property
    def _unkept(self) -> str | None:
        """Why nothing that is asked here can be judged; None where it can be."""
        if self._gateway.store is None:
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
                view = await cancel_on_disconnect(request.receive, self._answer(request, fields))
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
            new = await store_feedback(self._gateway, feedback)
        except GatewayError as error:
            return await self._answer_page(request, exchange, Said(fields, error=error.message), error.status)
        edit = feedback.edited_text
        marked = "" if edit is None else await asyncio.to_thread(_marked, exchange.returned, edit)
        return await self._answer_page(request, exchange, Said(fields, words=_words(feedback, new), edit=marked))

    @contextmanager
    def _place(self, request: Request) -> Iterator[None]:
        """A place among the requests under way; raises GatewayError where there is none."""
        slot = self._gateway.limiter.enter(request.state.key_id)
        try:
            yield
        finally:
            slot.release()

    async def _answer(self, request: Request, fields: Mapping[str, str]) -> AnswerView:
        if not fields["question"].strip():
            raise refused("the question is empty: write one", "question", "invalid_value")
        messages = [{"role": "user", "content": fields["question"]}]
        if fields["system"].strip():
            messages.insert(0, {"role": "system", "content": fields["system"]})
        body = {"model": fields["model"].strip(), "messages": messages, "store": True}
        headers = [(name, value) for name, value in request.headers.items() if name in _SENT_ALONG]
        content, headers = json.dumps(body).encode(), [*headers, ("x-everalign-mode", self._mode)]
        reading = partial(
            self._gateway.parser.parse, content, headers, request.state.key_id, self._gateway.has_corrector
        )
        context = await aside(content, reading)
        answered = await self._gateway.completions.complete(context)
        return await asyncio.to_thread(view_of, answered)

    async def _exchange(self, request: Request, id: str) -> Exchange:
        keeper = self._gateway.store
        try:
            found = None if keeper is None else await keeper.exchange(id, request.state.key_id)
        except (EveralignError, OSError, RuntimeError) as error:
            message = f"the store cannot be read ({type(error).__name__})"
            raise overloaded(message, "store_failed", status=503) from None
        if found is None:
            raise not_found("no answer of this name is kept for your key", "unknown_exchange")
        return found

    async def _answer_page(self, request: Request, exchange: Exchange, said: Said, status: int = 200) -> Response:
        view = await asyncio.to_thread(view_of_kept, exchange, self._gateway.parser.mode == "strict")
        values = {"view": view, "said": said, "store_failures": None, "failed": None}
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
