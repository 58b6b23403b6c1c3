"""Edit distances between an answer and its correction, and word diffs as text and HTML."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.text import Text

# A word or a single punctuation mark; a single character of scripts that put no spaces between words.
_ONE_BY_ONE = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = rf"[{_ONE_BY_ONE}]|[^\W{_ONE_BY_ONE}]+|[^\w\s]"
_WORDS, _PIECES = re.compile(_WORD), re.compile(rf"\s+|{_WORD}")


def words(text: str) -> list[str]:
    """Return a text's words and punctuation marks, the unit of edits and lengths."""
    return _WORDS.findall(text)


def pieces(text: str) -> list[str]:
    """Return a text's words, punctuation marks and white space; joined, they are the text."""
    return _PIECES.findall(text)


def edit_ratio(answer: Sequence[Hashable], correction: Sequence[Hashable]) -> float:
    """Return the Levenshtein distance in tokens, relative to the answer's length: 0 for a copy, without upper bound.

    The D of Ji et al. (NeurIPS 2024, section 3.4).
    """
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(answer, correction) / max(1, len(answer))


def edit_share(answer: Sequence[Hashable], correction: Sequence[Hashable]) -> float:
    """Return the Levenshtein distance in tokens, relative to the longer sequence: from 0 to 1.

    In a mean, a single correction that never ends does not outweigh all others, as it would with `edit_ratio`.
    """
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_distance(answer, correction)


def kept_share(answer: Sequence[Hashable], correction: Sequence[Hashable]) -> float:
    """Return the longest common subsequence, relative to the answer's length: from 0 to 1; 1 for an empty answer."""
    from rapidfuzz.distance import LCSseq

    return LCSseq.similarity(answer, correction) / len(answer) if answer else 1.0


Kind = Literal["same", "removed", "added"]

_STYLES = {"same": "", "removed": "red strike", "added": "green"}
_MARKS = {"same": ("", ""), "removed": ("[-", "-]"), "added": ("{+", "+}")}

# Up to this many pieces of both texts together, difflib finds whole phrases; with more, it may take minutes.
_PHRASES = 2_000
# Up to this product of pieces, the fewest edits are found, in about 0.03 seconds.
_PRODUCT = 10**8


@dataclass(frozen=True)
class Segment:
    """A stretch of text that both texts contain, or that only the first (removed) or the second (added) contains."""

    kind: Kind
    text: str


def word_diff(before: str, after: str) -> tuple[Segment, ...]:
    """Return the segments of two texts in reading order; in a change, the removed text comes first.

    Without the added segments they join to `before`, without the removed ones to `after`. No segment is empty. White
    space between two changes is part of them, as is a single word that is shorter than either, so that a replaced
    phrase is one change.
    """
    steps = _compared(before, after)
    segments: list[Segment] = []
    removed = added = ""
    for place, step in enumerate(steps):
        changes = not step.is_same
        if step.is_same and 0 < place < len(steps) - 1:
            # A single word between two changes that is shorter than either.
            least = min(max(len(near.before), len(near.after)) for near in (steps[place - 1], steps[place + 1]))
            changes = len(words(step.before)) <= 1 and len(step.before.strip()) < least
        if changes:
            removed, added = removed + step.before, added + step.after
            continue
        segments += [Segment("removed", removed), Segment("added", added), Segment("same", step.before)]
        removed = added = ""
    segments += [Segment("removed", removed), Segment("added", added)]
    return tuple(segment for segment in segments if segment.text)


def diff_html(segments: Iterable[Segment]) -> Markup:
    """Return escaped HTML with removed text in `<del>` and added text in `<ins>`.

    White space is kept: the element around it needs `white-space: pre-wrap`.
    """
    from markupsafe import Markup, escape

    tags = {"same": Markup("{}"), "removed": Markup("<del>{}</del>"), "added": Markup("<ins>{}</ins>")}
    return Markup("").join(tags[segment.kind].format(escape(segment.text)) for segment in segments)


def diff_text(segments: Iterable[Segment], *, marks: bool = False) -> Text:
    """Return text for a terminal: removed text red and struck through, added text green.

    Args:
        segments: of a `word_diff`.
        marks: write [-removed-] and {+added+}, as `git diff --word-diff` does, for terminals without colours.
    """
    from rich.text import Text

    if marks:
        return Text("".join(segment.text.join(_MARKS[segment.kind]) for segment in segments))
    return Text.assemble(*((segment.text, _STYLES[segment.kind]) for segment in segments))


class _Step(NamedTuple):
    is_same: bool
    before: str
    after: str


def _compared(before: str, after: str) -> list[_Step]:
    """Align two texts: by words, or by lines where there are too many words. Equal and changed steps alternate."""
    whole = _matched(pieces(before), pieces(after))
    if whole is not None:
        return whole
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    # Where there are too many lines as well, everything from the first change to the last one is a single change.
    first = common_prefix_length(old, new)
    last = common_prefix_length(old[first:][::-1], new[first:][::-1])
    middle, same = (old[first : len(old) - last], new[first : len(new) - last]), "".join(old[:first])
    changed = _matched(*middle) or [_Step(False, *map("".join, middle))]
    steps: list[_Step] = []
    for step in (_Step(True, same, same), *changed, _Step(True, *["".join(old[len(old) - last :])] * 2)):
        short = not step.is_same and len(step.before) + len(step.after) <= _PHRASES
        for found in (short and _matched(pieces(step.before), pieces(step.after))) or [step]:
            if steps and steps[-1].is_same == found.is_same:
                joined = steps.pop()
                found = _Step(joined.is_same, joined.before + found.before, joined.after + found.after)
            if found.before or found.after:
                steps.append(found)
    return steps


def common_prefix_length(old: Sequence[str], new: Sequence[str]) -> int:
    """Return how many items two sequences (or characters two texts) have in common at the beginning."""
    return next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))


def _matched(old: Sequence[str], new: Sequence[str]) -> list[_Step] | None:
    """Align two sequences: by phrases if they are short, by the fewest edits if longer; None if too long."""
    if len(old) + len(new) <= _PHRASES:
        found: Iterable[Any] = SequenceMatcher(str.isspace, old, new, autojunk=True).get_opcodes()
    elif len(old) * len(new) <= _PRODUCT:
        from rapidfuzz.distance import Levenshtein

        found = Levenshtein.opcodes(old, new)
    else:
        return None
    return [_Step(what == "equal", "".join(old[a:b]), "".join(new[c:d])) for what, a, b, c, d in found]
