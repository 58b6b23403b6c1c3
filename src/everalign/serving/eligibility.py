"""Whether an answer is corrected: one decision, whether it is streamed or not. Pure functions.

A rule's name is the reason that is told in `x-everalign-correction: skipped; reason=...`. What strict mode, in which
nothing unchecked leaves, makes of it stands beside it.

| reason | when | strict |
|---|---|---|
| `json` | the request asks for JSON or another grammar | refused (400) |
| `logprobs` | it asks for log-probabilities, which a correction does not have | refused (400) |
| `audio` | it asks for audio | refused (400) |
| `tools` | strict only: it offers tools, whose calls nobody could check | refused (400) |
| `prefill` | its last message is the beginning of the answer | refused (400) |
| `background` | a response that is asked for in the background, and given later | refused (400) |
| `no_question` | it has no text that could be asked | refused (400) |
| `tool_calls` | the answer calls tools | refused (422) |
| `refusal` | the answer is a refusal in its own field | given as it is |
| `content` | its content is something else than text | refused (422) |
| `empty` | there is no text in it | given, empty |
| `finish_reason` | it ended in another way than by itself, such as `error`, or without one | refused (422) |
| `length` | it was cut at the limit of tokens | refused (422) |
| `content_filter` | the upstream's filter cut it | refused (422) |
| `too_long` | it is longer than the corrector is given | refused (422) |
| `unreadable` | it is no text that could be encoded | refused (422) |
"""

from collections.abc import Mapping, Sequence
from typing import Any

from everalign.data.messages import Message, checked_prompt
from everalign.data.rows import check_text
from everalign.errors import InputError
from everalign.serving.completion_json import CUT, WHOLE, Choice
from everalign.serving.errors import refused
from everalign.serving.settings import MODES, Mode

GRAMMARS = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "grammar",
    "json_schema",
)
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
GIVEN_IN_STRICT = ("refusal", "empty")
"""Reasons with which an answer leaves even in strict mode: there is nothing in it to be corrected."""


def chosen_mode(asked: str | None, default: Mode, aligned: bool, has_corrector: bool) -> Mode:
    """Return the mode of a request.

    Args:
        asked: its header, if it has one.
        default: the server's.
        aligned: whether it names `MODEL:aligned`.
        has_corrector: whether there is one.

    Raises:
        GatewayError: there is no such mode; it needs a corrector; or it is weaker than the server's `strict`.
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


def request_rule(body: Mapping[str, Any]) -> str | None:
    """Return why the answers to a request are not corrected, whatever they are; None where they may be.

    Besides these, a request without a question (`question_of`) is `no_question`.
    """
    form = body.get("response_format")
    if (isinstance(form, Mapping) and form.get("type") != "text") or any(body.get(name) for name in GRAMMARS):
        return "json"
    if body.get("logprobs") or body.get("top_logprobs"):
        return "logprobs"
    modalities = body.get("modalities")
    if body.get("audio") or (isinstance(modalities, list) and "audio" in modalities):
        return "audio"
    return "prefill" if body["messages"][-1].get("role") == "assistant" else None


def offers_tools(body: Mapping[str, Any]) -> bool:
    """Whether an answer may call tools."""
    offered = body.get("tools") or body.get("functions") or body.get("web_search_options") is not None
    return bool(offered) and "none" not in (body.get("tool_choice"), body.get("function_call"))


def why_not_corrected(choice: Choice, longest: int) -> str | None:
    """Return why an answer is not corrected; None if it is.

    Args:
        choice: the answer.
        longest: characters that the corrector is given.
    """
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
        "unreadable": not _is_text(choice.text),
    }
    return next((name for name, holds in rules.items() if holds), None)


def question_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...] | None:
    """Return a conversation as a corrector reads it: texts, without what else is in it; None where none is left.

    Pictures and the like are named in square brackets. What tools gave is told by the user.
    """
    found = []
    for message in messages:
        text = _text(message.get("content"))
        role = _ROLES.get(str(message.get("role")))
        if text.strip():
            found.append({"role": role or "user", "content": text if role else f"Result of a tool: {text}"})
    try:
        return tuple(checked_prompt(found, "messages", "answer")) if found else None  # type: ignore[arg-type]
    except InputError:
        return None


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(_part(part) for part in parts if isinstance(part, Mapping))


def _part(part: Mapping[str, Any]) -> str:
    text = part.get("text")
    return text if isinstance(text, str) else f"[{str(part.get('type', 'something'))[:30]}]"


def _is_text(text: str) -> bool:
    try:
        check_text(text, "answer")
    except InputError:
        return False
    return True
