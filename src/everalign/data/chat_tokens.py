"""How text becomes tokens: the chat template, the border of prompt and answer, and the end of an answer.

The tokens are those of the whole conversation, tokenised as one text: tokenizers that put a mark of a space before a
text of its own, or that join characters across the border, have no other tokens for an answer behind its prompt.

* A chat prompt is rendered by the tokenizer's chat template up to where the assistant speaks. An answer is what the
  template adds to that for the assistant's message, through its end-of-turn mark, or else EOS.
* A text prompt is continued as it stands: BOS if the tokenizer adds one, then prompt and answer as one text, EOS.
* A token that straddles the border belongs to the answer. All answers of a row follow the same prompt: tokens that not
  all of them have in common belong to the answers too.

In use a model is given the tokens of the prompt alone (`encode_prompt`). They begin with those that an answer was
learned behind, and are the same but where a token straddles the border, or where the template opens the assistant's
turn with more than it keeps in the whole conversation.
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
from everalign.errors import InputError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

TokenizedRow = tuple[list[int], tuple[list[int], ...]]
"""Tokens of a prompt, and of each of its answers."""

_QUESTION: Prompt = ({"role": "user", "content": "Hi"},)
# Tokenised as part of the fingerprint, for the settings that neither the vocabulary nor the template shows.
_PROBE = "Mixed CASE,  two spaces\n\ttab; 12345 naïve ½ 漢字."
_TEXTS_AT_ONCE = 2048
# Texts that are tokenised alike whatever follows, or nearly.
_BEFORE = ("\n", ":", "x")


class ChatFormat:
    """The borders and ends of one tokenizer's prompts and answers; computed once and used for many rows.

    Args:
        tokenizer: a model's.

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
        self._head = _special_head(tokenizer)
        self._anchors = _anchors(tokenizer)

    def prompt_text(self, prompt: Prompt) -> str:
        """The prompt as the model reads it, up to the answer's first character."""
        return prompt if isinstance(prompt, str) else self._renderer.prompt(prompt)

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokens that a model reads before it answers; at least one, for an answer's first token to follow."""
        encoded = _tokenized(self.tokenizer, [self.prompt_text(prompt) for prompt in prompts])
        return [self._headed(prompt, tokens.ids) for prompt, tokens in zip(prompts, encoded, strict=True)]

    def encode(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        name: Callable[[int], str] = lambda i: f"row {i + 1}",
    ) -> list[TokenizedRow]:
        """Tokens of N prompts, and of the answers to each, ended by the end-of-turn mark or by EOS.

        A prompt and one of its answers together are the tokens of the whole conversation; no list is empty.

        Args:
            prompts: N prompts.
            completions: the answers to each of them, at least one.
            name: what errors call the row of an index.

        Raises:
            InputError: a conversation cannot be rendered; names its row.
        """
        found: list[TokenizedRow] = []
        while len(found) < len(prompts):
            # Texts of a batch are held with where all their tokens stand.
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
    ) -> list[TokenizedRow]:
        texts: list[str] = []
        wholes: list[list[Rendered]] = []
        for i, (prompt, answers) in enumerate(zip(prompts, completions, strict=True)):
            try:
                texts.append(self.prompt_text(prompt))
                wholes.append([self._whole(prompt, texts[-1], answer) for answer in answers])
            except InputError as error:
                raise InputError(f"{name(first + i)}: {error}") from None
        # The border in a plain text is told by where the tokens of the whole stand.
        plain = [self.tokenizer.is_fast and isinstance(prompt, str) for prompt in prompts]
        given = iter(_tokenized(self.tokenizer, [t for t, skip in zip(texts, plain, strict=True) if not skip]))
        heads = [None if skip else next(given) for skip in plain]
        # What stands before a special token is tokenised without what follows: for answers of one prompt, once.
        shared = [
            (0, 0) if head is None else self._shared(text, head, row)
            for text, head, row in zip(texts, heads, wholes, strict=True)
        ]
        tails = [one.text[chars:] for row, (_, chars) in zip(wholes, shared, strict=True) for one in row]
        encoded = iter(_tokenized(self.tokenizer, tails))
        found = []
        for prompt, text, head, row, (tokens, chars) in zip(prompts, texts, heads, wholes, shared, strict=True):
            bodies = list(islice(encoded, len(row)))
            borders = None if head is not None else _told_borders(row, bodies)
            if borders is None:
                ids = (_tokenized(self.tokenizer, [text])[0] if head is None else head).ids
                found.append(self._row(prompt, ids, row, tokens, chars, bodies))
            else:
                found.append(self._cut(prompt, [], row, [body.ids for body in bodies], min(borders)))
        return found

    def end_of_turn_ids(self, prompt: Prompt = _QUESTION) -> tuple[int, ...]:
        """Tokens any of which ends an assistant's turn: what the template ends it with, or else EOS.

        Args:
            prompt: messages, or text, where the end may depend on the prompt.

        Raises:
            InputError: the template refuses the conversation.
        """
        return (self.encode([prompt], [["x"]])[0][1][0][-1],)

    def _whole(self, prompt: Prompt, prompt_text: str, completion: Completion) -> Rendered:
        if not isinstance(prompt, str):
            return self._renderer.completion(prompt, prompt_text, completion)
        if not isinstance(completion, str):
            raise InputError("an answer of messages needs a prompt of messages; give the prompt as messages too")
        return Rendered(prompt + completion, len(prompt), completion.endswith(self._end_marks))

    def _shared(self, text: str, head: "_Tokenized", wholes: Sequence[Rendered]) -> tuple[int, int]:
        """Return how many tokens, and characters, of a prompt stand before the last special token in it.

        They are the same in front of every answer; both are 0 where there is no such token.
        """
        least = min(whole.start for whole in wholes)
        for place in range(len(head.ids) - 1, 0, -1):
            if head.ids[place] in self._anchors:
                start, end = head.span(place)
                # What is unknown becomes a special token too.
                if end <= least and text[start:end] == self._anchors[head.ids[place]]:
                    return place, start
        return 0, 0

    def _row(
        self,
        prompt: Prompt,
        head: list[int],
        wholes: Sequence[Rendered],
        tokens: int,
        chars: int,
        tails: "Sequence[_Tokenized]",
    ) -> TokenizedRow:
        rest = head[tokens:]
        bodies, borders = [], []
        for tail, whole in zip(tails, wholes, strict=True):
            ids, border = tail.ids, _before_border(rest, tail, whole.start - chars)
            if border < len(rest) and whole.written:
                written = self._written(whole.text[whole.start :])
                ids, border = (ids, border) if written is None else (rest + written, len(rest))
            bodies.append(ids)
            borders.append(border)
        return self._cut(prompt, head[:tokens], wholes, bodies, min(borders))

    def _cut(
        self, prompt: Prompt, head: list[int], wholes: Sequence[Rendered], bodies: Sequence[list[int]], border: int
    ) -> TokenizedRow:
        """Return a row whose prompt are `head` and what all bodies have in common before the border."""
        border = _alike([ids[:border] for ids in bodies])
        answers = tuple(
            ids[border:] + ([] if whole.ended else [self.eos]) for ids, whole in zip(bodies, wholes, strict=True)
        )
        return self._headed(prompt, head + bodies[0][:border]), answers

    def _written(self, text: str) -> list[int] | None:
        """Return the tokens of a text that is written behind others; None where they are joined with any."""
        for before in _BEFORE:
            first, both = (one.ids for one in _tokenized(self.tokenizer, (before, before + text)))
            if both[: len(first)] == first:
                return both[len(first) :]
        return None

    def _headed(self, prompt: Prompt, ids: list[int]) -> list[int]:
        whole = [*self._head, *ids] if isinstance(prompt, str) else ids
        return whole or [self.eos if self.bos is None else self.bos]


