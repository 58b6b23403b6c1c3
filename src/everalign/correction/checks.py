"""Checks of corrections: guards of what a corrector writes, the approver, and filters of what one learns from.

A correction that fails a guard, or is not approved, is replaced by the answer. Filters leave out rows that teach a
corrector nothing or something wrong, and count the reasons; a correction that equals its answer stays: it teaches a
corrector to leave good answers alone.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from everalign.correction.templates import DEFAULT_TEMPLATE, Question, Template, get_template, question_text
from everalign.data.messages import message_text
from everalign.data.records import Correction, CorrectionSet
from everalign.errors import InputError
from everalign.text import folded

# A line that may open or close a fenced block of code.
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)")
_URL = re.compile(r"https?://[^\s<>\"'`)\]}]+")
# Punctuation after an address that ends the sentence, not the address.
_AFTER_URL = ".,;:!?"
# Shorter lines may well stand twice in a row: list items, closing brackets.
_REPEATED_LINE = 20


# ---- guards and the approver ----


class Approver(Protocol):
    """Has the last word on corrections; see `everalign.evaluation.scoring.ScorerApprover`."""

    @property
    def fingerprint(self) -> str:
        """Digest of everything that approval depends on."""
        ...

    def approve(self, questions: Sequence[Question], answers: Sequence[str], corrections: Sequence[str]) -> list[bool]:
        """Say of each of N corrections, all of which change their answer, whether it may be returned."""
        ...


@dataclass(frozen=True)
class Guards:
    """Conditions on a correction; the name of the guard that rejects it is recorded as the reason.

    Args:
        unfinished: it ends before the length limit.
        empty: it is not empty.
        echo: it contains no mark of the template that the answer does not contain.
        growth: it has at most this many times the answer's characters; None for no limit.
        growth_characters: characters it may always add, whatever `growth` says: the correction of a short refusal is
            long.
        code: it contains the answer's fenced code blocks, character by character.
        url: it contains the answer's addresses.
        repeat: it is not the question again, and no line of 20 or more characters stands twice in a row, unless the
            answer is like that.

    Raises:
        InputError: `growth` or `growth_characters` is out of its range.
    """

    unfinished: bool = True
    empty: bool = True
    echo: bool = True
    growth: float | None = 4.0
    growth_characters: int = 2000
    code: bool = True
    url: bool = True
    repeat: bool = True

    def __post_init__(self) -> None:
        if self.growth is not None and not (math.isfinite(self.growth) and self.growth >= 1):
            raise InputError(f"growth: must be at least 1, or None to allow any, found {self.growth}")
        if self.growth_characters < 0:
            raise InputError(f"growth characters: must be at least 0, found {self.growth_characters}")

    @property
    def any(self) -> bool:
        """Whether any guard is on."""
        return self.growth is not None or any(
            (self.unfinished, self.empty, self.echo, self.code, self.url, self.repeat)
        )

    def first_violation(
        self, answer: str, correction: str, finished: bool, template: Template, question: Question = ""
    ) -> str | None:
        """Return the name of the first guard that rejects a correction, None if all accept it.

        Args:
            answer: the original.
            correction: what the corrector wrote.
            finished: whether it ended before the token limit.
            template: the corrector's.
            question: which a correction may not merely repeat.
        """
        before, after = len(answer), len(correction)
        allowed = None if self.growth is None else max(self.growth * before, before + self.growth_characters)
        violations = {
            "unfinished": self.unfinished and not finished,
            "empty": self.empty and not correction.strip(),
            "echo": self.echo and not {*template.marks_in(correction)} <= {*template.marks_in(answer)},
            "growth": allowed is not None and after > allowed,
            "code": self.code and not _code_blocks(answer) <= _code_blocks(correction),
            "url": self.url and not _urls(answer) <= _urls(correction),
            "repeat": self.repeat and _repeats(correction, question) and not _repeats(answer, question),
        }
        return next((name for name, violated in violations.items() if violated), None)


NO_GUARDS = Guards(unfinished=False, empty=False, echo=False, growth=None, code=False, url=False, repeat=False)
"""Accepts every correction."""


def fence_after(line: str, fence: str) -> str:
    """Return the fence of the code block that is open after a line; empty for none.

    As in CommonMark, the closing fence repeats the opening one's character, is at least as long, and has nothing
    after it; the line that opens a block of backticks contains no others.

    Args:
        line: without its line break.
        fence: of the block that is open before the line; empty for none.
    """
    match = _FENCE.fullmatch(line.rstrip())
    if match is None:
        return fence
    if fence:
        return "" if match[1].startswith(fence) and not match[2] else fence
    return "" if match[1][0] == "`" and "`" in match[2] else match[1]


def _code_blocks(text: str) -> set[str]:
    """Return a text's fenced code blocks, in one pass over its lines; a block that is never closed is none."""
    blocks: set[str] = set()
    fence, block = "", [""]
    for line in text.split("\n"):
        before, fence = fence, fence_after(line, fence)
        if before:
            block.append(line)
            if not fence:
                blocks.add("\n".join(block).strip())
        elif fence:
            block = [line]
    return blocks


