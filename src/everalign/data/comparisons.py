"""Whole sequences of tokens, prompt and answer together, as a reward model reads them.

Each sequence is cut to the length limit on its own, so that what an answer is worth never depends on the answers
beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from everalign.data.encoding import check_max_length, cut_prompt
from everalign.data.messages import Completion, Prompt
from everalign.data.records import Preference
from everalign.data.templating import ChatFormat
from everalign.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
class EncodedAnswers:
    """Sequences in the order of their answers, and what the length limit cost.

    Args:
        sequences: tokens of prompt and answer, none empty.
        answers: tokens of each answer, before any cut.
        cut: sequences that lost tokens.
    """

    sequences: tuple[list[int], ...]
    answers: tuple[int, ...]
    cut: int


def encode_answers(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    name: Callable[[int], str] = lambda i: f"answer {i + 1}",
) -> EncodedAnswers:
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
    return EncodedAnswers(tuple(sequences), tuple(len(answer) for _, answer in parts), cut)


def encode_comparisons(
    rows: Sequence[Preference], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[tuple[Comparison, ...], int]:
    """Tokenises preferences for a reward model; arguments as in `encode_answers`.

    Returns:
        One comparison a row, and how many sequences lost tokens.

    Raises:
        InputError: as in `encode_answers`, naming the pair; or no pair's answers can be told apart.
    """
    prompts = [row.prompt for row in rows for _ in range(2)]
    completions = [text for row in rows for text in (row.chosen, row.rejected)]
    encoded = encode_answers(
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
