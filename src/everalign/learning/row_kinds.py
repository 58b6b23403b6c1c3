"""What a learner is given as a task's rows, and as what they are judged."""

from collections.abc import Callable, Sequence
from typing import Any

from everalign.data.corrections import Correction, CorrectionSet
from everalign.data.prompts import PromptRow, PromptSet
from everalign.data.readers import PreferenceSet
from everalign.data.records import Preference
from everalign.data.row_set import RowSet
from everalign.data.scored import Scored, ScoredSet
from everalign.data.unscored import Unscored, UnscoredSet
from everalign.errors import InputError

Rows = Sequence[Preference] | Sequence[Scored] | Sequence[Unscored] | Sequence[PromptRow] | Sequence[Correction]
AnySet = RowSet[Any]

_SETS: tuple[type[AnySet], ...] = (ScoredSet, UnscoredSet, PromptSet, CorrectionSet)


def as_set(rows: Rows) -> AnySet:
    """Return rows as a set of their kind."""
    if isinstance(rows, RowSet):
        return rows
    kind = next((kind for kind in _SETS if any(isinstance(row, kind.record) for row in rows[:1])), PreferenceSet)
    return kind.of(rows)  # type: ignore[arg-type]  # told by the first


def as_tests(rows: Rows, corrections: bool, announce: Callable[[str], None]) -> AnySet:
    """Return held-out rows as what they are judged as: preferences, or corrections that change anything.

    Of a scored row, the best completion over the worst is a preference.

    Args:
        rows: the rows.
        corrections: whether they are judged as corrections.
        announce: is told how many rows have nothing better and worse in them and are left out.

    Raises:
        InputError: corrections are wanted, and the rows are none.
    """
    found = as_set(rows)
    if corrections and not isinstance(found, CorrectionSet):
        raise InputError(f"{found.source}: held-out rows of a corrector must be corrections (question, answer, ...)")
    if isinstance(found, PreferenceSet):
        return found
    kept = [(row, pair) for row in found if (pair := row.preference()) is not None]
    if len(kept) < len(found):
        left = f"{len(found) - len(kept)} of {len(found)} held-out rows"
        what = "change nothing" if isinstance(found, CorrectionSet) else "have no better and worse completion"
        announce(f"  {found.source}: {left} {what} and are left out")
    if corrections:
        return CorrectionSet(tuple(row for row, _ in kept), found.source, found.skipped)
    return PreferenceSet.of([pair for _, pair in kept], found.source)
