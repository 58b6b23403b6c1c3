"""Scored rows as tokens: one prompt and all its responses, each with what it counts or what is wanted of it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, overload

from everalign.data.encoding import check_max_length, cut_prompt
from everalign.data.scored import Scored
from everalign.data.templating import ChatFormat, EncodedRow
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


@dataclass(frozen=True, slots=True)
class TargetGroup:
    """Token ids of a prompt and of responses that are compared with each other; no list is empty.

    Args:
        id: the row's.
        prompt: tokens that every response follows.
        responses: tokens of each, its end mark included; at least two.
        shares: how the probability of these responses is to be divided among them, relative to the reference; they
            sum to 1. A share of 0 is for a response that is never to be given, not for one that does not count.
        weight: the row's.
    """

    id: str
    prompt: list[int]
    responses: tuple[list[int], ...]
    shares: tuple[float, ...]
    weight: float


AnyGroup = EncodedGroup | TargetGroup


@dataclass(frozen=True)
class EncodedGroups(Sequence[AnyGroup]):
    """Encoded rows in their order.

    Args:
        items: one group for each row.
        max_length: the limit they were cut to, in tokens of prompt and longest response together.
        truncated_prompts: prompts that lost tokens on their left.
    """

    items: tuple[AnyGroup, ...]
    max_length: int
    truncated_prompts: int

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all ids, tokens, weights and shares in order: the key for what is computed from them."""
        digest = hashlib.sha256()
        for group in self.items:
            digest.update(repr(tuple(getattr(group, field.name) for field in fields(group))).encode())
        return digest.hexdigest()

    @property
    def altered(self) -> bool:
        """Whether the limit cost anything."""
        return bool(self.truncated_prompts)

    def summary(self) -> str:
        """One line of text for a log."""
        return f"{len(self)} prompts of at most {self.max_length} tokens: {self.truncated_prompts} truncated"

    @overload
    def __getitem__(self, index: int) -> AnyGroup: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[AnyGroup, ...]: ...
    def __getitem__(self, index: int | slice) -> AnyGroup | tuple[AnyGroup, ...]:
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


def distinct(rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase") -> tuple[Scored, ...]:
    """Return the rows with every completion once: of those whose tokens are the same, the first stays.

    Raises:
        InputError: equal completions have different rewards; names the row and both.
    """
    kept = []
    for number, (row, (_, responses)) in enumerate(
        zip(rows, _encode_whole(rows, ChatFormat(tokenizer)), strict=True), start=1
    ):
        first: dict[tuple[int, ...], int] = {}
        for i, tokens in enumerate(responses):
            j = first.setdefault(tuple(tokens), i)
            if row.rewards[i] != row.rewards[j]:
                raise InputError(
                    f"row {number} (id {row.id}): completions[{j}] and completions[{i}] are the same answer with "
                    f"different rewards, {row.rewards[j]:g} and {row.rewards[i]:g}: keep one of them"
                )
        kept.append(row if len(first) == len(responses) else row.only(list(first.values())))
    return tuple(kept)


def encode_groups(rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> EncodedGroups:
    """Tokenises weighted rows; prompts lose tokens on their left (a leading BOS stays) so that all responses fit.

    Args:
        rows: with weights, and with completions that fit (see `fitting`).
        tokenizer: the model's.
        max_length: tokens of prompt and longest response together.

    Raises:
        InputError: a row has no weights, or a completion does not fit; names the row.
    """
    groups, cut = [], 0
    for row, weights, prompt, responses, was_cut in _encode_weighted(rows, tokenizer, max_length):
        cut += was_cut
        groups.append(EncodedGroup(row.id, prompt, responses, tuple(row.weight * weight for weight in weights)))
    return EncodedGroups(tuple(groups), max_length, cut)


def encode_targets(rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> EncodedGroups:
    """Tokenises weighted rows as `encode_groups` does, for comparison: a response's share is its part of the weights.

    Raises:
        InputError: as in `encode_groups`; or a row has one completion only, which compares with nothing.
    """
    groups: list[TargetGroup] = []
    cut = 0
    for row, weights, prompt, responses, was_cut in _encode_weighted(rows, tokenizer, max_length):
        if len(weights) == 1:
            raise InputError(f"row {len(groups) + 1} (id {row.id}): has one completion, from which nothing is learnt")
        cut += was_cut
        shares = tuple(weight / sum(weights) for weight in weights)
        groups.append(TargetGroup(row.id, prompt, responses, shares, row.weight))
    return EncodedGroups(tuple(groups), max_length, cut)


_Encoded = tuple[Scored, tuple[float, ...], list[int], tuple[list[int], ...], bool]


def _encode_weighted(
    rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Iterator[_Encoded]:
    """Yield each row with its weights, its prompt cut to the room there is, its responses, and whether it was cut."""
    check_max_length(max_length)
    for number, (row, (prompt, responses)) in enumerate(
        zip(rows, _encode_whole(rows, ChatFormat(tokenizer)), strict=True), start=1
    ):
        room = max_length - max(len(tokens) for tokens in responses)
        if row.weights is None or room < max_length // 4:
            what = "its completions have no weights yet" if row.weights is None else "a completion does not fit"
            raise InputError(f"row {number} (id {row.id}): {what}")
        short = cut_prompt(prompt, room, tokenizer.bos_token_id)
        yield row, row.weights, short, responses, len(short) < len(prompt)


def _encode_whole(rows: Sequence[Scored], form: ChatFormat) -> list[EncodedRow]:
    prompts, completions = [row.prompt for row in rows], [row.completions for row in rows]
    return form.encode(prompts, completions, lambda i: f"row {i + 1} (id {rows[i].id})")
