"""What the gateway reads from answers: their choices, whole or from chunks, and the tokens they cost.

The same answer gives the same choices, whether it came whole or in chunks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WHOLE = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")
"""Finish reasons of a complete answer: OpenAI's, and those of other servers."""

CUT = ("length", "max_tokens", "MAX_TOKENS", "model_length")
"""Finish reasons of an answer cut at the token limit."""

_CALL = ("id", "type", "name", "arguments")


@dataclass
class Choice:
    """One choice of an answer, as far as its correction depends on it.

    Args:
        index: number of the choice.
        text: its content.
        refusal: its refusal, which OpenAI sends in a field of its own; empty for none.
        tools: whether it calls tools.
        audio: whether it has audio.
        logprobs: whether it has log-probabilities of its tokens.
        parts: whether its content is something other than text.
        finish_reason: why it ended.
        calls: tool calls by number, each with `id`, `type`, `name` and `arguments`.
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

    @property
    def is_text(self) -> bool:
        """Whether it has nothing but text, as far as it has come."""
        return not (self.tools or self.audio or self.logprobs or self.parts)

    def add(self, choice: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        """Add a whole choice and its message, or a chunk's choice and its delta."""
        text = content.get("content")
        if isinstance(text, str):
            self.pieces.append(text)
        elif text is not None:
            self.parts = True
        if isinstance(content.get("refusal"), str):
            self.refusals.append(content["refusal"])
        for number, call in enumerate(_list(content.get("tool_calls"))):
            # What cannot be read becomes a call without a name, which no rule lets pass.
            call = call if isinstance(call, dict) else {}
            index = call.get("index", number)
            known = self.calls.setdefault(index if isinstance(index, int) else number, dict.fromkeys(_CALL, ""))
            function = call.get("function")
            fields = {**call, **(function if isinstance(function, dict) else {})}
            for name in _CALL:
                if isinstance(fields.get(name), str):
                    known[name] += fields[name]
        self.tools |= bool(content.get("tool_calls") or content.get("function_call"))
        self.audio |= bool(content.get("audio"))
        self.logprobs |= bool(choice.get("logprobs"))
        reason = choice.get("finish_reason")
        self.finish_reason = reason if isinstance(reason, str) else self.finish_reason


class CompletionAccumulator:
    """Collects the choices and the usage of an answer, from the whole answer or from its chunks."""

    def __init__(self) -> None:
        self._choices: dict[int, Choice] = {}
        self.usage: dict[str, Any] | None = None

    def add(self, event: Mapping[str, Any]) -> bool:
        """Add a chunk, or the whole answer; returns False if one of its choices cannot be read."""
        usage = event.get("usage")
        self.usage = usage if isinstance(usage, dict) else self.usage
        for choice in _list(event.get("choices")):
            if not isinstance(choice, dict) or not isinstance(choice.get("index", 0), int):
                return False
            content = choice.get("message", choice.get("delta"))
            if content is None and "message" not in choice:
                content = {}
            if not isinstance(content, dict):
                return False
            index = choice.get("index", 0)
            self._choices.setdefault(index, Choice(index)).add(choice, content)
        return True

    @property
    def only(self) -> Choice | None:
        """The choice so far, its text in `pieces`; None if there is none yet, or more than one."""
        return next(iter(self._choices.values())) if len(self._choices) == 1 else None

    def choices(self) -> list[Choice]:
        """Return the choices so far, ordered by index."""
        for one in self._choices.values():
            one.text, one.refusal = "".join(one.pieces), "".join(one.refusals)
        return [self._choices[index] for index in sorted(self._choices)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
