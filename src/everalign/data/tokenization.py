"""Tokenise preferences, scored completions and single answers, and truncate them to a maximum length."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from everalign.data.chat_tokens import ChatFormat
from everalign.data.messages import Completion, Prompt
from everalign.data.records import Preference, Scored
from everalign.errors import InputError, check_shortfall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST_MAX_LENGTH = 8


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """Token ids of a prompt and of its responses; no list is empty.

    Args:
        id: the row's.
        prompt: tokens that every response follows.
        responses: tokens of each response, its end mark included. A preference has two: chosen, rejected.
        weights: what each response counts; scored rows have those that their rewards became, others 1.
        weight: the row's own.
    """

    id: str
    prompt: list[int]
    responses: tuple[list[int], ...]
    weights: tuple[float, ...]
    weight: float = 1.0

    @classmethod
    def pair(
        cls, id: str, prompt: list[int], chosen: list[int], rejected: list[int], weight: float = 1.0
    ) -> "TokenizedRow":
        """Build a preference's row."""
        return cls(id, prompt, (chosen, rejected), (1.0, 1.0), weight)

    @property
    def chosen(self) -> list[int]:
        """A preference's better response."""
        return self.responses[0]

    @property
    def rejected(self) -> list[int]:
        """A preference's worse response."""
        return self.responses[1]

    def only(self, places: Iterable[int]) -> "TokenizedRow":
        """Return the row with the responses at these places alone."""
        places = tuple(places)
        return replace(
            self,
            responses=tuple(self.responses[i] for i in places),
            weights=tuple(self.weights[i] for i in places),
        )

    @property
    def identical(self) -> bool:
        """Whether there are several responses and all of them are the same tokens."""
        return len(self.responses) > 1 and all(tokens == self.responses[0] for tokens in self.responses)


