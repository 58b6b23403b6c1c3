"""Rollouts: answers sampled from the policy as it stands, and their rewards, which make scored rows of prompts.

Both are kept on disk in the folder of the task that is being learned, so that a run that was killed while sampling or
scoring continues where it was.

With `first_samples` a prompt gets a few answers first, and the rest only where their rewards disagree. Every answer
counts once, whatever its prompt got. If no reward told answers apart, what is learned would then be the policy itself,
under any rule that stops by the answers seen so far (Wald's identity). Were prompts to count alike instead, the few
answers of one that stopped would outweigh the many of one that did not, and a prompt whose good answers are rare, which
mostly stops without having seen any, would teach its bad ones. So prompts whose rewards disagree count more, up to
samples / first_samples times as much. The objective `snkl` counts prompts; its optimum is the same for any answers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from everalign.data.readers import load_scored
from everalign.data.records import Scored, ScoredSet
from everalign.data.rows import RowSet
from everalign.errors import InputError, ShortfallError, check_shortfall
from everalign.evaluation.scoring import score_rows
from everalign.learning.context import RunContext
from everalign.learning.options import RolloutOptions
from everalign.modeling.sampling import Samples, check_prompts, sample_journalled
from everalign.options import SamplingOptions
from everalign.storage import Journal


@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled answers and their rewards.

    Attributes:
        rows: the prompts that have enough finished answers.
        facts: what was sampled, for the manifest.
        warnings: what was lost where that is much.
        scale: deviation of the rewards by which it was chosen what to sample; None where nothing was chosen by them.
    """

    rows: ScoredSet
    facts: dict[str, float]
    warnings: tuple[str, ...] = ()
    scale: float | None = None

    def one_line(self) -> str:
        """One line of text for a log."""
        f = self.facts
        line = f"{f['answers']:.0f} answers to {f['prompts']:.0f} prompts, mean reward {f['mean_reward']:.4g}"
        if f.get("saved"):
            line += f"; the first rewards of {f['agreed']:.0f} prompts agree, which saves {f['saved']:.0f} answers"
        if f["unfinished"]:
            line += f"; {f['unfinished']:.0f} answers did not end within max_new_tokens and are left out"
        if f["dropped_prompts"]:
            line += f", and {f['dropped_prompts']:.0f} prompts with them"
        return line


def sample_and_score(
    context: RunContext, prompts: RowSet[Any], folder: Path, number: int, seed: int, scale: float | None = None
) -> Rollout:
    """Sample answers to every prompt from the policy as it stands, and score them.

    Args:
        context: the learner's parts.
        prompts: the N prompts.
        folder: keeps samples and rewards; what it holds of this round is taken as it is.
        number: of the round, from 1 on.
        seed: seeds the draw.
        scale: what the task's rewards are divided by; where rewards decide what is sampled and there is none yet, it is
            the deviation of the first answers' rewards.

    Raises:
        ShortfallError: most answers did not end, or most prompts have too few that did.
        InputError: there is no scorer, or a prompt is too long.
        EveralignError: the scorer fails.
    """
    if context.rollouts.first_samples is not None:
        return _sample_in_two_steps(context, prompts, folder, number, seed, scale)
    options, source, fewest = context.rollouts, prompts.source, context.objective.fewest_answers
    place = folder / f"round-{number}-{prompts.fingerprint[:16]}"
    answered, unfinished = _sample(context, prompts, options.samples, place, seed)
    usable = tuple(row for row in answered if len(row.completions) >= fewest)
    # Before a scorer is called, which may cost money.
    drawn = options.samples * len(prompts)
    warnings = check_losses(source, options, drawn, unfinished, len(prompts), len(usable), fewest)
    rows = _score_answered(context, usable, source, place)
    mean = fmean(reward for row in rows for reward in row.rewards)
    return Rollout(ScoredSet(tuple(rows), source), _facts(options, number, prompts, rows, unfinished, mean), warnings)


