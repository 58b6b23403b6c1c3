"""What the gateway reads from answers, and the rules that decide whether one may be corrected.

An answer's choices are the same whether it came whole or in chunks. The rules are pure functions over the request and
these choices.

A rule's name is the reason in `x-everalign-correction: skipped; reason=...`. Strict mode lets nothing unchecked
through, so most rules refuse there:

| reason | when | strict |
|---|---|---|
| `json` | the request asks for JSON or another grammar | refused (400) |
| `logprobs` | it asks for log-probabilities, which a correction does not have | refused (400) |
| `audio` | it asks for audio | refused (400) |
| `tools` | strict only: it offers tools, whose calls cannot be checked | refused (400) |
| `prefill` | its last message is the beginning of the answer | refused (400) |
| `background` | it asks for a response in the background, to be fetched later | refused (400) |
| `no_question` | it has no text to be answered | refused (400) |
| `tool_calls` | the answer calls tools | refused (422) |
| `refusal` | the answer is a refusal in its own field | returned as it is |
| `content` | its content is something other than text | refused (422) |
| `empty` | it has no text | returned, empty |
| `finish_reason` | it is another one, such as `error`, or missing | refused (422) |
| `length` | it was cut at a limit of tokens | refused (422) |
| `content_filter` | the upstream's filter cut it | refused (422) |
| `too_long` | it is longer than the corrector accepts | refused (422) |
| `unreadable` | it is not text that can be encoded | refused (422) |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from everalign.data.messages import Message, checked_prompt
from everalign.data.rows import check_text
from everalign.errors import InputError
from everalign.serving.errors import refused
from everalign.serving.settings import MODES, Mode

Api = Literal["chat", "responses"]

GRAMMARS = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "grammar",
    "json_schema",
)
"""Fields with which servers other than OpenAI's constrain an answer."""

GIVEN_IN_STRICT = ("refusal", "empty")
"""Reasons for which strict mode still returns an answer: it has no text that a corrector could check."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

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
        calls = content.get("tool_calls")
        for number, call in enumerate(calls if isinstance(calls, list) else ()):
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


def chosen_mode(asked: str | None, default: Mode, aligned: bool, has_corrector: bool) -> Mode:
    """Return the mode of a request that `asked` for one in its header, or named an `aligned` model.

    Raises:
        GatewayError: the mode is unknown, needs a corrector, or would weaken a strict server.
    """
    if asked is not None and asked not in MODES:
        raise refused(f"x-everalign-mode: must be one of {', '.join(MODES)}", "x-everalign-mode", "unknown_mode")
    if asked is not None and default == "strict" and asked != "strict":
        message = f"x-everalign-mode: this server is strict, which a request cannot weaken to {asked!r}; leave it out"
        raise refused(message, "x-everalign-mode", "mode_refused")
    weak = aligned and default in ("off", "shadow")
    mode = next(known for known in MODES if known == (asked or ("correct" if weak else default)))
    if mode != "off" and not has_corrector:
        raise refused(f"mode {mode!r}: this server has no corrector", "x-everalign-mode", "no_corrector")
    return mode


def request_rule(api: Api, body: Mapping[str, Any], form: Any) -> str | None:
    """Return why no answer to a request can be corrected; None if that depends on the answer."""
    include, modalities = body.get("include"), body.get("modalities")
    wants_json = isinstance(form, Mapping) and form.get("type") != "text"
    if wants_json or any(body.get(name) for name in GRAMMARS):
        return "json"
    if body.get("logprobs") or body.get("top_logprobs"):
        return "logprobs"
    if isinstance(include, list) and "message.output_text.logprobs" in include:
        return "logprobs"
    if body.get("audio") or (isinstance(modalities, list) and "audio" in modalities):
        return "audio"
    if api == "responses":
        return "background" if body.get("background") else None
    return "prefill" if body["messages"][-1].get("role") == "assistant" else None


def offers_tools(body: Mapping[str, Any]) -> bool:
    """Whether an answer may call tools."""
    offered = body.get("tools") or body.get("functions") or body.get("web_search_options") is not None
    return bool(offered) and "none" not in (body.get("tool_choice"), body.get("function_call"))


def why_not_corrected(choice: Choice, longest: int) -> str | None:
    """Return why an answer of one choice cannot be corrected; None if it can."""
    rules = {
        "tool_calls": choice.tools,
        "audio": choice.audio,
        "logprobs": choice.logprobs,
        "content": choice.parts,
        "content_filter": choice.finish_reason == "content_filter" and bool(choice.text.strip()),
        "finish_reason": choice.finish_reason not in (*WHOLE, *CUT, "content_filter"),
        "refusal": bool(choice.refusal) and not choice.text.strip(),
        "empty": not choice.text.strip(),
        "length": choice.finish_reason in CUT,
        "too_long": len(choice.text) > longest,
    }
    if reason := next((name for name, holds in rules.items() if holds), None):
        return reason
    try:
        check_text(choice.text, "answer")
    except InputError:
        return "unreadable"
    return None


def question_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...] | None:
    """Return a conversation's texts as the corrector reads them; None if it has none.

    Images and other parts are named in square brackets. Results of tools become user messages.
    """
    found = []
    for message in messages:
        content, role = message.get("content"), _ROLES.get(str(message.get("role")))
        text = content if isinstance(content, str) else ""
        if isinstance(content, list):
            parts = [part for part in content if isinstance(part, Mapping)]
            text = "\n".join(
                part["text"] if isinstance(part.get("text"), str) else f"[{str(part.get('type', 'something'))[:30]}]"
                for part in parts
            )
        if text.strip():
            found.append({"role": role or "user", "content": text if role else f"Result of a tool: {text}"})
    try:
        return tuple(checked_prompt(found, "messages", "answer")) if found else None  # type: ignore[arg-type]
    except InputError:
        return None
