"""How text becomes tokens: the chat template, the border of prompt and answer, and the end of an answer.

Prompt and answer are tokenised separately, as they are when the model is used: it reads the prompt's tokens
and then writes the answer's. No token straddles the border, so the prompt's are the same for every answer.

* A chat prompt is rendered by the tokenizer's chat template up to where the assistant speaks. An answer is
  what the template adds to that for the assistant's message, through its end-of-turn mark, or else EOS.
* A text prompt is continued as it stands: its tokens (with BOS if the tokenizer adds one), the answer's, EOS.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from everalign.data.fields import Message
from everalign.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Message]

DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""Used where the tokenizer has no chat template: each role in words on a line, EOS after each answer."""

# Tokenised as part of the fingerprint, for the settings that neither the vocabulary nor the template shows.
_PROBE = "Mixed CASE,  two spaces\n\ttab; 12345 naïve ½ 漢字."
_TEXTS_AT_ONCE = 2048


_QUESTION: Prompt = ({"role": "user", "content": "Hi"},)


class ChatFormat:
    """The borders and ends of one tokenizer's prompts and answers; computed once and used for many rows.

    Raises:
        InputError: the tokenizer has no EOS token, or several chat templates and no default one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"{_name(tokenizer)}: the tokenizer has no EOS token, so an answer would have no end; "
                "set tokenizer.eos_token"
            )
        self.tokenizer = tokenizer
        self.template = template_in_use(tokenizer)
        self.default_used = uses_default_template(tokenizer)
        self.eos: int = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id
        self._end_marks = tuple(_special_texts(tokenizer))

    def end_of_turn_ids(self, prompt: Prompt = _QUESTION) -> tuple[int, ...]:
        """Tokens any of which ends an assistant's turn: what the template ends it with, or else EOS.

        Args:
            prompt: messages, or text, where the end may depend on the prompt.

        Raises:
            InputError: the template refuses the conversation.
        """
        return (self.response_tokens([self.response_text(prompt, self.prompt_text(prompt), "x")])[0][-1],)

    def prompt_text(self, prompt: Prompt) -> str:
        """The prompt as the model reads it, up to the answer's first character."""
        return prompt if isinstance(prompt, str) else self._render(list(prompt), opens_answer=True)

    def response_text(self, prompt: Prompt, prompt_text: str, response: str) -> str:
        """What follows `prompt_text` when the answer is `response`, through the end-of-turn mark if any."""
        if isinstance(prompt, str):
            return response
        whole = self._render([*prompt, {"role": "assistant", "content": response}], opens_answer=False)
        if not whole.startswith(prompt_text):
            raise InputError(
                f"{_name(self.tokenizer)}: with the answer, the chat template does not extend the text of "
                f"the prompt (which ends in {prompt_text[-40:]!r}), so the answer cannot be cut off; "
                "use a template whose generation prompt is the beginning of the whole conversation"
            )
        return self._through_end_of_turn(whole[len(prompt_text) :], response)

    def prompt_tokens(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[list[int]]:
        """Tokens of rendered prompts; never none, since an answer's first token needs one before it."""
        plain = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
        tokens = self._tokens(texts, special=False)
        for i, ids in zip(plain, self._tokens([texts[i] for i in plain], special=True), strict=True):
            # Some tokenizers put EOS after every text; an answer cannot follow it.
            body = ids[:-1] if ids[-1:] == [self.eos] else ids
            tokens[i] = body if body[len(body) - len(tokens[i]) :] == tokens[i] else ids
        return [ids or [self.eos if self.bos is None else self.bos] for ids in tokens]

    def response_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of rendered answers, each ended by its end-of-turn mark or by EOS."""
        tokens = self._tokens(texts, special=False)
        for ids, text in zip(tokens, texts, strict=True):
            if not text.endswith(self._end_marks):
                ids.append(self.eos)
        return tokens

    def _render(self, messages: list[Message], *, opens_answer: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=opens_answer
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"{_name(self.tokenizer)}: the chat template refuses a conversation of {roles}: {error}; "
                "change the messages' roles or the template"
            ) from None
        return text

    def _through_end_of_turn(self, tail: str, response: str) -> str:
        """Cuts the white space that the template puts after its end of turn, and none of the answer's own."""
        if response.strip() not in tail:
            raise InputError(
                f"{_name(self.tokenizer)}: the chat template rewrites the answer {response[:40]!r}, so what "
                "was judged would not be what is learnt; change the answer or the template"
            )
        end = tail.rstrip()
        if not end.endswith(response.rstrip()):
            return end
        own_space = response[len(response.rstrip()) :]
        return end + own_space if tail.startswith(own_space, len(end)) else end

    def _tokens(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        tokens: list[list[int]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            batch = list(texts[start : start + _TEXTS_AT_ONCE])
            tokens += self.tokenizer(batch, add_special_tokens=special, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
        return tokens


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """The tokens a model reads before it answers; at least one."""
    form = ChatFormat(tokenizer)
    return form.prompt_tokens([prompt], [form.prompt_text(prompt)])[0]


def encode_response(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, response: str) -> list[int]:
    """The tokens of an answer to `prompt` (not the prompt's), ended by the end-of-turn mark or EOS."""
    form = ChatFormat(tokenizer)
    return form.response_tokens([form.response_text(prompt, form.prompt_text(prompt), response)])[0]


def template_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 over what decides how text becomes tokens: template in use, vocabulary, special tokens, a probe.

    Which token pads is left out: it reaches no prompt and no answer, and loading a model may change it.
    A template that prints today's date renders differently tomorrow under the same fingerprint; whoever
    stores what was computed from tokens keys it by `EncodedPairs.fingerprint`.
    """
    facts: dict[str, Any] = {
        "template": template_in_use(tokenizer),
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": sorted(_special_texts(tokenizer)),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "probe": list(tokenizer(_PROBE, verbose=False)["input_ids"]),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


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
        InputError: the tokenizer has several templates and no default one.
    """
    if uses_default_template(tokenizer):
        return DEFAULT_CHAT_TEMPLATE
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(f"{_name(tokenizer)}: no default chat template: {error}") from None
    return template


def _special_texts(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The texts of all special tokens: any of them at an answer's end is an end mark."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {tokenizer.bos_token, tokenizer.eos_token}
    return {text for text in added | named if text}


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return tokenizer.name_or_path or "tokenizer"