def _sample_in_two_steps(
    context: RunContext, prompts: RowSet[Any], folder: Path, number: int, seed: int, scale: float | None
) -> Rollout:
    """Sample and score the first answers to every prompt, and the rest where their rewards disagree."""
    options, source, fewest = context.rollouts, prompts.source, context.objective.fewest_answers
    few = int(options.first_samples or 0)
    more, drawn = options.samples - few, few * len(prompts)
    place = folder / f"round-{number}.first-{prompts.fingerprint[:16]}"
    answered, unfinished = _sample(context, prompts, few, place, seed)
    # That a prompt has too few can still change.
    warnings = check_losses(source, options, drawn, unfinished, len(prompts), len(prompts), fewest)
    rows = _score_answered(context, answered, source, place)
    first = [reward for row in rows for reward in row.rewards or ()]
    if scale is None:
        scale = pstdev(first) if context.objective.options.weighting.scale_rewards else 1.0
    differing = disagreeing([row.rewards or () for row in rows], float(options.agree_within or 0) * scale)
    if differing:
        asked = ScoredSet(tuple(prompts[at] for at in differing), source)
        place = folder / f"round-{number}.rest-{asked.fingerprint[:16]}"
        # Far from the first answers' seeds, which are consecutive.
        answered, lost = _sample(context, asked, more, place, random.Random(f"{seed}/rest").randrange(2**31))
        unfinished, drawn = unfinished + lost, drawn + more * len(asked)
        ended = {at: rows[at].completions + row.completions for at, row in zip(differing, answered, strict=True)}
        usable = len(prompts) - sum(len(texts) < fewest for texts in ended.values())
        warnings = check_losses(source, options, drawn, unfinished, len(prompts), usable, fewest)
        for at, row in zip(differing, _score_answered(context, answered, source, place), strict=True):
            if ended[at]:
                rewards = (*(rows[at].rewards or ()), *(row.rewards or ()))
                rows[at] = replace(row, completions=ended[at], rewards=rewards)
    kept = [row for row in rows if len(row.completions) >= fewest]
    # The mean of the first answers, of which every prompt has as many: who has more was chosen by rewards.
    facts = _facts(options, number, prompts, kept, unfinished, fmean(first))
    agreed = len(prompts) - len(differing)
    facts |= {"first_samples": few, "agreed": agreed, "saved": more * agreed}
    return Rollout(ScoredSet(tuple(kept), source), facts, warnings, scale or None)


def disagreeing(rewards: Sequence[Sequence[float]], tolerance: float) -> list[int]:
    """Return the places of prompts whose rewards are spread wider than a tolerance, or too few to tell.

    Args:
        rewards: of each prompt's finished answers.
        tolerance: widest spread that agrees, in units of the rewards.
    """
    return [at for at, found in enumerate(rewards) if len(found) < 2 or max(found) - min(found) > tolerance]


def _sample(context: RunContext, prompts: RowSet[Any], count: int, place: Path, seed: int) -> tuple[list[Scored], int]:
    """Return each prompt with those of its answers that ended, and how many did not."""
    found: list[Samples] = sample_journalled(
        context.policy,
        context.tokenizer,
        [row.prompt for row in prompts],
        _sampling(context, count),
        Journal(place.with_name(f"{place.name}.samples.sqlite")),
        seed=seed,
        tokens_per_batch=2 * context.tokens_per_batch,  # nothing is kept for gradients
        progress=context.progress,
    )
    rows = [replace(row, completions=tuple(samples.texts)) for row, samples in zip(prompts, found, strict=True)]
    return rows, sum(samples.unfinished for samples in found)


