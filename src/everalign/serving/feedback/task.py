"""From feedback to the next task's rows: agreement between keys, a cap per key, and what was left out and why."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from everalign.correction.filters import LONGEST_CORRECTION, filter_corrections
from everalign.data.records import Correction, CorrectionSet, Preference, correction_of
from everalign.data.rows import RowSet
from everalign.errors import EveralignError, InputError
from everalign.serving.feedback.rows import (
    KINDS,
    NO_QUESTION,
    SETS,
    Candidate,
    Judgement,
    candidates_of,
    judgement_of,
)
from everalign.serving.store.records import Exchange, Feedback
from everalign.text import folded


class NotEnoughFeedback(EveralignError):  # noqa: N818  # it is a state, which passes as feedback comes
    """There is no task yet: `report` says what there is and why the rest was left out; exit code 4."""

    exit_code = 4

    def __init__(self, message: str, report: "TaskReport") -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class NextTaskOptions:
    """What a task is made of.

    Args:
        kind: "preferences", "corrections" or "scored".
        minimum: fewest rows to learn, held-out ones not counted.
        key_share: most of a task's rows that may come from one key, as a share. Not applied where no client has a key.
        agreement: share of the keys' votes on an answer that must agree.
        balance: a kind of row with the same tags has at most this many times the mean number of rows of all such.
        identity: most of a task's rows that may be unchanged answers, as a share; for corrections.
        held_out: share of the questions that are kept to test on, now and in all later tasks.
        longest: most characters of a question or an answer.

    Raises:
        InputError: a value is out of its range.
    """

    kind: str = "preferences"
    minimum: int = 50
    key_share: float = 0.5
    agreement: float = 2 / 3
    balance: float = 2.0
    identity: float = 0.5
    held_out: float = 0.2
    longest: int = LONGEST_CORRECTION

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind: must be one of {', '.join(KINDS)}, found {self.kind!r}")
        for name in ("minimum", "longest"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: must be at least 1, found {getattr(self, name)}")
        for name, low in (("key_share", 0.0), ("agreement", 0.0)):
            if not low < getattr(self, name) <= 1:
                raise InputError(f"{name}: must be above 0 and at most 1, found {getattr(self, name)}")
        for name in ("identity", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: must be at least 0 and below 1, found {getattr(self, name)}")
        if not (math.isfinite(self.balance) and self.balance >= 1):
            raise InputError(f"balance: must be at least 1, found {self.balance}")


@dataclass(frozen=True)
class TaskReport:
    """What became of feedback; every judgement is in one row, or left out for one reason.

    Args:
        feedback: judgements that were looked at.
        rows: rows to learn.
        held_out: rows to test on.
        origins: both kinds of rows by what they come from.
        keys: both kinds of rows by key.
        left_out: judgements by the reason why they are in no row.
    """

    feedback: int
    rows: int
    held_out: int
    origins: Mapping[str, int] = field(default_factory=Counter)
    keys: Mapping[str, int] = field(default_factory=Counter)
    left_out: Mapping[str, int] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}

    def one_line(self) -> str:
        """One line of text for a log."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        total = sum(self.left_out.values())
        made = f"{self.feedback} judgements gave {self.rows} rows and {self.held_out} held out"
        return f"{made}; {total} left out ({reasons})" if total else made


@dataclass(frozen=True)
class NextTask:
    """A task made of feedback.

    Args:
        rows: to learn: a `PreferenceSet`, `CorrectionSet` or `ScoredSet`.
        test: to test on; None where nothing is held out. No question is in both.
        feedback_ids: the feedback in rows and test, and in duplicates of these: what `mark_learned` takes. Learning
            what is held out would spoil the test of every later task.
        report: what was left out, and why.
    """

    rows: RowSet[Any]
    test: RowSet[Any] | None
    feedback_ids: tuple[str, ...]
    report: TaskReport


CONTRADICTORY = "contradictory"
OUTVOTED = "outvoted"

Item = TypeVar("Item")
Group = TypeVar("Group", bound=Hashable)


