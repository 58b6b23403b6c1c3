"""Chat messages, and the prompts and completions that are made of them, as records hold them.

A message has what a chat template may read: `role` and `content`, and beside them `name`, `tool_calls`, `tool_call_id`,
`reasoning_content`, `thinking`, or whatever else the user's template asks for. Nothing of it is altered. What is no
text, such as pictures, cannot be learned and is refused by name.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from everalign.data.rows import check_text, kind
from everalign.errors import InputError

Message = dict[str, Any]
"""A chat message: `role` (one of `ROLES`), `content` (text, or a list of text parts), and what else it has."""

Completion = str | tuple[Message, ...]
"""What follows a prompt: the text of the assistant's message; or messages, where there is more to it than a text."""

Prompt = str | Sequence[Message]
"""What an answer follows: text that it continues, or messages that end before the assistant speaks."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
# A tool may return nothing, and many datasets have a system message for every row, whatever it says.
_MAY_BE_EMPTY = ("system", "developer", "tool")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Told by many exporters of every message, and by no template.
_BOOKKEEPING = ("id", "message_id", "uuid", "timestamp", "created_at", "metadata")
# What a call of the template is made of, and no variable of it.
_RESERVED = (
    "conversation",
    "messages",
    "tools",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)

PROMPT_COLUMNS = ("tools", "chat_template_kwargs", *_MEDIA)
"""Columns that may stand beside a prompt: what its template renders with it, and what is refused."""


@dataclass(frozen=True)
class ChatPrompt(Sequence[Message]):
    """Messages with what the chat template renders beside them; a sequence of its messages.

    Args:
        messages: they end before the assistant speaks.
        tools: what the model may call, as JSON schemas.
        chat_template_kwargs: variables of the template, such as `enable_thinking`; or `chat_template`, the name of one
            of the tokenizer's templates.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def columns(self) -> dict[str, Any]:
        """What stands beside the messages, as the columns of a file."""
        beside = {"tools": list(self.tools), "chat_template_kwargs": dict(self.chat_template_kwargs)}
        return {name: value for name, value in beside.items() if value}

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Message, ...]: ...
    def __getitem__(self, index: int | slice) -> Message | tuple[Message, ...]:
        return self.messages[index]

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    def __len__(self) -> int:
        return len(self.messages)


def prompt_columns(prompt: Prompt, name: str = "prompt") -> dict[str, Any]:
    """Return a prompt as the columns of a file, of which `name` is the prompt's own."""
    if isinstance(prompt, str):
        return {name: prompt}
    beside = prompt.columns() if isinstance(prompt, ChatPrompt) else {}
    return {name: [dict(message) for message in prompt], **beside}


def completion_column(completion: Completion) -> str | list[Message]:
    """Return a completion as a file has it."""
    return completion if isinstance(completion, str) else [dict(message) for message in completion]


