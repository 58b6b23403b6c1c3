"""Answers sampled from the policy as it stands, and their rewards: what a prompt alone needs to become a scored row.

Both are on disk as they come, in the folder of the task that is being learned: a run that was killed in the middle of
sampling or scoring goes on where it was.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from everalign.data.readers import load_scored
from everalign.data.records import ScoredSet
from everalign.errors import InputError, ShortfallError, check_shortfall
from everalign.evaluation.score_rows import score_rows
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


def sample_and_score(
    setup: RunContext, prompts: ScoredSet, folder: Path, number: int, fewest: int, seed: int
) -> Rollout:
    """Sample answers to every prompt from the policy as it stands, and score them.

    Args:
        setup: the learner's parts.
        prompts: the N prompts.
        folder: keeps samples and rewards; what it holds of this round is taken as it is.
        number: of the round, from 1 on.
        fewest: finished answers that a prompt needs to be learned from.
        seed: seeds the draw.

    Raises:
        ShortfallError: most answers did not end, or most prompts have too few that did.
        InputError: nobody gives rewards, or a prompt is too long.
        EveralignError: the scorer fails.
    """
    options, stem = setup.rollouts, f"round-{number}-{prompts.fingerprint[:16]}"
    asked = [row.prompt for row in prompts]
    found = sample_journalled(
        setup.policy,
        setup.tokenizer,
        asked,
        _sampling(setup),
        Journal(folder / f"{stem}.samples.sqlite"),
        seed=seed,
        tokens_per_batch=2 * setup.options.tokens_per_batch,  # nothing is kept for gradients
        progress=setup.progress,
    )
    answered = [
        replace(row, completions=tuple(s.texts))
        for row, s in zip(prompts, found, strict=True)
        if len(s.texts) >= fewest
    ]
    unfinished = sum(samples.unfinished for samples in found)
    # Before anybody is asked, and perhaps paid, for rewards.
    warnings = _losses(prompts.source, options, len(prompts), unfinished, len(answered), fewest)
    rows = score(setup, ScoredSet(tuple(answered), prompts.source), folder / f"{stem}.scored.jsonl")
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


def _losses(
    source: str, options: RolloutOptions, prompts: int, unfinished: int, answered: int, fewest: int
) -> tuple[str, ...]:
    """Return what was lost where that is much; refuse where most is."""
    longer = f"raise --max-new-tokens (max_new_tokens), {options.max_new_tokens} now"
    what = "sampled answers did not end or say nothing"
    few = f"prompts have fewer than {fewest} answers that ended, and are left out"
    try:
        return (
            *check_shortfall(unfinished, options.samples * prompts, what, longer),
            *check_shortfall(prompts - answered, prompts, few, longer),
        )
    except ShortfallError as error:
        raise ShortfallError(f"{source}: {error}") from error


def check_lengths(setup: RunContext, prompts: ScoredSet) -> None:
    """Refuse prompts that leave an answer too little room, before anything is sampled or trained.

    Raises:
        InputError: names the file and the first such prompt.
    """
    try:
        check_prompts(setup.tokenizer, [row.prompt for row in prompts], _sampling(setup))
    except InputError as error:
        options = f"max_length {setup.options.max_length} less max_new_tokens {setup.rollouts.max_new_tokens}"
        raise InputError(f"{prompts.source}: {error} (max_prompt_tokens is {options})") from error


def score(setup: RunContext, rows: ScoredSet, path: Path) -> ScoredSet:
    """Give answers their rewards, which stay in the file `path`.

    Raises:
        InputError: nobody gives rewards.
        EveralignError: the scorer fails.
    """
    if setup.scorer is None:
        raise InputError(f"{rows.source}: the answers have no rewards: name who gives them with reward")
    if path.exists():
        return load_scored(path)
    return score_rows(rows, setup.scorer, path, log=setup.log, progress=setup.progress).rows


def _sampling(setup: RunContext) -> SamplingOptions:
    options = setup.rollouts
    room = setup.options.max_length - options.max_new_tokens
    return SamplingOptions(
        completions=options.samples,
        temperature=options.sampling_temperature,
        max_new_tokens=options.max_new_tokens,
        max_prompt_tokens=room,
    )
