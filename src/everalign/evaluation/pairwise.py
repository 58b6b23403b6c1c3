"""Pairwise comparison of answers by any scorer, and the checks on what a scorer returns."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from everalign.data.messages import Prompt
from everalign.data.rows import is_finite, shown
from everalign.errors import EveralignError, InputError
from everalign.evaluation.judge import JudgeScorer

if TYPE_CHECKING:
    from everalign.evaluation.scorers import Scorer


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


_SECOND = 2.0


class ScorerApprover:
    """Approves corrections that a scorer finds better than the answers: a `Corrector`'s `approver`.

    Args:
        scorer: who says so.
        margin: how much better at least, as in `compare_answers`.

    Raises:
        InputError: the margin is below 0 or not finite, or given for a judge.
    """

    def __init__(self, scorer: "Scorer", margin: float = 0.0) -> None:
        _check_margin(scorer, margin)
        self._scorer, self._margin = scorer, margin

    @property
    def fingerprint(self) -> str:
        """Names what the approval depends on."""
        return f"{self._scorer.fingerprint} {self._margin!r}"

    def approve(self, questions: Sequence[Prompt], answers: Sequence[str], corrections: Sequence[str]) -> list[bool]:
        """Return which of N corrections are better than their answers; errors as in `compare_answers`."""
        return [verdict > 0 for verdict in compare_answers(self._scorer, questions, answers, corrections, self._margin)]


def compare_answers(
    scorer: "Scorer",
    prompts: Sequence[Prompt],
    before: Sequence[str],
    after: Sequence[str],
    margin: float = 0.0,
) -> list[int]:
    """Return 1 where the second answer is better, -1 where the first is, 0 where neither is.

    A judge is asked for the better of the two, in both orders: where its verdicts differ, neither is. Any other
    scorer rates both. Of equal texts neither is better, and nobody is asked.

    Args:
        scorer: who says so.
        prompts: N prompts.
        before: N answers, the first ones.
        after: N answers, the second ones.
        margin: by more than so much have rewards to differ, in the scorer's units; a judge has none.

    Raises:
        InputError: the margin is below 0 or not finite, or given for a judge.
        EveralignError: the scorer failed, or a reward is missing, no number, NaN or infinite; names the row.
    """
    _check_margin(scorer, margin)
    verdicts = [0] * len(prompts)
    numbers = [i for i, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    asked = [prompts[i] for i in numbers]
    first, second = ([answers[i] for i in numbers] for answers in (before, after))
    if not numbers:
        return verdicts
    if isinstance(scorer, JudgeScorer):
        found = _both_orders(scorer, asked, first, second)
    else:
        places = [(i + 1, side) for side in (0, 1) for i in numbers]
        rewards = checked_rewards(scorer.score([*asked, *asked], [*first, *second]), places)
        pairs = zip(rewards[: len(numbers)], rewards[len(numbers) :], strict=True)
        found = [(second_ - first_ > margin) - (first_ - second_ > margin) for first_, second_ in pairs]
    for i, verdict in zip(numbers, found, strict=True):
        verdicts[i] = verdict
    return verdicts


def _check_margin(scorer: "Scorer", margin: float) -> None:
    if not (math.isfinite(margin) and margin >= 0):
        raise InputError(f"margin: must be a finite number of at least 0, found {margin}")
    if margin and isinstance(scorer, JudgeScorer):
        raise InputError("margin: a judge names the better answer, not by how much; leave it out")


def _both_orders(
    judge: JudgeScorer, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
) -> list[int]:
    there, back = judge.compare(prompts, first, second), judge.compare(prompts, second, first)
    # Of the second question's answers the first is the one that is second here.
    wins = {(_SECOND, 1.0): 1, (1.0, _SECOND): -1}
    return [wins.get(pair, 0) for pair in zip(there, back, strict=True)]
