"""The playground: ask a question, see the answer with its correction marked, and give feedback on it."""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from markupsafe import Markup, escape

from everalign.correction.edits import diff_html, word_diff
from everalign.errors import EveralignError
from everalign.serving.chat_request import ALIGNED, RequestContext
from everalign.serving.eligibility import question_of
from everalign.serving.errors import GatewayError, overloaded, refused
from everalign.serving.gateway import Completed, Gateway
from everalign.serving.limits import aside
from everalign.serving.pages.base import Pages, read_form
from everalign.serving.routes import LONGEST_EDIT, Catalogue, read_feedback, store_feedback, streamed
from everalign.serving.sse import data_frame, strict_json
from everalign.serving.store.records import Exchange
from everalign.serving.stream_response import FrameQueue, cancel_on_disconnect

# An edited text of the greatest length, with each letter as %XX four times, and the other fields.
_MOST_BYTES = 4 << 20
_FORWARDED_HEADERS = ("user-agent", "accept-language")
_BLANK = {"model": "", "system": "", "question": "", "history": ""}
_EVENTS = "text/event-stream"
_UNKNOWN = "–"
_REASONS = {
    "corrector_error": "the corrector failed",
    "corrector_timeout": "the corrector took too long",
    "corrector_down": "the corrector failed several times and gets no answers for a while",
    "queue_full": "too many answers wait for the corrector",
    "length": "the answer was cut at the limit of tokens",
    "content_filter": "the upstream's filter cut the answer",
    "too_long": "the answer is too long for the corrector",
    "refusal": "the upstream refused to answer",
    "empty": "there was nothing to correct",
    "gate": "the corrector finds it likely enough as it is",
    "not_better": "the correction was not found better",
    "unfinished": "the correction did not end",
    "echo": "the correction repeated its instructions",
    "growth": "the correction was much longer than the answer",
    "code": "the correction would have lost code",
    "url": "the correction would have lost a link",
    "repeat": "the correction repeated the question, or a line",
}


@dataclass(frozen=True)
class AnswerView:
    """An answer on a page.

    Args:
        id: of the exchange.
        question: (role, text) of each message.
        model: that answered.
        original: the upstream's text with removed words marked; None if it is not shown.
        returned: the text that the client got, with added words marked.
        text: the same without marks.
        verdict: what became of the answer, in a sentence.
        figures: names and values of what it cost.
        kept: whether it is in the store, so that it can get feedback.
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
        """Digest of the text, by which an edit that changes nothing is recognized."""
        return digest(self.text)

    @property
    def editable(self) -> bool:
        return len(self.text) <= LONGEST_EDIT


def digest(text: str) -> str:
    """Return a text's sha256; line ends do not count, since browsers change them."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return hashlib.sha256(lines.encode(errors="replace")).hexdigest()


def completed_view(completed: Completed) -> AnswerView:
    """Return the view of a new answer; blocks while long texts are compared."""
    request, summary = completed.request, completed.summary
    seconds = {
        "seconds in the corrector": completed.corrector_seconds or None,
        "seconds in the upstream": completed.upstream_seconds,
    }
    original, returned = _marked_sides(completed.original, completed.returned, summary.outcome, request.mode)
    return AnswerView(
        id=request.id,
        question=[(one["role"], one["content"]) for one in question_of(request.messages) or ()],
        model=request.model,
        original=original,
        returned=returned,
        text=completed.returned,
        verdict=_verdict(summary.outcome, summary.reason, request.mode),
        figures=figures(completed.usage, seconds, summary.version, summary.template),
        kept=bool(summary.stored),
    )


def stored_view(exchange: Exchange, strict: bool) -> AnswerView:
    """Return the view of an exchange from the store, without the upstream's text on a strict server; may block."""
    mode = "strict" if strict else exchange.mode
    original, returned = _marked_sides(exchange.original, exchange.returned, exchange.outcome, mode)
    return AnswerView(
        id=exchange.id,
        question=[(one["role"], one["content"]) for one in question_of(exchange.messages) or ()],
        model=exchange.model,
        original=original,
        returned=returned,
        text=exchange.returned,
        verdict=_verdict(exchange.outcome, exchange.reason, exchange.mode),
        figures=figures(exchange.usage, {}, exchange.corrector, exchange.template),
        kept=True,
    )


def _marked_sides(original: str, returned: str, outcome: str, mode: str) -> tuple[Markup | None, Markup]:
    """Return both texts with their changes marked; only the second in strict mode, which shows nothing uncorrected."""
    if outcome != "applied" or mode == "strict":
        return None, escape(returned)
    segments = word_diff(original, returned)
    first = diff_html(one for one in segments if one.kind != "added")
    return first, diff_html(one for one in segments if one.kind != "removed")


