"""Answers sampled from the policy as it stands, and their rewards: what a prompt alone needs to become a scored row.

Both are on disk as they come, in the folder of the task that is being learned: a run that was killed in the middle of
sampling or scoring goes on where it was.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from everalign.data.prompts import PromptSet
from everalign.data.scored import ScoredSet, load_scored
from everalign.data.unscored import UnscoredSet
from everalign.errors import EveralignError
from everalign.evaluation.rewards import score_rows
from everalign.evaluation.scorers import Scorer
from everalign.files import write_text
from everalign.learning.options import RolloutOptions
from everalign.learning.setup import Setup
from everalign.modeling.sampling import Samples, SamplingOptions, sample_completions

# Prompts sampled between two writes.
_CHUNK = 256


@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled answers and their rewards.

    Attributes:
        rows: the prompts that have enough finished answers.
        facts: what was sampled, for the manifest.
    """

    rows: ScoredSet
    facts: dict[str, float]

    def summary(self) -> str:
        """One line of text for a log."""
        f = self.facts
        line = f"{f['answers']:.0f} answers to {f['prompts']:.0f} prompts, mean reward {f['mean_reward']:.4g}"
        if f["unfinished"]:
            line += f"; {f['unfinished']:.0f} answers did not end within max_new_tokens and are left out"
        if f["dropped_prompts"]:
            line += f", and {f['dropped_prompts']:.0f} prompts with them"
        return line


def roll_out(
    setup: Setup, prompts: PromptSet, scorer: Scorer, folder: Path, number: int, fewest: int, seed: int
) -> Rollout:
    """Sample answers to every prompt from the policy as it stands, and score them.

    Args:
        setup: the learner's parts.
        prompts: the N prompts.
        scorer: gives rewards.
        folder: keeps samples and rewards; what it holds of this round is taken as it is.
        number: of the round, from 1 on.
        fewest: finished answers that a prompt needs to be learned from.
        seed: seeds the draw.

    Raises:
        EveralignError: no prompt has enough finished answers, or the scorer fails.
    """
    options, stem = setup.rollouts, f"round-{number}-{prompts.fingerprint[:16]}"
    found = _sampled(setup, prompts, folder / f"{stem}.samples.jsonl", seed)
    answered = [row.answered(s.texts) for row, s in zip(prompts, found, strict=True) if len(s.texts) >= fewest]
    if not answered:
        raise EveralignError(
            f"{prompts.source}: of {options.samples} answers sampled to each prompt, no prompt has {fewest} that end "
            f"within max_new_tokens {options.max_new_tokens}: raise it"
        )
    scored = folder / f"{stem}.scored.jsonl"
    if scored.exists():
        rows = load_scored(scored)
    else:
        rows = score_rows(
            UnscoredSet(tuple(answered), prompts.source),
            scorer,
            scored,
            announce=setup.announce,
            progress=setup.progress,
        ).rows
    rewards = [reward for row in rows for reward in row.rewards]
    facts = {
        "round": number,
        "prompts": len(rows),
        "dropped_prompts": len(prompts) - len(rows),
        "answers": len(rewards),
        "unfinished": sum(samples.unfinished for samples in found),
        "sampling_temperature": options.sampling_temperature,
        "mean_reward": fmean(rewards),
    }
    return Rollout(ScoredSet(rows.items, prompts.source), facts)


def _sampled(setup: Setup, prompts: PromptSet, path: Path, seed: int) -> list[Samples]:
    """Sample chunk after chunk, each on disk before the next begins."""
    found = _read(path)
    for start in range(len(found), len(prompts), _CHUNK):
        chunk = [row.prompt for row in prompts[start : start + _CHUNK]]
        drawn = sample_completions(
            setup.policy, setup.tokenizer, chunk, _sampling(setup), seed=(seed + start) % 2**31
        )
        _append(path, drawn)
        found += drawn
        setup.progress("sampling", len(found), len(prompts))
    return found


def _sampling(setup: Setup) -> SamplingOptions:
    options: RolloutOptions = setup.rollouts
    room = setup.options.max_length - options.max_new_tokens
    return SamplingOptions(options.samples, options.sampling_temperature, options.max_new_tokens, room)


def _read(path: Path) -> list[Samples]:
    """Read whole chunks; the pieces of one that a kill has cut are dropped."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    chunks: list[list[Samples]] = [
        [Samples(tuple(texts), unfinished) for texts, unfinished in json.loads(line)] for line in lines
    ]
    write_text(path, "".join(lines))
    return [samples for chunk in chunks for samples in chunk]


def _append(path: Path, drawn: Sequence[Samples]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps([[list(samples.texts), samples.unfinished] for samples in drawn]) + "\n")
        file.flush()
        os.fsync(file.fileno())
