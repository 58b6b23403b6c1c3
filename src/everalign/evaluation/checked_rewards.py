"""What a scorer returned, checked; a module of its own, since a gateway that asks a judge needs no torch."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

from everalign.data.fields import is_finite, shown
from everalign.errors import EveralignError


def checked_rewards(found: Any, places: Sequence[tuple[int, int]]) -> list[float]:
    """Return what a scorer returned as floats; anything else than one finite number an answer is an error.

    Args:
        found: what it returned.
        places: of each answer, the number of its row from 1, and its number in the row from 0.

    Raises:
        EveralignError: names the row and the completion.
    """
    try:
        values = list(found)
    except TypeError:
        raise EveralignError(f"{_place(places[0])}: the scorer returned {_kind(found)}, no list of rewards") from None
    if len(values) != len(places):
        last = places[min(len(values), len(places) - 1)]
        which = "the first without a reward" if len(values) < len(places) else "the last answer"
        raise EveralignError(
            f"{_place(last)}: {which}; the scorer returned {len(values)} rewards for {len(places)} answers "
            f"({_place(places[0])} and following)"
        )
    for value, place in zip(values, places, strict=True):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise EveralignError(f"{_place(place)}: the reward must be a number, found {_kind(value)}")
        if not is_finite(value):
            raise EveralignError(f"{_place(place)}: the reward must be finite, found {shown(value)}")
    return [float(value) for value in values]


def _place(place: tuple[int, int]) -> str:
    return f"row {place[0]}, completions[{place[1]}]"


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
