"""Which corrections are worth learning from: what is left out, for which reason, and how often.

A correction that equals its answer stays: it teaches a corrector to leave good answers alone.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from everalign.correction.templates import DEFAULT_TEMPLATE, Template, get_template, question_text
from everalign.data.records import Correction, CorrectionSet
from everalign.errors import InputError
from everalign.text import folded as folded_text

LONGEST_CORRECTION = 16_384
NEAR = 0.9

REASONS = ("empty", "too long", "template echo", "refusal of the task", "duplicate", "near-duplicate")

_SHINGLE = 5
# An editor who speaks of the editing. A refusal to answer the question itself is a correction like any other.
_OPENING = 240
_EDITING = r"(?:edit|correct|rewrit|revis|improv|modify|modif|rephras)\w*"
_EDITED = r"(?:question[ -–]answer pair|answer|response|text|passage|content)"
_WORDS = r"(?:[\w’']+\s+){0,6}?"
_REFUSALS = (
    rf"(?:cannot|can['’]t|can not|unable to|won['’]t|not able to)\s+{_WORDS}{_EDITING}\s+{_WORDS}{_EDITED}",
    r"\bno (?:original )?(?:question|answer|response|text) (?:was|is|has been) (?:given|provided|supplied)",
    rf"\bplease (?:provide|share|give|supply)\s+{_WORDS}{_EDITED}[^.]*\b{_EDITING}",
)
_REFUSAL = re.compile("|".join(_REFUSALS), re.IGNORECASE)


@dataclass(frozen=True)
class Filtered:
    """What a filter kept, and what it left out.

    Args:
        rows: the kept rows in their order.
        dropped: how many rows were left out for each of `REASONS`; a row counts for the first that applies.
    """

    rows: CorrectionSet
    dropped: Counter[str]

    def one_line(self) -> str:
        """One line of text for a log."""
        reasons = ", ".join(f"{self.dropped[reason]} {reason}" for reason in REASONS if self.dropped[reason])
        return f"{len(self.rows)} corrections kept, {self.dropped.total()} left out{f' ({reasons})' if reasons else ''}"


def filter_corrections(
    rows: CorrectionSet,
    *,
    template: Template | None = None,
    longest: int = LONGEST_CORRECTION,
    near: float = NEAR,
) -> Filtered:
    """Leave out corrections that teach a corrector nothing or something wrong.

    empty: not one letter, digit or symbol. too long: more than `longest` characters. template echo: the correction has
    a mark of the template. refusal of the task: it says that it will not edit, or that there was nothing to edit.
    duplicate: question, answer and correction are those of an earlier row but for case, punctuation and white space.
    near-duplicate: the question is, and answer and correction together share at least `near` of their pieces of five
    characters (Jaccard's index) with one earlier row that was kept.

    Args:
        rows: the corrections.
        template: whose marks a correction must not have; the default one when None.
        longest: most characters of a correction.
        near: from what similarity on, above 0, a row is a near-duplicate; 1 leaves these out only where all pieces are
            the same.

    Raises:
        InputError: `longest` is below 1, or `near` is not above 0 and at most 1.
    """
    if longest < 1:
        raise InputError(f"longest: must be at least 1 character, found {longest}")
    if not 0 < near <= 1:
        raise InputError(f"near: must be above 0 and at most 1, found {near}")
    marks = get_template(DEFAULT_TEMPLATE) if template is None else template
    reasons = [_fault(row, marks, longest) for row in rows]
    folded = [_folded_row(row) for row in rows]
    _mark_duplicates(folded, reasons)
    _mark_near_duplicates(folded, reasons, near)
    kept = tuple(row for row, reason in zip(rows, reasons, strict=True) if reason is None)
    return Filtered(replace(rows, items=kept), Counter(reason for reason in reasons if reason is not None))


def _fault(row: Correction, template: Template, longest: int) -> str | None:
    """Say what is wrong with a row alone."""
    if not any(unicodedata.category(char)[0] in "LNS" for char in row.correction):
        return "empty"
    if len(row.correction) > longest:
        return "too long"
    if template.marks_in(row.correction):
        return "template echo"
    if not row.is_identity and _REFUSAL.search(row.correction[:_OPENING]):
        return "refusal of the task"
    return None


_Folded = tuple[str, str, str]


def _folded_row(row: Correction) -> _Folded:
    return folded_text(question_text(row.question)), folded_text(row.answer), folded_text(row.correction)


def _mark_duplicates(folded: Sequence[_Folded], reasons: list[str | None]) -> None:
    seen: set[_Folded] = set()
    for i, row in enumerate(folded):
        if reasons[i] is None and row in seen:
            reasons[i] = "duplicate"
        seen |= {row} if reasons[i] is None else set()


def _mark_near_duplicates(folded: Sequence[_Folded], reasons: list[str | None], near: float) -> None:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, (question, _, _) in enumerate(folded):
        if reasons[i] is None:
            groups[question].append(i)
    for group in groups.values():
        if len(group) > 1:
            for place in _near_duplicates([_shingles(folded[i]) for i in group], near):
                reasons[group[place]] = "near-duplicate"


def _shingles(row: _Folded) -> frozenset[str]:
    """Return all pieces of answer and correction, those of the one told apart from those of the other."""
    return frozenset(
        f"{part}{text[i : i + _SHINGLE]}"
        for part, text in enumerate(row[1:])
        for i in range(max(1, len(text) - _SHINGLE + 1))
    )


def _near_duplicates(sets: Sequence[frozenset[str]], near: float) -> Iterator[int]:
    """Yield the places of sets that are near an earlier one which is not yielded itself.

    Two sets with Jaccard's index of at least `near` share one of the first (1 - near)·size + 1 members of each, in
    whatever order of all members; with the rarest first, few sets have to be compared.
    """
    counts = Counter(member for members in sets for member in members)
    index: dict[str, list[int]] = defaultdict(list)
    for i, members in enumerate(sets):
        ordered = sorted(members, key=lambda member: (counts[member], member))
        # The rounding error of the product must not cost a member.
        first = ordered[: int((1 - near) * len(ordered) + 1e-9) + 1]
        candidates = {j for member in first for j in index[member]}
        if any(_jaccard(members, sets[j]) >= near for j in candidates):
            yield i
            continue
        for member in first:
            index[member].append(i)


def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    common = len(first & second)
    return common / (len(first) + len(second) - common)
