"""Tokenise preferences, scored completions and whole sequences, and cut them to a maximum length."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from everalign.data.chat_tokens import ChatFormat, TokenizedRow
from everalign.data.messages import Completion, Prompt
from everalign.data.records import Preference, Scored
from everalign.errors import InputError, check_shortfall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST_MAX_LENGTH = 8


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """Token ids of one preference; both answers follow the same prompt, and no list is empty."""

    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    weight: float


@dataclass(frozen=True, repr=False)
class TokenizedPairs(Sequence[TokenizedPair]):
    """Encoded rows in their order, and what the length limit cost.

    Args:
        items: one pair for each row, none left out.
        max_length: the limit they were cut to, in tokens of prompt and answer together.
        truncated_prompts: prompts that lost tokens, one a pair at most.
        truncated_responses: answers that lost tokens, two a pair at most.
        identical_after_truncation: pairs whose two answers are the same tokens, by the cut or because the
            tokenizer or the template removes what told them apart. Such a pair has no margin.
    """

    items: tuple[TokenizedPair, ...]
    max_length: int
    truncated_prompts: int
    truncated_responses: int
    identical_after_truncation: int

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all ids, tokens and weights in order: the key for what is computed from them."""
        digest = hashlib.sha256()
        for pair in self.items:
            digest.update(repr((pair.id, pair.prompt, pair.chosen, pair.rejected, pair.weight)).encode())
        return digest.hexdigest()

    @property
    def altered(self) -> bool:
        """Whether the limit cost anything."""
        return bool(self.truncated_prompts or self.truncated_responses or self.identical_after_truncation)

    def warnings(self) -> tuple[str, ...]:
        """Return what the limit cost where that is much: cut answers, cut prompts, pairs with nothing left to learn.

        Raises:
            InputError: most pairs have identical answers.
        """
        pairs, remedy = len(self), f"raise --max-length (max_length), {self.max_length} now"
        same = check_shortfall(
            self.identical_after_truncation,
            pairs,
            "pairs have identical answers as tokens",
            f"{remedy}, or mend them",
        )
        answers = check_shortfall(
            self.truncated_responses, 2 * pairs, "answers are cut and lose their end", remedy, refuse=False
        )
        prompts = check_shortfall(self.truncated_prompts, pairs, "prompts lose their beginning", remedy, refuse=False)
        return (*same, *answers, *prompts)

    def followed_by(self, others: "TokenizedPairs") -> "TokenizedPairs":
        """Return these rows and then others of the same length limit."""
        names = ("truncated_prompts", "truncated_responses", "identical_after_truncation")
        counts = {name: getattr(self, name) + getattr(others, name) for name in names}
        return TokenizedPairs(self.items + others.items, self.max_length, **counts)

    def one_line(self) -> str:
        """One line of text for a log."""
        return (
            f"{len(self)} pairs of at most {self.max_length} tokens: {self.truncated_prompts} prompts and "
            f"{self.truncated_responses} answers truncated, "
            f"{self.identical_after_truncation} pairs with identical answers"
        )

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TokenizedPair, ...]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | tuple[TokenizedPair, ...]:
        return self.items[index]

    def __iter__(self) -> Iterator[TokenizedPair]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"TokenizedPairs({self.one_line()})"


def tokenize_pairs(
    rows: Sequence[Preference],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    allow_identical: bool = False,
) -> TokenizedPairs:
    """Tokenises preferences and cuts each pair to `max_length` tokens of prompt and longer answer.

    First the prompt loses tokens on its left (a leading BOS stays), down to a quarter of `max_length`; then
    the answers lose their tails, end mark included, so that a model does not learn to stop there.

    Raises:
        InputError: `max_length` is below 8; a row cannot be rendered (names its number and id); no pair's
            answers can be told apart, unless `allow_identical`.
    """
    check_max_length(max_length)
    whole = _encode_whole(rows, ChatFormat(tokenizer))
    pairs = tuple(truncate_pair(pair, max_length, tokenizer.bos_token_id) for pair in whole)
    same = sum(pair.chosen == pair.rejected for pair in pairs)
    if pairs and same == len(pairs) and not allow_identical:
        raise InputError(
            f"max_length: {max_length} leaves the two answers of every pair ({same} in all) identical; "
            "raise it, or use a tokenizer that tells the answers apart"
        )
    cut_answers = 0
    for before, after in zip(whole, pairs, strict=True):
        cut_answers += len(after.chosen) < len(before.chosen)
        cut_answers += len(after.rejected) < len(before.rejected)
    cut_prompts = sum(len(a.prompt) < len(b.prompt) for a, b in zip(pairs, whole, strict=True))
    return TokenizedPairs(pairs, max_length, cut_prompts, cut_answers, same)


