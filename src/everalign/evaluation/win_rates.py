"""Win rates of answers over other answers to the same prompts, as they are and with the length taken out.

Longer answers win more often, whoever judges. The length-controlled win rate is what a logistic regression of the
outcome on the difference in length predicts where there is none (Dubois et al. 2024, "Length-controlled AlpacaEval").
AlpacaEval 2 also fits how hard each instruction is, over many models; with two models there is nothing to fit it by,
and it is left out here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from everalign.data.messages import Prompt
from everalign.errors import InputError
from everalign.evaluation.judge import JudgeScorer, UnreadableReplyError
from everalign.evaluation.scorers import Scorer
from everalign.evaluation.scoring import checked_rewards, compare_answers
from everalign.evaluation.statistics import Interval, bootstrap

Array = NDArray[np.float64]

# Ridge penalties on intercept and slope: without them the fit to outcomes that never differ runs to infinity.
_RIDGE = np.array([0.01, 0.1])
_STEPS = 60
_LARGEST_STEP = 2.0
_ENOUGH = 1e-10


@dataclass(frozen=True)
class WinRate:
    """How often one model's answers beat another's.

    Args:
        win_rate: share of prompts won; ties, which include equal answers and verdicts that change with the order in
            which a judge reads the answers, count half.
        length_controlled: the same for answers of equal length.
        prompts: number of prompts with a verdict.
        ties: how many of them were ties.
        failed: number of prompts whose verdict the judge did not give in a form that could be read; left out.
    """

    win_rate: Interval
    length_controlled: Interval
    prompts: int
    ties: int
    failed: int


def win_rate(
    scorer: Scorer, prompts: Sequence[Prompt], answers: Sequence[str], others: Sequence[str], *, seed: int = 0
) -> WinRate:
    """Compares N answers with N others by a reward model, a function, or an LLM judge that reads both orders.

    Raises:
        InputError: there are no prompts, or no verdict could be read.
        EveralignError: the scorer failed. What a judge with a cache has said until then is kept.
    """
    if not prompts:
        raise InputError("a win rate needs at least one prompt")

    def compare(numbers: Sequence[int]) -> list[float]:
        first, second = ([texts[i] for i in numbers] for texts in (others, answers))
        return [float(verdict) for verdict in compare_answers(scorer, [prompts[i] for i in numbers], first, second)]

    found = readable(scorer, len(prompts), compare)
    verdicts = [(number, verdict) for number, verdict in enumerate(found) if verdict is not None]
    if not verdicts:
        raise InputError(
            f"none of {len(prompts)} verdicts could be read: take a judge that follows instructions better"
        )
    outcomes = np.array([(1 + verdict) / 2 for _, verdict in verdicts])
    lengths = np.array([len(answers[number]) - len(others[number]) for number, _ in verdicts], dtype=np.float64)
    count = len(outcomes)
    return WinRate(
        bootstrap(count, lambda weights: weights @ outcomes / count, seed=seed),
        bootstrap(count, lambda weights: length_controlled(outcomes, lengths, weights), seed=seed),
        count,
        int((outcomes == 0.5).sum()),
        len(prompts) - count,
    )


def judged_scores(scorer: Scorer, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
    """Returns the reward of each of N answers, None where a judge's score could not be read; errors as in `score`."""

    def score(numbers: Sequence[int]) -> list[float]:
        found = scorer.score([prompts[i] for i in numbers], [answers[i] for i in numbers])
        return checked_rewards(found, [(i + 1, 0) for i in numbers])

    return readable(scorer, len(prompts), score)


def readable(scorer: Scorer, count: int, ask: Callable[[Sequence[int]], list[float]]) -> list[float | None]:
    """Asks for all of `count` rows at once; if a judge's reply cannot be read, row by row, and None for such a row.

    What the judge has replied is in its cache by then.
    """
    everything = range(count)
    try:
        return list[float | None](ask(everything))
    except UnreadableReplyError:
        if not isinstance(scorer, JudgeScorer) or scorer.cache is None:
            raise
    found: list[float | None] = []
    for number in everything:
        try:
            found += ask([number])
        except UnreadableReplyError:
            found.append(None)
    return found


def length_controlled(outcomes: Array, lengths: Array, weights: Array | None = None) -> Array:
    """Returns the win rate at equal length: σ(a) of the logistic regression σ(a + b · tanh(d / s)) of the outcomes.

    d is the difference in length and s its standard deviation, as in AlpacaEval 2.

    Args:
        outcomes: (N,) 1 for a win, ½ for a tie, 0 for a loss.
        lengths: (N,) length of the answer less that of the other.
        weights: (B, N) how often row n counts in fit b; each once, in a single fit, when None.

    Returns:
        (B,) win rates.
    """
    weights = np.ones((1, len(outcomes))) if weights is None else weights
    spread = lengths.std()
    scaled = np.tanh(lengths / spread) if spread else np.zeros_like(lengths)
    features = np.stack([np.ones_like(scaled), scaled], axis=1)
    found = np.zeros((len(weights), 2))
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-found @ features.T))
        gradient = (weights * (outcomes - chance)) @ features - _RIDGE * found
        curvature = np.einsum("bn,ni,nj->bij", weights * chance * (1 - chance), features, features) + np.diag(_RIDGE)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        found += np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
        if np.abs(step).max() < _ENOUGH:
            break
    return 1 / (1 + np.exp(-found[:, 0]))
