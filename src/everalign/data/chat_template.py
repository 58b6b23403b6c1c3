"""Render chats as text: the chat template, where an answer begins in it, and where its turn ends."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from everalign.data.messages import ChatPrompt, Completion, Message, Prompt, message_text
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
"""Used where the tokenizer has no chat template: each role in words on a line, EOS after each answer."""

# An answer that no template alters without altering others, and that no text has.
_SENTINEL = "Xq7zK0vN"
# What a template raises itself, and what Python does where it takes a message for something else.
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
_THOUGHT_TAG = re.compile(r"(</?think(?:ing)?>)")
_FIRST_MARK = re.compile(r"\s*(<[^<>]*>|\[[^\[\]]*\])")
# A mark that two texts begin alike, and reasoning that both of them open.
_HALF_MARK = re.compile(r"[<\[][^<>\[\]\s]*$")
_OPENED_MARK = re.compile(r"(?:<think(?:ing)?>\s*|[<\[][^<>\[\]\s]*)$")
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation with its answer, as text.

    Args:
        text: through the end of the answer's turn.
        start: where the answer begins in it.
        ended: whether the text ends with a token of its own; else EOS has to follow.
        written: whether the answer stands behind the whole prompt, as a model writes it, where no template does.
    """

    text: str
    start: int
    ended: bool
    written: bool = False


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
        """Return messages as text, up to the answer's first character."""
        return self.render(prompt, (), opens_answer=True)

    def completion(self, prompt: Sequence[Message], prompt_text: str, completion: Completion) -> Rendered:
        """Return the conversation with its answer; `prompt_text` is what `prompt` returns for these messages.

        Raises:
            InputError: the template refuses the conversation, or does not render what was judged and has no place where
                it could stand; says which of its rules is in the way.
        """
        reply = ({"role": "assistant", "content": completion},) if isinstance(completion, str) else completion
        try:
            whole = self.render(prompt, reply, opens_answer=False)
        except InputError:
            as_written = self._as_written(prompt, prompt_text, completion)
            if as_written is None:
                raise
            return as_written
        start = _alike(whole, prompt_text)
        end, ended = self._end(prompt, whole, start)
        lost = self._lost(whole[start:end], reply)
        if start == len(prompt_text) and not lost:
            return Rendered(whole[:end], start, ended)
        opened = self._opened(prompt, prompt_text)
        if lost and opened <= start:
            # The prompt may open what the answer writes too, such as its reasoning.
            lost = self._lost(whole[_before_mark(_OPENED_MARK, whole, opened, start) : end], reply)
        if start < len(prompt_text):
            start = _before_mark(_HALF_MARK, whole, opened, start)
        rendered = Rendered(whole[:end], start, ended)
        extends = not lost and start >= opened
        if extends and (start == len(prompt_text) or opens_thoughts(prompt_text[start:])):
            return rendered
        as_written = self._as_written(prompt, prompt_text, completion)
        if as_written is not None:
            return as_written
        if extends:
            return rendered
        raise self._refusal(lost, prompt_text)

    def end_of_turn(self, prompt: Sequence[Message]) -> str:
        """Return the text that ends an answer's turn; empty where the template has none."""
        return self._ending(prompt)[: self._kept(self._ending(prompt))]

    def _as_written(self, prompt: Sequence[Message], prompt_text: str, completion: Completion) -> Rendered | None:
        """Return the answer as a model writes it behind the prompt; None where the template shows no place for that."""
        if not isinstance(completion, str):
            return None
        try:
            whole = self.render(prompt, ({"role": "assistant", "content": _SENTINEL},), opens_answer=False)
        except InputError:
            return None
        shared, opened = _alike(whole, prompt_text), self._opened(prompt, prompt_text)
        place = whole.rfind(_SENTINEL)
        if place < shared or shared < opened:
            return None
        shared = _before_mark(_OPENED_MARK, whole, opened, shared)
        # What only the whole conversation has before an answer, and what only the prompt has.
        inserted, opening = whole[shared:place], prompt_text[shared:]
        mark = _FIRST_MARK.match(inserted)
        if inserted.strip() and not (mark and completion.lstrip().startswith(mark[1])):
            return None
        suffix = whole[place + len(_SENTINEL) :]
        kept = self._kept(suffix)
        end = suffix[:kept]
        ended = end.endswith(self._tokens)
        if opening.strip() and completion.startswith(opening):
            return Rendered(prompt_text + completion[len(opening) :] + end, len(prompt_text), ended, written=True)
        if opening.strip() and completion.lstrip().startswith(opening.strip()):
            text = prompt_text[:shared] + completion + end
            return Rendered(text, _alike(text, prompt_text), ended)
        return Rendered(prompt_text + completion + end, len(prompt_text), ended, written=True)

    def _opened(self, prompt: Sequence[Message], prompt_text: str) -> int:
        """Return where a prompt's messages end and the assistant's turn is opened."""
        closed = self.render(prompt, (), opens_answer=False)
        return _alike(closed, prompt_text)

    def _lost(self, body: str, reply: Sequence[Message]) -> str:
        """Return the part of an answer that its rendering does not have, in words; empty where it has all."""
        for number, message in enumerate(reply, start=1):
            content = message_text(message)
            if number < len(reply) and message["role"] == "assistant":
                # Reasoning is for the turn that it led to.
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

    def _refusal(self, lost: str, prompt_text: str) -> InputError:
        name = name_of(self._tokenizer)
        if not lost:
            return InputError(
                f"{name}: with the answer, the chat template does not extend the text of the prompt (which ends in "
                f"{prompt_text[-40:]!r}), so the answer cannot be cut off; use a template that renders the messages "
                "before an answer as it renders them without one"
            )
        return InputError(
            f"{name}: the chat template {lost}, so what was judged would not be what is learnt; change the answer or "
            "the template, or set what the template reads in 'chat_template_kwargs'"
        )

    # ---- the end of a turn ----

    def _end(self, prompt: Sequence[Message], whole: str, start: int) -> tuple[int, bool]:
        """Return where an answer's turn ends, and whether with a token of its own."""
        suffix = self._ending(prompt)
        if not whole.endswith(suffix) or len(whole) - len(suffix) < start:
            # The end depends on the answer: that of a call differs from that of a text.
            end = len(whole.rstrip())
            return end, whole[:end].endswith(self._tokens)
        end = len(whole) - len(suffix) + self._kept(suffix)
        return end, whole[len(whole) - len(suffix) : end].endswith(self._tokens)

    def _ending(self, prompt: Sequence[Message]) -> str:
        """Return what the template writes behind an answer to a prompt of this kind."""
        beside = (prompt.tools, prompt.chat_template_kwargs) if isinstance(prompt, ChatPrompt) else ()
        key = repr(([message["role"] for message in prompt], beside))
        if key not in self._endings:
            whole = self.render(prompt, ({"role": "assistant", "content": _SENTINEL},), opens_answer=False)
            self._endings[key] = whole[whole.rfind(_SENTINEL) + len(_SENTINEL) :] if _SENTINEL in whole else ""
        return self._endings[key]

    def _kept(self, suffix: str) -> int:
        """Return how much of what follows an answer ends its turn: the first tokens of their own, or all of it."""
        found = self._marks.search(suffix)
        return found.end() if found else len(suffix.rstrip())

    # ---- the template ----

    def render(self, prompt: Sequence[Message], reply: Sequence[Message] = (), *, opens_answer: bool) -> str:
        """Return a prompt and what was replied as text, and what opens the assistant's turn if asked.

        Raises:
            InputError: the template refuses the conversation; says with what words.
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
        """Return the template that renders a prompt: the usual one, that for tools, or the one that the row names."""
        if not isinstance(prompt, ChatPrompt):
            return self.template
        named, tools = prompt.chat_template_kwargs.get("chat_template"), list(prompt.tools) or None
        if named is None and (tools is None or uses_default_template(self._tokenizer)):
            return self.template
        return str(self._tokenizer.get_chat_template(named, tools))

    def _readable(self, messages: Sequence[Message], template: str) -> list[Message]:
        """Return messages with their content as the template reads it: as text, or as a list of parts."""
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
        """Whether a template renders a user's content of this form as its text."""
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