def truncate_pair(pair: TokenizedPair, max_length: int, bos: int | None = None) -> TokenizedPair:
    """Cuts one pair as `tokenize_pairs` says; `max_length` is at least 8, `bos` the token to keep in front."""
    longest = max(len(pair.chosen), len(pair.rejected))
    room = max(max_length - longest, max_length // 4)
    prompt = cut_prompt(pair.prompt, room, bos)
    left = max_length - len(prompt)
    return TokenizedPair(pair.id, prompt, pair.chosen[:left], pair.rejected[:left], pair.weight)


def check_max_length(max_length: int) -> None:
    """Refuse a limit that leaves prompt and answer nothing."""
    if max_length < SHORTEST_MAX_LENGTH:
        raise InputError(f"max_length: must be at least {SHORTEST_MAX_LENGTH} tokens, found {max_length}")


def cut_prompt(prompt: list[int], room: int, bos: int | None) -> list[int]:
    """Cut a prompt on its left to `room` tokens; a leading BOS stays."""
    if len(prompt) <= room:
        return prompt
    # Models trained with BOS read a text without it badly, so the cut is made behind it.
    head = prompt[:1] if prompt[0] == bos else []
    return head + prompt[len(prompt) - room + len(head) :]


def _encode_whole(rows: Sequence[Preference], form: ChatFormat) -> list[TokenizedPair]:
    encoded = form.encode(
        [row.prompt for row in rows],
        [(row.chosen, row.rejected) for row in rows],
        lambda i: f"pair {i + 1} (id {rows[i].id})",
    )
    return [
        TokenizedPair(row.id, prompt, chosen, rejected, row.weight)
        for row, (prompt, (chosen, rejected)) in zip(rows, encoded, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class TokenizedGroup:
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


AnyGroup = TokenizedGroup | TargetGroup


@dataclass(frozen=True)
class TokenizedGroups(Sequence[AnyGroup]):
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

    def one_line(self) -> str:
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
    for row, (_, responses) in zip(rows, _encode_groups_whole(rows, ChatFormat(tokenizer)), strict=True):
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
        zip(rows, _encode_groups_whole(rows, ChatFormat(tokenizer)), strict=True), start=1
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


def tokenize_groups(rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> TokenizedGroups:
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
        groups.append(TokenizedGroup(row.id, prompt, responses, tuple(row.weight * weight for weight in weights)))
    return TokenizedGroups(tuple(groups), max_length, cut)


def tokenize_targets(rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> TokenizedGroups:
    """Tokenises weighted rows as `tokenize_groups` does, for comparison: a response's share is its part of the weights.

    Raises:
        InputError: as in `tokenize_groups`; or a row has one completion only, which compares with nothing.
    """
    groups: list[TargetGroup] = []
    cut = 0
    for row, weights, prompt, responses, was_cut in _encode_weighted(rows, tokenizer, max_length):
        if len(weights) == 1:
            raise InputError(f"row {len(groups) + 1} (id {row.id}): has one completion, from which nothing is learnt")
        cut += was_cut
        shares = tuple(weight / sum(weights) for weight in weights)
        groups.append(TargetGroup(row.id, prompt, responses, shares, row.weight))
    return TokenizedGroups(tuple(groups), max_length, cut)


_Encoded = tuple[Scored, tuple[float, ...], list[int], tuple[list[int], ...], bool]


def _encode_weighted(
    rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Iterator[_Encoded]:
    """Yield each row with its weights, its prompt cut to the room there is, its responses, and whether it was cut."""
    check_max_length(max_length)
    for number, (row, (prompt, responses)) in enumerate(
        zip(rows, _encode_groups_whole(rows, ChatFormat(tokenizer)), strict=True), start=1
    ):
        room = max_length - max(len(tokens) for tokens in responses)
        if row.weights is None or room < max_length // 4:
            what = "its completions have no weights yet" if row.weights is None else "a completion does not fit"
            raise InputError(f"row {number} (id {row.id}): {what}")
        short = cut_prompt(prompt, room, tokenizer.bos_token_id)
        yield row, row.weights, short, responses, len(short) < len(prompt)


def _encode_groups_whole(rows: Sequence[Scored], form: ChatFormat) -> list[TokenizedRow]:
    prompts, completions = [row.prompt for row in rows], [row.completions for row in rows]
    return form.encode(prompts, completions, lambda i: f"row {i + 1} (id {rows[i].id})")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Token ids of one preference's two sequences, each prompt and answer.

    Args:
        id: the row's.
        chosen: tokens of prompt and better answer.
        rejected: tokens of prompt and worse answer.
        answers: tokens of the two answers alone, of chosen and rejected.
        weight: the row's.
    """

    id: str
    chosen: list[int]
    rejected: list[int]
    answers: tuple[int, int]
    weight: float


@dataclass(frozen=True)
class TokenizedAnswers:
    """Sequences in the order of their answers, and what the length limit cost.

    Args:
        sequences: tokens of prompt and answer, none empty.
        answers: tokens of each answer, before any cut.
        cut: sequences that lost tokens.
    """

    sequences: tuple[list[int], ...]
    answers: tuple[int, ...]
    cut: int


def tokenize_answers(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    name: Callable[[int], str] = lambda i: f"answer {i + 1}",
) -> TokenizedAnswers:
    """Tokenises answers behind their prompts and cuts each sequence to `max_length` tokens.

    First the prompt loses tokens on its left (a leading BOS stays), down to a quarter of `max_length`; then the answer
    loses its tail.

    Args:
        prompts: N prompts, one for each answer.
        completions: N answers.
        tokenizer: the model's, with a padding token.
        max_length: tokens of prompt and answer together, at least 8.
        name: what errors call the answer of an index.

    Raises:
        InputError: `max_length` is below 8; an answer cannot be rendered, or ends in the padding token (a reward model
            would take it for padding); names the answer.
    """
    check_max_length(max_length)
    encoded = ChatFormat(tokenizer).encode(prompts, [(completion,) for completion in completions], name)
    parts = [(prompt, answer) for prompt, (answer,) in encoded]
    sequences = [_cut(*part, max_length, tokenizer.bos_token_id) for part in parts]
    for i, tokens in enumerate(sequences):
        if tokens[-1] == tokenizer.pad_token_id:
            raise InputError(f"{name(i)}: ends in the padding token {tokenizer.pad_token!r}; remove it from the text")
    cut = sum(len(tokens) < len(p) + len(a) for tokens, (p, a) in zip(sequences, parts, strict=True))
    return TokenizedAnswers(tuple(sequences), tuple(len(answer) for _, answer in parts), cut)


def tokenize_comparisons(
    rows: Sequence[Preference], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[tuple[Comparison, ...], int]:
    """Tokenises preferences for a reward model; arguments as in `tokenize_answers`.

    Returns:
        One comparison a row, and how many sequences lost tokens.

    Raises:
        InputError: as in `tokenize_answers`, naming the pair; or no pair's answers can be told apart.
    """
    prompts = [row.prompt for row in rows for _ in range(2)]
    completions = [text for row in rows for text in (row.chosen, row.rejected)]
    encoded = tokenize_answers(
        prompts, completions, tokenizer, max_length, lambda i: f"pair {i // 2 + 1} (id {rows[i // 2].id})"
    )
    sequences, answers = encoded.sequences, encoded.answers
    pairs = tuple(
        Comparison(row.id, sequences[2 * i], sequences[2 * i + 1], (answers[2 * i], answers[2 * i + 1]), row.weight)
        for i, row in enumerate(rows)
    )
    if all(pair.chosen == pair.rejected for pair in pairs):
        raise InputError(
            f"max_length: {max_length} leaves the two answers of every pair ({len(pairs)} in all) identical; "
            "raise it, or use a tokenizer that tells the answers apart"
        )
    return pairs, encoded.cut


def pad_right(sequences: Sequence[list[int]], padding: int) -> dict[str, Tensor]:
    """Lay out B sequences of at most T tokens as `input_ids` and `attention_mask`, both (B, T) int64."""
    width = max(len(tokens) for tokens in sequences)
    ids = [tokens + [padding] * (width - len(tokens)) for tokens in sequences]
    mask = [[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in sequences]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _cut(prompt: list[int], answer: list[int], max_length: int, bos: int | None) -> list[int]:
    short = cut_prompt(prompt, max(max_length - len(answer), max_length // 4), bos)
    return short + answer[: max_length - len(short)]
