"""Autoregressive decoding with a key-value cache, for prompts padded on the left and for rows of individual lengths.

`Decoder` samples: every row grows by one token at a time, and the model makes its own masks, so that any model with
keys and values can. `RaggedRows` verifies drafts: each row grows and shrinks by any number of tokens under masks made
here. Both write into the same `KeyValueCache`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import eq
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from everalign.errors import EveralignError, InputError
from everalign.modeling.architecture import study_decoding
from everalign.modeling.attention import cpu_attention
from everalign.modeling.logprobs import SequenceLogProbs
from everalign.modeling.shrinking import shrunk_copy

# Buffers grow by this share of what is needed, and by at least so many tokens: a copy a token would cost more than
# the token.
_GROWTH, _MIN_GROWTH = 0.25, 64


class _CacheLayer(DynamicLayer):  # type: ignore[misc]  # transformers carries no types
    """Keys and values (rows, heads, capacity, width), of which the first `cache.end` slots are in use."""

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, cache: "KeyValueCache") -> None:
        super().__init__()
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values (R, H, Q, w) into their slots; returns all slots in use."""
        self.keys, self.values = self._written(self.keys, key_states), self._written(self.values, value_states)
        self.is_initialized = True
        return self.keys[:, :, : self._cache.end], self.values[:, :, : self._cache.end]

    def _written(self, held: Tensor | None, new: Tensor) -> Tensor:
        start, end, slots = self._cache.start, self._cache.end, self._cache.slots
        if held is None or held.shape[2] < end:
            capacity = end + max(_MIN_GROWTH, int(_GROWTH * end))
            # Zeros: slots that are masked still take part in the attention with weight 0, and 0 · NaN is NaN.
            larger = new.new_zeros(*new.shape[:2], capacity, new.shape[3])
            if held is not None:
                larger[:, :, : held.shape[2]] = held
            held = larger
        if slots is None:
            held[:, :, start:end] = new
        else:
            held[torch.arange(len(new), device=new.device)[:, None], :, slots.to(new.device)] = new.transpose(1, 2)
        return held

    def get_seq_length(self) -> int:
        """Slots in use before the tokens that are being computed; what the model's own masks count from."""
        return self._cache.start


