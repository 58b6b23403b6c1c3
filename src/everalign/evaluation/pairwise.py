"""Pairwise comparison of answers by any scorer, and validation of the rewards that a scorer returns."""

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
    """Returns a scorer's result as floats, one finite number for each answer.

    Args:
        found: what the scorer returned.
        places: for each answer, the number of its row from 1, and its number in the row from 0.

    Raises:
        EveralignError: a reward is missing, no number, NaN or infinite; names the row and the completion.
    """

    def error(index: int, problem: str) -> EveralignError:
        row, completion = places[index]
        return EveralignError(f"row {row}, completions[{completion}]: {problem}")

    def type_of(value: Any) -> str:
        return "None" if value is None else type(value).__name__

    try:
        values = list(found)
    except TypeError:
        raise error(0, f"the scorer returned {type_of(found)}, no list of rewards") from None
    if len(values) != len(places):
        which = "the first without a reward" if len(values) < len(places) else "the last answer"
        raise error(
            min(len(values), len(places) - 1),
            f"{which}; the scorer returned {len(values)} rewards for {len(places)} answers "
            f"(row {places[0][0]}, completions[{places[0][1]}] and following)",
        )
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise error(index, f"the reward must be a number, found {type_of(value)}")
        if not is_finite(value):
            raise error(index, f"the reward must be finite, found {shown(value)}")
    return [float(value) for value in values]


class ScorerApprover:
    """Approves corrections that a scorer finds better than the answers; the `approver` of a `Corrector`.

    Args:
        scorer: the scorer.
        margin: least difference, as in `compare_answers`.

    Attributes:
        fingerprint: names the scorer and the margin.

    Raises:
        InputError: the margin is below 0 or not finite, or given for a judge.
    """

    def __init__(self, scorer: "Scorer", margin: float = 0.0) -> None:
        _check_margin(scorer, margin)
        self._scorer, self._margin = scorer, margin
        self.fingerprint = f"{scorer.fingerprint} {margin!r}"

    def approve(self, questions: Sequence[Prompt], answers: Sequence[str], corrections: Sequence[str]) -> list[bool]:
        """Returns which of N corrections are better than their answers; errors as in `compare_answers`."""
        return [verdict > 0 for verdict in compare_answers(self._scorer, questions, answers, corrections, self._margin)]


def compare_answers(
    scorer: "Scorer",
    prompts: Sequence[Prompt],
    before: Sequence[str],
    after: Sequence[str],
    margin: float = 0.0,
) -> list[int]:
    """Compares two answers to each of N prompts: 1 if the second is better, -1 if the first is, 0 if neither is.

    A judge is asked for the better of the two in both orders; if its verdicts differ, neither is. Any other scorer
    rates both. Equal texts are a 0 without a question.

    Args:
        scorer: the scorer.
        prompts: N prompts.
        before: the N first answers.
        after: the N second answers.
        margin: the rewards must differ by more than this, in the scorer's units; not for a judge.

    Raises:
        InputError: the margin is below 0 or not finite, or given for a judge.
        EveralignError: the scorer failed, or a reward is missing, no number, NaN or infinite; names the row.
    """
    _check_margin(scorer, margin)
    verdicts = [0] * len(prompts)
    numbers = [i for i, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    if not numbers:
        return verdicts
    asked = [prompts[i] for i in numbers]
    first, second = ([answers[i] for i in numbers] for answers in (before, after))
    if isinstance(scorer, JudgeScorer):
        there, back = scorer.compare(asked, first, second), scorer.compare(asked, second, first)
        # The second time the answers change places: (2, 1) is a win of the second answer in both orders.
        wins = {(2.0, 1.0): 1, (1.0, 2.0): -1}
        found = [wins.get(pair, 0) for pair in zip(there, back, strict=True)]
    else:
        places = [(i + 1, side) for side in (0, 1) for i in numbers]
        rewards = checked_rewards(scorer.score([*asked, *asked], [*first, *second]), places)
        pairs = zip(rewards[: len(numbers)], rewards[len(numbers) :], strict=True)
        found = [(b - a > margin) - (a - b > margin) for a, b in pairs]
    for i, verdict in zip(numbers, found, strict=True):
        verdicts[i] = verdict
    return verdicts


def _check_margin(scorer: "Scorer", margin: float) -> None:
    if not (math.isfinite(margin) and margin >= 0):
        raise InputError(f"margin: must be a finite number of at least 0, found {margin}", field="margin")
    if margin and isinstance(scorer, JudgeScorer):
        problem = "margin: a judge names the better answer, not by how much; leave it out"
        raise InputError(problem, field="margin")
