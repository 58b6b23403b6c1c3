"""Rollouts: answers sampled from the policy as it stands, and their rewards, which make scored rows of prompts.

Both are kept on disk in the folder of the task that is being learned, so that a run that was killed while sampling or
scoring continues where it was.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from everalign.data.readers import load_scored
from everalign.data.records import ScoredSet
from everalign.data.rows import RowSet
from everalign.errors import InputError, ShortfallError, check_shortfall
from everalign.evaluation.scoring import score_rows
from everalign.learning.context import RunContext
from everalign.learning.options import RolloutOptions
from everalign.modeling.options import SamplingOptions
from everalign.modeling.sampling import check_prompts, sample_journalled
from everalign.storage import Journal


@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled answers and their rewards.

    Attributes:
        rows: the prompts that have enough finished answers.
        facts: what was sampled, for the manifest.
        warnings: what was lost where that is much.
    """

    rows: ScoredSet
    facts: dict[str, float]
    warnings: tuple[str, ...] = ()

    @property
    def settled(self) -> bool:
        """Whether all answers have one reward."""
        return len({reward for row in self.rows for reward in row.rewards}) == 1

    def one_line(self) -> str:
        """One line of text for a log."""
        f = self.facts
        line = f"{f['answers']:.0f} answers to {f['prompts']:.0f} prompts, mean reward {f['mean_reward']:.4g}"
        if f["unfinished"]:
            line += f"; {f['unfinished']:.0f} answers did not end within max_new_tokens and are left out"
        if f["dropped_prompts"]:
            line += f", and {f['dropped_prompts']:.0f} prompts with them"
        return line


def sample_and_score(context: RunContext, prompts: RowSet[Any], folder: Path, number: int, seed: int) -> Rollout:
    """Sample answers to every prompt from the policy as it stands, and score them.

    Args:
        context: the learner's parts.
        prompts: the N prompts.
        folder: keeps samples and rewards; what it holds of this round is taken as it is.
        number: of the round, from 1 on.
        seed: seeds the draw.

    Raises:
        ShortfallError: most answers did not end, or most prompts have too few that did.
        InputError: there is no scorer, or a prompt is too long.
        EveralignError: the scorer fails.
    """
    options, stem = context.rollouts, f"round-{number}-{prompts.fingerprint[:16]}"
    fewest = context.objective.fewest_answers
    found = sample_journalled(
        context.policy,
        context.tokenizer,
        [row.prompt for row in prompts],
        _sampling(context),
        Journal(folder / f"{stem}.samples.sqlite"),
        seed=seed,
        tokens_per_batch=2 * context.tokens_per_batch,  # nothing is kept for gradients
        progress=context.progress,
    )
    answered = [
        replace(row, completions=tuple(samples.texts))
        for row, samples in zip(prompts, found, strict=True)
        if len(samples.texts) >= fewest
    ]
    unfinished = sum(samples.unfinished for samples in found)
    # Before a scorer is called, which may cost money.
    warnings = check_losses(prompts.source, options, len(prompts), unfinished, len(answered), fewest)
    rows = score(context, ScoredSet(tuple(answered), prompts.source), folder / f"{stem}.scored.jsonl")
    rewards = [reward for row in rows for reward in row.rewards]
    facts = {
        "round": number,
        "prompts": len(rows),
        "dropped_prompts": len(prompts) - len(rows),
        "answers": len(rewards),
        "unfinished": unfinished,
        "sampling_temperature": options.sampling_temperature,
        "mean_reward": fmean(rewards),
    }
    return Rollout(ScoredSet(rows.items, prompts.source), facts, warnings)


def check_losses(
    source: str, options: RolloutOptions, prompts: int, unfinished: int, answered: int, fewest: int
) -> tuple[str, ...]:
    """Return a warning for each large loss among sampled answers, and refuse where most is lost.

    Args:
        source: where the prompts are from, for the error.
        options: how answers were sampled.
        prompts: number of them.
        unfinished: answers that did not end, or say nothing.
        answered: prompts with at least `fewest` answers that ended.
        fewest: answers that a prompt needs to be learned from.
    """
    longer = f"raise --max-new-tokens (max_new_tokens), {options.max_new_tokens} now"
    what = "sampled answers did not end or are empty"
    few = f"prompts have fewer than {fewest} answers that ended, and are left out"
    try:
        return (
            *check_shortfall(unfinished, options.samples * prompts, what, longer),
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
        check_prompts(context.tokenizer, [row.prompt for row in prompts], _sampling(context))
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


def _sampling(context: RunContext) -> SamplingOptions:
    options = context.rollouts
    return SamplingOptions(
        completions=options.samples,
        temperature=options.sampling_temperature,
        max_new_tokens=options.max_new_tokens,
        max_prompt_tokens=context.max_length - options.max_new_tokens,
    )
