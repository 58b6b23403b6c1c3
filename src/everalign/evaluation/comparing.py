"""Which of two answers is better, by whatever gives answers their rewards."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from everalign.data.messages import Prompt
from everalign.errors import InputError
from everalign.evaluation.checked_rewards import checked_rewards
from everalign.evaluation.judge import JudgeScorer

if TYPE_CHECKING:
    from everalign.evaluation.scorers import Scorer

_SECOND = 2.0


class ScorerApproval:
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
