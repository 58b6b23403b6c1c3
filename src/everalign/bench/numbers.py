"""A number over the runs of a contender, with what is known of its chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from everalign.evaluation.statistics import Interval, holm


@dataclass(frozen=True)
class Number:
    """A number over a contender's runs.

    Args:
        mean: over the runs; None where no run has it.
        deviation: standard deviation over the runs; None of fewer than two.
        low, high: ends of the 95 % interval over runs and pairs, where pairs are known.
        difference: to the baseline, over the runs of both, with its own interval.
        p_value: of that difference over the runs, by changing signs; None where nothing is compared, or neither side
            learns: then all runs are one.
        p_holm: the same, corrected for the number of contenders.
    """

    mean: float | None
    deviation: float | None = None
    low: float | None = None
    high: float | None = None
    difference: Interval | None = None
    p_value: float | None = None
    p_holm: float | None = None


def corrected(numbers: Mapping[str, Number]) -> dict[str, Number]:
    """Returns the same number of several contenders, with p-values corrected for how many of them have one."""
    known = {name: one.p_value for name, one in numbers.items() if one.p_value is not None}
    values = dict(zip(known, holm(list(known.values())), strict=True))
    return {name: replace(one, p_holm=values.get(name)) for name, one in numbers.items()}
