"""What a corrector does to answers: how much it edits, whom that leaves better off, and what it should have left alone.

    report = evaluate_corrector(load_answers("answers.jsonl"), Corrector.from_pretrained("runs/corrector"), referee)
    report.overall.win.net, report.overall.over_edit_rate, report.kinds["medical"].edit_rate

The net win rate is the paper's (Ji et al., NeurIPS 2024, arXiv 2402.02416, section 3.1); that good answers are left
alone is what it does not measure. An answer that is returned as it is counts as a draw.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everalign.correction.batch import ROWS_PER_BATCH, check_batches, correct_batches, journal_facts
from everalign.correction.corrector import Corrected, CorrectionOptions, Corrector
from everalign.correction.edits import edit_ratio, kept_share, words
from everalign.correction.templates import Question
from everalign.data.records import Correction, CorrectionSet
from everalign.errors import EveralignError
from everalign.storage import Journal, exclusive, lock_of

Referee = Callable[[Sequence[Question], Sequence[str], Sequence[str]], Sequence[int]]
"""Given questions, answers and corrections: 1 where the correction is better, -1 where the answer is, 0 for neither."""

RESAMPLES = 9999
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class WinRate:
    """Whose answers are better after correction.

    Args:
        wins: rows whose correction is better than the answer.
        draws: rows where neither is.
        losses: rows whose answer was better.
        net: (wins - losses) / rows, from -1 to 1.
        low: lower end of its bootstrap 95 % interval over rows; None for a single row.
        high: upper end.
        p_value: two-sided sign test of wins against losses.
    """

    wins: int
    draws: int
    losses: int
    net: float
    low: float | None
    high: float | None
    p_value: float


@dataclass(frozen=True)
class CorrectionScores:
    """What a corrector does to N answers; tokens are words and signs, whoever corrects.

    Args:
        rows: N.
        edit_rate: share of the answers that are changed.
        copy_rate: mean share of an answer's tokens that its correction has in the same order.
        edit_ratio: mean of Levenshtein's distance over the answer's tokens.
        good: answers that are known to need no correction.
        over_edit_rate: share of these that are changed; None where there are none.
        length_before: mean tokens of the answers.
        length_after: mean tokens of what is returned.
        kept: share of the answers that are returned because of the gate or a guard, by reason.
        win: by the referee; None without one.
    """

    rows: int
    edit_rate: float
    copy_rate: float
    edit_ratio: float
    good: int
    over_edit_rate: float | None
    length_before: float
    length_after: float
    kept: dict[str, float]
    win: WinRate | None


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of all rows, and of the rows of each kind, where rows have kinds."""

    overall: CorrectionScores
    kinds: dict[str, CorrectionScores]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)


def evaluate_corrector(
    rows: CorrectionSet,
    corrector: Corrector,
    referee: Referee | None = None,
    *,
    options: CorrectionOptions | None = None,
    seed: int = 0,
    rows_per_batch: int = ROWS_PER_BATCH,
    cache: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] = lambda _: None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> EvaluationReport:
    """Correct answers and report on what came of them.

    Args:
        rows: the answers.
        corrector: corrects them.
        referee: says which of answer and correction is better; nobody does when None.
        options: how to correct; the corrector's own when None.
        seed: seeds the bootstrap.
        rows_per_batch: rows handed to the corrector at once.
        cache: folder in which corrections are kept after each batch, in a file named after corrector, options and
            rows: the same call goes on where it was killed, and another referee needs no new corrections. A gate has
            to be a number then. Nothing is kept when None.
        log: called with one line for each thing that happens.
        progress: called with ("correcting", rows done, rows in all).

    Raises:
        InputError: there are no rows, an option cannot be used, or what is kept is damaged.
        EveralignError: the corrector failed (names the rows), or the referee did.
    """
    check_batches(rows, rows_per_batch)
    if cache is None:
        found, _ = correct_batches(rows, corrector, options, rows_per_batch, None, log, progress)
    else:
        options = options or CorrectionOptions()
        journal = Journal.within(Path(cache), "corrections", *journal_facts(corrector, options, rows))

        def waiting(holder: str) -> None:
            log(f"  {holder} is correcting the same answers: waiting for it")

        with exclusive(lock_of(journal.path), wait=waiting):
            found, _ = correct_batches(rows, corrector, options, rows_per_batch, journal, log, progress)
    verdicts = None
    if referee is not None:
        columns = [row.question for row in rows], [row.answer for row in rows], [one.text for one in found]
        verdicts = _checked(referee(*columns), len(rows))
    return evaluation_report(rows, found, verdicts, seed)


def evaluation_report(
    rows: Sequence[Correction], corrected: Sequence[Corrected], verdicts: Sequence[int] | None = None, seed: int = 0
) -> EvaluationReport:
    """Report on N corrected answers, at least one; `verdicts` as a `Referee` gives them."""
    kinds = dict.fromkeys(row.kind for row in rows if row.kind is not None)
    places = {name: [i for i, row in enumerate(rows) if row.kind == name] for name in kinds}

    def scores(chosen: Sequence[int]) -> CorrectionScores:
        won = None if verdicts is None else win_rate([verdicts[i] for i in chosen], seed)
        return _scores([rows[i] for i in chosen], [corrected[i] for i in chosen], won)

    return EvaluationReport(
        scores(range(len(rows))), {name: scores(chosen) for name, chosen in places.items() if name is not None}
    )


def win_rate(verdicts: Sequence[int], seed: int = 0) -> WinRate:
    """Sum up N verdicts, each 1, 0 or -1; at least one."""
    from scipy.stats import binomtest, bootstrap

    wins, losses = verdicts.count(1), verdicts.count(-1)
    low = high = None
    if len(verdicts) > 1:
        found = bootstrap(
            (list(verdicts),),
            lambda sample, axis: sample.mean(axis),
            n_resamples=RESAMPLES,
            batch=max(1, (1 << 22) // len(verdicts)),
            confidence_level=_CONFIDENCE,
            method="percentile",
            rng=seed,
        )
        low, high = (float(end) for end in found.confidence_interval)
    decided = wins + losses
    p_value = float(binomtest(wins, decided).pvalue) if decided else 1.0
    return WinRate(wins, len(verdicts) - decided, losses, (wins - losses) / len(verdicts), low, high, p_value)


def _scores(rows: Sequence[Correction], corrected: Sequence[Corrected], win: WinRate | None) -> CorrectionScores:
    before, after = [words(row.answer) for row in rows], [words(one.text) for one in corrected]
    pairs = list(zip(before, after, strict=True))
    good = [one.changed for row, one in zip(rows, corrected, strict=True) if row.is_good]
    reasons = Counter(one.reason for one in corrected if one.reason is not None)
    return CorrectionScores(
        rows=len(rows),
        edit_rate=_mean([one.changed for one in corrected]),
        copy_rate=_mean([kept_share(*pair) for pair in pairs]),
        edit_ratio=_mean([edit_ratio(*pair) for pair in pairs]),
        good=len(good),
        over_edit_rate=_mean(good) if good else None,
        length_before=_mean([len(tokens) for tokens in before]),
        length_after=_mean([len(tokens) for tokens in after]),
        kept={reason: count / len(rows) for reason, count in sorted(reasons.items())},
        win=win,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _checked(verdicts: Sequence[int], count: int) -> list[int]:
    found = list(verdicts)
    if len(found) != count or any(verdict not in (-1, 0, 1) for verdict in found):
        raise EveralignError(f"the referee must return 1, 0 or -1 for each of {count} rows")
    return found