def agreed(
    items: Sequence[Item],
    vote: Callable[[Item], tuple[Hashable, Hashable] | None],
    key: Callable[[Item], str],
    least: float,
) -> tuple[list[Item], list[tuple[Item, str]]]:
    """Keep what agrees with the majority of the keys that judged the same.

    Every key has one vote on a subject, which is that of its own majority.

    Args:
        items: all that are known.
        vote: the subject, and what is said of it; None for an item that says nothing, which is kept.
        key: whose item it is.
        least: share of the votes that a majority needs.

    Returns:
        Those kept, and the others with the reason: contradictory where there is no such majority, else outvoted.
    """
    votes: dict[Hashable, dict[str, list[Hashable]]] = defaultdict(lambda: defaultdict(list))
    cast = [vote(item) for item in items]
    for item, said in zip(items, cast, strict=True):
        if said is not None:
            votes[said[0]][key(item)].append(said[1])
    verdicts = {subject: _majority_of_keys(keys.values(), least) for subject, keys in votes.items()}
    kept: list[Item] = []
    left: list[tuple[Item, str]] = []
    for item, said in zip(items, cast, strict=True):
        verdict = None if said is None else verdicts[said[0]]
        if said is None or said[1] == verdict:
            kept.append(item)
        else:
            left.append((item, CONTRADICTORY if verdict is None else OUTVOTED))
    return kept, left


def cap_for_share(sizes: Iterable[int], share: float) -> int:
    """Return the most members that each of several groups may have so that none has more than `share` of all kept.

    With `most`, a group of size n keeps min(n, most) of its members; the others then count for less, too. 0 where no
    number will do, because there are too few groups.
    """
    counts = sorted(sizes)
    for most in range(counts[-1] if counts else 0, 0, -1):
        if most <= share * sum(min(count, most) for count in counts):
            return most
    return 0


def cap_per_group(
    items: Sequence[Item], group: Callable[[Item], Group], most: Callable[[Group], int]
) -> tuple[list[Item], list[Item]]:
    """Return the first items of every group, at most so many of each, in their order; and the others."""
    seen: Counter[Group] = Counter()
    kept: list[Item] = []
    left: list[Item] = []
    for item in items:
        name = group(item)
        seen[name] += 1
        (kept if seen[name] <= most(name) else left).append(item)
    return kept, left


def _majority_of_keys(keys: Iterable[Sequence[Hashable]], least: float) -> Hashable | None:
    found = [_majority(votes, least) for votes in keys]
    return _majority([vote for vote in found if vote is not None], least)


def _majority(votes: Sequence[Hashable], least: float) -> Hashable | None:
    """What most say, where these are at least a share of all and no tie."""
    first, second = [*Counter(votes).most_common(2), (None, 0), (None, 0)][:2]
    return first[0] if first[1] > second[1] and first[1] >= least * len(votes) else None


__all__ = ["NextTask", "NextTaskOptions", "NotEnoughFeedback", "TaskReport", "build_task", "rows_of"]

TOO_LONG = "too long"
DUPLICATE = "duplicate"
OVER_IDENTITY = "too many unchanged answers"
OVER_GROUP = "too many of its kind and tags"
OVER_KEY = "too many of its key"

WITHOUT_KEYS = "local"
"""The key of every client of a gateway that has no keys: there is nobody to tell apart."""


def build_task(feedback: Iterable[tuple[Exchange, Feedback]], options: NextTaskOptions) -> NextTask:
    """Make a task of feedback, the oldest first.

    Raises:
        NotEnoughFeedback: fewer rows are left than wanted, none to test on, or too few keys gave them.
    """
    building = _Building(options)
    found = building.filtered(building.candidates(feedback))
    train = [one for one in found if not _is_held_out(one.topic, options.held_out)]
    test = [one for one in found if _is_held_out(one.topic, options.held_out)]
    train, test = (building.of_keys(building.balanced(side)) for side in (train, test))
    report = building.report(train, test)
    _check(train, test, options, report)
    used = {name for one in (*train, *test) for name in building.feedback_ids(one)}
    return NextTask(
        SETS[options.kind](tuple(one.row for one in train), "feedback"),
        SETS[options.kind](tuple(one.row for one in test), "feedback (held out)") if test else None,
        tuple(sorted(used | building.near)),
        report,
    )