class KeyValueCache(Cache):  # type: ignore[misc]
    """The cache of all layers; call `place` before each forward pass.

    Layers with a sliding window keep all tokens as well: rows can then take tokens back, and a mask hides the rest.

    Attributes:
        start: first slot that the next tokens are written to (of the longest row).
        end: slots in use once they are written.
        slots: (R, Q) where each row's next tokens go; None where all rows write to `start` and following.
    """

    def __init__(self, layers: int) -> None:
        self.start = self.end = 0
        self.slots: Tensor | None = None
        super().__init__(layers=[_CacheLayer(self) for _ in range(layers)])

    def place(self, starts: Sequence[int], count: int, device: torch.device) -> Tensor:
        """Send row r's next `count` tokens to slots starts[r] and following; returns the slots (R, count)."""
        slots = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
        self.slots = None if min(starts) == max(starts) else slots
        self.start, self.end = max(starts), max(starts) + count
        return slots

    def select(self, rows: Tensor, used: int) -> None:
        """Keep these rows (R',), in this order, and their first `used` slots."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows, :, :used], layer.values[rows, :, :used]


def attention_windows(model: Any) -> list[int | None] | None:
    """Return how many tokens each layer attends to, itself included (None: all of them).

    None in place of the list where some layer keeps something else than keys and values, such as a recurrent state.
    """
    layers = DynamicCache(config=model.config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return [getattr(layer, "sliding_window", None) for layer in layers]


# ---- rows that grow together ----

# A batch drops its finished rows once they are this share of it: each time what is left of the cache is copied.
FINISHED_SHARE = 0.2
# Copies of the logits that exist at once: the model's own, scaled, as shares, and these and their sums in fp64.
_CHOICE_COPIES = 8


def pad_left(prompts: Sequence[list[int]], padding: int) -> dict[str, Tensor]:
    """Collate B prompts of at most T tokens as `input_ids` and `attention_mask`, both (B, T) int64."""
    width = max(len(ids) for ids in prompts)
    padded = [[padding] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


class Decoder:
    """R prompts with the tokens written behind them so far, and the state that predicts the next one.

    Args:
        model: a Hugging Face causal language model; no gradients are kept.
        batch: left-padded prompts: `input_ids` and `attention_mask`, both (R, T).
        head: the model's; made when None.

    Raises:
        InputError: the model keeps something else than keys and values of its past.
    """

    def __init__(self, model: Any, batch: dict[str, Tensor], head: SequenceLogProbs | None = None) -> None:
        windows = attention_windows(model)
        if windows is None:
            kind = model.config.get_text_config().model_type
            raise InputError(f"answers cannot be sampled from a {kind} model: it keeps more of its past than attention")
        self._cache, self._mask = KeyValueCache(len(windows)), batch["attention_mask"]
        self._head = head or SequenceLogProbs(model, study_decoding(model))
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
        self._cache.place([self._cache.end] * len(tokens), tokens.shape[1], tokens.device)
        inputs = {
            "input_ids": tokens,
            "attention_mask": self._mask if self._padded else None,
            "position_ids": positions,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        return self._head.last(inputs)

    @torch.no_grad()
    def choose(self, choose: Callable[..., Tensor], *beside: Tensor) -> Tensor:
        """Return the next token (R,) of each row, by a function from logits (R', V) fp32 of some rows to tokens (R',).

        Logits of many rows and a large vocabulary are never all held at once. Of tensors `beside`, (R, ...), the
        function gets the same rows.
        """
        parts = self._head.chunks(self._states, *beside, copies=_CHOICE_COPIES)
        return torch.cat([choose(self._head.logits(states).float(), *others) for states, *others in parts])

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (R',) int64, in this order; a row may be taken several times."""
        rows = rows.to(self._mask.device)
        self._cache.select(rows, self._cache.end)
        self._mask, self._next, self._states = self._mask[rows], self._next[rows], self._states[rows]

    def append(self, tokens: Tensor) -> None:
        """Write one token (R,) behind each row, and compute the state that predicts the next one."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._next)], dim=1)
        self._states = self._compute(tokens[:, None], self._next)
        self._next = self._next + 1


def continue_rows(
    decoder: Decoder,
    choose: Callable[..., Tensor],
    ends: Collection[int],
    limit: int,
    finished: Callable[[int, list[int]], bool] = lambda number, tokens: False,
    chances: Tensor | None = None,
) -> list[list[int]]:
    """Write tokens behind every row until it has ended.

    Args:
        decoder: R rows.
        choose: from logits (R', V) of some of the rows, in order, to tokens (R',); with `chances`, from these too.
        ends: tokens that end a row.
        limit: most tokens of a row.
        finished: called with a row's number and its new tokens; ends the row where it returns True.
        chances: (R, limit), a random number for each row's every token; `choose` gets (R',) of them. None for none.

    Returns:
        The new tokens of each row: up to and with the first end, or `limit` of them.
    """
    found: list[list[int]] = [[] for _ in range(len(decoder))]
    # Rows of the batch that goes on, by their numbers; some of them may have ended already.
    numbers, ended = list(range(len(found))), [False] * len(found)
    stop = frozenset(ends)
    for written in range(1, limit + 1):
        tokens = decoder.choose(choose, *([] if chances is None else [chances[:, written - 1]]))
        for place, (number, token) in enumerate(zip(numbers, tokens.tolist(), strict=True)):
            if not ended[place]:
                found[number].append(token)
                ended[place] = token in stop or finished(number, found[number])
        going = [place for place, done in enumerate(ended) if not done]
        if written == limit or not going:
            break
        if len(going) <= (1 - FINISHED_SHARE) * len(numbers):
            rows = torch.tensor(going)
            decoder.select(rows)
            tokens = tokens[rows.to(tokens.device)]
            chances = None if chances is None else chances[rows.to(chances.device)]
            numbers, ended = [numbers[place] for place in going], [False] * len(going)
        decoder.append(tokens)
    return found


_UNITS = 2.0**52


def draw(logits: Tensor, chances: Tensor) -> Tensor:
    """Draw a token (R,) from each row of logits (R, V): the inverse of the distribution at one random number a row.

    `chances` (R,) fp64 are these, at least 0 and below 1.
    """
    shares = logits.softmax(-1).double()
    if torch.are_deterministic_algorithms_enabled():
        # A GPU has no fixed order for running sums of fractions; those of whole numbers are exact in any order.
        shares = (shares * _UNITS).long()
    shares = shares.cumsum(-1)
    drawn = (chances[:, None] * shares[:, -1:]).to(shares.dtype)
    return torch.searchsorted(shares, drawn, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


# ---- rows that grow and shrink on their own ----

TOKENS_PER_PASS = 16_384
_LOGITS_AT_ONCE = 1 << 24
# Logits are computed of so many of a row's positions at first, and then of twice as many as before.
_FIRST_SLICE = 32
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass
class Predicted:
    """What a model predicts at K positions of a row.

    Attributes:
        tokens: the most likely ones.
        log_probs: of the targets, in nats; empty where they were not asked for.
        margins: by how much targets are more likely than the most likely other token, in nats; likewise.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


