"""Validate chat messages, and the prompts and completions made of them.

A message keeps everything that a chat template may read: `role` and `content`, and `name`, `tool_calls`,
`tool_call_id`, `reasoning_content`, `thinking` or whatever else the user's template reads. Nothing is altered. Media
such as images cannot be learned and are refused.

A preference without a prompt of its own has one in what `chosen` and `rejected` begin with alike: `split_conversations`
and `split_texts` find it.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from everalign.data.rows import check_text, common_length, content_id, field_error, kind
from everalign.errors import InputError

Message = dict[str, Any]
"""A chat message: `role` (one of `ROLES`), `content` (text, or a list of text parts), and further keys."""

Completion = str | tuple[Message, ...]
"""What follows a prompt: the text of the assistant's message, or messages if there is more to it than one text."""

Prompt = str | Sequence[Message]
"""What an answer follows: text that it continues, or messages that end before the assistant speaks."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
# A tool may return nothing, and many datasets have a system message in every row, empty or not.
_MAY_BE_EMPTY = ("system", "developer", "tool")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Written by many exporters, and read by no template.
_BOOKKEEPING = ("id", "message_id", "uuid", "timestamp", "created_at", "metadata")
# Arguments of `apply_chat_template`, which are no variables of a template.
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
"""Columns beside a prompt: what the chat template renders with it, and media, which are refused."""


@dataclass(frozen=True)
class ChatPrompt(Sequence[Message]):
    """A sequence of messages, with the tools and template variables that are rendered with them.

    Args:
        messages: the messages, which end before the assistant speaks.
        tools: JSON schemas of the functions that the model may call.
        chat_template_kwargs: variables of the template, such as `enable_thinking`; or `chat_template`, the name of one
            of the tokenizer's templates.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Message, ...]: ...
    def __getitem__(self, index: int | slice) -> Message | tuple[Message, ...]:
        return self.messages[index]

    def __len__(self) -> int:
        return len(self.messages)


def prompt_columns(prompt: Prompt, name: str = "prompt") -> dict[str, Any]:
    """Returns a prompt as the columns of a file; `name` is that of the prompt's own column."""
    if isinstance(prompt, str):
        return {name: prompt}
    row: dict[str, Any] = {name: [dict(message) for message in prompt]}
    if isinstance(prompt, ChatPrompt) and prompt.tools:
        row["tools"] = list(prompt.tools)
    if isinstance(prompt, ChatPrompt) and prompt.chat_template_kwargs:
        row["chat_template_kwargs"] = dict(prompt.chat_template_kwargs)
    return row


def completion_column(completion: Completion) -> str | list[Message]:
    """Returns a completion as the cell of a file."""
    return completion if isinstance(completion, str) else [dict(message) for message in completion]


