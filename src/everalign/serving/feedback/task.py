"""Build the next training task from feedback: majority of keys, filters, balance, a cap per key, a held-out share."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import Field

from everalign.correction.checks import LONGEST_CORRECTION, Filtered, filter_corrections
from everalign.data.records import Correction, CorrectionSet, Preference, correction_of
from everalign.data.rows import RowSet
from everalign.errors import EveralignError, InputError
from everalign.options import Options
from everalign.serving.feedback.rows import KINDS, NO_QUESTION, SETS, Candidate, Judgement, candidates_of, judgement_of
from everalign.serving.store.records import Exchange, Feedback
from everalign.text import folded


class NotEnoughFeedback(EveralignError):  # noqa: N818  # a state, which more feedback ends
    """There is not enough feedback for a task yet; `report` says what there is and why the rest was left out.

    Exit code 4.
    """

    exit_code = 4

    def __init__(self, message: str, report: "TaskReport") -> None:
        super().__init__(message)
        self.report = report


class NextTaskOptions(Options):
    """How a task is made of feedback."""

    kind: Literal["preferences", "corrections", "scored"] = Field(default="preferences", description="Of rows.")
    minimum: int = Field(default=50, ge=1, description="Fewest rows to learn, held-out ones not counted.")
    key_share: float = Field(
        default=0.5, gt=0, le=1, description="Most of a task's rows from one key, as a share; not without keys."
    )
    agreement: float = Field(
        default=2 / 3, gt=0, le=1, description="Share of the keys' votes on an answer that must agree."
    )
    balance: float = Field(
        default=2.0, ge=1, description="Most rows of the same origin and tags, in multiples of the mean of all such."
    )
    identity: float = Field(
        default=0.5, ge=0, lt=1, description="Most of a task's rows that are unchanged answers, as a share."
    )
    held_out: float = Field(
        default=0.2, ge=0, lt=1, description="Share of the questions to test on, the same ones in all later tasks."
    )
    longest: int = Field(default=LONGEST_CORRECTION, ge=1, description="Most characters of a question or an answer.")


@dataclass(frozen=True)
class TaskReport:
    """What became of feedback: every judgement is in one row, or left out for one reason.

    Args:
        feedback: judgements that were read.
        rows: rows to learn.
        held_out: rows to test on.
        origins: rows of both kinds, by origin.
        keys: rows of both kinds, by key.
        left_out: judgements that are in no row, by the reason.
    """

    feedback: int
    rows: int
    held_out: int
    origins: Mapping[str, int] = field(default_factory=Counter)
    keys: Mapping[str, int] = field(default_factory=Counter)
    left_out: Mapping[str, int] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}

    def one_line(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        total = sum(self.left_out.values())
        made = f"{self.feedback} judgements gave {self.rows} rows and {self.held_out} held out"
        return f"{made}; {total} left out ({reasons})" if total else made


@dataclass(frozen=True)
class NextTask:
    """A task made of feedback.

    Args:
        rows: to learn: a `PreferenceSet`, `CorrectionSet` or `ScoredSet`.
        test: to test on, None if nothing is held out. No question is in both.
        feedback_ids: for `mark_learned`: the feedback in rows and test, and in duplicates of these. Held-out feedback
            counts as learned, because learning it later would spoil the test of every later task.
        report: what was left out, and why.
    """

    rows: RowSet[Any]
    test: RowSet[Any] | None
    feedback_ids: tuple[str, ...]
    report: TaskReport


CONTRADICTORY = "contradictory"
OUTVOTED = "outvoted"
TOO_LONG = "too long"
DUPLICATE = "duplicate"
OVER_IDENTITY = "too many unchanged answers"
OVER_GROUP = "too many of its kind and tags"
OVER_KEY = "too many of its key"

WITHOUT_KEYS = "local"
"""The key of all clients of a gateway without keys, who cannot be told apart."""

_ANY_LENGTH = 1 << 62  # for filters of corrections: lengths are checked before

Item = TypeVar("Item")
Group = TypeVar("Group", bound=Hashable)


def build_task(feedback: Iterable[tuple[Exchange, Feedback]], options: NextTaskOptions) -> NextTask:
    """Build a task from feedback, the oldest first.

    Raises:
        NotEnoughFeedback: fewer rows are left than wanted, none to test on, or too few keys gave them.
    """
    left: Counter[str] = Counter()  # judgements that are in no row, by the reason

    def drop(candidates: Iterable[Candidate], reason: str) -> None:
        left[reason] += sum(len(one.judgements) for one in candidates)

    read = [judgement_of(exchange, given) for exchange, given in feedback]
    judgements = [judgement for judgement in read if judgement is not None]
    left[NO_QUESTION] = len(read) - len(judgements)
    judgements.sort(key=lambda judgement: (judgement.feedback.created, judgement.feedback.id))

    # Keys vote on whether an answer is good, which of two is better, and what an answer should become.
    agreed, outvoted = majority_only(judgements, _verdict, lambda one: one.feedback.key_id, options.agreement)
    made, unusable = candidates_of(agreed, options.kind)
    left.update(reason for _, reason in (*outvoted, *unusable))
    for vote in (_direction, _target_vote(made)):
        made, divided = majority_only(made, vote, lambda one: one.key_id, options.agreement)
        left.update(reason for _, reason in divided)

    # The same row twice is one row, learned from the feedback of both.
    same: dict[str, list[Candidate]] = defaultdict(list)
    for one in made:
        same[one.row.id].append(one)
    for several in same.values():
        drop(several[1:], DUPLICATE)
    different, near = _filtered([several[0] for several in same.values()], options, drop)

    sides: tuple[list[Candidate], list[Candidate]] = ([], [])
    for one in different:
        # By the question alone, so that it is on the same side in every task, for every key.
        digest = int.from_bytes(hashlib.sha256(one.topic.encode()).digest()[:8], "big")
        sides[digest < options.held_out * (1 << 64)].append(one)
    train, test = (_balanced(side, options, drop) for side in sides)
    both = [*train, *test]
    report = TaskReport(
        feedback=len(read),
        rows=len(train),
        held_out=len(test),
        origins=Counter(one.origin for one in both),
        keys=Counter(one.key_id for one in both),
        left_out=+left,
    )
    _check(train, test, options, report)
    # Feedback in near duplicates is learned too: it never gives a row of its own.
    learned = [*near, *(several for one in both for several in same[one.row.id])]
    return NextTask(
        SETS[options.kind](tuple(one.row for one in train), "feedback"),
        SETS[options.kind](tuple(one.row for one in test), "feedback (held out)") if test else None,
        tuple(sorted({judgement.feedback.id for one in learned for judgement in one.judgements})),
        report,
    )


def rows_of(feedback: Iterable[tuple[Exchange, Feedback]], kind: str) -> tuple[RowSet[Any], Counter[str]]:
    """Make rows of feedback, without votes, filters and caps.

    Args:
        feedback: of any keys.
        kind: one of `KINDS`, else InputError.

    Returns:
        The rows, and how many judgements gave none, by the reason.
    """
    if kind not in KINDS:
        raise InputError(f"kind: must be one of {', '.join(KINDS)}, found {kind!r}")
    read = [judgement_of(exchange, given) for exchange, given in feedback]
    made, unusable = candidates_of([judgement for judgement in read if judgement is not None], kind)
    left = Counter(reason for _, reason in unusable)
    left[NO_QUESTION] = read.count(None)
    return SETS[kind](tuple(one.row for one in made), "feedback"), +left


def majority_only(
    items: Sequence[Item],
    vote: Callable[[Item], tuple[Hashable, Hashable] | None],
    key: Callable[[Item], str],
    least: float,
) -> tuple[list[Item], list[tuple[Item, str]]]:
    """Keep the items that agree with the majority of the keys that judged the same subject.

    Every key has one vote on a subject, its own majority, however many users it has.

    Args:
        items: all items.
        vote: returns an item's subject and its vote; None for an item without a vote, which is kept.
        key: returns an item's key.
        least: share of the votes that a majority needs.

    Returns:
        The items kept, and the others with the reason: contradictory if there is no majority, else outvoted.
    """
    cast = [vote(item) for item in items]
    votes: dict[Hashable, dict[str, list[Hashable]]] = defaultdict(lambda: defaultdict(list))
    for item, said in zip(items, cast, strict=True):
        if said is not None:
            votes[said[0]][key(item)].append(said[1])
    verdicts = {}
    for subject, keys in votes.items():
        of_keys = [_majority(own, least) for own in keys.values()]
        verdicts[subject] = _majority([own for own in of_keys if own is not None], least)
    kept: list[Item] = []
    left: list[tuple[Item, str]] = []
    for item, said in zip(items, cast, strict=True):
        if said is None or said[1] == verdicts[said[0]]:
            kept.append(item)
        else:
            left.append((item, CONTRADICTORY if verdicts[said[0]] is None else OUTVOTED))
    return kept, left


def _majority(votes: Sequence[Hashable], least: float) -> Hashable | None:
    """Return the most frequent vote, if it has the least share of all votes and no tie."""
    first, second = [*Counter(votes).most_common(2), (None, 0), (None, 0)][:2]
    return first[0] if first[1] > second[1] and first[1] >= least * len(votes) else None


def cap_for_share(sizes: Iterable[int], share: float) -> int:
    """Return the largest cap per group with which no group has more than `share` of all that is kept.

    With a cap, a group of size n keeps min(n, cap) members, so that large groups count for less in the total, too. 0 if
    no cap will do, because there are too few groups.
    """
    counts = sorted(sizes)
    for cap in range(counts[-1] if counts else 0, 0, -1):
        if cap <= share * sum(min(count, cap) for count in counts):
            return cap
    return 0


def cap_per_group(
    items: Sequence[Item], group: Callable[[Item], Group], cap: Callable[[Group], int]
) -> tuple[list[Item], list[Item]]:
    """Return the first items of every group up to its cap, in their order; and the others."""
    seen: Counter[Group] = Counter()
    kept: list[Item] = []
    left: list[Item] = []
    for item in items:
        name = group(item)
        seen[name] += 1
        (kept if seen[name] <= cap(name) else left).append(item)
    return kept, left


def _verdict(judgement: Judgement) -> tuple[Hashable, bool] | None:
    """Vote on whether the answer that the client got is good."""
    subject = (judgement.topic, folded(judgement.exchange.returned))
    return None if judgement.good is None else (subject, judgement.good)


def _direction(one: Candidate) -> tuple[Hashable, bool] | None:
    """Vote on which of two answers is better: an edit of one into the other may meet its reverse."""
    if one.origin in ("identity", "group"):
        return None
    row = _as_correction(one)
    better, worse = folded(row.correction), folded(row.answer)
    return (one.topic, frozenset((better, worse))), better < worse


def _target_vote(made: Sequence[Candidate]) -> Callable[[Candidate], tuple[Hashable, str] | None]:
    """Return the vote on what an answer should become, if several keys edited it: different edits contradict."""

    def subject(one: Candidate) -> Hashable:
        return one.topic, folded(_as_correction(one).answer)

    keys: dict[Hashable, set[str]] = defaultdict(set)
    for one in made:
        if one.origin != "group":
            keys[subject(one)].add(one.key_id)

    def vote(one: Candidate) -> tuple[Hashable, str] | None:
        if one.origin == "group" or len(keys[subject(one)]) < 2:
            return None
        return subject(one), folded(_as_correction(one).correction)

    return vote


def _as_correction(one: Candidate) -> Correction:
    return correction_of(one.row) if isinstance(one.row, Preference) else one.row  # type: ignore[return-value]


def _filtered(
    candidates: Sequence[Candidate], options: NextTaskOptions, drop: Callable[[Sequence[Candidate], str], None]
) -> tuple[list[Candidate], list[Candidate]]:
    """Drop long rows, rows that would teach a corrector nothing, and near duplicates; return the rest and the last."""
    kept = [one for one in candidates if max(map(len, one.texts)) <= options.longest]
    drop([one for one in candidates if max(map(len, one.texts)) > options.longest], TOO_LONG)
    if options.kind == "scored":
        return kept, []

    def filtered(rows: Iterable[Candidate]) -> Filtered:
        return filter_corrections(CorrectionSet(tuple(map(_as_correction, rows))), longest=_ANY_LENGTH)

    ids = {row.id for row in filtered(kept).rows}
    near = []
    for one in kept:
        if _as_correction(one).id not in ids:
            # Wrong by itself, or else too much like another row.
            reason = next(iter(filtered([one]).dropped), DUPLICATE)
            drop([one], reason)
            if reason == DUPLICATE:
                near.append(one)
    return [one for one in kept if _as_correction(one).id in ids], near


def _balanced(
    candidates: Sequence[Candidate], options: NextTaskOptions, drop: Callable[[Sequence[Candidate], str], None]
) -> list[Candidate]:
    """Cap unchanged answers, rows of the same kind and tags, and rows of one key."""
    share, others = options.identity, sum(one.origin != "identity" for one in candidates)
    caps = {"identity": int(share / (1 - share) * others + 1e-9)}
    kept, left = cap_per_group(candidates, lambda one: one.origin, lambda origin: caps.get(origin, len(candidates)))
    drop(left, OVER_IDENTITY)
    mean = len(kept) / max(1, len({one.group for one in kept}))
    kept, left = cap_per_group(kept, lambda one: one.group, lambda _: max(1, int(options.balance * mean)))
    drop(left, OVER_GROUP)
    keys = Counter(one.key_id for one in kept)
    if set(keys) <= {WITHOUT_KEYS}:
        return kept
    cap = cap_for_share(keys.values(), options.key_share)
    kept, left = cap_per_group(kept, lambda one: one.key_id, lambda _: cap)
    drop(left, OVER_KEY)
    return kept


def _check(train: Sequence[Candidate], test: Sequence[Candidate], options: NextTaskOptions, report: TaskReport) -> None:
    advice = "wait for more, or lower the minimum (--minimum)"
    if report.left_out.get(OVER_KEY) and not train:
        keys = math.ceil(1 / options.key_share - 1e-9)
        advice = (
            f"with key_share {options.key_share:g} at least {keys} keys must have given some: "
            "raise it (1 trusts every key) or wait for others"
        )
    if len(train) < options.minimum:
        raise NotEnoughFeedback(
            f"feedback not learned yet makes {len(train)} {options.kind}, and {options.minimum} are wanted: "
            f"{advice}; {report.one_line()}",
            report,
        )
    if options.held_out and not test:
        raise NotEnoughFeedback(
            f"feedback not learned yet makes no {options.kind} to test on (held_out {options.held_out:g}): "
            f"{advice}; {report.one_line()}",
            report,
        )
