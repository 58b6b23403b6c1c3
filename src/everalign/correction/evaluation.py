"""Evaluate a corrector: how much it edits, how often that makes answers better, and which good answers it spoils.

    report = evaluate_corrector(load_answers("answers.jsonl"), Corrector.from_pretrained("runs/corrector"), referee)
    report.overall.win.net, report.overall.over_edit_rate, report.kinds["medical"].edit_rate

The net win rate is the paper's (Ji et al., NeurIPS 2024, arXiv 2402.02416, section 3.1). It says nothing about good
answers that should have been left alone, hence the over-edit rate. An answer that is returned unchanged is a draw.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
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
    """How many answers a corrector makes better or worse.

    Args:
        wins: rows whose correction is better than the answer.
        draws: rows where neither is better.
        losses: rows whose answer is better.
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
    """How a corrector changes N answers; tokens are words and punctuation marks, whatever the model's tokenizer.

    Args:
        rows: N.
        edit_rate: share of the answers that are changed.
        copy_rate: mean share of an answer's tokens that its correction has in the same order.
        edit_ratio: mean Levenshtein distance, relative to the answer's tokens.
        good: answers that are known to need no correction.
        over_edit_rate: share of these that are changed; None where there are none.
        length_before: mean tokens of the answers.
        length_after: mean tokens of what is returned.
        kept: by reason, the share of answers that are returned because of the gate or a guard.
        win: the referee's verdicts; None without one.
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
    """Scores of all rows, and of the rows of each kind if they have one."""

    overall: CorrectionScores
    kinds: dict[str, CorrectionScores]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain values."""
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
    """Correct answers and score the corrections.

    Args:
        rows: answers, with whatever is known of them: a correction, whether they are good, their kind.
        corrector: corrects them.
        referee: decides between answer and correction; no win rate when None.
        options: how to correct; the corrector's own when None.
        seed: of the bootstrap.
        rows_per_batch: rows corrected at once.
        cache: folder for a journal named after corrector, options and rows: a killed call continues, and another
            referee needs no new corrections. A gate has to be a number then. Nothing is kept when None.
        log: called with one line for each step.
        progress: called with ("correcting", rows done, rows in all).

    Raises:
        InputError: there are no rows, an option cannot be used, or the journal is damaged.
        EveralignError: the corrector failed (names the rows), or the referee did.
    """
    check_batches(rows, rows_per_batch)
    journal, lock = None, nullcontext[None]()
    if cache is not None:
        options = options or CorrectionOptions()
        journal = Journal.within(Path(cache), "corrections", *journal_facts(corrector, options, rows))
        waiting = "is correcting the same answers: waiting for it"
        lock = exclusive(  # type: ignore[assignment]  # both are contexts of None
            lock_of(journal.path), wait=lambda holder: log(f"  {holder} {waiting}")
        )
    with lock:
        corrected, _ = correct_batches(rows, corrector, options, rows_per_batch, journal, log, progress)
    verdicts = None
    if referee is not None:
        texts = [one.text for one in corrected]
        verdicts = list(referee([row.question for row in rows], [row.answer for row in rows], texts))
        if len(verdicts) != len(rows) or any(verdict not in (-1, 0, 1) for verdict in verdicts):
            raise EveralignError(f"the referee must return 1, 0 or -1 for each of {len(rows)} rows")
    return evaluation_report(rows, corrected, verdicts, seed)


def evaluation_report(
    rows: Sequence[Correction], corrected: Sequence[Corrected], verdicts: Sequence[int] | None = None, seed: int = 0
) -> EvaluationReport:
    """Score N corrected answers, at least one; `verdicts` as a `Referee` returns them."""
    before, after = [words(row.answer) for row in rows], [words(one.text) for one in corrected]

    def scores(chosen: Sequence[int]) -> CorrectionScores:
        good = [corrected[i].changed for i in chosen if rows[i].is_good]
        reasons = Counter(reason for i in chosen if (reason := corrected[i].reason) is not None)
        return CorrectionScores(
            rows=len(chosen),
            edit_rate=fmean(corrected[i].changed for i in chosen),
            copy_rate=fmean(kept_share(before[i], after[i]) for i in chosen),
            edit_ratio=fmean(edit_ratio(before[i], after[i]) for i in chosen),
            good=len(good),
            over_edit_rate=fmean(good) if good else None,
            length_before=fmean(len(before[i]) for i in chosen),
            length_after=fmean(len(after[i]) for i in chosen),
            kept={reason: count / len(chosen) for reason, count in sorted(reasons.items())},
            win=None if verdicts is None else win_rate([verdicts[i] for i in chosen], seed),
        )

    by_kind: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.kind is not None:
            by_kind.setdefault(row.kind, []).append(i)
    return EvaluationReport(scores(range(len(rows))), {kind: scores(chosen) for kind, chosen in by_kind.items()})


def win_rate(verdicts: Sequence[int], seed: int = 0) -> WinRate:
    """Summarise N verdicts, each 1, 0 or -1; at least one."""
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