def _score_answered(context: RunContext, rows: Sequence[Scored], source: str, place: Path) -> list[Scored]:
    """Return rows with the rewards of their answers; those without answers as they are."""
    answered = tuple(row for row in rows if row.completions)
    if not answered:
        return list(rows)
    found = iter(score(context, ScoredSet(answered, source), place.with_name(f"{place.name}.scored.jsonl")))
    return [next(found) if row.completions else row for row in rows]


def _facts(
    options: RolloutOptions,
    number: int,
    prompts: RowSet[Any],
    rows: Sequence[Scored],
    unfinished: int,
    mean_reward: float,
) -> dict[str, float]:
    """Return what the manifest tells of a round: what it asked, and the rows that are left of it."""
    return {
        "round": number,
        "prompts": len(rows),
        "dropped_prompts": len(prompts) - len(rows),
        "answers": sum(len(row.completions) for row in rows),
        "unfinished": unfinished,
        "sampling_temperature": options.sampling_temperature,
        "mean_reward": mean_reward,
    }


def check_losses(
    source: str, options: RolloutOptions, drawn: int, unfinished: int, prompts: int, answered: int, fewest: int
) -> tuple[str, ...]:
    """Return a warning for each large loss among sampled answers, and refuse where most is lost.

    Args:
        source: where the prompts are from, for the error.
        options: how answers were sampled.
        drawn: answers in all.
        unfinished: answers that did not end, or say nothing.
        prompts: number of them.
        answered: prompts with at least `fewest` answers that ended.
        fewest: answers that a prompt needs to be learned from.
    """
    longer = f"raise --max-new-tokens (max_new_tokens), {options.max_new_tokens} now"
    what = "sampled answers did not end or are empty"
    few = f"prompts have fewer than {fewest} answers that ended, and are left out"
    try:
        return (
            *check_shortfall(unfinished, drawn, what, longer),
            *check_shortfall(prompts - answered, prompts, few, longer),
        )
    except ShortfallError as error:
        raise error.at(source) from error


def check_sampling(context: RunContext, prompts: RowSet[Any]) -> None:
    """Refuse prompts whose answers could not be learned from, before anything is sampled or trained.

    Raises:
        InputError: the estimator is not for sampled answers, one answer a prompt is too few, or a prompt leaves an
            answer too little room; names the file and the first such prompt.
    """
    estimator, options, objective = context.objective.options.weighting.estimator, context.rollouts, context.objective
    if estimator not in ("group", "group_loo", "in_batch"):
        raise InputError(f"the estimator {estimator} is not for sampled answers: use group, group_loo or in_batch")
    if options.samples < objective.fewest_answers:
        raise InputError(f"with {estimator}, a single sample has nothing to be compared with: raise samples")
    limits = f"max_new_tokens is {options.max_new_tokens} and max_length {context.max_length}"
    if options.max_new_tokens >= context.max_length:
        raise InputError(f"{limits}, which leaves no room for a prompt: raise max_length")
    try:
        check_prompts(context.tokenizer, [row.prompt for row in prompts], _sampling(context, options.samples))
    except InputError as error:
        room = f"max_length {context.max_length} less max_new_tokens {options.max_new_tokens}"
        raise InputError(f"{prompts.source}: {error} (max_prompt_tokens is {room})") from error


def score(context: RunContext, rows: ScoredSet, path: Path) -> ScoredSet:
    """Give answers their rewards, which are kept in the file `path`.

    Raises:
        InputError: there is no scorer.
        EveralignError: the scorer fails.
    """
    if context.scorer is None:
        raise InputError(f"{rows.source}: the answers have no rewards: name a scorer with reward")
    if path.exists():
        return load_scored(path)
    return score_rows(rows, context.scorer, path, log=context.log, progress=context.progress).rows


def _sampling(context: RunContext, count: int) -> SamplingOptions:
    options = context.rollouts
    return SamplingOptions(
        completions=count,
        temperature=options.sampling_temperature,
        max_new_tokens=options.max_new_tokens,
        max_prompt_tokens=context.max_length - options.max_new_tokens,
    )