@dataclass(frozen=True, repr=False)
class TokenizedRows(Sequence[TokenizedRow]):
    """Tokenised rows in their order, and what the length limit cost.

    Args:
        items: one for each row, none left out.
        max_length: the limit, in tokens of prompt and longest response together.
        truncated_prompts: prompts that lost tokens.
        truncated_responses: responses that lost tokens.
    """

    items: tuple[TokenizedRow, ...]
    max_length: int
    truncated_prompts: int = 0
    truncated_responses: int = 0

    @cached_property
    def identical(self) -> int:
        """Rows whose responses are the same tokens.

        Truncation did it, or a tokenizer or template that removes the difference. Such a row has no margin.
        """
        return sum(row.identical for row in self.items)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all ids, tokens and weights in order: the key for what is computed from them.

        That of preferences, and of scored rows and corrections without a weight of their own, is the one of version
        0.1.0, whose unfinished stages are continued.
        """
        digest = hashlib.sha256()
        for row in self.items:
            content: tuple[object, ...] = (row.responses, row.weights)
            if row.weights == (1.0, 1.0):
                content = (*row.responses, row.weight)
            elif row.weight != 1.0:
                content = (*content, row.weight)
            digest.update(repr((row.id, row.prompt, *content)).encode())
        return digest.hexdigest()

    @property
    def altered(self) -> bool:
        """Whether the limit cost anything, or responses cannot be told apart."""
        return bool(self.truncated_prompts or self.truncated_responses or self.identical)

    def warnings(self) -> tuple[str, ...]:
        """Return a warning for each large loss: truncated answers or prompts, pairs with identical answers.

        Raises:
            InputError: most pairs have identical answers.
        """
        pairs, remedy = len(self), f"raise --max-length (max_length), {self.max_length} now"
        answers = sum(len(row.responses) for row in self.items)
        return (
            *check_shortfall(
                self.identical, pairs, "pairs have identical answers as tokens", f"{remedy}, or mend them"
            ),
            *check_shortfall(
                self.truncated_responses, answers, "answers are cut and lose their end", remedy, refuse=False
            ),
            *check_shortfall(self.truncated_prompts, pairs, "prompts lose their beginning", remedy, refuse=False),
        )

    def one_line(self) -> str:
        """One line of text for a log."""
        return (
            f"{len(self)} rows of at most {self.max_length} tokens: {self.truncated_prompts} prompts and "
            f"{self.truncated_responses} answers truncated, {self.identical} rows with identical answers"
        )

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TokenizedRow, ...]: ...
    def __getitem__(self, index: int | slice) -> TokenizedRow | tuple[TokenizedRow, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"TokenizedRows({self.one_line()})"


def check_max_length(max_length: int) -> None:
    """Refuse a limit that leaves no room for prompt and answer."""
    if max_length < SHORTEST_MAX_LENGTH:
        raise InputError(f"max_length: must be at least {SHORTEST_MAX_LENGTH} tokens, found {max_length}")


def truncate(
    prompt: list[int], responses: Sequence[list[int]], max_length: int, bos: int | None = None
) -> tuple[list[int], tuple[list[int], ...]]:
    """Truncate a prompt and its responses to `max_length` tokens of prompt and longest response.

    First the prompt loses tokens on its left (a leading BOS stays), down to a quarter of `max_length`; then the
    responses lose their tails, end mark included, so that a model does not learn to stop there.

    Args:
        prompt: its tokens.
        responses: tokens of each response.
        max_length: at least 8.
        bos: the token to keep in front; None for none.
    """
    room = max(max_length - max(map(len, responses)), max_length // 4)
    if len(prompt) > room:
        # Models trained with BOS read a text without it badly, so the cut is made behind it.
        head = prompt[:1] if prompt[0] == bos else []
        prompt = head + prompt[len(prompt) - room + len(head) :]
    return prompt, tuple(tokens[: max_length - len(prompt)] for tokens in responses)


def tokenize_preferences(
    rows: Sequence[Preference],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    allow_identical: bool = False,
) -> TokenizedRows:
    """Tokenise preferences as rows of two responses, chosen and rejected, and `truncate` each row.

    Raises:
        InputError: `max_length` is below 8; a row cannot be rendered (names its number and id); no pair's
            answers can be told apart, unless `allow_identical`.
    """
    check_max_length(max_length)
    encoded = ChatFormat(tokenizer).encode(
        [row.prompt for row in rows],
        [(row.chosen, row.rejected) for row in rows],
        lambda i: f"pair {i + 1} (id {rows[i].id})",
    )
    items, cut_prompts, cut_answers = [], 0, 0
    for row, (prompt, answers) in zip(rows, encoded, strict=True):
        short, kept = truncate(prompt, answers, max_length, tokenizer.bos_token_id)
        cut_prompts += len(short) < len(prompt)
        cut_answers += sum(len(after) < len(before) for after, before in zip(kept, answers, strict=True))
        items.append(TokenizedRow(row.id, short, kept, (1.0, 1.0), row.weight))
    found = TokenizedRows(tuple(items), max_length, cut_prompts, cut_answers)
    if items and found.identical == len(items) and not allow_identical:
        raise InputError(
            f"max_length: {max_length} leaves the two answers of every pair ({len(items)} in all) identical; "
            "raise it, or use a tokenizer that tells the answers apart"
        )
    return found


def tokenize_scored(rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> TokenizedRows:
    """Tokenise weighted rows; prompts lose tokens on their left (a leading BOS stays) so that all responses fit.

    Args:
        rows: with weights, and with completions that fit (see `drop_overlong`).
        tokenizer: the model's.
        max_length: tokens of prompt and longest response together.

    Raises:
        InputError: a row has no weights, or a completion does not fit; names the row.
    """
    check_max_length(max_length)
    items, cut = [], 0
    for number, (row, (prompt, responses)) in enumerate(_encode_scored(rows, tokenizer), start=1):
        if row.weights is None:
            raise InputError(f"row {number} (id {row.id}): its completions have no weights yet")
        if max_length - max(map(len, responses)) < max_length // 4:
            raise InputError(f"row {number} (id {row.id}): a completion does not fit")
        short, _ = truncate(prompt, responses, max_length, tokenizer.bos_token_id)
        cut += len(short) < len(prompt)
        items.append(TokenizedRow(row.id, short, responses, row.weights, row.weight))
    return TokenizedRows(tuple(items), max_length, cut)


def _encode_scored(
    rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase"
) -> Iterable[tuple[Scored, tuple[list[int], tuple[list[int], ...]]]]:
    """Return each row with the tokens of its prompt and of its completions, none cut."""
    encoded = ChatFormat(tokenizer).encode(
        [row.prompt for row in rows],
        [row.completions for row in rows],
        lambda i: f"row {i + 1} (id {rows[i].id})",
    )
    return zip(rows, encoded, strict=True)


@dataclass(frozen=True)
class FittingRows:
    """The rows whose completions fit, with the tokens of each completion, and how many of either were dropped."""

    rows: tuple[Scored, ...]
    lengths: tuple[tuple[int, ...], ...]
    dropped_rows: int
    dropped_completions: int


def drop_overlong(
    rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase", max_length: int, fewest: int = 1
) -> FittingRows:
    """Drop the completions that leave the prompt less than a quarter of `max_length`.

    A response without its end would teach the model not to stop, and its reward is that of the whole. A row is
    dropped with them where fewer than `fewest` completions are left, or none that has a weight above 0.
    """
    check_max_length(max_length)
    kept: list[tuple[Scored, tuple[int, ...]]] = []
    dropped = 0
    for row, (_, responses) in _encode_scored(rows, tokenizer):
        fit = [i for i, tokens in enumerate(responses) if len(tokens) <= max_length - max_length // 4]
        dropped += len(responses) - len(fit)
        if len(fit) >= fewest and (row.weights is None or any(row.weights[i] > 0 for i in fit)):
            whole = len(fit) == len(responses)
            kept.append((row if whole else row.only(fit), tuple(len(responses[i]) for i in fit)))
    return FittingRows(tuple(r for r, _ in kept), tuple(n for _, n in kept), len(rows) - len(kept), dropped)


def deduplicate(rows: Sequence[Scored], tokenizer: "PreTrainedTokenizerBase") -> tuple[Scored, ...]:
    """Return the rows with every completion once: of those whose tokens are the same, the first stays.

    Raises:
        InputError: equal completions have different rewards; names the row and both.
    """
    kept = []
    for number, (row, (_, responses)) in enumerate(_encode_scored(rows, tokenizer), start=1):
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


def tokenize_answers(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    name: Callable[[int], str] = lambda i: f"answer {i + 1}",
) -> tuple[list[TokenizedRow], int]:
    """Tokenise answers behind their prompts for a reward model, and `truncate` each with its prompt separately.

    Args:
        prompts: N prompts, one for each answer.
        completions: N answers.
        tokenizer: the model's, with a padding token.
        max_length: tokens of prompt and answer together, at least 8.
        name: what errors call the answer of an index.

    Returns:
        N rows of one answer each, and how many lost tokens.

    Raises:
        InputError: `max_length` is below 8; an answer cannot be rendered, or ends in the padding token (a reward model
            would take it for padding); names the answer.
    """
    check_max_length(max_length)
    encoded = ChatFormat(tokenizer).encode(prompts, [(completion,) for completion in completions], name)
    rows, cut = [], 0
    for i, (prompt, (answer,)) in enumerate(encoded):
        short, (kept,) = truncate(prompt, [answer], max_length, tokenizer.bos_token_id)
        check_end(kept, tokenizer, name(i))
        cut += len(short) + len(kept) < len(prompt) + len(answer)
        rows.append(TokenizedRow(name(i), short, (kept,), (1.0,)))
    return rows, cut


def check_end(tokens: Sequence[int], tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Refuse an answer that ends in the padding token, which a reward model would take for padding."""
    if tokens[-1] == tokenizer.pad_token_id:
        raise InputError(f"{name}: ends in the padding token {tokenizer.pad_token!r}; remove it from the text")


def pad_right(sequences: Sequence[list[int]], padding: int) -> dict[str, Tensor]:
    """Collate B sequences of at most T tokens as `input_ids` and `attention_mask`, both (B, T) int64."""
    width = max(len(tokens) for tokens in sequences)
    ids = [tokens + [padding] * (width - len(tokens)) for tokens in sequences]
    mask = [[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in sequences]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
