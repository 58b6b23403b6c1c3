"""What a bench makes of the answers: rewards, wins over the baseline, length, distance from the base model, perplexity.

Every measure is a statistic of R runs on N prompts, of which all tasks count alike. Runs of a contender and of the
baseline are paired by order and seed, and their answers by prompt; intervals draw runs and prompts anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import stdev

import numpy as np

from everalign.bench.answers import AnswersFile
from everalign.bench.numbers import Number, corrected
from everalign.bench.records import Record
from everalign.data.messages import Completion, Prompt
from everalign.data.rows import content_id
from everalign.errors import EveralignError
from everalign.evaluation.answers import length_controlled
from everalign.evaluation.scorers import RewardModel, Scorer
from everalign.evaluation.scoring import checked_rewards
from everalign.evaluation.statistics import (
    Array,
    crossed_statistic,
    equal_weights,
    paired_permutation_test,
)
from everalign.storage import Journal

MEASURES = ("reward_win_rate", "reward_win_rate_lc", "reward", "unfinished", "length", "kl", "perplexity")
"""Names as in `everalign.reporting.formats.ANSWER_METRICS`."""
WINS = MEASURES[:2]
"""Shares of prompts won against the baseline: even is a half, and there is no other difference."""
_REWARDS_AT_ONCE = 64

Statistic = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Said:
    """What one run's final policies said, as numbers; prompts stand task by task.

    Args:
        place: the run's order and seed, by which it is paired.
        tasks: number of prompts of each task, by name.
        texts: (N,) the answers.
        values: by measure (N,) numbers of the answers; NaN where there is none.
        chat: (2, C) negative log-likelihood per token of the chat rows, and their tokens; None where not measured.
        learns: whether anything was learned, so that another seed answers otherwise.
    """

    place: tuple[tuple[str, ...], int]
    tasks: Mapping[str, int]
    texts: Sequence[str]
    values: Mapping[str, Array]
    chat: Array | None
    learns: bool = True


class KeptRewards:
    """A reward model whose rewards are kept in a file: an answer is scored once, whatever it is compared with.

    Args:
        scorer: gives the rewards.
        path: the file.
    """

    def __init__(self, scorer: RewardModel, path: Path) -> None:
        self._scorer, self._journal, self.fingerprint = scorer, Journal(path), scorer.fingerprint
        self.cut_note = scorer.cut_note

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """Returns the rewards; errors are the scorer's."""
        keys = [self._key(*pair) for pair in zip(prompts, completions, strict=True)]
        found: dict[str, float] = self._journal.read(keys)
        missing = list({key: i for i, key in enumerate(keys) if key not in found}.values())
        for start in range(0, len(missing), _REWARDS_AT_ONCE):
            some = missing[start : start + _REWARDS_AT_ONCE]
            rewards = self._scorer.score([prompts[i] for i in some], [completions[i] for i in some])
            fresh = dict(
                zip((keys[i] for i in some), checked_rewards(rewards, [(i + 1, 0) for i in some]), strict=True)
            )
            self._journal.put(fresh)
            found |= fresh
        return [found[key] for key in keys]

    def _key(self, prompt: Prompt, completion: Completion) -> str:
        return hashlib.sha256(f"{self.fingerprint} {content_id([prompt, completion])}".encode()).hexdigest()[:32]


def read_said(record: Record, file: AnswersFile, scorer: Scorer | None, without: Sequence[str] = ()) -> Said:
    """Returns what a run said, judged by a scorer if there is one, with some tasks left out."""
    answers = {task: found for task, found in sorted(file.answers.items()) if task not in without}
    written = [one for found in answers.values() for one in found]
    values = {
        "unfinished": np.array([float(not one.ended) for one in written]),
        "length": np.array([float(len(one.text)) for one in written]),
        "kl": np.array([np.nan if one.kl is None else one.kl for one in written]),
    }
    if scorer is not None and written:
        values["reward"] = np.array(scorer.score([one.prompt for one in written], [one.text for one in written]))
    chat = None
    if file.chat is not None:
        chat = np.array([[-value for value in file.chat.log_probs], file.chat.tokens], dtype=np.float64)
    sizes = {task: len(found) for task, found in answers.items()}
    return Said((tuple(record.order), record.seed), sizes, [one.text for one in written], values, chat, record.learns)


def measure_said(said: Mapping[str, Sequence[Said]], baseline: str | None) -> dict[str, dict[str, Number]]:
    """Returns by contender and measure what its runs came to, with Holm's correction over contenders."""
    base = {one.place: one for one in said.get(baseline or "", [])}
    found: dict[str, dict[str, Number]] = {}
    for name, runs in said.items():
        if not runs:
            continue
        both = [] if name == baseline else [(one, base[one.place]) for one in runs if one.place in base]
        found[name] = {measure: _number(measure, runs, both) for measure in MEASURES}
    for measure in MEASURES:
        for name, number in corrected({name: numbers[measure] for name, numbers in found.items()}).items():
            found[name][measure] = number
    return found


