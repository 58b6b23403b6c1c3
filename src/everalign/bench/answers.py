"""What the final policies of a run said, one file a run, and what a bench makes of it.

The answers are greedy; the measures are rewards, wins over the baseline, length, distance from the base model and the
perplexity of chat. Every measure is a statistic of R runs on N prompts, of which all tasks count alike. Runs of a
contender and of the baseline are paired by order and seed, and their answers by prompt; intervals draw runs and prompts
anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, FiniteFloat

from everalign.bench.data import prompt_with_system
from everalign.bench.records import Record, Run
from everalign.data.messages import Completion, Prompt
from everalign.data.rows import content_id
from everalign.errors import EveralignError
from everalign.evaluation.answers import answer_kls, length_controlled, response_log_probs, write_answers
from everalign.evaluation.scorers import RewardModel, Scorer
from everalign.evaluation.scoring import checked_rewards
from everalign.evaluation.statistics import (
    Array,
    Interval,
    crossed_statistic,
    equal_weights,
    holm,
    paired_permutation_test,
)
from everalign.learning.run_data import RunData
from everalign.modeling.policy import Policy
from everalign.storage import Journal, write_json

MEASURES = ("reward_win_rate", "reward_win_rate_lc", "reward", "unfinished", "length", "kl", "perplexity")
"""Names as in `everalign.reporting.formats.ANSWER_METRICS`."""
WINS = MEASURES[:2]
"""Shares of prompts won against the baseline: even is a half, and there is no other difference."""
_REWARDS_AT_ONCE = 64
_TOKENS_PER_BATCH = 4096

Statistic = Callable[[Array, Array], Array]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Written(_File):
    """One answer.

    Args:
        prompt: text, or chat messages, without an instruction.
        text: the answer.
        ended: whether it ended within the limit of tokens.
        kl: how far the policy is from the base model along it, nats per token; None where that was not measured.
    """

    prompt: str | list[dict[str, Any]]
    text: str
    ended: bool
    kl: FiniteFloat | None


class Chat(_File):
    """Log-likelihoods per token of the chat rows' answers, nats, and their numbers of tokens."""

    log_probs: list[FiniteFloat]
    tokens: list[int]


class AnswersFile(_File):
    """answers/NAME.json: the answers by task, and what the policy makes of the chat rows, where it is one policy."""

    format: Literal[1] = 1
    answers: dict[str, list[Written]] = {}
    chat: Chat | None = None


def write_answers_file(
    run: Run, policy: Policy, tokenizer: Any, data: RunData | None, work: Path, target: Path, log: Callable[[str], None]
) -> None:
    """Asks the final policies of a finished run everything, and writes what they say.

    Args:
        run: the run; `asked` says what.
        policy: can be switched to every version of the run.
        tokenizer: the model's.
        data: the finished run; None where nothing was learned, and the policy is the base model.
        work: holds answers until all are written, for a call that is killed.
        target: the file.
        log: called with a line for each task.
    """
    asked = run.asked
    assert asked is not None
    found: dict[str, list[Written]] = {}
    journal = Journal(work / "answers.sqlite")
    for task, prompts in asked.prompts.items():
        log(f"  answers: {task}")
        with _final(policy, data, task) as version:
            system = (run.system or {}).get(task)
            told = [prompt if system is None else prompt_with_system(prompt, system) for prompt in prompts]
            answers = write_answers(
                *(policy, tokenizer, told, journal, version),
                max_new_tokens=asked.max_new_tokens,
                max_prompt_tokens=asked.max_prompt_tokens,
            )
            longest = asked.max_prompt_tokens + asked.max_new_tokens
            kls: Sequence[float | None] = [None] * len(answers)
            if not run.system:
                kls = answer_kls(policy, tokenizer, prompts, answers, max_length=longest)
        found[task] = []
        for prompt, answer, kl in zip(prompts, answers, kls, strict=True):
            shown = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
            found[task].append(Written(prompt=shown, text=answer.text, ended=answer.ended, kl=kl))
    chat = None
    # Of a model for each task or label there is no one policy, and an instruction is one for tasks.
    apart = data is not None and (data.regime == "separate" or data.versions[-1].manifest.label is not None)
    if asked.chat and not run.system and not apart:
        log("  perplexity of chat")
        with _final(policy, data, run.order[-1]):
            scored = response_log_probs(
                *(policy, tokenizer, [row.prompt for row in asked.chat], [row.answer for row in asked.chat]),
                max_length=asked.max_chat_tokens or run.recipe.training_options().max_length,
                tokens_per_batch=_TOKENS_PER_BATCH,
            )
        chat = Chat(log_probs=list(scored.values), tokens=list(scored.tokens))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, AnswersFile(answers=found, chat=chat).model_dump())


@contextmanager
def _final(policy: Policy, data: RunData | None, task: str) -> Iterator[str]:
    """Switches to what answers a task's prompts in the end and yields its name.

    That is the last version; of a model for each task the task's own, and with labels the last of the task's label.
    """
    if data is None:
        policy.reset(0)
        yield "base"
        return
    own: Mapping[str, Any] = {version.task: version for version in data.versions}
    label = own[task].manifest.label if task in own else None
    version = own[task] if data.regime == "separate" else data.adapters_at(data.versions[-1])[label]
    policy.load_adapter(data.path / "versions" / version.id / "adapter", long_term=True, seed=0)
    yield version.id


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
        pairs = [content_id([*pair]) for pair in zip(prompts, completions, strict=True)]
        keys = [hashlib.sha256(f"{self.fingerprint} {pair}".encode()).hexdigest()[:32] for pair in pairs]
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
        value = float(statistic(np.full((1, len(runs)), 1 / len(runs)), alone[None])[0])
        found[task] = value if np.isfinite(value) else None
        start += size
    return found


def _number(measure: str, runs: Sequence[Said], both: Sequence[tuple[Said, Said]]) -> Number:
    if measure in WINS:
        runs = [one for one, _ in both]
    known = [one for one in runs if _has(one, measure)]
    if not known:
        return Number(None)
    if measure == "perplexity":
        assert known[0].chat is not None
        sizes = [known[0].chat.shape[1]]
    else:
        sizes = list(known[0].tasks.values())
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


def _statistic(measure: str, runs: Sequence[Said], others: Sequence[Said]) -> Statistic:
    """The measure as a function of what runs (B, R) and prompts (B, N) count; wins are over `others`, run by run."""
    if measure == "perplexity":
        chat = np.stack([one.chat for one in runs if one.chat is not None])
        return partial(_perplexity, chat[:, 0], chat[0, 1])
    sizes = list(runs[0].tasks.values())
    if measure not in WINS:
        return partial(_mean, np.stack([one.values[measure] for one in runs]), sizes)
    rows = []
    for one, other in zip(runs, others, strict=True):
        if len(one.texts) != len(other.texts):
            raise EveralignError("two runs have answered different prompts: delete the folder answers, and run again")
        same = np.array([mine == its for mine, its in zip(one.texts, other.texts, strict=True)])
        ahead = np.sign(one.values["reward"] - other.values["reward"])
        rows.append((1 + np.where(same, 0.0, ahead)) / 2)
    outcomes = np.stack(rows)  # (R, N) 1 for an answer that wins, 0 for one that loses, ½ for a tie: of equal texts too
    if measure == "reward_win_rate":
        return partial(_mean, outcomes, sizes)
    lengths = np.stack([one.values["length"] - its.values["length"] for one, its in zip(runs, others, strict=True)])
    return partial(_at_equal_length, outcomes, lengths)


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
