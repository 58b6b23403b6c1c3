"""Chat completions on their way to the client: as JSON or as chunks, relayed or written anew with corrected texts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from everalign.serving.chat_request import RequestContext
from everalign.serving.decide import Decision, Summary
from everalign.serving.eligibility import CUT, WHOLE, Choice
from everalign.serving.errors import bad_upstream
from everalign.serving.sse import DONE, data_frame
from everalign.serving.upstream import asks_usage

_KNOWN_REASONS = (*WHOLE, *CUT, "content_filter", "tool_calls", "function_call")
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
_COMMON = ("created", "model", "system_fingerprint", "service_tier")
_MALFORMED = "the upstream's answer has no choices that could be read"
_PIECE = 16  # characters, at least
_WORD = re.compile(r"\s+|\S{1,64}\s*")


class ChatAnswer:
    """A chat completion, read from the whole answer or from its chunks.

    If it is `relayed`, it passes as it is, and only its texts are of interest.
    """

    def __init__(self, request: RequestContext, relayed: bool) -> None:
        self.choices: list[Choice] = []
        self._request, self._relayed = request, relayed
        self._found: dict[int, Choice] = {}  # the choices so far, by index; their texts are in pieces
        self._usage: dict[str, Any] | None = None
        self._events: list[dict[str, Any]] = []  # none of a stream that is relayed
        self._common: dict[str, Any] = {}  # what all chunks have in common
        self._only: Choice | None = None  # the choice whose text `new_text` returns
        self._taken = 0  # pieces of it that were returned
        self._begun = False  # whether the only choice's text has begun to leave

    def add(self, event: dict[str, Any]) -> None:
        """Add the whole answer, or a chunk of it; raises GatewayError if it cannot be read."""
        usage, choices = event.get("usage"), event.get("choices")
        self._usage = usage if isinstance(usage, dict) else self._usage
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict) or not isinstance(choice.get("index", 0), int):
                raise bad_upstream(_MALFORMED, "upstream_malformed")
            # A chunk may leave out its delta, but a whole choice has a message.
            content = choice.get("message", choice.get("delta"))
            if content is None and "message" not in choice:
                content = {}
            if not isinstance(content, dict):
                raise bad_upstream(_MALFORMED, "upstream_malformed")
            index = choice.get("index", 0)
            self._found.setdefault(index, Choice(index)).add(choice, content)
        if not (self._relayed and self._request.streams):
            self._events.append(event)

    def new_text(self) -> str:
        """Return what came of the text of the only choice since the last call; nothing once it is not text alone."""
        if len(self._found) != 1:
            return ""
        (only,) = self._found.values()
        if not only.is_text:
            return ""
        new, self._taken, self._only = "".join(only.pieces[self._taken :]), len(only.pieces), only
        return new

    def end(self) -> None:
        """Find the choices, ordered by index; raises GatewayError if there are none."""
        for one in self._found.values():
            one.text, one.refusal = "".join(one.pieces), "".join(one.refusals)
        self.choices = [self._found[index] for index in sorted(self._found)]
        if self._relayed and self._request.streams:
            return
        if not self.choices:
            raise bad_upstream(_MALFORMED, "upstream_malformed")
        self._set_common()

    def check_begun(self) -> None:
        """Raise GatewayError if the text that began to leave before the end is not the only one."""
        if self._begun and len(self.choices) > 1:
            raise bad_upstream("the upstream sends several answers and was asked for one", "upstream_malformed")

    def _set_common(self) -> None:
        first = self._events[0]
        self._common = {"id": self._request.id, **{name: first[name] for name in _COMMON if name in first}}
        if self._request.mode == "strict":
            self._common = _strict_common(self._request, first)
        self._common["object"] = "chat.completion.chunk"

    @property
    def usage(self) -> dict[str, Any] | None:
        """The upstream's usage; in strict mode only its numbers."""
        if self._usage is None or self._request.mode != "strict":
            return self._usage
        return {name: self._usage[name] for name in _COUNTS if isinstance(self._usage.get(name), int)}

    def unchanged(self) -> dict[str, Any]:
        """Return the whole answer as the upstream sent it, with the id of the exchange."""
        return {**self._events[0], "id": self._request.id}

    def corrected(
        self, decisions: Sequence[Decision], summary: Summary, usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return the whole answer with its texts replaced; in strict mode nothing else of the original is in it."""
        original, strict = self._events[0], self._request.mode == "strict"
        by_index = {choice.get("index", 0): choice for choice in original["choices"]}
        choices = []
        for choice, decision in zip(self.choices, decisions, strict=True):
            if decision.text is None and not strict:
                choices.append(by_index[choice.index])
                continue
            message: dict[str, Any] = {"role": "assistant", "content": decision.text, "refusal": None}
            reason = _finish_reason(choice)
            if decision.calls:
                message, reason = {**message, "content": None, "tool_calls": list(decision.calls)}, "tool_calls"
            elif decision.text is None:
                message["refusal"] = choice.refusal
            choices.append({"index": choice.index, "message": message, "logprobs": None, "finish_reason": reason})
        return {
            **(_strict_common(self._request, original) if strict else original),
            "id": self._request.id,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage,
            "everalign": summary.report(self._request),
        }

    def live(self, text: str, opens: bool) -> bytes:
        """Return the chunks of a piece of a single corrected text, and with the first piece those before it.

        The answer need not have ended.
        """
        choice = self._only or self.choices[0]
        if opens:
            self._begun = True
            self._set_common()
        opening = [self._chunk(choice, {"role": "assistant", "content": ""})] if opens else []
        return self._frames([*opening, *self._text_chunks(choice, text)])

    def remaining(
        self, decisions: Sequence[Decision], summary: Summary, usage: dict[str, Any] | None, written: str
    ) -> bytes:
        """Return all chunks but those of the text that is `written` already."""
        if written:
            (choice,), (decision,) = self.choices, decisions
            chunks = self._text_chunks(choice, decision.returned(choice)[len(written) :])
            chunks.append(self._chunk(choice, {}, _finish_reason(choice)))
        else:
            chunks = self._all_chunks(decisions)
        chunks[-1] = {**chunks[-1], "everalign": summary.report(self._request)}
        if asks_usage(self._request.payload) and usage is not None:
            chunks.append({**self._common, "choices": [], "usage": usage})
        return self._frames(chunks) + DONE

    def _all_chunks(self, decisions: Sequence[Decision]) -> list[dict[str, Any]]:
        pairs = list(zip(self.choices, decisions, strict=True))
        strict = self._request.mode == "strict"
        unchanged = {choice.index for choice, decision in pairs if decision.text is None and not strict}
        chunks = []
        for event in self._events if unchanged else ():
            choices = [choice for choice in event.get("choices") or () if choice.get("index", 0) in unchanged]
            if choices:
                plain = {name: value for name, value in event.items() if name != "usage"}
                chunks.append({**plain, "id": self._request.id, "choices": choices})
        for choice, decision in pairs:
            if decision.calls:
                calls = [{"index": i, **one} for i, one in enumerate(decision.calls)]
                chunks.append(self._chunk(choice, {"role": "assistant", "content": None, "tool_calls": calls}))
                chunks.append(self._chunk(choice, {}, "tool_calls"))
            elif choice.index not in unchanged:
                chunks.append(self._chunk(choice, {"role": "assistant", "content": ""}))
                if decision.text is None:
                    chunks.append(self._chunk(choice, {"refusal": choice.refusal}))
                else:
                    chunks += self._text_chunks(choice, decision.text)
                chunks.append(self._chunk(choice, {}, _finish_reason(choice)))
        return chunks

    def _text_chunks(self, choice: Choice, text: str) -> list[dict[str, Any]]:
        """Return a text in chunks of a few words, which clients show one after the other."""
        chunks, begun = [], 0
        for word in _WORD.finditer(text):
            if word.end() - begun >= _PIECE or word.end() == len(text):
                chunks.append(self._chunk(choice, {"content": text[begun : word.end()]}))
                begun = word.end()
        return chunks

    def _chunk(self, choice: Choice, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        only = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._common, "choices": [only]}

    def _frames(self, chunks: Sequence[dict[str, Any]]) -> bytes:
        # A client that asked for the usage gets it as null in every other chunk.
        none = {"usage": None} if asks_usage(self._request.payload) else {}
        return b"".join(data_frame({**none, **chunk}) for chunk in chunks)


class ChatRelay:
    """Chunks of an answer that passes as it is, with the id of the exchange.

    The chunks at the end are held back if they have to say whether the exchange is stored, which is known only after
    them. `drops_usage` is whether the upstream was asked for the usage although the client did not ask for it.
    """

    def __init__(self, request: RequestContext, drops_usage: bool) -> None:
        self._request, self._drops_usage = request, drops_usage
        self._reports = request.corrects or request.reports_storage
        choices = request.payload.get("n")
        self._running = choices if isinstance(choices, int) else 1  # choices that have not ended
        self._held: list[dict[str, Any]] = []

    def frames(self, events: Sequence[dict[str, Any]]) -> bytes:
        """Return what may be sent now."""
        found = list[dict[str, Any]]()
        for event in events:
            if self._drops_usage and "usage" in event:
                if event["usage"] is not None and not event.get("choices"):
                    continue  # a chunk with nothing else
                event = {name: value for name, value in event.items() if name != "usage"}
            self._running -= sum(choice.get("finish_reason") is not None for choice in event.get("choices") or ())
            ends = self._reports and (self._held or self._running <= 0)
            (self._held if ends else found).append({**event, "id": self._request.id})
        if self._held and not self._request.reports_storage:
            found += self._release(Summary("skipped", self._request.rule))
        return b"".join(map(data_frame, found))

    def rest(self, summary: Summary) -> bytes:
        """Return what was held back, with the outcome, and the end."""
        if not self._held and self._request.reports_storage:  # no choice has said that it ended
            common = _strict_common(self._request, {})
            self._held = [{**common, "object": "chat.completion.chunk", "choices": []}]
        return b"".join(map(data_frame, self._release(summary) if self._held else [])) + DONE

    def _release(self, summary: Summary) -> list[dict[str, Any]]:
        first, *others = self._held
        self._held, self._reports = [], False
        return [{**first, "everalign": summary.report(self._request)}, *others]


def _finish_reason(choice: Choice) -> str | None:
    """Return a finish reason that is known: an unknown one could be any text, and none must not become `stop`."""
    return choice.finish_reason if choice.finish_reason in _KNOWN_REASONS else None


def _strict_common(request: RequestContext, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an answer has besides its choices, without any words of the upstream."""
    created = answer.get("created")
    return {"id": request.id, "created": created if isinstance(created, int) else 0, "model": request.model}