def _urls(text: str) -> set[str]:
    return {url.rstrip(_AFTER_URL) for url in _URL.findall(text)}


def _repeats(text: str, question: Question) -> bool:
    """Whether a text is its question, or has a long line twice in a row."""
    asked = question if isinstance(question, str) else message_text(question[-1])
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return text.split() == asked.split() or any(
        len(line) >= _REPEATED_LINE and line == after for line, after in pairwise(lines)
    )


# ---- filters ----


LONGEST_CORRECTION = 16_384
NEAR = 0.9

REASONS = ("empty", "too long", "template echo", "refusal of the task", "duplicate", "near-duplicate")

_SHINGLE = 5  # characters
# A correction that talks about editing, near its beginning. A refusal to answer the question itself is a correction
# like any other.
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
    """The rows that a filter kept, and how many it left out.

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

    * empty: no letter, digit or symbol.
    * too long: more than `longest` characters.
    * template echo: the correction contains a mark of the template.
    * refusal of the task: it says that it will not edit, or that there was nothing to edit.
    * duplicate: question, answer and correction are those of an earlier row except for case, punctuation and white
      space.
    * near-duplicate: the question is that of an earlier row that was kept, and the five-character shingles of answer
      and correction have a Jaccard index of at least `near` with that row's.

    Args:
        rows: the corrections.
        template: whose marks a correction must not contain; the default template when None.
        longest: most characters of a correction.
        near: similarity from which a row is a near-duplicate; 1 leaves out only rows with the same shingles.

    Raises:
        InputError: `longest` is below 1, or `near` is not above 0 and at most 1.
    """
    if longest < 1:
        raise InputError(f"longest: must be at least 1 character, found {longest}")
    if not 0 < near <= 1:
        raise InputError(f"near: must be above 0 and at most 1, found {near}")
    template = template or get_template(DEFAULT_TEMPLATE)
    reasons = [_fault(row, template, longest) for row in rows]
    texts = [(folded(question_text(row.question)), folded(row.answer), folded(row.correction)) for row in rows]
    seen: set[tuple[str, str, str]] = set()
    by_question: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(texts):
        if reasons[i] is None and row in seen:
            reasons[i] = "duplicate"
        elif reasons[i] is None:
            seen.add(row)
            by_question[row[0]].append(i)
    for group in by_question.values():
        if len(group) > 1:
            for place in near_duplicates([_shingles(*texts[i][1:]) for i in group], near):
                reasons[group[place]] = "near-duplicate"
    kept = tuple(row for row, reason in zip(rows, reasons, strict=True) if reason is None)
    return Filtered(replace(rows, items=kept), Counter(reason for reason in reasons if reason is not None))


def _fault(row: Correction, template: Template, longest: int) -> str | None:
    """Return why a row is left out whatever the others are."""
    if not any(unicodedata.category(char)[0] in "LNS" for char in row.correction):
        return "empty"
    if len(row.correction) > longest:
        return "too long"
    if template.marks_in(row.correction):
        return "template echo"
    if not row.is_identity and _REFUSAL.search(row.correction[:_OPENING]):
        return "refusal of the task"
    return None


def _shingles(answer: str, correction: str) -> frozenset[str]:
    """Return the character shingles of both texts; the same shingle counts apart in answer and correction."""
    return frozenset(
        f"{part}{text[i : i + _SHINGLE]}"
        for part, text in enumerate((answer, correction))
        for i in range(max(1, len(text) - _SHINGLE + 1))
    )


def near_duplicates(sets: Sequence[frozenset[str]], near: float) -> Iterator[int]:
    """Yield the indices of sets whose Jaccard index with an earlier set that is not yielded is at least `near`.

    Prefix filtering: in any order of all members, two such sets share one of the first (1 - near)·size + 1 members of
    each. With the rarest members first, few sets have to be compared.
    """
    counts = Counter(member for members in sets for member in members)
    index: dict[str, list[int]] = defaultdict(list)
    for i, members in enumerate(sets):
        ordered = sorted(members, key=lambda member: (counts[member], member))
        # Rounding of the product must not cost a member.
        prefix = ordered[: int((1 - near) * len(ordered) + 1e-9) + 1]
        candidates = {j for member in prefix for j in index[member]}
        if any(jaccard(members, sets[j]) >= near for j in candidates):
            yield i
            continue
        for member in prefix:
            index[member].append(i)


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the Jaccard index of two sets, of which one is not empty."""
    common = len(first & second)
    return common / (len(first) + len(second) - common)
