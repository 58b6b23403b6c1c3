"""What a model's positions do with long rows: where they end, and from where on they depend on a batch's longest row.

Tables of learned positions end: a longer row is an error inside of the model. Rotary positions that stretch with the
length (LongRoPE, dynamic NTK) are computed for the longest row of a batch, so that what a model says of a short row
depends on its neighbours, and in some on what it computed before. Both are found out on a shrunk copy.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everalign.errors import InputError
from everalign.modeling.shrinking import FIRST_SPECIAL, LENGTH_NAMES, MODEL_ERRORS

# Tokens of the rows that are tried, in a copy whose positions stretch from 32 on and whose tables have 64 rows.
_TRIED = (4, 20, 40, 44, 70, 74)
_BEYOND = 16
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Stretch:
    """From where on positions depend on the longest row of a batch.

    Args:
        limits: tokens. Rows between the same two limits agree on what their positions are.
        by_length: above the first limit only rows of the same length agree.
    """

    limits: tuple[int, ...]
    by_length: bool

    def kind(self, length: int) -> tuple[int, ...]:
        """Return what rows of this many tokens have in common: rows of one kind can be computed together."""
        passed = sum(length > limit for limit in self.limits)
        return (passed, length) if self.by_length and passed else (passed,)


@dataclass(frozen=True)
class Lengths:
    """How long rows may be.

    Args:
        longest: tokens that a model can read at all; None where there is no such limit.
        stretch: None where no row depends on its neighbours.
    """

    longest: int | None = None
    stretch: Stretch | None = None

    def check_written(self, tokens: int, advice: str) -> None:
        """Raise InputError where a row that is written token by token may become longer than all of it can be.

        Args:
            tokens: what it may have in the end.
            advice: what to do.
        """
        if self.longest is not None and tokens > self.longest:
            raise InputError(f"a row may grow to {tokens} tokens, and the model can read {self.longest}: {advice}")
        if self.stretch is not None and tokens > self.stretch.limits[0]:
            # What was written of it would have been written under other positions than it is read again.
            limit = self.stretch.limits[0]
            raise InputError(
                f"a row may grow to {tokens} tokens, and beyond {limit} the model's positions stretch with its length, "
                f"those of what is written already as well: {advice}"
            )


class PositionState:
    """What parts of a model without parameters keep from one forward pass to the next, as it is at first."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (part, {n: b.clone() for n, b in part.named_buffers(recurse=False)}, _plain(part)) for part in _bare(model)
        ]

    def restore(self) -> None:
        """Put it back, so that the next rows are computed as if they were the first."""
        for part, buffers, settings in self._kept:
            for name, value in buffers.items():
                now = part._buffers[name]
                part._buffers[name] = value.clone() if now is None else value.to(now.device, copy=True)
            for name, value in settings.items():
                setattr(part, name, value)


def _bare(model: nn.Module) -> Iterator[nn.Module]:
    for part in model.modules():
        if any(True for _ in part.named_buffers(recurse=False)) and not any(True for _ in part.parameters()):
            yield part


def _plain(part: nn.Module) -> dict[str, Any]:
    values = vars(part).items()
    return {name: value for name, value in values if isinstance(value, int | float | Tensor) and name != "training"}


def named_length(config: Any) -> int | None:
    """Return the most tokens that a configuration speaks of, under whatever name; None where it speaks of none."""
    text = config.get_text_config()
    value = getattr(text, "max_position_embeddings", None)
    if isinstance(value, int):
        return value
    return next((v for name, v in vars(text).items() if LENGTH_NAMES.search(name) and isinstance(v, int)), None)


def _original_length(config: Any) -> int | None:
    """Return the length that a model was trained with before its positions were stretched."""
    text = config.get_text_config()
    found = getattr(text, "original_max_position_embeddings", None)
    return found if isinstance(found, int) else _in_rope(getattr(text, "rope_parameters", None) or {})


def _in_rope(rope: dict[str, Any]) -> int | None:
    for name, value in rope.items():
        if name == "original_max_position_embeddings" and isinstance(value, int):
            return value
        if isinstance(value, dict) and (found := _in_rope(value)) is not None:
            return found
    return None


def probe_lengths(small: Any, config: Any) -> Lengths:
    """Find out on a shrunk copy, and tell in the lengths of the model's own configuration."""
    named, real = named_length(small.config), named_length(config)
    state = PositionState(small)
    try:
        with torch.no_grad():
            longest = _longest(small, named)
            stretch = _stretch(small, state, config, longest)
    except MODEL_ERRORS:
        return Lengths()
    if longest is None:
        return Lengths(None, stretch)
    return Lengths(longest if named is None or real is None else longest + real - named, stretch)


def _longest(small: Any, named: int | None) -> int | None:
    """Return how many tokens the copy can read; None where its named length is none that it stops at."""
    most = max(_TRIED if named is None else (*_TRIED, named)) + _BEYOND
    if _can_read(small, most):
        return None
    start = most if named is None else named + 4
    return next((length for length in range(start, 0, -1) if _can_read(small, length)), None)


def _can_read(small: Any, length: int) -> bool:
    try:
        _states(small, [_row(small, length)])
    except MODEL_ERRORS:
        return False
    return True


def _stretch(small: Any, state: PositionState, config: Any, longest: int | None) -> Stretch | None:
    """Compare rows beside others with rows alone."""
    tried = [length for length in _TRIED if longest is None or length <= longest]

    @functools.cache
    def alone(length: int) -> Tensor:
        state.restore()
        return _states(small, [_row(small, length)])[0]

    def agree(*lengths: int) -> bool:
        known = [length for length in lengths if length in tried]
        state.restore()
        together = _states(small, [_row(small, length) for length in known])
        return len(known) < 2 or all(_close(alone(n), found) for n, found in zip(known, together, strict=True))

    if agree(4, 40, 70):
        return None
    if not agree(4, 20):
        return Stretch((0,), by_length=True)
    original, named = _original_length(config), named_length(config)
    limits = [] if original is None or agree(4, 40) else [original]
    if named is not None and named != original and not (agree(40, 70) and (limits or agree(4, 70))):
        limits.append(named)
    by_length = not (agree(40, 44) and agree(70, 74))
    # What no named length explains is computed with rows of the same length alone.
    return Stretch(tuple(limits), by_length) if limits else Stretch((0,), by_length=True)


def _states(model: Any, rows: Sequence[list[int]]) -> list[Tensor]:
    """Return what a model's decoder gives for each row, right-padded where they differ in length."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    inputs = {"input_ids": tokens} if bool(mask.all()) else {"input_ids": tokens, "attention_mask": mask}
    if model.base_model is model:
        states = model(**inputs, use_cache=False).logits
    else:
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
    return [states[i, : len(row)] for i, row in enumerate(rows)]


def _row(model: Any, length: int) -> list[int]:
    tokens = min(model.config.get_text_config().vocab_size, FIRST_SPECIAL) - 3
    return [3 + (7 * i + length) % tokens for i in range(length)]


def _close(expected: Tensor, found: Tensor) -> bool:
    return bool((expected - found).abs().max() <= _TOLERANCE * expected.abs().max().clamp(min=1.0))
