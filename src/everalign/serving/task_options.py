"""What a task made of feedback is to be, and what came of it."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everalign.correction.filters import LONGEST_CORRECTION
from everalign.data.row_set import RowSet
from everalign.errors import EveralignError, InputError
from everalign.serving.judgements import KINDS


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

    def facts(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}

    def summary(self) -> str:
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
