"""Which of two answers is better, by whatever gives answers their rewards."""

from collections.abc import Sequence

from everalign.data.templating import Prompt
from everalign.evaluation.judge import JudgeScorer
from everalign.evaluation.rewards import Scorer, checked_rewards

_SECOND = 2.0


def compare_answers(
    scorer: Scorer, prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str]
) -> list[int]:
    """Return 1 where the second answer is better, -1 where the first is, 0 where neither is.

    A judge is asked for the better of the two, in both orders: where its verdicts differ, neither is. Any other
    scorer rates both. Of equal texts neither is better, and nobody is asked.

    Args:
        scorer: who says so.
        prompts: N prompts.
        before: N answers, the first ones.
        after: N answers, the second ones.

    Raises:
        EveralignError: the scorer failed, or a reward is missing, no number, NaN or infinite; names the row.
    """
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
        found = [(after_ > before_) - (after_ < before_) for before_, after_ in pairs]
    for i, verdict in zip(numbers, found, strict=True):
        verdicts[i] = verdict
    return verdicts


def _both_orders(
    judge: JudgeScorer, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
) -> list[int]:
    there, back = judge.compare(prompts, first, second), judge.compare(prompts, second, first)
    # Of the second question's answers the first is the one that is second here.
    wins = {(_SECOND, 1.0): 1, (1.0, _SECOND): -1}
    return [wins.get(pair, 0) for pair in zip(there, back, strict=True)]
