"""Render chats as text with the tokenizer's chat template, and find where an answer begins and where its turn ends."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from everalign.data.messages import ChatPrompt, Completion, Message, message_text
from everalign.data.rows import common_length
from everalign.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""For tokenizers without a chat template: the role on a line, then the content, and EOS after each answer."""

# Stands for any answer: no text contains it, and a template that alters it alters others too.
_SENTINEL = "Xq7zK0vN"
# What a template raises itself, and what Python raises if a message is not what the template expects.
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
_THOUGHT_TAG = re.compile(r"(</?think(?:ing)?>)")
_FIRST_MARK = re.compile(r"\s*(<[^<>]*>|\[[^\[\]]*\])")
# The beginning of a mark at the end of a text, and the same or a tag that opens reasoning.
_HALF_MARK = re.compile(r"[<\[][^<>\[\]\s]*$")
_OPENED_MARK = re.compile(r"(?:<think(?:ing)?>\s*|[<\[][^<>\[\]\s]*)$")
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation with its answer, as text.

    Args:
        text: the conversation through the end of the answer's turn.
        start: character at which the answer begins.
        ended: whether the text ends with a special token; if not, EOS must follow.
        appended: whether the answer was appended to the prompt's text, as a model writes it, because the template
            renders it in another way.
    """

    text: str
    start: int
    ended: bool
    appended: bool = False


class Renderer:
    """The chat template of one tokenizer.

    Raises:
        InputError: the tokenizer has several templates and no default one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self.template = template_in_use(tokenizer)
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        self._tokens = tuple(sorted(added | special_texts(tokenizer), key=len, reverse=True))
        self._marks = re.compile("(?:" + "|".join(map(re.escape, self._tokens)) + ")+")
        self._reads: dict[str, tuple[bool, bool]] = {}
        self._endings: dict[str, str] = {}

    def prompt(self, prompt: Sequence[Message]) -> str:
        """Renders messages up to the answer's first character."""
        return self.render(prompt, (), opens_answer=True)

    def completion(self, prompt: Sequence[Message], prompt_text: str, completion: Completion) -> Rendered:
        """Renders messages with their answer.

        A template may render an answer in another way than a model writes it behind the prompt: it may drop reasoning,
        insert empty reasoning, or open reasoning in the prompt only. Then the answer is appended to the prompt's text
        if the template shows that it belongs there.

        Args:
            prompt: the messages.
            prompt_text: what `prompt` returns for them.
            completion: the answer.

        Raises:
            InputError: the template refuses the conversation, or alters the answer and has no place for it; says which
                of its rules is in the way.
        """
        reply = ({"role": "assistant", "content": completion},) if isinstance(completion, str) else completion
        try:
            whole = self.render(prompt, reply, opens_answer=False)
        except InputError:
            appended = self._appended(prompt, prompt_text, completion)
            if appended is None:
                raise
            return appended
        start = common_length((whole, prompt_text))
        end, ended = self._answer_end(prompt, whole, start)
        lost = self._lost(whole[start:end], reply)
        if start == len(prompt_text) and not lost:
            return Rendered(whole[:end], start, ended)
        opened = self._opened(prompt, prompt_text)
        if lost and opened <= start:
            # The prompt may open what the answer also contains, such as its reasoning.
            lost = self._lost(whole[_before_mark(_OPENED_MARK, whole, opened, start) : end], reply)
        if start < len(prompt_text):
            start = _before_mark(_HALF_MARK, whole, opened, start)
        rendered = Rendered(whole[:end], start, ended)
        extends = not lost and start >= opened
        # Behind reasoning that the prompt opens, an answer without any would be read as reasoning.
        if extends and (start == len(prompt_text) or _THOUGHT_TAG.search(prompt_text[start:])):
            return rendered
        appended = self._appended(prompt, prompt_text, completion)
        if appended is not None:
            return appended
        if extends:
            return rendered
        problem = (
            f"the chat template {lost}, so what was judged would not be what is learned; change the answer or the "
            "template, or set what the template reads in 'chat_template_kwargs'"
            if lost
            else "with the answer, the chat template does not extend the text of the prompt (which ends in "
            f"{prompt_text[-40:]!r}), so the answer cannot be cut off; use a template that renders the messages "
            "before an answer as it renders them without one"
        )
        raise InputError(f"{name_of(self._tokenizer)}: {problem}")

    def _appended(self, prompt: Sequence[Message], prompt_text: str, completion: Completion) -> Rendered | None:
        """Appends an answer to the prompt's text, as a model writes it; None if the template shows no place for it."""
        if not isinstance(completion, str):
            return None
        try:
            whole = self.render(prompt, ({"role": "assistant", "content": _SENTINEL},), opens_answer=False)
        except InputError:
            return None
        shared, opened = common_length((whole, prompt_text)), self._opened(prompt, prompt_text)
        place = whole.rfind(_SENTINEL)
        if place < shared or shared < opened:
            return None
        shared = _before_mark(_OPENED_MARK, whole, opened, shared)
        # What only the whole conversation has in front of an answer, and what only the prompt has.
        inserted, opening = whole[shared:place], prompt_text[shared:]
        mark = _FIRST_MARK.match(inserted)
        if inserted.strip() and not (mark and completion.lstrip().startswith(mark[1])):
            return None
        suffix = whole[place + len(_SENTINEL) :]
        end = suffix[: self._turn_end(suffix)]
        ended = end.endswith(self._tokens)
        if opening.strip() and completion.startswith(opening):
            return Rendered(prompt_text + completion[len(opening) :] + end, len(prompt_text), ended, appended=True)
        if opening.strip() and completion.lstrip().startswith(opening.strip()):
            text = prompt_text[:shared] + completion + end
            return Rendered(text, common_length((text, prompt_text)), ended)
        return Rendered(prompt_text + completion + end, len(prompt_text), ended, appended=True)

    def _opened(self, prompt: Sequence[Message], prompt_text: str) -> int:
        """Returns the character at which a prompt's messages end and the assistant's turn is opened."""
        return common_length((self.render(prompt, (), opens_answer=False), prompt_text))

    def _lost(self, body: str, reply: Sequence[Message]) -> str:
        """Says which part of an answer its rendering lacks; empty if none."""
        for number, message in enumerate(reply, start=1):
            content = message_text(message)
            if number < len(reply) and message["role"] == "assistant":
                # Templates drop the reasoning of earlier turns.
                content = _THOUGHT_TAG.split(content)[-1]
            if not _says(body, content):
                return f"rewrites the answer {content[:40]!r}"
            for key in _REASONING:
                if number == len(reply) and not _says(body, message.get(key, "")):
                    return f"does not render {key!r} of the answer"
        called = [call.get("function", call).get("name") for message in reply for call in message.get("tool_calls", ())]
        for name in filter(None, called):
            # Some templates render the first call of a message and pass over the others.
            if isinstance(name, str) and body.count(name) < called.count(name):
                return f"does not render every call of {name!r} in 'tool_calls' of the answer"
        return ""

    def _answer_end(self, prompt: Sequence[Message], whole: str, start: int) -> tuple[int, bool]:
        """Returns the character at which an answer's turn ends, and whether a special token ends it."""
        # What the template writes behind an answer to a prompt of these roles, tools and variables.
        beside = (prompt.tools, prompt.chat_template_kwargs) if isinstance(prompt, ChatPrompt) else ()
        key = repr(([message["role"] for message in prompt], beside))
        if key not in self._endings:
            text = self.render(prompt, ({"role": "assistant", "content": _SENTINEL},), opens_answer=False)
            self._endings[key] = text[text.rfind(_SENTINEL) + len(_SENTINEL) :] if _SENTINEL in text else ""
        suffix = self._endings[key]
        place = len(whole) - len(suffix)
        if whole.endswith(suffix) and place >= start:
            end = place + self._turn_end(suffix)
            return end, whole[place:end].endswith(self._tokens)
        # The end depends on the answer: that of a call differs from that of a text.
        end = len(whole.rstrip())
        return end, whole[:end].endswith(self._tokens)

    def _turn_end(self, suffix: str) -> int:
        """Returns how much of the text behind an answer ends its turn: through the first special tokens, or all."""
        found = self._marks.search(suffix)
        return found.end() if found else len(suffix.rstrip())

    def render(self, prompt: Sequence[Message], reply: Sequence[Message] = (), *, opens_answer: bool) -> str:
        """Renders a prompt and a reply.

        Args:
            prompt: the messages, with their tools and variables.
            reply: further messages.
            opens_answer: whether the text ends with what opens the assistant's turn.

        Raises:
            InputError: the template refuses the conversation; quotes its message.
        """
        tools: Sequence[Any] = prompt.tools if isinstance(prompt, ChatPrompt) else ()
        variables: Mapping[str, Any] = prompt.chat_template_kwargs if isinstance(prompt, ChatPrompt) else {}
        messages = [*prompt, *reply]
        try:
            template = self.template_of(prompt)
            text: str = self._tokenizer.apply_chat_template(
                self._readable(messages, template),
                tools=list(tools) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=opens_answer,
                **{name: value for name, value in variables.items() if name != "chat_template"},
            )
        except _REFUSALS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"{name_of(self._tokenizer)}: the chat template refuses a conversation of {roles}: {error}; "
                "change the messages' roles or the template"
            ) from None
        return text

    def template_of(self, prompt: Sequence[Message]) -> str:
        """Returns the template that renders a prompt: the default one, that for tools, or one that the row names."""
        if not isinstance(prompt, ChatPrompt):
            return self.template
        named, tools = prompt.chat_template_kwargs.get("chat_template"), list(prompt.tools) or None
        if named is None and (tools is None or uses_default_template(self._tokenizer)):
            return self.template
        return str(self._tokenizer.get_chat_template(named, tools))

    def _readable(self, messages: Sequence[Message], template: str) -> list[Message]:
        """Returns messages with their content in the form that the template reads: text, or a list of parts."""
        if template not in self._reads:
            parts = self._shows(template, _parts)
            self._reads[template] = self._shows(template, str) or not parts, parts
        reads_text, reads_parts = self._reads[template]
        if reads_text and (reads_parts or not any(isinstance(message.get("content"), list) for message in messages)):
            return list(messages)
        in_parts = reads_parts and not reads_text
        found = []
        for message in messages:
            if isinstance(message.get("content"), str if in_parts else list):
                text = message_text(message)
                found.append({**message, "content": _parts(text) if in_parts else text})
            else:
                found.append(message)
        return found

    def _shows(self, template: str, form: Callable[[str], Any]) -> bool:
        """Whether a template renders a user's content in this form as its text."""
        user = {"role": "user", "content": form(_SENTINEL)}
        system = {"role": "system", "content": form("Be brief.")}
        for messages in ([user], [system, user]):  # some want a system message before all
            try:
                text: str = self._tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            except _REFUSALS:
                continue
            return _SENTINEL in text and f"'{_SENTINEL}'" not in text and f'"{_SENTINEL}"' not in text
        return False


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _before_mark(mark: re.Pattern[str], text: str, first: int, last: int) -> int:
    """Returns where a mark begins that `last` would cut in two, not before `first`; else `last`."""
    found = mark.search(text[first:last])
    return last if found is None else first + found.start()


