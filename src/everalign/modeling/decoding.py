"""Decode rows of different lengths together, with a key-value cache in which every row grows and shrinks on its own."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from everalign.errors import EveralignError, InputError
from everalign.modeling.architecture import study
from everalign.modeling.cpu_kernels import grouped_attention
from everalign.modeling.logprobs import SequenceLogProbs

# Room that a full layer grows by, as a share of what it holds, and at least in tokens.
_GROWTH, _LEAST_ROOM = 0.5, 64


class _Room:
    """A buffer (rows, heads, tokens, width) and how much of it is taken."""

    def __init__(self, like: Tensor) -> None:
        self.held = like.new_empty(*like.shape[:2], 0, like.shape[3])
        self._buffer = self.held

    def append(self, new: Tensor) -> Tensor:
        """Return what is held with `new` behind it; copies nothing while there is room."""
        start, end = self.held.shape[2], self.held.shape[2] + new.shape[2]
        # What is held may have been replaced: rows selected or repeated, tokens cropped.
        ours = self.held.data_ptr() == self._buffer.data_ptr() and len(self.held) == len(self._buffer)
        if not ours or end > self._buffer.shape[2]:
            room = end + max(_LEAST_ROOM, int(_GROWTH * end))
            self._buffer = new.new_empty(*new.shape[:2], room, new.shape[3])
            self._buffer[:, :, :start] = self.held
        self._buffer[:, :, start:end] = new
        self.held = self._buffer[:, :, :end]
        return self.held


class _InPlaceLayer(DynamicLayer):  # type: ignore[misc]  # transformers carries no types
    """A layer's keys and values (rows, heads, tokens, width), views of buffers with room for more tokens."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no tokens, with as many heads and as wide as the first ones."""
        super().lazy_initialization(key_states, value_states)
        self._rooms = (_Room(key_states), _Room(value_states))
        self.keys, self.values = (room.held for room in self._rooms)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._rooms
        keys.held, values.held = self.keys, self.values
        self.keys, self.values = keys.append(key_states), values.append(value_states)
        return self.keys, self.values


