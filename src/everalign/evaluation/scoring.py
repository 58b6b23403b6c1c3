"""Score the answers of a file with any scorer, and compare answers pairwise; killed work is continued."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from everalign.bulk.files import Columns, OutputFile
from everalign.bulk.job import Words, numbered_rows
from everalign.data.messages import Prompt
from everalign.data.records import Scored, ScoredSet
from everalign.data.rows import is_finite, shown
from everalign.distributed import on_main
from everalign.errors import EveralignError, InputError, check_shortfall
from everalign.evaluation.judge import JudgeScorer
from everalign.storage import Journal, check_new_file, exclusive, json_line, lock_of, write_text

if TYPE_CHECKING:
    from everalign.evaluation.scorers import Scorer


def checked_rewards(found: Any, places: Sequence[tuple[int, int]]) -> list[float]:
    """Returns a scorer's result as floats, one finite number for each answer.

    Args:
        found: what the scorer returned.
        places: for each answer, the number of its row from 1, and its number in the row from 0.

    Raises:
        EveralignError: a reward is missing, no number, NaN or infinite; names the row and the completion.
    """

    def error(index: int, problem: str) -> EveralignError:
        row, completion = places[index]
        return EveralignError(f"row {row}, completions[{completion}]: {problem}")

    def type_of(value: Any) -> str:
        return "None" if value is None else type(value).__name__

    try:
        values = list(found)
    except TypeError:
        raise error(0, f"the scorer returned {type_of(found)}, no list of rewards") from None
    if len(values) != len(places):
        which = "the first without a reward" if len(values) < len(places) else "the last answer"
        raise error(
            min(len(values), len(places) - 1),
            f"{which}; the scorer returned {len(values)} rewards for {len(places)} answers "
            f"(row {places[0][0]}, completions[{places[0][1]}] and following)",
        )
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise error(index, f"the reward must be a number, found {type_of(value)}")
        if not is_finite(value):
            raise error(index, f"the reward must be finite, found {shown(value)}")
    return [float(value) for value in values]


class ScorerApprover:
    """Approves corrections that a scorer finds better than the answers; the `approver` of a `Corrector`.

    Args:
        scorer: the scorer.
        margin: least difference, as in `compare_answers`.

    Attributes:
        fingerprint: names the scorer and the margin.

    Raises:
        InputError: the margin is below 0 or not finite, or given for a judge.
    """

    def __init__(self, scorer: "Scorer", margin: float = 0.0) -> None:
        _check_margin(scorer, margin)
        self._scorer, self._margin = scorer, margin
        self.fingerprint = f"{scorer.fingerprint} {margin!r}"

    def approve(self, questions: Sequence[Prompt], answers: Sequence[str], corrections: Sequence[str]) -> list[bool]:
        """Returns which of N corrections are better than their answers; errors as in `compare_answers`."""
        return [verdict > 0 for verdict in compare_answers(self._scorer, questions, answers, corrections, self._margin)]


def compare_answers(
    scorer: "Scorer",
    prompts: Sequence[Prompt],
    before: Sequence[str],
    after: Sequence[str],
    margin: float = 0.0,
) -> list[int]:
    """Compares two answers to each of N prompts: 1 if the second is better, -1 if the first is, 0 if neither is.

    A judge is asked for the better of the two in both orders; if its verdicts differ, neither is. Any other scorer
    rates both. Equal texts are a 0 without a question.

    Args:
        scorer: the scorer.
        prompts: N prompts.
        before: the N first answers.
        after: the N second answers.
        margin: the rewards must differ by more than this, in the scorer's units; not for a judge.

    Raises:
        InputError: the margin is below 0 or not finite, or given for a judge.
        EveralignError: the scorer failed, or a reward is missing, no number, NaN or infinite; names the row.
    """
    _check_margin(scorer, margin)
    verdicts = [0] * len(prompts)
    numbers = [i for i, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    if not numbers:
        return verdicts
    asked = [prompts[i] for i in numbers]
    first, second = ([answers[i] for i in numbers] for answers in (before, after))
    if isinstance(scorer, JudgeScorer):
        # At once, so that a reply that cannot be read leaves none of the others unasked.
        replies = scorer.compare([*asked, *asked], [*first, *second], [*second, *first])
        there, back = replies[: len(asked)], replies[len(asked) :]
        # The second time the answers change places: (2, 1) is a win of the second answer in both orders.
        wins = {(2.0, 1.0): 1, (1.0, 2.0): -1}
        found = [wins.get(pair, 0) for pair in zip(there, back, strict=True)]
    else:
        places = [(i + 1, side) for side in (0, 1) for i in numbers]
        rewards = checked_rewards(scorer.score([*asked, *asked], [*first, *second]), places)
        pairs = zip(rewards[: len(numbers)], rewards[len(numbers) :], strict=True)
        found = [(b - a > margin) - (a - b > margin) for a, b in pairs]
    for i, verdict in zip(numbers, found, strict=True):
        verdicts[i] = verdict
    return verdicts


def _check_margin(scorer: "Scorer", margin: float) -> None:
    if not (math.isfinite(margin) and margin >= 0):
        raise InputError(f"margin: must be a finite number of at least 0, found {margin}", field="margin")
    if margin and isinstance(scorer, JudgeScorer):
        problem = "margin: a judge names the better answer, not by how much; leave it out"
        raise InputError(problem, field="margin")


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
    scorer: "Scorer",
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
    # A gateway that compares answers by a judge loads this module, and no torch.
    from everalign.evaluation.scorers import RewardModel

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
        cut_before = scorer.cut if isinstance(scorer, RewardModel) else 0
        for places in _batches([rows[number] for number in missing], answers_per_batch):
            batch = [missing[place] for place in places]
            # Reward models share a batch between processes; a function or a judge is asked by one of them.
            shared = isinstance(scorer, RewardModel)
            score = _score_batch if shared else on_main(_score_batch)
            found = score(asked, [rows[number] for number in batch], [number + 1 for number in batch])
            journal.put(dict(zip(batch, found, strict=True)))
            done |= zip(batch, found, strict=True)
            progress("scoring", len(done), len(rows))
        if isinstance(scorer, RewardModel):
            answers = sum(len(rows[number].completions) for number in missing)
            for warning in cut_warnings(scorer.cut - cut_before, answers):
                log(f"  warning: {rows.source}: {warning}")
        scored = tuple(replace(row, rewards=tuple(done[number])) for number, row in enumerate(rows))
        on_main(write_text)(path, "".join(json_line(row.to_json()) for row in scored))
        journal.remove()
        if asked is not scorer:
            single_scores.remove()
    return ScoringResult(path, ScoredSet(scored, str(path)), resumed)


def cut_warnings(cut: int, answers: int) -> tuple[str, ...]:
    """Returns a warning if many answers were cut, else nothing."""
    what, remedy = "answers with their prompts were cut before they were scored", "train with more --max-length"
    return check_shortfall(cut, answers, what, remedy, refuse=False)


def _batches(rows: Sequence[Scored], answers: int) -> Iterator[list[int]]:
    """Cuts rows into batches of at most `answers` answers, or of one row that has more; returns their indices."""
    batch, count = list[int](), 0
    for i, row in enumerate(rows):
        if batch and count + len(row.completions) > answers:
            yield batch
            batch, count = [], 0
        batch.append(i)
        count += len(row.completions)
    if batch:
        yield batch


def _score_batch(scorer: "Scorer", rows: Sequence[Scored], numbers: Sequence[int]) -> list[list[float]]:
    """Returns the rewards of some rows; `numbers` are theirs in the file, from 1, for errors."""
    prompts = [row.prompt for row in rows for _ in row.completions]
    completions = [text for row in rows for text in row.completions]
    try:
        found = scorer.score(prompts, completions)
    except EveralignError as error:
        raise type(error)(f"{numbered_rows(numbers)}: {error}; what was scored before is kept") from error
    places = [(number, i) for number, row in zip(numbers, rows, strict=True) for i in range(len(row.completions))]
    rewards = iter(checked_rewards(found, places))
    return [[next(rewards) for _ in row.completions] for row in rows]


class ScoringWork:
    """Scoring as work for `run_bulk`.

    Args:
        scorer: gives the rewards.
        answers_per_batch: answers per call of the scorer; a row is never split.

    Raises:
        InputError: the batch size is below 1.
    """

    words = Words("score", "scoring", "scored")
    columns: ClassVar[Columns] = {
        "prompt": "text",
        "completions": "texts",
        "rewards": "numbers",
        "weight": "number",
        "tools": "text",
        "chat_template_kwargs": "text",
    }

    def __init__(self, scorer: "Scorer", answers_per_batch: int = ANSWERS_PER_BATCH) -> None:
        if answers_per_batch < 1:
            raise InputError(f"batch size: must be at least 1, found {answers_per_batch}", field="batch size")
        self._scorer = self._asked = scorer
        self._answers_per_batch = answers_per_batch
        self.facts: tuple[str, ...] = (scorer.fingerprint,)
        self._single_scores: Journal | None = None
        self._computed = 0
        self._before: Mapping[str, float] = {}

    def begin(self, output: OutputFile) -> None:
        """Keeps a judge's single scores beside the output: an interrupted batch must not lose those that it has."""
        self._before = self._counts()
        if isinstance(self._scorer, JudgeScorer) and self._scorer.cache is None:
            path = output.local
            self._single_scores = Journal(path.with_name(f"{path.name}.judge.partial"))
            self._asked = self._scorer.with_cache(self._single_scores)

    def end(self) -> Mapping[str, float]:
        """Returns what a judge's requests came to, or how many answers a reward model has cut."""
        if self._single_scores is not None:
            self._single_scores.remove()
        return {name: count - self._before.get(name, 0) for name, count in self._counts().items()}

    def _counts(self) -> dict[str, float]:
        if isinstance(self._scorer, JudgeScorer):
            return asdict(self._scorer.client.usage)
        return {"cut": getattr(self._scorer, "cut", 0), "computed": self._computed}

    def length(self, row: Scored) -> int:
        """Returns the characters of the prompt and the longest completion, about; 0 for a judge, who does not pad."""
        if isinstance(self._scorer, JudgeScorer):
            return 0
        return len(str(row.prompt)) + max(len(str(completion)) for completion in row.completions)

    def batches(self, rows: Sequence[Scored]) -> Iterator[list[int]]:
        """Cuts rows into batches by their answers."""
        return _batches(rows, self._answers_per_batch)

    def run(self, rows: Sequence[Scored], numbers: Sequence[int]) -> list[list[float]]:
        """Returns rewards; errors as in `score_rows`."""
        found = _score_batch(self._asked, rows, numbers)
        self._computed += sum(map(len, found))
        return found

    def is_result(self, row: Scored, result: Any) -> bool:
        """Whether these can be the row's rewards."""
        return isinstance(result, list) and len(result) == len(row.completions)

    def output(self, row: Scored, result: list[float]) -> Mapping[str, Any]:
        """Returns the row with its rewards."""
        found = row.to_json()
        weight = {"weight": found.pop("weight")} if "weight" in found else {}
        return {**found, "rewards": result, **weight}

    def totals(self, row: Scored, result: list[float]) -> Mapping[str, float]:
        """Returns the sums from which mean and spread follow."""
        return {"answers": len(result), "sum": sum(result), "squares": sum(reward * reward for reward in result)}
