"""One request from its question to its whole answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from everalign.serving.chat_request import ChatRequest
from everalign.serving.completion_json import Choice, CompletionAccumulator, counts_of, rewritten, with_effort
from everalign.serving.decide import Judge, Summary, Verdict, summary
from everalign.serving.errors import GatewayError, bad_upstream
from everalign.serving.headers import provenance
from everalign.serving.request_log import Recorder


def malformed() -> GatewayError:
    """An upstream's answer that is no chat completion."""
    return bad_upstream("the upstream's answer has no choices that could be read", "upstream_malformed")


def forwarded_headers(call: ChatRequest, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the upstream's headers for the client; in strict mode none, since they could hold anything."""
    return {} if call.mode == "strict" else dict(headers)


def origin(call: ChatRequest, found: Summary) -> dict[str, str]:
    """Return the headers that say what became of an answer."""
    return provenance(call.id, call.mode, found.outcome, found.reason, found.version, found.template, found.stored)


def report(call: ChatRequest, found: Summary) -> dict[str, Any]:
    """Return the same for an answer's own JSON."""
    about = {
        "mode": call.mode,
        "correction": found.outcome,
        "reason": found.reason,
        "corrector": found.version,
        "template": found.template,
    }
    return about if found.stored is None else {**about, "stored": found.stored}


def known_before(call: ChatRequest) -> Summary | None:
    """Return what becomes of an answer whatever it is; None for one that is to be seen first, as all are in strict."""
    if not call.corrects:
        return Summary("skipped", call.mode)
    return Summary("skipped", call.rule) if call.mode == "correct" and call.rule is not None else None


def said_stored(call: ChatRequest, found: Summary, kept: bool) -> Summary:
    """Return it with whether the exchange is kept, where somebody asked for that."""
    return replace(found, stored=kept) if call.wants_storing else found


def returned_text(choice: Choice, verdict: Verdict) -> str:
    """Return the text that the client gets."""
    return choice.text if verdict.text is None else verdict.text


def reported_usage(call: ChatRequest, usage: Mapping[str, Any] | None, found: Summary) -> dict[str, Any] | None:
    """Return the usage that the client is told: the upstream's, and the corrector's beside it."""
    return with_effort(counts_of(usage) if call.mode == "strict" else usage, found.effort)


@dataclass(frozen=True)
class Answered:
    """A request with its whole answer.

    Args:
        call: the request.
        body: the answer's JSON.
        headers: of the reply.
        original: the upstream's text; of several the first one's. It is not for the client.
        returned: the text in its place that the client gets.
        found: what became of it.
        usage: tokens, the corrector's among them.
        kept: whether the store has the exchange.
        upstream_seconds: spent in the upstream.
        corrector_seconds: spent in the corrector, waiting included.
    """

    call: ChatRequest
    body: dict[str, Any]
    headers: dict[str, str]
    original: str
    returned: str
    found: Summary
    usage: dict[str, Any] | None
    kept: bool
    upstream_seconds: float
    corrector_seconds: float


async def complete(call: ChatRequest, judge: Judge, recorder: Recorder) -> Answered:
    """Return a request's answer.

    Args:
        call: the request.
        judge: decides what becomes of the answer.
        recorder: remembers.

    Raises:
        GatewayError: there is none, or none that may leave.
    """
    with recorder.counted(call) as record:
        with record.in_upstream():
            answered = await call.upstream.chat(call.asked())
        gathering = CompletionAccumulator()
        if not gathering.add(answered.body) or not (choices := gathering.choices()):
            raise malformed()
        if call.corrects:
            with record.in_corrector():
                verdicts = await judge.judge(call, choices)
            found = summary(verdicts)
            usage = reported_usage(call, gathering.usage, found)
            body = {**_corrected(call, answered.body, choices, verdicts), "usage": usage}
            returned = returned_text(choices[0], verdicts[0])
        else:
            found, usage, returned = Summary("skipped", call.mode), gathering.usage, choices[0].text
            body = {**answered.body, "id": call.id}
        kept = await recorder.keep(call, choices, returned, found, usage)
        found = said_stored(call, found, kept)
        if call.corrects:
            body["everalign"] = report(call, found)
        if call.mode == "shadow":
            recorder.shadow(call, choices)
        record.end(found)
        headers = {**forwarded_headers(call, answered.headers), **origin(call, found)}
        spent = record.upstream_seconds, record.corrector_seconds
        return Answered(call, body, headers, choices[0].text, returned, found, usage, kept, *spent)


def _corrected(
    call: ChatRequest, answer: dict[str, Any], choices: Sequence[Choice], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Return an answer with its texts replaced; in strict mode nothing of the original is in it."""
    strict = call.mode == "strict"
    originals = {choice.get("index", 0): choice for choice in answer["choices"]}
    texts = [
        originals[choice.index]
        if verdict.text is None and not strict
        else rewritten(choice, verdict.text, verdict.calls)
        for choice, verdict in zip(choices, verdicts, strict=True)
    ]
    common = strict_head(call, answer) if strict else answer
    return {**common, "id": call.id, "object": "chat.completion", "choices": texts}


def strict_head(call: ChatRequest, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an answer has besides its choices, of which nothing is the upstream's own words."""
    created = answer.get("created")
    return {"id": call.id, "created": created if isinstance(created, int) else 0, "model": call.body["model"]}
