"""Chat completions, whole and in chunks: what is in their choices, and new ones made from corrected texts.

Pure functions over JSON. What they find in a whole answer and in the chunks of the same answer is the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WHOLE = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")
"""Reasons with which an answer has ended by itself: OpenAI's, and what other servers call it."""

CUT = ("length", "max_tokens", "MAX_TOKENS", "model_length")
"""Reasons with which it was cut at a limit of tokens."""

_KNOWN = (*WHOLE, *CUT, "content_filter", "tool_calls", "function_call")
_CALL = ("id", "type", "name", "arguments")
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
_TOP = ("created", "model", "system_fingerprint", "service_tier")


@dataclass
class Choice:
    """One of the answers, as far as it matters for its correction.

    Args:
        index: its number.
        text: its content.
        refusal: its refusal, in the field of its own that OpenAI has for them; empty for none.
        tools: whether it calls tools.
        audio: whether it speaks.
        logprobs: whether it has its tokens' log-probabilities.
        parts: whether its content is something else than text.
        finish_reason: why it ended.
        calls: of tools, by their number: `id`, `type`, `name` and `arguments`.
    """

    index: int
    text: str = ""
    refusal: str = ""
    tools: bool = False
    audio: bool = False
    logprobs: bool = False
    parts: bool = False
    finish_reason: str | None = None
    calls: dict[int, dict[str, str]] = field(default_factory=dict, repr=False, compare=False)
    pieces: list[str] = field(default_factory=list, repr=False, compare=False)
    refusals: list[str] = field(default_factory=list, repr=False, compare=False)

    def add(self, choice: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        """Take in a choice and its message, or what a chunk adds to it."""
        text = content.get("content")
        if isinstance(text, str):
            self.pieces.append(text)
        elif text is not None:
            self.parts = True
        if isinstance(content.get("refusal"), str):
            self.refusals.append(content["refusal"])
        for number, call in enumerate(_list(content.get("tool_calls"))):
            self._add_call(call, number)
        self.tools |= bool(content.get("tool_calls") or content.get("function_call"))
        self.audio |= bool(content.get("audio"))
        self.logprobs |= bool(choice.get("logprobs"))
        reason = choice.get("finish_reason")
        self.finish_reason = reason if isinstance(reason, str) else self.finish_reason

    def _add_call(self, call: Any, number: int) -> None:
        """Take in a call of a tool, or a part of one; what cannot be read is a call of nothing."""
        call = call if isinstance(call, dict) else {}
        index = call.get("index", number)
        known = self.calls.setdefault(index if isinstance(index, int) else number, dict.fromkeys(_CALL, ""))
        function = call.get("function")
        told = {**call, **(function if isinstance(function, dict) else {})}
        for name in _CALL:
            if isinstance(told.get(name), str):
                known[name] += told[name]


class CompletionAccumulator:
    """Takes in an answer, whole or chunk by chunk, and tells what is in it."""

    def __init__(self) -> None:
        self._found: dict[int, Choice] = {}
        self.usage: dict[str, Any] | None = None

    def add(self, event: Mapping[str, Any]) -> bool:
        """Take in a chunk, or the whole answer; False where something in it is no choice."""
        usage = event.get("usage")
        self.usage = usage if isinstance(usage, dict) else self.usage
        for choice in _list(event.get("choices")):
            content = _content(choice)
            if content is None:
                return False
            index = choice.get("index", 0)
            self._found.setdefault(index, Choice(index)).add(choice, content)
        return True

    def choices(self) -> list[Choice]:
        """Return the choices, in their order."""
        for one in self._found.values():
            one.text, one.refusal = "".join(one.pieces), "".join(one.refusals)
        return [self._found[index] for index in sorted(self._found)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _content(choice: Any) -> Mapping[str, Any] | None:
    if not isinstance(choice, dict) or not isinstance(choice.get("index", 0), int):
        return None
    found = choice.get("message", choice.get("delta"))
    return found if isinstance(found, dict) else {} if found is None and "message" not in choice else None


def counts_of(usage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return nothing but the numbers of a usage."""
    if usage is None:
        return None
    return {name: usage[name] for name in _COUNTS if isinstance(usage.get(name), int)}


@dataclass(frozen=True)
class CorrectorUsage:
    """What a corrector took; None where it does not tell.

    Args:
        tokens: that it wrote.
        accepted: tokens of the answer that it verified without writing them.
        rejected: tokens of the answer that were not the ones that it would have written.
        passes: forward passes.
    """

    tokens: int | None = None
    accepted: int | None = None
    rejected: int | None = None
    passes: int | None = None

    def __add__(self, other: "CorrectorUsage") -> "CorrectorUsage":
        return CorrectorUsage(*(_sum(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__))


def _sum(first: int | None, second: int | None) -> int | None:
    return second if first is None else first if second is None else first + second


def with_effort(usage: Mapping[str, Any] | None, effort: CorrectorUsage | None) -> dict[str, Any] | None:
    """Return an upstream's usage, with the corrector's own as `corrector`; the two are not summed."""
    if effort is None:
        return None if usage is None else dict(usage)
    details = {"accepted_prediction_tokens": effort.accepted, "rejected_prediction_tokens": effort.rejected}
    own = {"completion_tokens": effort.tokens, "completion_tokens_details": details, "forward_passes": effort.passes}
    return {**(usage or {}), "corrector": own}


def finish_reason(choice: Choice) -> str | None:
    """Why an answer ended, in a word that is known; never that it ended well where nobody said so."""
    return choice.finish_reason if choice.finish_reason in _KNOWN else None


def rewritten(choice: Choice, text: str | None, calls: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return a choice of a whole answer that has a text, a refusal, or calls, and nothing else of the original."""
    if calls:
        called = {"role": "assistant", "content": None, "refusal": None, "tool_calls": list(calls)}
        return {"index": choice.index, "message": called, "logprobs": None, "finish_reason": "tool_calls"}
    refusal = choice.refusal if text is None else None
    message = {"role": "assistant", "content": text, "refusal": refusal}
    return {"index": choice.index, "message": message, "logprobs": None, "finish_reason": finish_reason(choice)}


def head_of(events: Sequence[Mapping[str, Any]], id: str) -> dict[str, Any]:
    """Return what the chunks of an answer have in common."""
    first = events[0] if events else {}
    return {"id": id, "object": "chat.completion.chunk", **{name: first[name] for name in _TOP if name in first}}


def chunk(head: Mapping[str, Any], index: int, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
    """Return a chunk of one choice."""
    return {**head, "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}]}


def without_usage(event: dict[str, Any]) -> dict[str, Any] | None:
    """Return a chunk as it is where nobody asked for the usage; None for one that has nothing else."""
    if "usage" not in event:
        return event
    if event.get("usage") is not None and not event.get("choices"):
        return None
    return {name: value for name, value in event.items() if name != "usage"}