def _says(body: str, text: str) -> bool:
    """Whether a rendering contains a text, up to white space at its ends and around the tags of its reasoning."""
    if text.strip() in body:
        return True
    place = 0
    for piece in _THOUGHT_TAG.split(text):
        place = body.find(piece.strip(), place)
        if place < 0:
            return False
        place += len(piece.strip())
    return True


def uses_default_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether chats are rendered with `DEFAULT_CHAT_TEMPLATE` because the tokenizer has no template."""
    return tokenizer.chat_template is None


def keep_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Sets the tokenizer's template to the one in use; call it before the tokenizer is saved.

    A model that learned chats in the default format must be prompted in that format.
    """
    if uses_default_template(tokenizer):
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE


def template_in_use(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns the chat template that renders messages.

    Raises:
        InputError: the tokenizer has several templates and no default one, or renders chats without any.
    """
    if type(tokenizer).__name__ == "MistralCommonBackend":
        raise InputError(
            f"{name_of(tokenizer)}: mistral-common reads this tokenizer and renders chats without a template; put the "
            "model's tokenizer.json and chat_template.jinja into its folder, and load it with mistral_format=False"
        )
    if uses_default_template(tokenizer):
        return DEFAULT_CHAT_TEMPLATE
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(f"{name_of(tokenizer)}: no default chat template: {error}") from None
    return template


def special_texts(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """Returns the texts of all special tokens; any of them ends an answer."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {tokenizer.bos_token, tokenizer.eos_token}
    return {text for text in added | named if text}


def name_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns the tokenizer's name for error messages."""
    return tokenizer.name_or_path or "tokenizer"


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
    text = renderer.prompt(chats[0][0])
    opening = text[renderer.completion(chats[0][0], text, "x").start :]
    if _THOUGHT_TAG.search(opening):
        lines.append(
            f"the chat template begins an answer with {opening!r} and leaves that out of the conversation: answers "
            "without reasoning are learned without it"
        )
    return tuple(lines)


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
