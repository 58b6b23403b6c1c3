"""A cache in which every row has a length of its own: a token's keys and values lie in the slot of its position.

Taking back a row's last tokens costs nothing: its length is set back, and what lies behind it is overwritten before
anything sees it. Layers that attend to a window keep the whole past too, so that this works for them as well; the
attention mask, which whoever uses the cache has to give, hides what is outside of the window.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

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