class _Tokenized:
    """One text of a batch: its tokens, and on demand where each stands in the text."""

    __slots__ = ("_batch", "_row", "ids")

    def __init__(self, batch: "BatchEncoding", row: int) -> None:
        self._batch, self._row = batch, row
        self.ids: list[int] = batch["input_ids"][row]

    def span(self, place: int) -> tuple[int, int]:
        """Return where a token's characters begin and end; nowhere, (0, -1), where the tokenizer does not tell."""
        found = self._batch.token_to_chars(self._row, place) if self._batch.is_fast else None
        return (0, -1) if found is None else (found.start, found.end)

    def at(self, character: int) -> int | None:
        """Return the token that a character is in; None where it is in none, such as a space that is cut off."""
        place: int | None = self._batch.char_to_token(self._row, character)
        return place


def _tokenized(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[_Tokenized]:
    """Tokenise texts as they stand, without what the tokenizer puts around a text."""
    found: list[_Tokenized] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = list(texts[start : start + _TEXTS_AT_ONCE])
        batch = tokenizer(
            part, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        found += [_Tokenized(batch, row) for row in range(len(part))]
    return found


def _told_borders(wholes: Sequence[Rendered], bodies: Sequence[_Tokenized]) -> list[int] | None:
    """Return how many tokens stand before each answer; None where the tokenizer does not tell of all."""
    found = []
    for whole, body in zip(wholes, bodies, strict=True):
        place = body.at(whole.start)
        if place is None:
            return None
        found.append(place)
    return found


def _before_border(head: list[int], whole: _Tokenized, border: int) -> int:
    """Return how many tokens of a whole text lie before a border in it.

    Args:
        head: tokens of the prompt by itself.
        whole: prompt and answer as one text.
        border: the character where the answer begins.
    """
    ids = whole.ids
    if ids[: len(head)] == head:
        return len(head)
    count = _alike((ids, head))
    while count and whole.span(count - 1)[1] > border:
        count -= 1
    while count < len(ids) and 0 <= whole.span(count)[1] <= border:
        count += 1
    return count


def _alike(lists: Sequence[list[int]]) -> int:
    """Return how many tokens lists begin with alike."""
    shortest, longest = min(lists), max(lists)
    pairs = enumerate(zip(shortest, longest, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(shortest), len(longest)))


def _special_head(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return what a tokenizer puts before every text, such as BOS; what it puts behind one, an answer cannot follow."""
    plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    marked = list(tokenizer("a", verbose=False)["input_ids"])
    places = (i for i in range(len(marked)) if marked[i : i + len(plain)] == plain)
    return marked[: next(places, 0)]


def _anchors(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Return the special tokens, and their texts, that cut a text in two, neither of which depends on the other.

    Tokenizers of the tokenizers library look for them before anything else. None for others, and none of those that
    take the space about them, too, or that are looked for in the normalised text.
    """
    if not tokenizer.is_fast:
        return {}
    return {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    }


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """The tokens a model reads before it answers; at least one."""
    return ChatFormat(tokenizer).encode_prompts([prompt])[0]


def encode_response(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, response: Completion) -> list[int]:
    """The tokens of an answer to `prompt` (not the prompt's), ended by the end-of-turn mark or EOS.

    They follow `encode_prompt(tokenizer, prompt)`, or begin with its last tokens where these are others in the whole
    conversation; `ChatFormat.encode` gives both.
    """
    return ChatFormat(tokenizer).encode([prompt], [[response]])[0][1][0]


def template_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 over what decides how text becomes tokens: template in use, vocabulary, special tokens, a probe.

    Which token pads is left out: it reaches no prompt and no answer, and loading a model may change it.
    A template that prints today's date renders differently tomorrow under the same fingerprint; whoever
    stores what was computed from tokens keys it by `TokenizedPairs.fingerprint`.
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