def message_text(message: Mapping[str, Any]) -> str:
    """Return a message's content as one text; it is empty where the message only calls tools."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def completion_text(completion: Completion) -> str:
    """Return a completion as one text for people and judges: the text of each message, and the calls as JSON."""
    if isinstance(completion, str):
        return completion
    parts: list[str] = []
    for message in completion:
        parts += [message_text(message)] if message["role"] == "assistant" else [_told(message)]
        parts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(part for part in parts if part)


def _told(message: Message) -> str:
    return f"{message['role']}: {message_text(message)}"


def is_same(first: Completion, second: Completion) -> bool:
    """Whether two completions differ by no more than white space at their ends."""
    if isinstance(first, str) and isinstance(second, str):
        return first.strip() == second.strip()
    return first == second


# ---- checks ----


def checked_prompt(value: Any, name: str = "prompt", follows: str = "chosen") -> Prompt:
    """Return a prompt as records hold it: text, or messages that end before the assistant speaks.

    Args:
        value: what a row has.
        name: what the row calls it.
        follows: the field where an answer belongs.

    Raises:
        InputError: names the field and says what to do.
    """
    if isinstance(value, str):
        check_text(value, name)
        return value
    beside = (value.tools, value.chat_template_kwargs) if isinstance(value, ChatPrompt) else ((), {})
    found = messages(value.messages if isinstance(value, ChatPrompt) else value, name)
    if found[-1]["role"] == "assistant":
        raise InputError(
            f"field {name!r}: ends in an assistant message; the {name} must end before the answer, "
            f"so move that message to {follows!r} or drop it"
        )
    return _with(found, _checked_tools(beside[0]), _checked_variables(beside[1]))


def prompt_of(row: Mapping[Any, Any], prompt: Any, name: str = "prompt") -> Any:
    """Return a row's prompt together with what the columns beside it say of it.

    Args:
        row: a raw row.
        prompt: its prompt, in any form that `checked_prompt` takes.
        name: what the row calls it.

    Raises:
        InputError: a column cannot be learned or is not what it should be; names it.
    """
    for column in _MEDIA:
        if not _is_nothing(row.get(column)):
            raise InputError(
                f"field {column!r}: only text is learned here, and the row has more than that; "
                "remove the column, or the row"
            )
    tools = _checked_tools(_unpacked(row.get("tools"), "tools"))
    variables = _checked_variables(_unpacked(row.get("chat_template_kwargs"), "chat_template_kwargs"))
    given = [n for n, value in (("tools", tools), ("chat_template_kwargs", variables)) if value]
    if isinstance(prompt, str) and given:
        raise InputError(
            f"field {given[0]!r}: is rendered by a chat template, and the {name} is plain text; "
            f"give the {name} as messages, or leave the column out"
        )
    return _with(tuple(prompt), tools, variables) if given and isinstance(prompt, list | tuple) else prompt


def checked_completion(value: Any, name: str, prompt: Prompt | None = None) -> Completion:
    """Return a completion as records hold it: a text, or messages where there is more to it than one text.

    Args:
        value: a text, or messages that begin and end with one of the assistant's.
        name: what the row calls it.
        prompt: what it follows; a text is continued by a text only. None where nobody knows.

    Raises:
        InputError: names the field and says what to do.
    """
    if not isinstance(value, list | tuple):
        check_text(value, name)
        return str(value)
    found = messages(value, name)
    if found[0]["role"] != "assistant" or found[-1]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in found)
        raise InputError(
            f"field {name!r}: after the prompt there must be the assistant's message, and no other may end the answer; "
            f"found {len(found)} ({roles}); leave out what repeats the prompt or follows the answer"
        )
    if len(found) == 1 and found[0].keys() == {"role", "content"}:
        return message_text(found[0])
    if isinstance(prompt, str):
        raise InputError(f"field {name!r}: its messages are rendered by a chat template; give the prompt as messages")
    return found


def checked_answer(value: Any, name: str) -> str:
    """Return an answer that is one text, given as such or as a list with one message; for what corrects texts."""
    found = checked_completion(value, name)
    if not isinstance(found, str):
        raise InputError(
            f"field {name!r}: is more than one text (tool calls, reasoning or several messages), and only a text can "
            "be corrected; give the text of the assistant's message alone"
        )
    return found


def messages(value: Any, name: str) -> tuple[Message, ...]:
    """Return chat messages as records hold them."""
    if not isinstance(value, list | tuple):
        raise InputError(f"field {name!r}: must be text or a list of chat messages, found {kind(value)}")
    if not value:
        raise InputError(f"field {name!r}: the list of messages is empty; give at least one message")
    return tuple(_message(item, f"{name}[{i}]") for i, item in enumerate(value))


def _message(value: Any, name: str) -> Message:
    """Return a message with all that a template may read of it, and without what is null, as templates see it."""
    if not isinstance(value, Mapping) or "role" not in value:
        keys = f"keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else kind(value)
        raise InputError(f"field {name!r}: a message is an object with 'role' and 'content', found {keys}")
    role = value["role"]
    if role not in ROLES:
        hint = f"; use {_OTHER_ROLES[role]!r}" if isinstance(role, str) and role in _OTHER_ROLES else ""
        raise InputError(f"field {name!r}: role {role!r} is not one of {', '.join(ROLES)}{hint}")
    found: Message = {"role": role}
    for key, item in value.items():
        if key not in ("role", *_BOOKKEEPING) and item is not None and (kept := _part(key, item, value, name)):
            found[key] = kept[0]
    if "content" not in found and not _says_more(found):
        problem = "must be text, found null" if "content" in value else "a message needs 'content'"
        raise InputError(f"field {name!r}: {problem}")
    return found


def _part(key: Any, item: Any, message: Mapping[Any, Any], name: str) -> tuple[Any, ...]:
    """Return what a message has under a key, or nothing where no template could read it."""
    if key in _MEDIA and not _is_nothing(item):
        raise InputError(f"field {name!r}: {key!r} cannot be learned; use messages of text only")
    if key == "content":
        may_be_empty = message["role"] in _MAY_BE_EMPTY or _says_more(message)
        return (_content(item, name, may_be_empty),)
    if key == "tool_calls":
        calls = _calls(item, name)
        return (calls,) if calls else ()
    if key in (*_REASONING, "name", "tool_call_id") and not isinstance(item, str):
        raise InputError(f"field {name!r}: {key!r} must be text, found {kind(item)}")
    return (item,) if key not in _MEDIA and isinstance(key, str) and _is_json(item) else ()


def _says_more(message: Mapping[Any, Any]) -> bool:
    """Whether an assistant's message needs no content: it calls tools, or has thoughts."""
    return message.get("role") == "assistant" and any(message.get(key) for key in ("tool_calls", *_REASONING))