def _verdict(outcome: str, reason: str | None, mode: str) -> str:
    why = "" if reason is None else _REASONS.get(reason, reason.replace("_", " "))
    if outcome == "applied":
        hidden = " What the upstream said is not shown: nothing uncorrected leaves a strict server."
        if why:
            return f"The corrector changed the beginning of the answer; the rest is the upstream's: {why}."
        return f"The corrector changed the answer.{hidden if mode == 'strict' else ''}"
    if outcome == "unchanged":
        return f"The corrector left the answer as it was{f': {why}' if why else ''}."
    if mode in ("off", "shadow"):
        return "The upstream's answer as it is: nothing was corrected."
    return f"The upstream's answer as it is, uncorrected: {why or 'it was not to be corrected'}."


def figures(
    usage: Mapping[str, Any] | None, seconds: Mapping[str, float | None], version: str | None, template: str | None
) -> list[tuple[str, str]]:
    """Return names and values of what an answer cost, as far as they are known.

    The upstream's `usage` holds the corrector's as `corrector`; `version` and `template` are None if it was not asked.
    """
    usage = usage or {}
    found: list[tuple[str, str]] = []

    def add(name: str, tokens: Any) -> None:
        known = type(tokens) is int
        found.append((name, f"{tokens:,}".replace(",", "\u202f") if known else _UNKNOWN))

    own = usage.get("corrector")
    if version is not None and isinstance(own, Mapping):
        details = own.get("completion_tokens_details")
        draft = details if isinstance(details, Mapping) else {}
        add("corrector's tokens", own.get("completion_tokens"))
        add("draft tokens accepted", draft.get("accepted_prediction_tokens"))
        add("draft tokens rejected", draft.get("rejected_prediction_tokens"))
        add("forward passes", own.get("forward_passes"))
    found += [(name, f"{value:.3f}") for name, value in seconds.items() if value is not None]
    for name, key in (("tokens of the question", "prompt_tokens"), ("tokens of the answer", "completion_tokens")):
        if usage.get(key) is not None:
            add(name, usage[key])
    return found + [(name, value) for name, value in (("corrector", version), ("template", template)) if value]


@dataclass(frozen=True)
class Said:
    """Feedback on a page.

    Args:
        fields: of the form, to be shown again.
        error: what is wrong with them, if anything.
        words: what was stored, if it was.
        edit: the differences between the answer and its edited text; empty for none.
    """

    fields: Mapping[str, str]
    error: str | None = None
    words: tuple[str, ...] = ()
    edit: str = ""


