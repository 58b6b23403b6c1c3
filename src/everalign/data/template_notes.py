"""Warn where the chat template renders less, or other things, than the rows hold."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from everalign.data.chat_template import Renderer, opens_thoughts, uses_default_template
from everalign.data.messages import ChatPrompt, Completion, Message, message_text
from everalign.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = tuple[Sequence[Message], Sequence[Completion]]
"""A prompt of messages and its answers."""

# A template that renders messages differently does so in many rows or in none.
_MOST_CHECKED = 256


def template_notes(tokenizer: "PreTrainedTokenizerBase", rows: Iterable[Any]) -> tuple[str, ...]:
    """Returns a line for each thing in the rows that the chat template does not render as one may expect.

    Args:
        tokenizer: the model's tokenizer.
        rows: preferences, scored rows or prompts.
    """
    chats: list[Chat] = []
    for row in rows:
        if not isinstance(row.prompt, str):
            pair = [getattr(row, name) for name in ("chosen", "rejected") if hasattr(row, name)]
            chats.append((row.prompt, getattr(row, "completions", pair)))
    if not chats:
        return ()
    lines = []
    if uses_default_template(tokenizer):
        lines.append(
            "the tokenizer has no chat template: chats are learned in Everalign's own format, which an exported model "
            "has as its template"
        )
    renderer = Renderer(tokenizer)
    lines += _unread(renderer, chats)
    lines += _left_out(renderer, [prompt for prompt, _ in chats])
    lines += _quoted_arguments(renderer, chats)
    return (*lines, *_opening(renderer, chats[0][0]))


def _unread(renderer: Renderer, chats: Sequence[Chat]) -> list[str]:
    """Names the keys, tools and variables of the rows that their template does not read."""
    missing: dict[str, int] = {}
    asked: dict[tuple[str, str], bool] = {}
    for prompt, answers in chats:
        template = renderer.template_of(prompt)
        messages = [*prompt, *(message for answer in answers if not isinstance(answer, str) for message in answer)]
        names = {key for message in messages for key in message} - {"role", "content"}
        if isinstance(prompt, ChatPrompt):
            names |= {"tools"} if prompt.tools else set()
            names |= prompt.chat_template_kwargs.keys() - {"chat_template"}
        for name in names:
            if (template, name) not in asked:
                asked[template, name] = re.search(rf"\b{re.escape(name)}\b", template) is not None
            if not asked[template, name]:
                missing[name] = missing.get(name, 0) + 1
    return [
        f"the chat template does not read {name!r}, which {count} rows have: it is not learned"
        for name, count in sorted(missing.items())
    ]


def _left_out(renderer: Renderer, prompts: Sequence[Sequence[Message]]) -> list[str]:
    """Names the roles whose messages are missing in the rendered conversation."""
    unusual = [prompt for prompt in prompts if any(message["role"] not in ("user", "assistant") for message in prompt)]
    roles: dict[str, None] = {}
    for prompt in unusual[:_MOST_CHECKED]:
        text = renderer.prompt(prompt)
        for message in prompt:
            if message["role"] != "assistant" and message_text(message).strip() not in text:
                roles[message["role"]] = None
    return [f"the chat template leaves out or rewrites messages of the role {role!r}" for role in roles]


def _quoted_arguments(renderer: Renderer, chats: Sequence[Chat]) -> list[str]:
    """Warns of calls whose arguments are JSON text, as in OpenAI's API, if the template quotes them once more."""
    for prompt, answers in chats:
        for reply in ((), *(answer for answer in answers if not isinstance(answer, str))):
            calls = [call for message in (*prompt, *reply) for call in message.get("tool_calls", ())]
            texts = [call.get("function", call).get("arguments") for call in calls]
            quoted = [json.dumps(text, ensure_ascii=False) for text in texts if isinstance(text, str) and '"' in text]
            if not quoted:
                continue
            try:
                rendered = renderer.render(prompt, reply, opens_answer=False)
            except InputError:
                continue  # reported with the row's name when it is tokenized
            # The template writes all rows' arguments as it writes one row's.
            if not any(text in rendered for text in quoted):
                return []
            return [
                "'arguments' of tool calls are text, which the chat template writes as a text in quotes: where the "
                "model is to write an object, give an object"
            ]
    return []


def _opening(renderer: Renderer, prompt: Sequence[Message]) -> list[str]:
    """Warns of reasoning that the template opens in the prompt and leaves out of the conversation."""
    text = renderer.prompt(prompt)
    rendered = renderer.completion(prompt, text, "x")
    if not opens_thoughts(text[rendered.start :]):
        return []
    return [
        f"the chat template begins an answer with {text[rendered.start :]!r} and leaves that out of the conversation: "
        "answers without reasoning are learned without it"
    ]
