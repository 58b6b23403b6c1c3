"""The cache of keys and values that decoding needs, written in place.

transformers' own dynamic cache copies all of a layer's keys and values for every new token, which for a small model on
a CPU is three quarters of the time. Here a layer has room for tokens to come, and copies only when that is used up.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

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