class Playground:
    """The pages for asking and for feedback."""

    def __init__(self, gateway: Gateway, pages: Pages) -> None:
        self._gateway, self._pages = gateway, pages
        self._catalogue = Catalogue(gateway)

    async def form(self, request: Request) -> Response:
        return await self._page(request, _BLANK)

    async def ask(self, request: Request) -> Response:
        """Show the answer to a question, or why there is none; to a script that asks for events, while it comes."""
        fields, live = dict(_BLANK), _EVENTS in request.headers.get("accept", "")
        try:
            with self._gateway.limiter.enter(request.state.key_id) as place:
                fields |= await read_form(request, self._pages.sessions, self._gateway.settings.limits.body_bytes)
                context = await self._context(request, fields, live)
                if live:
                    work = partial(self._write, request, fields, context)
                    return await streamed(self._gateway, request, context, place, work)
                completed = await cancel_on_disconnect(request.receive, self._gateway.completions.complete(context))
        except GatewayError as error:
            return await self._page(request, fields, error=error)
        return await self._completed_page(request, fields, completed)

    async def _write(
        self, request: Request, fields: Mapping[str, str], context: RequestContext, queue: FrameQueue
    ) -> None:
        """Write an answer's chunks, and last the page with it."""
        completed = await self._gateway.completions.stream(context, queue, remembers=True)
        page = await self._completed_page(request, fields, completed)
        await queue.send(data_frame({"page": bytes(page.body).decode()}))

    async def _completed_page(self, request: Request, fields: Mapping[str, str], completed: Completed) -> Response:
        """Show an answer, in a form that goes on with the conversation."""
        view = await asyncio.to_thread(completed_view, completed)
        turns = [*_turns(fields), _turn("user", fields["question"]), _turn("assistant", completed.returned)]
        further = {**fields, "question": "", "history": json.dumps(turns)}
        return await self._page(request, further, view=view)

    async def stored(self, request: Request, id: str) -> Response:
        try:
            exchange = await self._exchange(request, id)
        except GatewayError as error:
            return await self._page(request, _BLANK, error=error)
        return await self._answer_page(request, exchange, Said({}))

    async def give_feedback(self, request: Request, id: str) -> Response:
        try:
            with self._gateway.limiter.enter(request.state.key_id):
                exchange = await self._exchange(request, id)
                fields = await read_form(request, self._pages.sessions, _MOST_BYTES)
        except GatewayError as error:
            return await self._page(request, _BLANK, error=error)
        try:
            # As a body of `POST /v1/feedback`, without empty fields and unchanged text.
            edited = fields.get("edited_text")
            given = {
                "rating": {"good": 1, "bad": -1}.get(fields.get("rating", "")),
                "preferred": fields.get("preferred") or None,
                "edited_text": None if edited is None or digest(edited) == fields.get("digest") else edited,
                "tags": [tag.strip() for tag in fields.get("tags", "").split(",") if tag.strip()] or None,
                "comment": fields.get("comment", "").strip() or None,
            }
            body = {"id": id, **{name: value for name, value in given.items() if value is not None}}
            feedback = read_feedback(body, request.state.key_id)
            new = await store_feedback(self._gateway, feedback)
        except GatewayError as error:
            return await self._answer_page(request, exchange, Said(fields, error=error.message), error.status)
        said = {
            "rated good": feedback.rating == 1,
            "rated bad": feedback.rating == -1,
            f"preferred: {feedback.preferred}": feedback.preferred is not None,
            "edited": feedback.edited_text is not None,
            f"tags: {', '.join(feedback.tags)}": bool(feedback.tags),
            "commented": feedback.comment is not None,
            "it replaces your earlier feedback": not new,
        }
        marked = ""
        if feedback.edited_text is not None:
            segments = await asyncio.to_thread(word_diff, exchange.returned, feedback.edited_text)
            marked = diff_html(segments)
        words = tuple(word for word, holds in said.items() if holds)
        return await self._answer_page(request, exchange, Said(fields, words=words, edit=marked))

    @property
    def _mode(self) -> str:
        """The mode of questions: as strict as the server, and corrected if there is a corrector."""
        if self._gateway.parser.mode == "strict":
            return "strict"
        return "correct" if self._gateway.has_corrector else "off"

    async def _context(self, request: Request, fields: Mapping[str, str], live: bool) -> RequestContext:
        if not fields["question"].strip():
            raise refused("the question is empty: write one", "question", "invalid_value")
        messages = [*_turns(fields), _turn("user", fields["question"])]
        if fields["system"].strip():
            messages.insert(0, _turn("system", fields["system"]))
        body = {"model": fields["model"].strip(), "messages": messages, "store": True, "stream": live}
        headers = [(name, value) for name, value in request.headers.items() if name in _FORWARDED_HEADERS]
        content, headers = json.dumps(body).encode(), [*headers, ("x-everalign-mode", self._mode)]
        parser = self._gateway.parser
        parse = partial(parser.parse, content, headers, request.state.key_id, self._gateway.has_corrector)
        return await aside(content, parse)

    async def _exchange(self, request: Request, id: str) -> Exchange:
        store, found = self._gateway.store, None
        try:
            if store is not None:
                found = await store.read(lambda store: store.exchange(id, request.state.key_id))
        except (EveralignError, OSError, RuntimeError) as error:
            message = f"the store cannot be read ({type(error).__name__})"
            raise overloaded(message, "store_failed", status=503) from None
        if found is None:
            raise refused("no answer with this id is stored for your key", code="unknown_exchange", status=404)
        return found

    async def _answer_page(self, request: Request, exchange: Exchange, said: Said, status: int = 200) -> Response:
        view = await asyncio.to_thread(stored_view, exchange, self._gateway.parser.mode == "strict")
        values = {"view": view, "said": said}
        return self._pages.page(request, "answer.html.j2", values, status)

    async def _page(
        self,
        request: Request,
        fields: Mapping[str, str],
        *,
        view: AnswerView | None = None,
        error: GatewayError | None = None,
    ) -> Response:
        models: list[str] = []
        trouble = not_stored = None
        try:
            ids = [str(one["id"]) for one in await self._catalogue.models()]
            models = [name for name in ids if not name.endswith(ALIGNED)]
        except GatewayError as no_models:
            trouble = no_models.message  # a model can still be named by hand
        off = "Nothing asked here is kept, and feedback is off: the gateway"
        if self._gateway.store is None:
            not_stored = f"{off} has no store (serve --store)."
        elif self._gateway.settings.keep == "none":
            not_stored = f"{off} was told to keep none (serve --keep)."
        turns: list[dict[str, str]] = []
        with suppress(GatewayError):  # said as the error already
            turns = _turns(fields)
        values = {
            "fields": fields,
            "turns": turns,
            "models": models,
            "trouble": trouble,
            "view": view,
            "said": Said({}),
            "failed": None if error is None else error.message,
            "not_stored": not_stored,
            "mode": self._mode,
        }
        return self._pages.page(request, "playground.html.j2", values, 200 if error is None else error.status)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _turns(fields: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the earlier messages of a form's conversation; raises GatewayError if they are not what a page sent."""
    if not fields["history"]:
        return []
    try:
        found = strict_json(fields["history"])
        roles = [one["role"] for one in found]
        if roles != ["user", "assistant"] * (len(found) // 2) or not all(type(one["content"]) is str for one in found):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise refused("the conversation cannot be read: begin a new one", "history", "invalid_value") from None
    return [_turn(one["role"], one["content"]) for one in found]


def playground_routes(gateway: Gateway, pages: Pages) -> APIRouter:
    """Return the routes of the playground and of stored answers."""
    router, playground = APIRouter(include_in_schema=False), Playground(gateway, pages)
    router.add_api_route("/", playground.form, methods=["GET"])
    router.add_api_route("/", playground.ask, methods=["POST"])
    router.add_api_route("/answers/{id}", playground.stored, methods=["GET"])
    router.add_api_route("/answers/{id}", playground.give_feedback, methods=["POST"])
    return router
