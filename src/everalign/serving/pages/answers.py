"""An answer as a page shows it: what was asked, both texts with their differences, and what the correction cost."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from everalign.correction.word_diff import diff_html, word_diff
from everalign.serving.exchanges import Answered
from everalign.serving.policy import question_of
from everalign.serving.routes_feedback import LONGEST_EDIT
from everalign.serving.store.records import Exchange

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


def view_of(answered: Answered) -> AnswerView:
    """Return the view of an answer that was just given; blocks while long texts are compared."""
    call, found = answered.call, answered.found
    seconds = {
        "seconds in the corrector": answered.corrector_seconds if answered.corrector_seconds else None,
        "seconds in the upstream": answered.upstream_seconds,
    }
    return _view(
        call.id,
        call.body["messages"],
        str(call.body["model"]),
        _sides(answered.original, answered.returned, found.outcome, call.mode),
        answered.returned,
        _verdict(found.outcome, found.reason, call.mode),
        figures(answered.usage, seconds, found.version, found.template),
        answered.kept,
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