class RaggedModel:
    """A model that was found to compute rows of different lengths under masks that are given to it.

    Args:
        model: a Hugging Face causal language model, in evaluation mode.
        tokens_per_pass: most tokens computed at once, padding included; longer inputs take several passes.
        on_copy_too: whether to check the masks on a shrunk copy as well.

    Raises:
        InputError: the model cannot: it keeps something else than keys and values of its past, or does not follow an
            attention mask that is given to it.
    """

    def __init__(self, model: Any, tokens_per_pass: int = TOKENS_PER_PASS, on_copy_too: bool = True) -> None:
        if tokens_per_pass < 1:
            raise InputError(f"tokens per pass: must be at least 1, found {tokens_per_pass}")
        config = model.config.get_text_config()
        refused = f"drafts cannot be verified by a {config.model_type} model"
        windows = attention_windows(model)
        if windows is None:
            raise InputError(f"{refused}: it keeps more of its past than attention")
        attention = getattr(config, "_attn_implementation", "sdpa")
        if attention not in ("sdpa", "eager"):
            raise InputError(f"drafts cannot be verified with {attention} attention: load the model with sdpa or eager")
        self.model, self.tokens_per_pass = model, tokens_per_pass
        self.device, self.dtype = model.device, next(model.parameters()).dtype
        self.windows, self.vocabulary = windows, config.vocab_size
        self._kinds = getattr(config, "layer_types", None) or [None] * len(windows)
        self._additive = attention == "eager"
        self.head = SequenceLogProbs(model, study_decoding(model))
        self._check(refused)
        # Some models restrict what a token sees inside of their layers, where no mask of ours reaches. The windows of a
        # shrunk copy are so small that this shows.
        if on_copy_too and (small := shrunk_copy(model)) is not None:
            RaggedModel(small, on_copy_too=False)

    def masks(self, slots: Tensor, used: int) -> Any:
        """Return what tokens in `slots` (R, Q) see of `used` slots: (R, 1, Q, used), one for each kind of layer."""
        seen, own = torch.arange(used, device=slots.device), slots[:, None, :, None]
        found: dict[Any, Tensor] = {}
        for kind, window in zip(self._kinds, self.windows, strict=True):
            if kind in found:
                continue
            allowed = seen <= own if window is None else (seen <= own) & (seen > own - window)
            if self._additive:
                lowest = torch.finfo(self.dtype).min
                allowed = torch.zeros_like(allowed, dtype=self.dtype).masked_fill(~allowed, lowest)
            found[kind] = allowed
        return found if len(found) > 1 else next(iter(found.values()))

    @torch.no_grad()
    def _check(self, refused: str) -> None:
        """Compare logits of a row that is computed in two passes beside another one with those of the row alone."""
        row, other = ([(start + 5 * i) % self.vocabulary for i in range(8)] for start in (1, 3))
        try:
            alone = self.model(input_ids=torch.tensor([row], device=self.device), use_cache=False).logits[0, 4:].float()
            rows = RaggedRows(self, 2)
            # The shorter row, so that its place in the cache is not the one that a model would think of.
            rows.append([row[:4], other[:6]], [0, 0])
            found = self.head.logits(rows.states([row[4:], other[6:7]], [4, 0])[0]).float()
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{refused}: takes no attention mask of its own ({type(error).__name__})") from error
        if not (alone - found).abs().max() <= _TOLERANCES[self.dtype] * alone.abs().max().clamp(min=1.0):
            raise InputError(f"{refused}: its layers do not follow the attention mask")