def message_text(message: Mapping[str, Any]) -> str:
    """Returns a message's content as one text; empty if the message only calls tools."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def completion_text(completion: Completion) -> str:
    """Returns a completion as one text for people and judges: the text of each message, and its calls as JSON."""
    if isinstance(completion, str):
        return completion
    parts: list[str] = []
    for message in completion:
        role = "" if message["role"] == "assistant" else f"{message['role']}: "
        parts.append(role + message_text(message))
        parts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(part for part in parts if part)


def is_same(first: Completion, second: Completion) -> bool:
    """Whether two completions differ by no more than white space at their ends."""
    if isinstance(first, str) and isinstance(second, str):
        return first.strip() == second.strip()
    return first == second


def prompt_key(prompt: Prompt) -> str:
    """Returns 16 hexadecimal digits that name what is asked, to find a prompt again in other data.

    A text and a chat of one user's message with that text have one key, whatever a system message says.
    """
    if isinstance(prompt, str):
        return content_id([["user", prompt.strip()]])
    turns = [(one["role"], one.get("content")) for one in prompt if one["role"] not in ("system", "developer")]
    return content_id([[role, said.strip() if isinstance(said, str) else said] for role, said in turns])


def checked_prompt(value: Any, name: str = "prompt", follows: str = "chosen") -> Prompt:
    """Returns a prompt as records hold it: text, or messages that end before the assistant speaks.

    Args:
        value: the raw prompt.
        name: its column.
        follows: the column where an answer belongs.

    Raises:
        InputError: names the field and says what to do.
    """
    if isinstance(value, str):
        check_text(value, name)
        return value
    tools, variables = (value.tools, value.chat_template_kwargs) if isinstance(value, ChatPrompt) else ((), {})
    found = messages(value.messages if isinstance(value, ChatPrompt) else value, name)
    if found[-1]["role"] == "assistant":
        raise field_error(
            name,
            f"ends in an assistant message; the {name} must end before the answer, "
            f"so move that message to {follows!r} or drop it",
        )
    tools, variables = _checked_beside(tools, variables)
    return ChatPrompt(found, tools, variables) if tools or variables else found


def prompt_of(row: Mapping[Any, Any], prompt: Any, name: str = "prompt") -> Any:
    """Returns a row's prompt together with the tools and template variables in the columns beside it.

    Args:
        row: a raw row.
        prompt: its prompt, in any form that `checked_prompt` takes.
        name: the prompt's column.

    Raises:
        InputError: a column is not valid, or cannot be learned; names it.
    """
    for column in _MEDIA:
        if not _is_empty(row.get(column)):
            problem = "only text is learned here, and the row has more than that"
            raise field_error(column, problem, "remove the column, or the row")
    beside = {}
    for column in ("tools", "chat_template_kwargs"):
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            # Tables often hold JSON as text.
            try:
                value = json.loads(value)
            except ValueError:
                raise field_error(column, "is text that is not JSON", "write the cell with json.dumps") from None
        beside[column] = value
    tools, variables = _checked_beside(beside["tools"], beside["chat_template_kwargs"])
    if isinstance(prompt, str) and (tools or variables):
        raise field_error(
            "tools" if tools else "chat_template_kwargs",
            f"is rendered by a chat template, and the {name} is plain text",
            f"give the {name} as messages, or leave the column out",
        )
    if not isinstance(prompt, list | tuple):
        return prompt
    return ChatPrompt(tuple(prompt), tools, variables) if tools or variables else tuple(prompt)


def checked_completion(value: Any, name: str, prompt: Prompt | None = None) -> Completion:
    """Returns a completion as records hold it: text, or messages if there is more to it than one text.

    Args:
        value: text, or messages that begin and end with one of the assistant's.
        name: its column.
        prompt: the prompt, if known: a text prompt can only be continued by text.

    Raises:
        InputError: names the field and says what to do.
    """
    if not isinstance(value, list | tuple):
        check_text(value, name)
        return str(value)
    found = messages(value, name)
    if found[0]["role"] != "assistant" or found[-1]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in found)
        raise field_error(
            name,
            "after the prompt there must be the assistant's message, and no other may end the answer; "
            f"found {len(found)} ({roles})",
            "leave out what repeats the prompt or follows the answer",
        )
    if len(found) == 1 and found[0].keys() == {"role", "content"}:
        return message_text(found[0])
    if isinstance(prompt, str):
        raise field_error(name, "its messages are rendered by a chat template", "give the prompt as messages")
    return found


def checked_answer(value: Any, name: str) -> str:
    """Returns an answer that must be one text, given as text or as a list with one message; for corrections."""
    found = checked_completion(value, name)
    if not isinstance(found, str):
        raise field_error(
            name,
            "is more than one text (tool calls, reasoning or several messages), and only a text can be corrected",
            "give the text of the assistant's message alone",
        )
    return found


def messages(value: Any, name: str) -> tuple[Message, ...]:
    """Returns chat messages as records hold them: without nulls, bookkeeping keys, and what JSON cannot hold."""
    if not isinstance(value, list | tuple):
        raise field_error(name, f"must be text or a list of chat messages, found {kind(value)}")
    if not value:
        raise field_error(name, "the list of messages is empty", "give at least one message")
    return tuple(_message(item, f"{name}[{i}]") for i, item in enumerate(value))


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, Mapping) or "role" not in value:
        keys = f"keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else kind(value)
        raise field_error(name, f"a message is an object with 'role' and 'content', found {keys}")
    role = value["role"]
    if role not in ROLES:
        hint = f"use {_OTHER_ROLES[role]!r}" if isinstance(role, str) and role in _OTHER_ROLES else None
        raise field_error(name, f"role {role!r} is not one of {', '.join(ROLES)}", hint)
    # An assistant's message that calls tools or has reasoning needs no content.
    says_more = role == "assistant" and any(value.get(key) for key in ("tool_calls", *_REASONING))
    found: Message = {"role": role}
    for key, item in value.items():
        if key in ("role", *_BOOKKEEPING) or item is None:
            continue
        if key == "content":
            found[key] = _content(item, name, may_be_empty=role in _MAY_BE_EMPTY or says_more)
        elif key == "tool_calls":
            if calls := _objects(item, name, "'tool_calls' "):
                found[key] = calls
        else:
            _check_key(key, item, name)
            # A template reads no other keys than texts, and no values that JSON cannot hold.
            if key not in _MEDIA and isinstance(key, str) and _is_json(item):
                found[key] = item
    if "content" not in found and not says_more:
        raise field_error(name, "must be text, found null" if "content" in value else "a message needs 'content'")
    return found


def _check_key(key: Any, item: Any, name: str) -> None:
    if key in _MEDIA and not _is_empty(item):
        raise field_error(name, f"{key!r} cannot be learned", "use messages of text only")
    if key in (*_REASONING, "name", "tool_call_id") and not isinstance(item, str):
        raise field_error(name, f"{key!r} must be text, found {kind(item)}")


def _content(value: Any, name: str, may_be_empty: bool) -> Any:
    """Returns a text, or a list of text parts without nulls, which tables have in unused columns."""
    if not isinstance(value, list | tuple):
        if not (may_be_empty and isinstance(value, str) and not value.strip()):
            check_text(value, name)
        return value
    parts = []
    for part in value:
        what = part.get("type") if isinstance(part, Mapping) else kind(part)
        if not isinstance(part, Mapping) or what != "text" or not isinstance(part.get("text"), str):
            raise field_error(
                name,
                f"a part of its content is {what!r}; only parts of text, "
                '{"type": "text", "text": "..."}, can be learned',
            )
        parts.append({key: item for key, item in part.items() if item is not None})
    text = "".join(part["text"] for part in parts)
    if text.strip() or not may_be_empty:
        check_text(text, name)
    return parts


def _objects(value: Any, field: str, what: str = "") -> list[dict[Any, Any]]:
    """Returns a list of JSON objects."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        schemas = "" if what else ", the tools' JSON schemas"
        raise field_error(field, f"{what}must be a list of objects{schemas}, found {kind(value)}")
    objects = [dict(item) for item in value]
    if not _is_json(objects):
        raise field_error(field, f"{what}holds what JSON cannot", None if what else "give JSON schemas")
    return objects


