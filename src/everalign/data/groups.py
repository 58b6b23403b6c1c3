"""Scored rows as tokens: one prompt and all its responses, each with what it counts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, overload

from everalign.data.encoding import check_max_length, cut_prompt
from everalign.data.scored import Scored
from everalign.data.templating import ChatFormat
from everalign.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """Token ids of a prompt and its responses; no list is empty.

    Args:
        id: the row's.
        prompt: tokens that every response follows.
        responses: tokens of each, its end mark included.
        weights: what each counts, the row's own weight included; at least one is above 0.
    """

    id: str
    prompt: list[int]
    responses: tuple[list[int], ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class EncodedGroups(Sequence[EncodedGroup]):
    """Encoded rows in their order.

    Args:
        items: one group for each row.
        max_length: the limit they were cut to, in tokens of prompt and longest response together.
        truncated_prompts: prompts that lost tokens on their left.
    """

    items: tuple[EncodedGroup, ...]
    max_length: int
    truncated_prompts: int

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all ids, tokens and weights in order: the key for what is computed from them."""
        digest = hashlib.sha256()
        for group in self.items:
            digest.update(repr((group.id, group.prompt, group.responses, group.weights)).encode())
        return digest.hexdigest()

    @property
    def altered(self) -> bool:
        """Whether the limit cost anything."""
        return bool(self.truncated_prompts)

    def summary(self) -> str:
        """One line of text for a log."""
        return f"{len(self)} prompts of at most {self.max_length} tokens: {self.truncated_prompts} truncated"

    @overload
    def __getitem__(self, index: int) -> EncodedGroup: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[EncodedGroup, ...]: ...
    def __getitem__(self, index: int | slice) -> EncodedGroup | tuple[EncodedGroup, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Fitting:
    """The rows whose completions fit, with the tokens of each completion, and how many of either were dropped."""

    rows: tuple[Scored, ...]
    lengths: tuple[tuple[int, ...], ...]
    dropped_rows: int
    dropped_completions: int


def fitting(rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase", max_length: int, fewest: int = 1) -> Fitting:
    """Drop the completions that leave the prompt less than a quarter of `max_length`.

    A response without its end would teach the model not to stop; and what it is worth was said of the whole. A row
    goes with them where fewer than `fewest` completions are left, or none with a weight of those it was given.
    """
    check_max_length(max_length)
    kept: list[tuple[Scored, tuple[int, ...]]] = []
    dropped = 0
    for row, (_, responses) in zip(rows, _encode_whole(rows, ChatFormat(tokenizer)), strict=True):
        fit = [i for i, tokens in enumerate(responses) if len(tokens) <= max_length - max_length // 4]
        dropped += len(responses) - len(fit)
        taught = row.weights is None or any(row.weights[i] > 0 for i in fit)
        if taught and len(fit) >= fewest:
            lengths = tuple(len(responses[i]) for i in fit)
            kept.append((row if len(fit) == len(responses) else row.only(fit), lengths))
    return Fitting(tuple(r for r, _ in kept), tuple(n for _, n in kept), len(rows) - len(kept), dropped)


def encode_groups(rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> EncodedGroups:
    """Tokenises weighted rows; prompts lose tokens on their left (a leading BOS stays) so that all responses fit.

    Args:
        rows: with weights, and with completions that fit (see `fitting`).
        tokenizer: the model's.
        max_length: tokens of prompt and longest response together.

    Raises:
        InputError: a row has no weights, or a completion does not fit; names the row.
    """
    check_max_length(max_length)
    groups, cut = [], 0
    for number, (row, (prompt, responses)) in enumerate(
        zip(rows, _encode_whole(rows, ChatFormat(tokenizer)), strict=True), start=1
    ):
        room = max_length - max(len(tokens) for tokens in responses)
        if row.weights is None or room < max_length // 4:
            what = "its completions have no weights yet" if row.weights is None else "a completion does not fit"
            raise InputError(f"row {number} (id {row.id}): {what}")
        short = cut_prompt(prompt, room, tokenizer.bos_token_id)
        cut += len(short) < len(prompt)
        groups.append(EncodedGroup(row.id, short, responses, tuple(row.weight * weight for weight in row.weights)))
    return EncodedGroups(tuple(groups), max_length, cut)


def _encode_whole(rows: Sequence[Scored], form: ChatFormat) -> list[tuple[list[int], tuple[list[int], ...]]]:
    texts, answers = [], []
    for number, row in enumerate(rows, start=1):
        try:
            text = form.prompt_text(row.prompt)
            answers += [form.response_text(row.prompt, text, completion) for completion in row.completions]
        except InputError as error:
            raise InputError(f"row {number} (id {row.id}): {error}") from None
        texts.append(text)
    prompts = form.prompt_tokens([row.prompt for row in rows], texts)
    responses = iter(form.response_tokens(answers))
    return [
        (prompt, tuple(next(responses) for _ in row.completions)) for prompt, row in zip(prompts, rows, strict=True)
    ]
