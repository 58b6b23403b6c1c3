"""Preferences as tokens: one prompt and two answers a row, cut to a length with the answers kept."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, overload

from everalign.data.records import Preference
from everalign.data.templating import ChatFormat
from everalign.errors import InputError
from everalign.shortfall import check_shortfall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST_MAX_LENGTH = 8


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids of one preference; both answers follow the same prompt, and no list is empty."""

    id: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    weight: float


@dataclass(frozen=True, repr=False)
class EncodedPairs(Sequence[EncodedPair]):
    """Encoded rows in their order, and what the length limit cost.

    Args:
        items: one pair for each row, none left out.
        max_length: the limit they were cut to, in tokens of prompt and answer together.
        truncated_prompts: prompts that lost tokens, one a pair at most.
        truncated_responses: answers that lost tokens, two a pair at most.
        identical_after_truncation: pairs whose two answers are the same tokens, by the cut or because the
            tokenizer or the template removes what told them apart. Such a pair has no margin.
    """

    items: tuple[EncodedPair, ...]
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

    def followed_by(self, others: "EncodedPairs") -> "EncodedPairs":
        """Return these rows and then others of the same length limit."""
        names = ("truncated_prompts", "truncated_responses", "identical_after_truncation")
        counts = {name: getattr(self, name) + getattr(others, name) for name in names}
        return EncodedPairs(self.items + others.items, self.max_length, **counts)

    def summary(self) -> str:
        """One line of text for a log."""
        return (
            f"{len(self)} pairs of at most {self.max_length} tokens: {self.truncated_prompts} prompts and "
            f"{self.truncated_responses} answers truncated, "
            f"{self.identical_after_truncation} pairs with identical answers"
        )

    @overload
    def __getitem__(self, index: int) -> EncodedPair: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[EncodedPair, ...]: ...
    def __getitem__(self, index: int | slice) -> EncodedPair | tuple[EncodedPair, ...]:
        return self.items[index]

    def __iter__(self) -> Iterator[EncodedPair]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"EncodedPairs({self.summary()})"


def encode_pairs(
    rows: Sequence[Preference],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    allow_identical: bool = False,
) -> EncodedPairs:
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
    return EncodedPairs(pairs, max_length, cut_prompts, cut_answers, same)


def truncate_pair(pair: EncodedPair, max_length: int, bos: int | None = None) -> EncodedPair:
    """Cuts one pair as `encode_pairs` says; `max_length` is at least 8, `bos` the token to keep in front."""
    longest = max(len(pair.chosen), len(pair.rejected))
    room = max(max_length - longest, max_length // 4)
    prompt = cut_prompt(pair.prompt, room, bos)
    left = max_length - len(prompt)
    return EncodedPair(pair.id, prompt, pair.chosen[:left], pair.rejected[:left], pair.weight)


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


def _encode_whole(rows: Sequence[Preference], form: ChatFormat) -> list[EncodedPair]:
    encoded = form.encode(
        [row.prompt for row in rows],
        [(row.chosen, row.rejected) for row in rows],
        lambda i: f"pair {i + 1} (id {rows[i].id})",
    )
    return [
        EncodedPair(row.id, prompt, chosen, rejected, row.weight)
        for row, (prompt, (chosen, rejected)) in zip(rows, encoded, strict=True)
    ]
