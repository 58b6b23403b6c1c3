"""Tokenize prompts and answers: chat template, border between prompt and answer, and end of an answer.

Prompt and answer are tokenized as one text. Tokenizers that put a space in front of every text, or that join characters
across the border, would give an answer other tokens by itself than it has behind its prompt.

* A chat prompt is rendered with the chat template up to where the assistant speaks. An answer is what the template adds
  for the assistant's message, through its end-of-turn token, or else EOS.
* A text prompt is continued as it is: BOS if the tokenizer adds one, then prompt and answer as one text, then EOS.
* A token that straddles the border belongs to the answer. All answers of a row follow the same prompt tokens: tokens
  that are not common to all of them belong to the answers too.

At inference a model reads the tokens of the prompt alone (`encode_prompt`). They begin with the prompt tokens of
training, and are the same unless a token straddles the border, or the template opens the assistant's turn with more
than it keeps in the whole conversation.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from everalign.data.chat_template import (
    Rendered,
    Renderer,
    name_of,
    special_texts,
    template_in_use,
    uses_default_template,
)
from everalign.data.messages import Completion, Prompt
from everalign.data.rows import common_length
from everalign.errors import InputError, located

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

PromptAndAnswers = tuple[list[int], tuple[list[int], ...]]
"""The tokens of a prompt, and those of each of its answers."""

_QUESTION: Prompt = ({"role": "user", "content": "Hi"},)
# Tokenized for the fingerprint: shows settings that are neither in the vocabulary nor in the template.
_PROBE = "Mixed CASE,  two spaces\n\ttab; 12345 naïve ½ 漢字."
_TEXTS_AT_ONCE = 2048
# Texts whose tokens hardly ever depend on what follows.
_BEFORE = ("\n", ":", "x")


class ChatFormat:
    """Tokenizes prompts and answers with one tokenizer; make it once for many rows.

    Args:
        tokenizer: a model's tokenizer.

    Raises:
        InputError: the tokenizer has no EOS token, or several chat templates and no default one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"{name_of(tokenizer)}: the tokenizer has no EOS token, so an answer would have no end; "
                "set tokenizer.eos_token"
            )
        self.tokenizer = tokenizer
        self.template = template_in_use(tokenizer)
        self.default_used = uses_default_template(tokenizer)
        self.eos: int = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id
        self._renderer = Renderer(tokenizer)
        self._end_marks = tuple(special_texts(tokenizer))
        # What the tokenizer adds before every text, such as BOS, without what it adds behind.
        plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
        marked = list(tokenizer("a", verbose=False)["input_ids"])
        self._head = marked[: next((i for i in range(len(marked)) if marked[i : i + len(plain)] == plain), 0)]
        # The special tokens, with their texts, that split a text into parts with independent tokens: the tokenizers
        # library looks for them before anything else. Left out are all tokens of other tokenizers, and those that
        # include the space around them or are searched in the normalized text.
        self._splitting = {
            number: token.content
            for number, token in (tokenizer.added_tokens_decoder if tokenizer.is_fast else {}).items()
            if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        }

    def prompt_text(self, prompt: Prompt) -> str:
        """Returns the prompt as the model reads it, up to the answer's first character."""
        return prompt if isinstance(prompt, str) else self._renderer.prompt(prompt)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Returns the tokens that a model reads before it answers; at least one for each prompt."""
        encoded = _tokenize(self.tokenizer, [self.prompt_text(prompt) for prompt in prompts])
        return [self._with_bos(prompt, tokens.ids) for prompt, tokens in zip(prompts, encoded, strict=True)]

    def encode(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        name: Callable[[int], str] = lambda i: f"row {i + 1}",
    ) -> list[PromptAndAnswers]:
        """Tokenizes N prompts and the answers to each, which end with the end-of-turn token or with EOS.

        The tokens of a prompt and one of its answers together are those of the whole conversation; no list is empty.

        Args:
            prompts: N prompts.
            completions: the answers to each of them, at least one.
            name: names the row of an index in error messages.

        Raises:
            InputError: a conversation cannot be rendered; names its row.
        """
        found: list[PromptAndAnswers] = []
        while len(found) < len(prompts):
            # A batch is kept in memory with the places of all its tokens.
            first, texts, last = len(found), 0, len(found)
            while last < len(prompts) and texts < _TEXTS_AT_ONCE:
                texts += len(completions[last])
                last += 1
            found += self._encode(prompts[first:last], completions[first:last], name, first)
        return found

    def _encode(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        name: Callable[[int], str],
        first: int,
    ) -> list[PromptAndAnswers]:
        texts: list[str] = []
        wholes: list[list[Rendered]] = []
        for i, (prompt, answers) in enumerate(zip(prompts, completions, strict=True)):
            with located(name(first + i)):
                texts.append(self.prompt_text(prompt))
                wholes.append([self._conversation(prompt, texts[-1], answer) for answer in answers])
        # In plain text the places of the tokens tell the border, so that the prompt need not be tokenized by itself.
        plain = [self.tokenizer.is_fast and isinstance(prompt, str) for prompt in prompts]
        given = iter(_tokenize(self.tokenizer, [t for t, skip in zip(texts, plain, strict=True) if not skip]))
        heads = [None if skip else next(given) for skip in plain]
        # What precedes a special token is tokenized alike whatever follows: once for all answers of a prompt.
        shared = [
            (0, 0) if head is None else self._fixed_prefix(text, head, row)
            for text, head, row in zip(texts, heads, wholes, strict=True)
        ]
        tails = [one.text[chars:] for row, (_, chars) in zip(wholes, shared, strict=True) for one in row]
        encoded = iter(_tokenize(self.tokenizer, tails))
        found = []
        for prompt, text, head, row, (tokens, chars) in zip(prompts, texts, heads, wholes, shared, strict=True):
            bodies = list(islice(encoded, len(row)))
            places = [body.at(one.start) for one, body in zip(row, bodies, strict=True)] if head is None else []
            borders = [place for place in places if place is not None]
            if head is not None or len(borders) < len(row):
                ids = (_tokenize(self.tokenizer, [text])[0] if head is None else head).ids
                found.append(self._split(prompt, ids, row, tokens, chars, bodies))
            else:
                found.append(self._cut(prompt, [], row, [body.ids for body in bodies], min(borders)))
        return found

    def end_of_turn_ids(self, prompt: Prompt = _QUESTION) -> tuple[int, ...]:
        """Returns the tokens any of which ends an assistant's turn: what the template ends it with, or else EOS.

        Args:
            prompt: messages or text; the end may depend on it.

        Raises:
            InputError: the template refuses the conversation.
        """
        return (self.encode([prompt], [["x"]])[0][1][0][-1],)

    def _conversation(self, prompt: Prompt, prompt_text: str, completion: Completion) -> Rendered:
        if not isinstance(prompt, str):
            return self._renderer.completion(prompt, prompt_text, completion)
        if not isinstance(completion, str):
            raise InputError("an answer of messages needs a prompt of messages; give the prompt as messages too")
        return Rendered(prompt + completion, len(prompt), completion.endswith(self._end_marks))

    def _fixed_prefix(self, text: str, head: "_TextTokens", wholes: Sequence[Rendered]) -> tuple[int, int]:
        """Counts the tokens and characters of a prompt before its last special token.

        They are the same in front of every answer; both are 0 if there is no such token.
        """
        least = min(whole.start for whole in wholes)
        for place in range(len(head.ids) - 1, 0, -1):
            if head.ids[place] in self._splitting:
                start, end = head.span(place)
                # Unknown text becomes a special token too.
                if end <= least and text[start:end] == self._splitting[head.ids[place]]:
                    return place, start
        return 0, 0

    def _split(
        self,
        prompt: Prompt,
        head: list[int],
        wholes: Sequence[Rendered],
        tokens: int,
        chars: int,
        tails: "Sequence[_TextTokens]",
    ) -> PromptAndAnswers:
        rest = head[tokens:]
        bodies, borders = [], []
        for tail, whole in zip(tails, wholes, strict=True):
            ids, border = tail.ids, _tokens_before(rest, tail, whole.start - chars)
            if border < len(rest) and whole.appended:
                written = whole.text[whole.start :]
                # Tokenized behind other text, as the answer stands there; as it was where they are joined with it.
                for before in _BEFORE:
                    alone, both = (one.ids for one in _tokenize(self.tokenizer, (before, before + written)))
                    if both[: len(alone)] == alone:
                        ids, border = rest + both[len(alone) :], len(rest)
                        break
            bodies.append(ids)
            borders.append(border)
        return self._cut(prompt, head[:tokens], wholes, bodies, min(borders))

    def _cut(
        self, prompt: Prompt, head: list[int], wholes: Sequence[Rendered], bodies: Sequence[list[int]], border: int
    ) -> PromptAndAnswers:
        """Returns the row whose prompt is `head` and what all bodies have in common before the border."""
        border = common_length([ids[:border] for ids in bodies])
        answers = tuple(
            ids[border:] + ([] if whole.ended else [self.eos]) for ids, whole in zip(bodies, wholes, strict=True)
        )
        return self._with_bos(prompt, head + bodies[0][:border]), answers

    def _with_bos(self, prompt: Prompt, ids: list[int]) -> list[int]:
        whole = [*self._head, *ids] if isinstance(prompt, str) else ids
        return whole or [self.eos if self.bos is None else self.bos]


class _TextTokens:
    """The tokens of one text of a batch, and their places in the text."""

    __slots__ = ("_batch", "_row", "ids")

    def __init__(self, batch: "BatchEncoding", row: int) -> None:
        self._batch, self._row = batch, row
        self.ids: list[int] = batch["input_ids"][row]

    def span(self, place: int) -> tuple[int, int]:
        """Returns the first character of a token and the one behind it; (0, -1) if the tokenizer does not tell."""
        found = self._batch.token_to_chars(self._row, place) if self._batch.is_fast else None
        return (0, -1) if found is None else (found.start, found.end)

    def at(self, character: int) -> int | None:
        """Returns the token of a character; None if it is in none, such as a stripped space."""
        place: int | None = self._batch.char_to_token(self._row, character)
        return place


def _tokenize(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[_TextTokens]:
    """Tokenizes texts without the special tokens that the tokenizer adds around a text."""
    found: list[_TextTokens] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = list(texts[start : start + _TEXTS_AT_ONCE])
        batch = tokenizer(
            part, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        found += [_TextTokens(batch, row) for row in range(len(part))]
    return found


def _tokens_before(head: list[int], whole: _TextTokens, border: int) -> int:
    """Counts the tokens of a whole text that lie before a border in it.

    Args:
        head: tokens of the prompt by itself.
        whole: prompt and answer as one text.
        border: the character at which the answer begins.
    """
    ids = whole.ids
    if ids[: len(head)] == head:
        return len(head)
    count = common_length((ids, head))
    while count and whole.span(count - 1)[1] > border:
        count -= 1
    while count < len(ids) and 0 <= whole.span(count)[1] <= border:
        count += 1
    return count


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """Returns the tokens that a model reads before it answers; at least one."""
    return ChatFormat(tokenizer).encode_prompts([prompt])[0]


def encode_response(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, response: Completion) -> list[int]:
    """Returns the tokens of an answer to `prompt`, without the prompt's, ending with the end-of-turn token or EOS.

    They follow `encode_prompt(tokenizer, prompt)`, or begin with its last tokens if the whole conversation has others
    there; `ChatFormat.encode` gives both.
    """
    return ChatFormat(tokenizer).encode([prompt], [[response]])[0][1][0]


def template_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns the sha256 of what tokenization depends on: template, vocabulary, special tokens, and a probe's tokens.

    The padding token is left out: it is in no prompt and no answer, and loading a model may change it. A template that
    prints the date renders differently tomorrow under the same fingerprint; key what is computed from tokens by the
    tokens themselves.
    """
    facts: dict[str, Any] = {
        "template": template_in_use(tokenizer),
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": sorted(special_texts(tokenizer)),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "probe": list(tokenizer(_PROBE, verbose=False)["input_ids"]),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