class RaggedRows:
    """R rows, empty at first.

    Attributes:
        lengths: tokens of each row whose keys and values count. Lowering one takes back the row's last tokens.
        passes: forward passes so far.
    """

    def __init__(self, model: RaggedModel, rows: int) -> None:
        self._model, self._cache = model, KeyValueCache(len(model.windows))
        self.lengths = [0] * rows
        self.passes = 0

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        if rows:
            self._cache.select(torch.tensor(rows, device=self._model.device), max(self.lengths))

    def append(
        self,
        tokens: Sequence[list[int]],
        wanted: Sequence[int],
        targets: Sequence[list[int]] | None = None,
        scored: bool = False,
    ) -> tuple[list[Predicted], list[int]]:
        """Write tokens behind each row and predict what follows its last ones.

        Args:
            tokens: of each row, at least one.
            wanted: behind how many of each row's last tokens the next one is predicted.
            targets: tokens of each row, as many as wanted, that the predictions are compared with.
            scored: whether log-probabilities and margins of all targets are asked for; else prediction stops where
                most of a row's targets were wrong, which with a large vocabulary saves much of a pass.

        Returns:
            The predictions of each row, and in how many forward passes each row took part.

        Raises:
            EveralignError: a logit is NaN.
            InputError: a row becomes longer than the model can read, or can write with the same positions throughout.
        """
        longest = max(length + len(new) for length, new in zip(self.lengths, tokens, strict=True))
        self._model.head.lengths.check_written(longest, "shorten it")
        hidden, places = self.states(tokens, wanted)
        numbers: list[list[int]] = [[] for _ in tokens]
        for number, (row, _) in enumerate(places):
            numbers[row].append(number)
        found = [Predicted() for _ in tokens]
        start, end = 0, max(wanted) if scored or targets is None else _FIRST_SLICE
        going = [row for row, count in enumerate(wanted) if count]
        while going:
            part = [(row, number) for row in going for number in numbers[row][start:end]]
            asked = [token for row in going for token in targets[row][start:end]] if targets and scored else None
            order = [number for _, number in part]
            states = hidden if order == list(range(len(hidden))) else hidden[order]
            for (row, _), values in zip(part, self._predict(states, asked), strict=True):
                columns: tuple[list[Any], ...] = (found[row].tokens, found[row].log_probs, found[row].margins)
                for column, value in zip(columns, values, strict=False):
                    column.append(value)
            going = [row for row in going if end < wanted[row]]
            if targets is not None and not scored:
                # At least half of the last slice has to be right.
                right = {row: sum(map(eq, found[row].tokens[start:end], targets[row][start:end])) for row in going}
                going = [row for row in going if 2 * right[row] >= end - start]
            start, end = end, end + 2 * (end - start)
        width = max(1, self._model.tokens_per_pass // len(tokens))
        return found, [-(-len(row) // width) for row in tokens]

    @torch.no_grad()
    def states(self, tokens: Sequence[list[int]], wanted: Sequence[int]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Write tokens behind each row; returns K hidden states (or logits), and their rows and columns in `tokens`."""
        longest, width = max(map(len, tokens)), max(1, self._model.tokens_per_pass // len(tokens))
        parts, places = [], []
        for start in range(0, longest, width):
            end = min(start + width, longest)
            here = [
                (row, column)
                for row, (ids, count) in enumerate(zip(tokens, wanted, strict=True))
                for column in range(max(start, len(ids) - count), min(end, len(ids)))
            ]
            parts.append(self._pass(tokens, start, end, here))
            places += here
        self.lengths = [length + len(ids) for length, ids in zip(self.lengths, tokens, strict=True)]
        return torch.cat(parts), places

    def _pass(self, tokens: Sequence[list[int]], start: int, end: int, wanted: list[tuple[int, int]]) -> Tensor:
        """Compute columns `start` to `end` of the tokens, shorter rows padded on the right."""
        model, self.passes = self._model, self.passes + 1
        device, width = model.device, end - start
        padded = [ids[start:end] + [0] * (width - len(ids[start:end])) for ids in tokens]
        slots = self._cache.place([length + start for length in self.lengths], width, device)
        positions = slots
        if any(len(ids) < end for ids in tokens):
            # Padding must not stand where a model has no position any more.
            last = [[length + len(ids) - 1] for length, ids in zip(self.lengths, tokens, strict=True)]
            positions = torch.minimum(slots, torch.tensor(last, device=device))
        # The model's own causal mask is faster. It is right where equal rows begin or grow by one token.
        first = self._cache.start
        own_mask = self._cache.slots is None and not any(model.windows) and (first == 0 or width == 1)
        inputs = {
            "input_ids": torch.tensor(padded, device=device),
            "attention_mask": None if own_mask else model.masks(slots, first + width),
            "position_ids": positions,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        everything = len(wanted) == len(padded) * width
        rows, columns = torch.tensor(wanted, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
        if model.head.chunked:
            with nullcontext() if own_mask and width > 1 else cpu_attention(model.model):
                states: Tensor = model.model.base_model(**inputs).last_hidden_state
            return states.flatten(0, 1) if everything else states[rows, columns - start]
        if everything:
            every: Tensor = model.model(**inputs).logits
            return every.flatten(0, 1)
        kept, places = torch.unique(columns - start, return_inverse=True)
        if len(kept) == 0:
            kept = torch.zeros(1, dtype=torch.long, device=device)
        logits: Tensor = model.model(**inputs, logits_to_keep=kept).logits
        return logits[rows, places]

    @torch.no_grad()
    def _predict(self, hidden: Tensor, targets: list[int] | None) -> Iterator[tuple[Any, ...]]:
        """Yield the most likely token at K positions, and with targets these's log-probability and margin."""
        # Logits of all positions are never held at once.
        size = max(1, _LOGITS_AT_ONCE // self._model.vocabulary)
        for start in range(0, len(hidden), size):
            logits = self._model.head.logits(hidden[start : start + size]).float()
            largest, best = logits.max(-1)
            if bool(largest.isnan().any()):
                raise EveralignError("the model's logits are NaN: its weights are damaged, or its precision too low")
            values = [best]
            if targets is not None:
                asked = torch.tensor(targets[start : start + size], device=logits.device)[:, None]
                of_asked = logits.gather(1, asked)[:, 0]
                others = logits.scatter(1, asked, float("-inf")).amax(-1)
                values += [of_asked - logits.logsumexp(-1), of_asked - others]
            yield from zip(*(value.tolist() for value in values), strict=True)