def new_cache(model: Any) -> DynamicCache | None:
    """Return an empty cache for a model that attends to its past, all or a window of it; None for another one."""
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [_InPlaceLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def pad_left(prompts: Sequence[list[int]], padding: int) -> dict[str, Tensor]:
    """Lay out B prompts of at most T tokens as `input_ids` and `attention_mask`, both (B, T) int64."""
    width = max(len(ids) for ids in prompts)
    padded = [[padding] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


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

    def __init__(self, model: Any, batch: dict[str, Tensor], head: SequenceLogProbs | None = None) -> None:
        cache = new_cache(model)
        if cache is None:
            kind = model.config.get_text_config().model_type
            raise InputError(f"answers cannot be sampled from a {kind} model: it keeps more of its past than attention")
        self._cache, self._mask = cache, batch["attention_mask"]
        self._head = head or SequenceLogProbs(model, study(model))
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


# Room that buffers grow by, as a share of what is needed, and at least in tokens.
_GROWTH, _LEAST_ROOM = 0.25, 64


@dataclass
class _Places:
    """Where the next tokens go, for all layers: slots (R, Q), or the first slot alone where all rows' are the same."""

    slots: Tensor | int = 0
    start: int = 0
    end: int = 0


class _SlotLayer(DynamicLayer):  # type: ignore[misc]  # transformers carries no types
    """Keys and values (rows, heads, room, width), of which the first `end` slots are in use."""

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self._places = places

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values (R, H, Q, w) into their slots; returns all slots in use."""
        self.keys = self._written(self.keys, key_states)
        self.values = self._written(self.values, value_states)
        self.is_initialized = True
        end = self._places.end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _written(self, held: Tensor | None, new: Tensor) -> Tensor:
        places = self._places
        if held is None or held.shape[2] < places.end:
            room = places.end + max(_LEAST_ROOM, int(_GROWTH * places.end))
            # Not empty: what is hidden from the attention still takes part in it with weight 0, and may be no NaN.
            larger = new.new_zeros(*new.shape[:2], room, new.shape[3])
            if held is not None:
                larger[:, :, : held.shape[2]] = held
            held = larger
        if isinstance(places.slots, int):
            held[:, :, places.slots : places.end] = new
        else:
            rows = torch.arange(len(new), device=new.device)[:, None]
            held[rows, :, places.slots] = new.transpose(1, 2)
        return held

    def get_seq_length(self) -> int:
        """Slots in use before the tokens that are computed now."""
        return self._places.start


class SlotCache(Cache):  # type: ignore[misc]
    """The cache of all layers. Call `place` before each forward pass."""

    def __init__(self, layers: int) -> None:
        self._places = _Places()
        super().__init__(layers=[_SlotLayer(self._places) for _ in range(layers)])

    def place(self, starts: list[int], count: int, device: torch.device) -> Tensor:
        """Say that row r's next `count` tokens go to slots starts[r] and following; returns the slots (R, count)."""
        slots = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
        same = min(starts) == max(starts)
        self._places.slots = starts[0] if same else slots
        self._places.start, self._places.end = max(starts), max(starts) + count
        return slots

    def select(self, rows: Tensor, used: int) -> None:
        """Go on with these rows (R',) and their first `used` slots."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows, :, :used], layer.values[rows, :, :used]


def windows_of(model: Any) -> list[int | None] | None:
    """Return how many tokens each layer sees, itself included (None for all); None where it is no plain attention."""
    layers = DynamicCache(config=model.config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return [getattr(layer, "sliding_window", None) for layer in layers]


TOKENS_PER_PASS = 16_384
_LOGITS_AT_ONCE = 1 << 24
# The head is computed for so many of a row's positions at first, and then for twice as many as before.
_FIRST_SLICE = 32
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_ATTENTIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class Predicted:
    """What a model expects at K positions of a row.

    Args:
        tokens: the most likely ones.
        behind: by how much less likely the target is, in nats: 0 where it is the same token; empty without targets.
        log_probs: of the targets, in nats; empty where they were not asked for.
        margins: by how much targets are more likely than the most likely other token, in nats; likewise.
    """

    tokens: list[int]
    behind: list[float]
    log_probs: list[float]
    margins: list[float]


class RaggedModel:
    """A model made ready to compute rows of different lengths.

    Args:
        model: a Hugging Face causal language model, in evaluation mode.
        tokens_per_pass: tokens computed at once at most, padding included; longer inputs take several passes.

    Raises:
        InputError: the model cannot: it keeps something else than keys and values of its past, or does not follow an
            attention mask that is given to it.
    """

    def __init__(self, model: Any, tokens_per_pass: int = TOKENS_PER_PASS) -> None:
        if tokens_per_pass < 1:
            raise InputError(f"tokens per pass: must be at least 1, found {tokens_per_pass}")
        config = model.config.get_text_config()
        windows = windows_of(model)
        if windows is None:
            raise InputError(
                f"drafts cannot be verified by a {config.model_type} model: it keeps more of its past than attention"
            )
        self.model, self.windows, self.tokens_per_pass = model, windows, tokens_per_pass
        self.device, self.dtype = model.device, next(model.parameters()).dtype
        self.kinds = getattr(config, "layer_types", None) or [None] * len(windows)
        attention = getattr(config, "_attn_implementation", "sdpa")
        if attention not in _ATTENTIONS:
            raise InputError(f"drafts cannot be verified with {attention} attention: load the model with sdpa or eager")
        self._additive = attention == "eager"
        architecture = study(model)
        self.head = SequenceLogProbs(model, architecture)
        if architecture.why_no_prefix_sharing:
            # Some models restrict what a token sees inside of their layers, where no mask of ours reaches.
            raise InputError(f"{self._name}: {architecture.why_no_prefix_sharing}")
        self._check()

    def masks(self, slots: Tensor, used: int) -> Any:
        """Return what tokens in `slots` (R, Q) see of `used` slots: (R, 1, Q, used), one for each kind of layer.

        None where it is what a model sees without a mask.
        """
        found: dict[Any, Tensor] = {}
        for kind, window in zip(self.kinds, self.windows, strict=True):
            if kind not in found:
                found[kind] = self._mask(slots, used, window)
        return found if len(found) > 1 else next(iter(found.values()))

    def _mask(self, slots: Tensor, used: int, window: int | None) -> Tensor:
        seen, own = torch.arange(used, device=slots.device), slots[:, None, :, None]
        allowed = seen <= own
        if window is not None:
            allowed &= seen > own - window
        if not self._additive:
            return allowed
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill(~allowed, torch.finfo(self.dtype).min)

    def _check(self) -> None:
        """Compare logits of a row that is computed in two passes beside another one with those of the row alone."""
        vocabulary = self.model.config.get_text_config().vocab_size
        row, other = ([(start + 5 * i) % vocabulary for i in range(8)] for start in (1, 3))
        try:
            with torch.no_grad():
                alone = self.model(input_ids=torch.tensor([row], device=self.device), use_cache=False).logits[0, 4:]
                rows = RaggedRows(self, 2)
                # The shorter row, so that its place in the cache is not the one that a model would think of.
                rows.feed([row[:4], other[:6]], [0, 0])
                found = rows.logits([row[4:], other[6:7]], [4, 0])
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{self._name}: takes no attention mask of its own ({type(error).__name__})") from error
        difference = (alone.float() - found).abs().max()
        if not difference <= _TOLERANCES[self.dtype] * alone.float().abs().max().clamp(min=1.0):
            raise InputError(f"{self._name}: its layers do not follow an attention mask that is given to them")

    @property
    def _name(self) -> str:
        return f"drafts cannot be verified by a {self.model.config.get_text_config().model_type} model"


class RaggedRows:
    """R rows, empty at first.

    Attributes:
        lengths: tokens of each row whose keys and values count. Setting one back takes back the row's last tokens.
        passes: forward passes so far.
    """

    def __init__(self, model: RaggedModel, rows: int) -> None:
        self._model, self._cache = model, SlotCache(len(model.windows))
        self.lengths = [0] * rows
        self.passes = 0

    def take(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        if rows:
            self._cache.select(torch.tensor(rows, device=self._model.device), max(self.lengths))

    def feed(
        self,
        tokens: Sequence[list[int]],
        wanted: Sequence[int],
        targets: Sequence[list[int]] | None = None,
        scored: bool = False,
    ) -> tuple[list[Predicted], list[int]]:
        """Write tokens behind each row.

        Args:
            tokens: of each row, at least one.
            wanted: behind how many of each row's last tokens the next one is predicted.
            targets: tokens of each row, as many as wanted, that the predictions are compared with.
            scored: whether log-probabilities and margins of all targets are asked for; else nothing more of a row is
                predicted once most predictions are no targets, which with a large vocabulary saves much of a pass.

        Returns:
            The predictions of each row, and in how many forward passes each row took part.

        Raises:
            EveralignError: a logit is NaN.
            InputError: a row becomes longer than the model can read, or can write with the same positions throughout.
        """
        longest = max(length + len(new) for length, new in zip(self.lengths, tokens, strict=True))
        self._model.head.lengths.check_written(longest, "shorten it")
        hidden, places = self._states(tokens, wanted)
        numbers: list[list[int]] = [[] for _ in tokens]
        for number, (row, _) in enumerate(places):
            numbers[row].append(number)
        found = [Predicted([], [], [], []) for _ in tokens]
        start, end = 0, max(wanted) if scored or targets is None else _FIRST_SLICE
        going = [row for row, count in enumerate(wanted) if count]
        while going:
            part = [(row, number) for row in going for number in numbers[row][start:end]]
            asked = None if targets is None else [token for row in going for token in targets[row][start:end]]
            order = [number for _, number in part]
            states = hidden if order == list(range(len(hidden))) else hidden[order]
            for (row, _), values in zip(part, self._predict(states, asked, scored), strict=True):
                row_found = found[row]
                row_found.tokens.append(values[0])
                if targets is not None:
                    row_found.behind.append(values[1])
                if scored:
                    row_found.log_probs.append(values[2])
                    row_found.margins.append(values[3])
            going = [
                row
                for row in going
                if end < wanted[row] and (targets is None or scored or _on_course(found[row].behind[start:]))
            ]
            start, end = end, end + 2 * (end - start)
        width = self._width(len(tokens))
        return found, [-(-len(row) // width) for row in tokens]

    def logits(self, tokens: Sequence[list[int]], wanted: Sequence[int]) -> Tensor:
        """Write tokens behind each row as `feed` does; returns the logits (K, V) fp32 themselves."""
        return self._head(self._states(tokens, wanted)[0])

    def _width(self, rows: int) -> int:
        return max(1, self._model.tokens_per_pass // rows)

    @torch.no_grad()
    def _states(self, tokens: Sequence[list[int]], wanted: Sequence[int]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Return hidden states (or logits) of the K tokens behind which is predicted, and those's rows and columns."""
        longest, width = max(map(len, tokens)), self._width(len(tokens))
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
        padded = [ids[start:end] + [0] * (end - start - len(ids[start:end])) for ids in tokens]
        slots = self._cache.place([length + start for length in self.lengths], end - start, model.device)
        positions = slots
        if any(len(ids) < end for ids in tokens):
            # Padding must not stand where a model has no position any more.
            last = [[length + len(ids) - 1] for length, ids in zip(self.lengths, tokens, strict=True)]
            positions = torch.minimum(slots, torch.tensor(last, device=model.device))
        inputs = {
            "input_ids": torch.tensor(padded, device=model.device),
            "attention_mask": self._mask(slots, start, end),
            "position_ids": positions,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        everything = len(wanted) == len(padded) * (end - start)
        if not everything:
            rows, columns = torch.tensor(wanted, dtype=torch.long, device=model.device).reshape(-1, 2).unbind(1)
        if model.head.chunked:
            with nullcontext() if inputs["attention_mask"] is None else grouped_attention(model.model):
                states: Tensor = model.model.base_model(**inputs).last_hidden_state
            return states.flatten(0, 1) if everything else states[rows, columns - start]
        if everything:
            every: Tensor = model.model(**inputs).logits
            return every.flatten(0, 1)
        kept, places = torch.unique(columns - start, return_inverse=True)
        if len(kept) == 0:
            kept = torch.zeros(1, dtype=torch.long, device=model.device)
        logits: Tensor = model.model(**inputs, logits_to_keep=kept).logits
        return logits[rows, places]

    def _mask(self, slots: Tensor, start: int, end: int) -> Any:
        """None where the model's own causal mask is right, which is faster: equal rows that begin or grow by one."""
        first = start + max(self.lengths)
        simple = all(window is None for window in self._model.windows) and min(self.lengths) == max(self.lengths)
        if simple and (first == 0 or end - start == 1):
            return None
        return self._model.masks(slots, first + end - start)

    def _head(self, hidden: Tensor) -> Tensor:
        return self._model.head.logits(hidden).float()

    @torch.no_grad()
    def _predict(self, hidden: Tensor, targets: list[int] | None, scored: bool) -> Iterator[tuple[Any, ...]]:
        """Yield token, behind, and where scored log-probability and margin, at K positions; some of them at a time."""
        vocabulary = self._model.model.config.get_text_config().vocab_size
        size = max(1, _LOGITS_AT_ONCE // vocabulary)
        for start in range(0, len(hidden), size):
            logits = self._head(hidden[start : start + size])
            largest, best = logits.max(-1)
            # No NaN equals itself.
            if any(value != value for value in largest.tolist()):
                raise EveralignError("the model's logits are NaN: its weights are damaged, or its precision too low")
            if targets is None:
                yield from zip(best.tolist())
                continue
            asked = torch.tensor(targets[start : start + size], device=logits.device)[:, None]
            of_asked = logits.gather(1, asked)[:, 0]
            values = [best, largest - of_asked]
            if scored:
                values.append(of_asked - logits.logsumexp(-1))
                values.append(of_asked - logits.scatter(1, asked, float("-inf")).amax(-1))
            yield from zip(*(value.tolist() for value in values), strict=True)


def _on_course(behind: Sequence[float]) -> bool:
    """Whether at least half of the predictions are the targets."""
    return 2 * sum(value == 0 for value in behind) >= len(behind)