def _content(value: Any, name: str, may_be_empty: bool) -> Any:
    """Return a text, or a list of text parts as it is (without what is null, as a table's columns have it)."""
    if not isinstance(value, list | tuple):
        if not (may_be_empty and isinstance(value, str) and not value.strip()):
            check_text(value, name)
        return value
    parts = []
    for part in value:
        what = part.get("type") if isinstance(part, Mapping) else kind(part)
        if not isinstance(part, Mapping) or what != "text" or not isinstance(part.get("text"), str):
            raise InputError(
                f"field {name!r}: a part of its content is {what!r}; only parts of text, "
                '{"type": "text", "text": "..."}, can be learned'
            )
        parts.append({key: item for key, item in part.items() if item is not None})
    text = "".join(part["text"] for part in parts)
    if text.strip() or not may_be_empty:
        check_text(text, name)
    return parts


def _calls(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list | tuple) or not all(isinstance(call, Mapping) for call in value):
        raise InputError(f"field {name!r}: 'tool_calls' must be a list of objects, found {kind(value)}")
    calls = [dict(call) for call in value]
    if not _is_json(calls):
        raise InputError(f"field {name!r}: 'tool_calls' holds what JSON cannot")
    return calls


def _checked_tools(value: Any) -> tuple[dict[str, Any], ...]:
    if _is_nothing(value):
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise InputError(f"field 'tools': must be a list of objects, the tools' JSON schemas, found {kind(value)}")
    tools = tuple(dict(tool) for tool in value)
    if not _is_json(list(tools)):
        raise InputError("field 'tools': holds what JSON cannot; give JSON schemas")
    return tools


def _checked_variables(value: Any) -> dict[str, Any]:
    if _is_nothing(value):
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InputError(f"field 'chat_template_kwargs': must be an object, found {kind(value)}")
    # A table has a cell for every name that any of its rows has.
    variables = {name: item for name, item in value.items() if item is not None}
    for name in variables:
        if name in _RESERVED:
            raise InputError(f"field 'chat_template_kwargs': {name!r} is no variable of a template; leave it out")
    if not _is_json(variables):
        raise InputError("field 'chat_template_kwargs': holds what JSON cannot")
    return variables


def _with(
    found: tuple[Message, ...], tools: tuple[dict[str, Any], ...], variables: dict[str, Any]
) -> Sequence[Message]:
    return ChatPrompt(found, tools, variables) if tools or variables else found


def _unpacked(value: Any, name: str) -> Any:
    """Return a cell that holds JSON as text, as tables often do, as what it says."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise InputError(f"field {name!r}: is text that is not JSON; write the cell with json.dumps") from None


def _is_nothing(value: Any) -> bool:
    """Whether a cell says nothing; tables have cells for columns that a row does not use."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    return isinstance(value, list | tuple | Mapping) and len(value) == 0


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True