def opens_thoughts(opening: str) -> bool:
    """Whether what a prompt opens is reasoning: behind that, an answer without any would be a thought."""
    return _THOUGHT_TAG.search(opening) is not None


def _alike(whole: str, prompt_text: str) -> int:
    """Return how many characters two texts begin with alike."""
    if whole.startswith(prompt_text):
        return len(prompt_text)
    pairs = enumerate(zip(whole, prompt_text, strict=False))
    return next((i for i, (one, other) in pairs if one != other), len(whole))


def _before_mark(mark: re.Pattern[str], text: str, first: int, last: int) -> int:
    """Return where a mark begins that would be cut in two at `last`, if not before `first`; else `last`."""
    found = mark.search(text[first:last])
    return last if found is None else first + found.start()


def _says(body: str, text: str) -> bool:
    """Whether a rendering has a text, but for white space at its ends and about the tags of its reasoning."""
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
    """Whether chats are rendered by `DEFAULT_CHAT_TEMPLATE`, since the tokenizer has no template of its own."""
    return tokenizer.chat_template is None


def keep_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give the tokenizer the template that its chats are rendered by; call it before the tokenizer is saved.

    What learned chats in the default format is of use only where it is asked in that format.
    """
    if uses_default_template(tokenizer):
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE


def template_in_use(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template by which messages are rendered.

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
    """The texts of all special tokens: any of them at an answer's end is an end mark."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {tokenizer.bos_token, tokenizer.eos_token}
    return {text for text in added | named if text}


