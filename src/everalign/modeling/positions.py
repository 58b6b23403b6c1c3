"""What a model's positions do with long rows: where they end, and from where on they depend on a batch's longest row.

Tables of learned positions end: a longer row is an error inside of the model. Rotary positions that stretch with the
length (LongRoPE, dynamic NTK) are computed for the longest row of a batch, so that what a model says of a short row
depends on its neighbours, and in some on what it computed before. Both are found out on a shrunk copy.
"""

import functools
from collections.abc import Sequence
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
        self._kept = []
        for part in model.modules():
            buffers = {name: buffer.clone() for name, buffer in part.named_buffers(recurse=False)}
            if buffers and next(part.parameters(), None) is None:
                settings = {
                    name: value
                    for name, value in vars(part).items()
                    if isinstance(value, int | float | Tensor) and name != "training"
                }
                self._kept.append((part, buffers, settings))

    def restore(self) -> None:
        """Put it back, so that the next rows are computed as if they were the first."""
        for part, buffers, settings in self._kept:
            for name, value in buffers.items():
                now = part._buffers[name]
                part._buffers[name] = value.clone() if now is None else value.to(now.device, copy=True)
            for name, setting in settings.items():
                setattr(part, name, setting)


def named_length(config: Any) -> int | None:
    """Return the most tokens that a configuration names, under whatever key; None where it names none."""
    text = config.get_text_config()
    value = getattr(text, "max_position_embeddings", None)
    if isinstance(value, int):
        return value
    return next((v for name, v in vars(text).items() if LENGTH_NAMES.search(name) and isinstance(v, int)), None)


def _original_length(config: Any) -> int | None:
    """Return the length that a model was trained with before its positions were stretched."""
    text = config.get_text_config()
    found = getattr(text, "original_max_position_embeddings", None)
    ropes = [getattr(text, "rope_parameters", None) or {}]
    # One set of parameters, or one for each kind of layer.
    while ropes and not isinstance(found, int):
        rope = ropes.pop(0)
        found = rope.get("original_max_position_embeddings")
        ropes += [value for value in rope.values() if isinstance(value, dict)]
    return found if isinstance(found, int) else None


def probe_lengths(small: Any, config: Any) -> Lengths:
    """Find out how long rows may be.

    Args:
        small: a shrunk copy of a model.
        config: the model's own configuration, in whose lengths the result is given.
    """
    named, real = named_length(small.config), named_length(config)
    state = PositionState(small)

    def can_read(length: int) -> bool:
        try:
            _states(small, [length])
        except MODEL_ERRORS:
            return False
        return True

    try:
        with torch.no_grad():
            # How many tokens the copy can read; None where its named length is none that it stops at.
            longest, most = None, max(_TRIED if named is None else (*_TRIED, named)) + _BEYOND
            if not can_read(most):
                start = most if named is None else named + 4
                longest = next((length for length in range(start, 0, -1) if can_read(length)), None)
            stretch = _stretch(small, state, config, longest)
    except MODEL_ERRORS:
        return Lengths()
    if longest is not None and named is not None and real is not None:
        longest += real - named
    return Lengths(longest, stretch)


def _stretch(small: Any, state: PositionState, config: Any, longest: int | None) -> Stretch | None:
    """Compare rows beside others with rows alone."""
    tried = [length for length in _TRIED if longest is None or length <= longest]

    @functools.cache
    def alone(length: int) -> Tensor:
        state.restore()
        return _states(small, [length])[0]

    def agree(*lengths: int) -> bool:
        known = [length for length in lengths if length in tried]
        state.restore()
        together = _states(small, known)
        return len(known) < 2 or all(
            (alone(length) - found).abs().max() <= _TOLERANCE * alone(length).abs().max().clamp(min=1.0)
            for length, found in zip(known, together, strict=True)
        )

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


def _states(model: Any, lengths: Sequence[int]) -> list[Tensor]:
    """Return what a model's decoder gives for rows of these lengths, right-padded where they differ."""
    tokens = min(model.config.get_text_config().vocab_size, FIRST_SPECIAL) - 3
    ids, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.tensor([3 + (7 * i + length) % tokens for i in range(length)])
        mask[row, :length] = 1
    inputs = {"input_ids": ids} if bool(mask.all()) else {"input_ids": ids, "attention_mask": mask}
    if model.base_model is model:
        states = model(**inputs, use_cache=False).logits
    else:
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
    return [states[row, :length] for row, length in enumerate(lengths)]
