"""Give every answer of a file its reward, in batches that survive a kill.

    rows = load_unscored("answers.jsonl")
    score_rows(rows, RewardModelScorer.from_folder("runs/reward"), "scored.jsonl")

What is finished stands beside the output in a file that is named after scorer and rows, until the output is written
whole; the same call goes on from there and asks the scorer for nothing twice. A judge keeps every single score, in its
own cache, or else in one beside the output for as long.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from everalign.data.records import Scored, ScoredSet
from everalign.errors import EveralignError, InputError, check_shortfall
from everalign.evaluation.judge import JudgeOptions, JudgeScorer
from everalign.evaluation.pairwise import checked_rewards
from everalign.evaluation.scorers import CallableScorer, RewardModelScorer, Scorer, make_scorer
from everalign.storage import Journal, check_new_file, exclusive, json_line, lock_of, write_text

__all__ = [
    "CallableScorer",
    "JudgeOptions",
    "JudgeScorer",
    "RewardModelScorer",
    "Scorer",
    "ScoringResult",
    "make_scorer",
    "score_rows",
]

ANSWERS_PER_BATCH = 64


@dataclass(frozen=True)
class ScoringResult:
    """A finished scoring.

    Args:
        path: the file written.
        rows: the rows with their rewards, in the order given.
        resumed: how many of them an earlier, broken-off run had scored.
    """

    path: Path
    rows: ScoredSet
    resumed: int


def score_rows(
    rows: ScoredSet,
    scorer: Scorer,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    answers_per_batch: int = ANSWERS_PER_BATCH,
    log: Callable[[str], None] = lambda _: None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> ScoringResult:
    """Score rows and write them as JSON Lines that `load_scored` reads, whole or not at all.

    Args:
        rows: the answers.
        scorer: gives rewards.
        output: the file, whose name ends in .jsonl.
        overwrite: replace `output` if it exists.
        answers_per_batch: answers handed to the scorer at once; a row is never divided. After each batch its rewards
            are on disk.
        log: called with one line for each thing that happens.
        progress: called with ("scoring", rows done, rows in all).

    Raises:
        InputError: there are no rows, `output` cannot be used, or another process is writing it.
        EveralignError: the scorer failed, or a reward is missing, no number, NaN or infinite; names the rows, or the
            row and the completion. What was scored before is kept.
    """
    path = Path(output)
    with exclusive(lock_of(path)):
        _check_output(rows, path, overwrite, answers_per_batch)
        journal = Journal.beside(path, scorer.fingerprint, rows.fingerprint)
        beside = Journal(path.with_name(f"{path.name}.judge.partial"))
        asked = scorer.with_cache(beside) if _is_unkept(scorer) else scorer
        done = _kept(journal, rows)
        resumed = len(done)
        fresh = frozenset(range(len(rows))) - done.keys()
        cut = scorer.cut if isinstance(scorer, RewardModelScorer) else 0
        if done:
            log(f"  {resumed} of {len(rows)} rows were scored by an earlier run")
        for batch in _batches(rows, sorted(fresh), answers_per_batch):
            found = _score_batch(asked, rows, batch)
            journal.put(found)
            done |= found
            progress("scoring", len(done), len(rows))
        if isinstance(scorer, RewardModelScorer):
            answers = sum(len(row.completions) for number, row in enumerate(rows) if number in fresh)
            what, remedy = "answers with their prompts were cut before they were scored", "train with more --max-length"
            for warning in check_shortfall(scorer.cut - cut, answers, what, remedy, refuse=False):
                log(f"  warning: {rows.source}: {warning}")
        scored = tuple(replace(row, rewards=tuple(done[number])) for number, row in enumerate(rows))
        write_text(path, "".join(json_line(row.to_json()) for row in scored))
        journal.remove()
        if asked is not scorer:
            beside.remove()
    return ScoringResult(path, ScoredSet(scored, str(path)), resumed)


def _is_unkept(scorer: Scorer) -> TypeGuard[JudgeScorer]:
    """Whether a scorer is slow and costs money, but would lose a batch's rewards with the batch."""
    return isinstance(scorer, JudgeScorer) and scorer.cache is None


def _check_output(rows: ScoredSet, path: Path, overwrite: bool, answers_per_batch: int) -> None:
    if not rows:
        raise InputError(f"{rows.source}: no rows in it")
    check_new_file(path, ".jsonl", overwrite)
    if answers_per_batch < 1:
        raise InputError(f"batch size: must be at least 1, found {answers_per_batch}")


def _batches(rows: Sequence[Scored], numbers: Sequence[int], answers: int) -> Iterator[list[int]]:
    """Cut the rows of these numbers into batches of at most `answers` answers, or of one row that has more."""
    batch, count = list[int](), 0
    for number in numbers:
        if batch and count + len(rows[number].completions) > answers:
            yield batch
            batch, count = [], 0
        batch.append(number)
        count += len(rows[number].completions)
    if batch:
        yield batch


def _score_batch(scorer: Scorer, rows: Sequence[Scored], batch: Sequence[int]) -> dict[int, list[float]]:
    """Return the rewards of the rows of these numbers, by number."""
    prompts = [rows[number].prompt for number in batch for _ in rows[number].completions]
    completions = [text for number in batch for text in rows[number].completions]
    try:
        found = scorer.score(prompts, completions)
    except EveralignError as error:
        named = f"row {batch[0] + 1}" if len(batch) == 1 else f"rows {batch[0] + 1} to {batch[-1] + 1}"
        raise type(error)(f"{named}: {error}; what was scored before is kept") from error
    places = [(number + 1, i) for number in batch for i in range(len(rows[number].completions))]
    rewards = iter(checked_rewards(found, places))
    return {number: [next(rewards) for _ in rows[number].completions] for number in batch}


def _kept(journal: Journal, rows: Sequence[Scored]) -> dict[int, list[float]]:
    """Return the rewards of the rows that an earlier run has finished, by the rows' numbers."""
    found: dict[int, list[float]] = journal.read(range(len(rows)))
    if not all(_fits(rewards, rows[number]) for number, rewards in found.items()):
        raise journal.damaged()
    return found


def _fits(rewards: Any, row: Scored) -> bool:
    return isinstance(rewards, list) and len(rewards) == len(row.completions)
