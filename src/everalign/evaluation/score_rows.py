"""Score the answers of a file, in batches that survive a kill.

    rows = load_unscored("answers.jsonl")
    score_rows(rows, RewardModelScorer.from_folder("runs/reward"), "scored.jsonl")

Finished batches are kept in a journal beside the output, named after the scorer and the rows, until the output is
written whole; the same call continues from there and asks the scorer for nothing twice. A judge keeps every single
score, in its own cache or else in a journal beside the output.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from everalign.data.records import Scored, ScoredSet
from everalign.errors import EveralignError, InputError, check_shortfall
from everalign.evaluation.judge import JudgeScorer
from everalign.evaluation.pairwise import checked_rewards
from everalign.evaluation.scorers import RewardModelScorer, Scorer
from everalign.storage import Journal, check_new_file, exclusive, json_line, lock_of, write_text

ANSWERS_PER_BATCH = 64


@dataclass(frozen=True)
class ScoringResult:
    """A finished scoring.

    Args:
        path: the file written.
        rows: the rows with their rewards, in the order given.
        resumed: number of rows that an earlier, interrupted run had scored.
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
    """Scores rows and writes them as JSON Lines that `load_scored` reads, whole or not at all.

    Args:
        rows: rows with completions; rewards that they have are replaced.
        scorer: gives the rewards.
        output: the file, whose name ends in .jsonl.
        overwrite: replace `output` if it exists.
        answers_per_batch: answers per call of the scorer; a row is never split. After each batch its rewards are on
            disk.
        log: called with one line for each event.
        progress: called with ("scoring", rows done, rows in all).

    Raises:
        InputError: there are no rows, a row has no completions, `output` cannot be used, or another process is writing
            it.
        EveralignError: the scorer failed, or a reward is missing, no number, NaN or infinite; names the rows, or the
            row and the completion. Earlier batches are kept.
    """
    path = Path(output)
    with exclusive(lock_of(path)):
        if not rows:
            raise InputError(f"{rows.source}: no rows in it", where=rows.source)
        rows.require("completions")
        check_new_file(path, ".jsonl", overwrite)
        if answers_per_batch < 1:
            raise InputError(f"batch size: must be at least 1, found {answers_per_batch}", field="batch size")
        journal = Journal.beside(path, scorer.fingerprint, rows.fingerprint)
        single_scores = Journal(path.with_name(f"{path.name}.judge.partial"))
        asked = scorer
        if isinstance(scorer, JudgeScorer) and scorer.cache is None:
            # A judge is slow and costs money: an interrupted batch must not lose the scores that it has.
            asked = scorer.with_cache(single_scores)
        done: dict[int, list[float]] = journal.read(range(len(rows)))
        if not all(isinstance(found, list) and len(found) == len(rows[i].completions) for i, found in done.items()):
            raise journal.damaged()
        resumed = len(done)
        if resumed:
            log(f"  {resumed} of {len(rows)} rows were scored by an earlier run")
        missing = [number for number in range(len(rows)) if number not in done]
        cut_before = scorer.cut if isinstance(scorer, RewardModelScorer) else 0
        for batch in _batches(rows, missing, answers_per_batch):
            found = _score_batch(asked, rows, batch)
            journal.put(found)
            done |= found
            progress("scoring", len(done), len(rows))
        if isinstance(scorer, RewardModelScorer):
            answers = sum(len(rows[number].completions) for number in missing)
            what, remedy = "answers with their prompts were cut before they were scored", "train with more --max-length"
            for warning in check_shortfall(scorer.cut - cut_before, answers, what, remedy, refuse=False):
                log(f"  warning: {rows.source}: {warning}")
        scored = tuple(replace(row, rewards=tuple(done[number])) for number, row in enumerate(rows))
        write_text(path, "".join(json_line(row.to_json()) for row in scored))
        journal.remove()
        if asked is not scorer:
            single_scores.remove()
    return ScoringResult(path, ScoredSet(scored, str(path)), resumed)


def _batches(rows: Sequence[Scored], numbers: Sequence[int], answers: int) -> Iterator[list[int]]:
    """Cuts the rows of these numbers into batches of at most `answers` answers, or of one row that has more."""
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
    """Returns the rewards of the rows of these numbers, by number."""
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