def name_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What errors call a tokenizer."""
    return tokenizer.name_or_path or "tokenizer"


# What is rendered differently is so in many rows or in none.
_MOST_CHECKED = 256


def prompts_and_answers(row: Any) -> tuple[Prompt, Sequence[Completion]]:
    """Return a row's prompt and its answers, of any kind of row that is learned behind a chat template."""
    if hasattr(row, "completions"):
        return row.prompt, row.completions
    return row.prompt, [getattr(row, name) for name in ("chosen", "rejected") if hasattr(row, name)]


def template_notes(tokenizer: "PreTrainedTokenizerBase", rows: Iterable[Any]) -> tuple[str, ...]:
    """Return a line for each thing that is not learned as one may think; none where all is rendered.

    Args:
        tokenizer: the model's.
        rows: preferences, scored rows, answers or prompts.
    """
    chats = [(prompt, answers) for prompt, answers in map(prompts_and_answers, rows) if not isinstance(prompt, str)]
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


def _unread(renderer: Renderer, chats: Sequence[tuple[Sequence[Message], Sequence[Completion]]]) -> list[str]:
    """Name what the rows have and their template does not ask for."""
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
    """Name the roles whose messages are not in the text of their conversation."""
    unusual = [prompt for prompt in prompts if any(message["role"] not in ("user", "assistant") for message in prompt)]
    roles: dict[str, None] = {}
    for prompt in unusual[:_MOST_CHECKED]:
        text = renderer.prompt(prompt)
        for message in prompt:
            if message["role"] != "assistant" and message_text(message).strip() not in text:
                roles[message["role"]] = None
    return [f"the chat template leaves out or rewrites messages of the role {role!r}" for role in roles]


def _quoted_arguments(renderer: Renderer, chats: Sequence[tuple[Sequence[Message], Sequence[Completion]]]) -> list[str]:
    """Tell of arguments of calls that are JSON as text, as OpenAI has them, where a template quotes them once more."""
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
                continue  # said with the row's name when it is encoded
            # As the template writes one row's arguments, it writes those of all.
            if not any(text in rendered for text in quoted):
                return []
            return [
                "'arguments' of tool calls are text, which the chat template writes as a text in quotes: where the "
                "model is to write an object, give an object"
            ]
    return []


def _opening(renderer: Renderer, prompt: Sequence[Message]) -> list[str]:
    """Tell of reasoning that a template begins and that an answer without any does not have."""
    text = renderer.prompt(prompt)
    rendered = renderer.completion(prompt, text, "x")
    if not opens_thoughts(text[rendered.start :]):
        return []
    return [
        f"the chat template begins an answer with {text[rendered.start :]!r} and leaves that out of the conversation: "
        "answers without reasoning are learned without it"
    ]