def rows_of(feedback: Iterable[tuple[Exchange, Feedback]], kind: str) -> tuple[RowSet[Any], Counter[str]]:
    """Make rows of feedback as it is, without any of a task's guards.

    Args:
        feedback: of whatever keys.
        kind: one of `KINDS`.

    Returns:
        The rows, and how many judgements gave none by the reason.

    Raises:
        InputError: there is no such kind.
    """
    if kind not in KINDS:
        raise InputError(f"kind: must be one of {', '.join(KINDS)}, found {kind!r}")
    found = [judgement_of(exchange, given) for exchange, given in feedback]
    made, nothing = candidates_of([judgement for judgement in found if judgement is not None], kind)
    left = Counter(reason for _, reason in nothing)
    if None in found:
        left[NO_QUESTION] = found.count(None)
    return SETS[kind](tuple(one.row for one in made), "feedback"), left


class _Building:
    """The steps to a task, and a count of what each of them leaves out."""

    def __init__(self, options: NextTaskOptions) -> None:
        self._options = options
        self._seen = 0
        self._left: Counter[str] = Counter()
        self._same: dict[str, set[str]] = defaultdict(set)
        self.near: set[str] = set()  # feedback in rows that nearly are others: it never gives a row of its own

    def candidates(self, feedback: Iterable[tuple[Exchange, Feedback]]) -> list[Candidate]:
        """Make rows of what keys agree on; the same row twice is one, of both."""
        judgements: list[Judgement] = []
        for exchange, given in feedback:
            self._seen += 1
            judgement = judgement_of(exchange, given)
            if judgement is None:
                self._left[NO_QUESTION] += 1
            else:
                judgements.append(judgement)
        judgements.sort(key=lambda judgement: (judgement.feedback.created, judgement.feedback.id))
        kept, left = agreed(judgements, _verdict, lambda one: one.feedback.key_id, self._options.agreement)
        made, nothing = candidates_of(kept, self._options.kind)
        self._left.update(reason for _, reason in (*left, *nothing))
        for vote in (_direction, _Targets(made)):
            made, divided = agreed(made, vote, lambda one: one.key_id, self._options.agreement)
            self._left.update(reason for _, reason in divided)
        by_id: dict[str, list[Candidate]] = defaultdict(list)
        for one in made:
            by_id[one.row.id].append(one)
        for same in by_id.values():
            self._drop(same[1:], DUPLICATE)
            self._same[same[0].row.id] = _feedback_ids(same)
        return [same[0] for same in by_id.values()]

    def filtered(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Leave out what is too long, what a corrector could learn nothing from, and what is nearly there already."""
        kept: list[Candidate] = []
        for one in candidates:
            reason = TOO_LONG if max(map(len, one.texts)) > self._options.longest else _fault(one, self._options)
            if reason is None:
                kept.append(one)
            else:
                self._drop([one], reason)
        if self._options.kind == "scored":
            return kept
        found = filter_corrections(CorrectionSet(tuple(_as_correction(one) for one in kept)), longest=_ANY_LENGTH)
        different = {row.id for row in found.rows}
        same = [one for one in kept if _as_correction(one).id not in different]
        self._drop(same, DUPLICATE)
        self.near |= _feedback_ids(same)
        return [one for one in kept if _as_correction(one).id in different]

    def balanced(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Bound unchanged answers, and every kind of row with the same tags."""
        share, others = self._options.identity, sum(one.origin != "identity" for one in candidates)
        most = {"identity": int(share / (1 - share) * others + 1e-9)}
        kept, left = cap_per_group(candidates, lambda one: one.origin, lambda origin: most.get(origin, len(candidates)))
        self._drop(left, OVER_IDENTITY)
        groups = Counter(one.group for one in kept)
        mean = len(kept) / max(1, len(groups))
        kept, left = cap_per_group(kept, lambda one: one.group, lambda _: max(1, int(self._options.balance * mean)))
        self._drop(left, OVER_GROUP)
        return kept

    def of_keys(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Bound what comes from one key."""
        keys = Counter(one.key_id for one in candidates)
        if set(keys) <= {WITHOUT_KEYS}:
            return list(candidates)
        most = cap_for_share(keys.values(), self._options.key_share)
        kept, left = cap_per_group(candidates, lambda one: one.key_id, lambda _: most)
        self._drop(left, OVER_KEY)
        return kept

    def report(self, train: Sequence[Candidate], test: Sequence[Candidate]) -> TaskReport:
        """Return what became of all feedback."""
        both = (*train, *test)
        return TaskReport(
            self._seen,
            len(train),
            len(test),
            Counter(one.origin for one in both),
            Counter(one.key_id for one in both),
            self._left,
        )

    def feedback_ids(self, one: Candidate) -> set[str]:
        """Return the ids of all feedback that gave this very row."""
        return self._same[one.row.id]

    def _drop(self, candidates: Iterable[Candidate], reason: str) -> None:
        for one in candidates:
            self._left[reason] += len(one.judgements)


def _feedback_ids(candidates: Iterable[Candidate]) -> set[str]:
    return {judgement.feedback.id for one in candidates for judgement in one.judgements}


_ANY_LENGTH = 1 << 62  # lengths are checked for every kind of row before


def _verdict(judgement: Judgement) -> tuple[Hashable, bool] | None:
    """Whether the answer that the client got is good."""
    subject = (judgement.topic, folded(judgement.exchange.returned))
    return None if judgement.good is None else (subject, judgement.good)


def _direction(one: Candidate) -> tuple[Hashable, bool] | None:
    """Which of two answers is the better one; an edit of one into the other may meet one the other way round."""
    if one.origin in ("identity", "group"):
        return None
    row = _as_correction(one)
    better, worse = folded(row.correction), folded(row.answer)
    return (one.topic, frozenset((better, worse))), better < worse


class _Targets:
    """What an answer is to become, where several keys say so: edits that differ contradict each other."""

    def __init__(self, made: Sequence[Candidate]) -> None:
        self._keys: dict[Hashable, set[str]] = defaultdict(set)
        for one in made:
            if one.origin != "group":
                self._keys[self._subject(one)].add(one.key_id)

    def __call__(self, one: Candidate) -> tuple[Hashable, str] | None:
        if one.origin == "group" or len(self._keys[self._subject(one)]) < 2:
            return None
        return self._subject(one), folded(_as_correction(one).correction)

    def _subject(self, one: Candidate) -> Hashable:
        return one.topic, folded(_as_correction(one).answer)


def _as_correction(one: Candidate) -> Correction:
    return correction_of(one.row) if isinstance(one.row, Preference) else one.row  # type: ignore[return-value]


def _fault(one: Candidate, options: NextTaskOptions) -> str | None:
    """What a filter of corrections finds wrong with a row alone."""
    if options.kind == "scored":
        return None
    found = filter_corrections(CorrectionSet((_as_correction(one),)), longest=_ANY_LENGTH)
    return next(iter(found.dropped), None)


def _is_held_out(topic: str, share: float) -> bool:
    """Tell by the question alone: it is on the same side in every task, whoever asks it."""
    digest = int.from_bytes(hashlib.sha256(topic.encode()).digest()[:8], "big")
    return digest < share * (1 << 64)


def _check(train: Sequence[Candidate], test: Sequence[Candidate], options: NextTaskOptions, report: TaskReport) -> None:
    keys = math.ceil(1 / options.key_share - 1e-9)
    advice = f"wait for more, or ask for less; {report.one_line()}"
    if report.left_out.get(OVER_KEY) and not train:
        advice = (
            f"with key_share {options.key_share:g} at least {keys} keys must have given some: "
            f"raise it (1 trusts every key) or wait for others; {report.one_line()}"
        )
    if len(train) < options.minimum:
        raise NotEnoughFeedback(
            f"feedback not learned yet makes {len(train)} {options.kind}, and {options.minimum} are wanted: {advice}",
            report,
        )
    if options.held_out and not test:
        raise NotEnoughFeedback(
            f"feedback not learned yet makes no {options.kind} to test on (held_out {options.held_out:g}): {advice}",
            report,
        )
