"""Decoding, many rows at a time: a row that has ended is dropped from the batch instead of being padded to the last.

transformers' `generate` computes every row until the longest one has ended, and copies the whole cache for every
token; answers of a policy differ in length, so that most of what it computes is thrown away.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from everalign.errors import InputError
from everalign.modeling.architecture import study
from everalign.modeling.decoding_cache import new_cache
from everalign.modeling.likelihood import LanguageHead

# Rows are dropped once so many of the batch have ended: each time what is left of the cache is copied.
_ENDED_SHARE = 0.2
# Logits, what a model of its own makes of them and `pick`: scaled, as shares, and these and their sums in fp64.
_CHOICE_COPIES = 8


class Decoder:
    """Prompts, what was written behind them so far, and what comes next.

    Args:
        model: a Hugging Face causal language model; no gradients are kept.
        batch: left-padded prompts: `input_ids` and `attention_mask`, both (B, T).
        head: the model's; made when None.

    Raises:
        InputError: the model keeps something else than keys and values of its past.
    """

    def __init__(self, model: Any, batch: dict[str, Tensor], head: LanguageHead | None = None) -> None:
        cache = new_cache(model)
        if cache is None:
            kind = model.config.get_text_config().model_type
            raise InputError(f"answers cannot be sampled from a {kind} model: it keeps more of its past than attention")
        self._cache, self._mask = cache, batch["attention_mask"]
        self._head = head or LanguageHead(model, study(model))
        self._padded = not bool(self._mask.all())
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._next = positions[:, -1:] + 1
        self._states = self._compute(batch["input_ids"], positions)

    def __len__(self) -> int:
        """Return R, the number of rows."""
        return len(self._states)

    @torch.no_grad()
    def _compute(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return (R, d) of each row's last token: hidden states, or logits where they cannot be computed apart."""
        inputs = {
            "input_ids": tokens,
            "attention_mask": self._mask if self._padded else None,
            "position_ids": positions,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        return self._head.last(inputs)

    @torch.no_grad()
    def choose(self, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the next token (R,) of each row, by a function from logits (R', V) fp32 of some rows to tokens (R',).

        Logits of many rows and a large vocabulary are never all held at once.
        """
        parts = self._head.chunks(self._states, copies=_CHOICE_COPIES)
        return torch.cat([choose(self._head.logits(states).float()) for (states,) in parts])

    def take(self, rows: Tensor) -> None:
        """Go on with these rows (R',) int64, in this order; a row may be taken several times."""
        rows = rows.to(self._mask.device)
        self._cache.batch_select_indices(rows)
        self._mask, self._next, self._states = self._mask[rows], self._next[rows], self._states[rows]

    def write(self, tokens: Tensor) -> None:
        """Write one token (R,) behind each row, and compute what comes next."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._next)], dim=1)
        self._states = self._compute(tokens[:, None], self._next)
        self._next = self._next + 1


def continue_rows(
    decoder: Decoder,
    choose: Callable[[Tensor], Tensor],
    ends: Collection[int],
    limit: int,
    over: Callable[[int, list[int]], bool] = lambda number, tokens: False,
) -> list[list[int]]:
    """Write behind every row until it has ended.

    Args:
        decoder: R rows.
        choose: from logits (R', V) of some of the rows, in order, to tokens (R',).
        ends: tokens that end a row.
        limit: most tokens of a row.
        over: called with a row's number and its new tokens; ends the row where it returns True.

    Returns:
        The new tokens of each row: up to and with the first end, or `limit` of them.
    """
    found: list[list[int]] = [[] for _ in range(len(decoder))]
    # Rows of the batch that goes on, by their numbers; some of them may have ended already.
    numbers, ended = list(range(len(found))), [False] * len(found)
    stop = frozenset(ends)
    for written in range(1, limit + 1):
        tokens = decoder.choose(choose)
        for place, (number, token) in enumerate(zip(numbers, tokens.tolist(), strict=True)):
            if not ended[place]:
                found[number].append(token)
                ended[place] = token in stop or over(number, found[number])
        going = [place for place, done in enumerate(ended) if not done]
        if written == limit or not going:
            break
        if len(going) <= (1 - _ENDED_SHARE) * len(numbers):
            rows = torch.tensor(going)
            decoder.take(rows)
            tokens = tokens[rows.to(tokens.device)]
            numbers, ended = [numbers[place] for place in going], [False] * len(going)
        decoder.write(tokens)
    return found


def pick(logits: Tensor) -> Tensor:
    """Draw a token (R,) from each row of logits (R, V): the inverse of the distribution at one random number a row."""
    shares = logits.softmax(-1).double().cumsum(-1)
    drawn = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device) * shares[:, -1:]
    return torch.searchsorted(shares, drawn, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