def _checked_beside(tools: Any, variables: Any) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """Returns tools and template variables as a `ChatPrompt` holds them; empty where there are none."""
    checked = () if _is_empty(tools) else tuple(_objects(tools, "tools"))
    if _is_empty(variables):
        return checked, {}
    field = "chat_template_kwargs"
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise field_error(field, f"must be an object, found {kind(variables)}")
    # A table has a cell for every name that any of its rows has.
    given = {name: item for name, item in variables.items() if item is not None}
    for name in given:
        if name in _RESERVED:
            raise field_error(field, f"{name!r} is not a template variable", "leave it out")
    if not _is_json(given):
        raise field_error(field, "holds what JSON cannot")
    return checked, given


def _is_empty(value: Any) -> bool:
    """Whether a cell is absent: tables have cells for columns that a row does not use."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    return isinstance(value, list | tuple | Mapping) and len(value) == 0


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


# What opens an assistant's turn in plain text, by convention. A text uses the first convention that it matches.
_TURNS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"\n\nAssistant:",
        r"<\|im_start\|>assistant\n",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        r"<\|assistant\|>\n?",
        r"<start_of_turn>model\n",
        r"\[/INST\]",
        r"^### (?:Response|Assistant):\n?",
        r"(?<=\s)ASSISTANT:",
        r"^(?:Assistant|AI|Bot|Response|Answer|A):",
    )
)
_JOINERS = "\u200d\ufe0e\ufe0f"


def split_conversations(
    prompt: str | None, chosen: list[Any], rejected: list[Any]
) -> tuple[Any, Completion, Completion]:
    """Splits two conversations into the messages they share and the two answers, each from an assistant's message on.

    Args:
        prompt: the row's own prompt if it has one; it must repeat one of the shared messages.
        chosen: the better conversation.
        rejected: the worse conversation.

    Raises:
        InputError: the conversations do not begin alike, or the prompt is not among their messages.
    """
    better, worse = messages(chosen, "chosen"), messages(rejected, "rejected")
    shared = 0
    while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
        shared += 1
    while shared and not (better[shared]["role"] == worse[shared]["role"] == "assistant"):
        shared -= 1
    if shared == 0:
        raise field_error(
            "prompt",
            "none found; 'chosen' and 'rejected' are message lists that do not begin alike: "
            'give the prompt as messages too, such as [{"role": "user", "content": "..."}]',
        )
    context = better[:shared]
    if prompt is not None and prompt.strip() not in {message_text(message).strip() for message in context}:
        raise field_error(
            "prompt",
            "its text is not a message of the conversations in 'chosen' and 'rejected'",
            "leave the column out, or give the answers alone",
        )
    return context, checked_completion(better[shared:], "chosen"), checked_completion(worse[shared:], "rejected")


def split_texts(chosen: str, rejected: str, missing: InputError) -> tuple[str, str, str]:
    """Splits two texts into the prompt they share and the two answers.

    The prompt ends behind the last shared mark of an assistant's turn. Without such a mark it ends before the first
    word that differs, and a space before that word belongs to the answers, as in TRL.

    Args:
        chosen: the better text.
        rejected: the worse text.
        missing: raised if the texts share nothing.
    """
    check_text(chosen, "chosen")
    check_text(rejected, "rejected")
    alike = common_length((chosen, rejected))
    found = ([turn.end() for turn in pattern.finditer(chosen, 0, alike)] for pattern in _TURNS)
    turns = next((ends for ends in found if ends), [])
    # A text that ends with the mark has no answer behind it.
    cut = max((end for end in turns if chosen[end:].strip() and rejected[end:].strip()), default=None)
    if cut is None:
        cut = alike
        shorter = min(len(chosen), len(rejected))
        while cut and (cut == shorter or not (_begins_word(chosen, cut) and _begins_word(rejected, cut))):
            cut -= 1
        if cut and chosen[cut - 1] == " ":
            cut -= 1
    if not chosen[:cut].strip():
        raise missing
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _begins_word(text: str, place: int) -> bool:
    """Whether a word may begin at `place`. In scripts without spaces every character may begin one."""
    before, here = text[place - 1], text[place]
    if unicodedata.combining(here) or here in _JOINERS or before == _JOINERS[0]:
        return False
    for character in (before, here):
        # Chinese, Japanese, Thai and Khmer letters are left out: spaces do not divide their words.
        code = ord(character)
        spaced = code < 0x0E00 or 0x10A0 <= code < 0x1780 or 0x1E00 <= code < 0x2000 or 0xAC00 <= code < 0xD7B0
        if not spaced or not (character.isalnum() or character in "'’_"):
            return True
    return False