def measure_tasks(said: Sequence[Said], base: Sequence[Said], measure: str) -> dict[str, float | None]:
    """Returns by task a measure of the answers over the runs; `base` are the baseline's runs, for win rates."""
    if not said or measure == "perplexity":
        return {}
    by_place = {one.place: one for one in base}
    both = [(one, by_place[one.place]) for one in said if one.place in by_place]
    runs = [one for one, _ in both] if measure in WINS else said
    if not runs or ("reward" not in runs[0].values and measure in ("reward", *WINS)):
        return {}
    statistic, sizes = _statistic(measure, runs, [other for _, other in both]), runs[0].tasks
    found, start = {}, 0
    for task, size in sizes.items():
        alone = np.zeros(sum(sizes.values()))
        alone[start : start + size] = 1 / size
        found[task] = _finite(statistic(np.full((1, len(runs)), 1 / len(runs)), alone[None])[0])
        start += size
    return found


def _number(measure: str, runs: Sequence[Said], both: Sequence[tuple[Said, Said]]) -> Number:
    if measure in WINS:
        runs = [one for one, _ in both]
    known = [one for one in runs if _has(one, measure)]
    if not known:
        return Number(None)
    sizes = _sizes(measure, known[0])
    others = [other for one, other in both if _has(one, measure) and _has(other, measure)]
    own = _statistic(measure, known, others)
    value, low, high = crossed_statistic(len(known), sizes, own)
    each = _each(own, len(known), sizes)
    deviation = stdev(each.tolist()) if len(known) > 1 else None
    compared = [pair for pair in both if all(_has(one, measure) for one in pair)]
    varies = any(one.learns for pair in compared for one in pair)
    if measure in WINS:
        p_value = paired_permutation_test((each - 0.5).tolist()) if varies else None
        return Number(value, deviation, low, high, p_value=p_value)
    if not others:
        return Number(value, deviation, low, high)
    mine = _statistic(measure, [one for one, _ in compared], [])
    its = _statistic(measure, others, [])

    def moved(weights: Array, rows: Array) -> Array:
        return mine(weights, rows) - its(weights, rows)

    difference = crossed_statistic(len(others), sizes, moved)
    changes = _each(moved, len(others), sizes)
    p_value = paired_permutation_test(changes.tolist()) if varies else None
    return Number(value, deviation, low, high, difference, p_value)


def _each(statistic: Statistic, runs: int, sizes: Sequence[int]) -> Array:
    """(R,) the statistic of every run alone."""
    return statistic(np.eye(runs), np.tile(equal_weights(sizes), (runs, 1)))


def _has(one: Said, measure: str) -> bool:
    if measure == "perplexity":
        return one.chat is not None
    values = one.values.get("reward" if measure in WINS else measure)
    return values is not None and len(values) > 0 and not np.isnan(values).all()


def _sizes(measure: str, one: Said) -> list[int]:
    if measure == "perplexity":
        assert one.chat is not None
        return [one.chat.shape[1]]
    return list(one.tasks.values())


def _statistic(measure: str, runs: Sequence[Said], others: Sequence[Said]) -> Statistic:
    """The measure as a function of what runs (B, R) and prompts (B, N) count; wins are over `others`, run by run."""
    if measure == "perplexity":
        chat = np.stack([one.chat for one in runs if one.chat is not None])
        return partial(_perplexity, chat[:, 0], chat[0, 1])
    sizes = list(runs[0].tasks.values())
    if measure not in WINS:
        return partial(_mean, np.stack([one.values[measure] for one in runs]), sizes)
    outcomes = np.stack([_outcomes(*pair) for pair in zip(runs, others, strict=True)])
    if measure == "reward_win_rate":
        return partial(_mean, outcomes, sizes)
    lengths = np.stack([one.values["length"] - its.values["length"] for one, its in zip(runs, others, strict=True)])
    return partial(_at_equal_length, outcomes, lengths)


def _outcomes(one: Said, other: Said) -> Array:
    """(N,) 1 for an answer that wins, 0 for one that loses, ½ for a tie, which equal texts always are."""
    if len(one.texts) != len(other.texts):
        raise EveralignError("two runs have answered different prompts: delete the folder answers, and run again")
    same = np.array([mine == its for mine, its in zip(one.texts, other.texts, strict=True)])
    ahead = np.sign(one.values["reward"] - other.values["reward"])
    return (1 + np.where(same, 0.0, ahead)) / 2


def _mean(values: Array, sizes: Sequence[int], runs: Array, rows: Array) -> Array:
    """(B,) means over tasks of weighted means of (R, N) values; missing ones, and tasks without any, count nothing."""
    known = ~np.isnan(values)
    starts = np.cumsum([0, *sizes[:-1]])
    total = np.add.reduceat((runs @ np.where(known, values, 0.0)) * rows, starts, axis=1)
    weight = np.add.reduceat((runs @ known.astype(np.float64)) * rows, starts, axis=1)
    means = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    tasks = (weight > 0).sum(axis=1)
    found: Array = np.divide(means.sum(axis=1), tasks, out=np.full(len(tasks), np.nan), where=tasks > 0)
    return found


def _perplexity(losses: Array, tokens: Array, runs: Array, rows: Array) -> Array:
    """(B,) exp of the mean loss (R, C) per token over runs and all tokens (C,)."""
    weights = rows * tokens
    found: Array = np.exp(((runs @ losses) * weights).sum(axis=1) / weights.sum(axis=1))
    return found


def _at_equal_length(outcomes: Array, lengths: Array, runs: Array, rows: Array) -> Array:
    weights = (runs[:, :, None] * rows[:, None, :]).reshape(len(runs), -1) * outcomes.size
    return length_controlled(outcomes.ravel(), lengths.ravel(), weights)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
