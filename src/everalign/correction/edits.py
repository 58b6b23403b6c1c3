"""Word diffs, and how much of an answer a correction keeps."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.text import Text

# Words, and signs one by one; where a script puts no spaces between words, its letters one by one.
_ONE_BY_ONE = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = rf"[{_ONE_BY_ONE}]|[^\W{_ONE_BY_ONE}]+|[^\w\s]"
_WORDS, _PIECES = re.compile(_WORD), re.compile(rf"\s+|{_WORD}")


def words(text: str) -> list[str]:
    """Return a text's words and signs, in whose number edits and lengths are told."""
    return _WORDS.findall(text)


def pieces(text: str) -> list[str]:
    """Return a text's words and signs with the white space between them; joined, they are the text."""
    return _PIECES.findall(text)


def edit_ratio(answer: Sequence[Hashable], correction: Sequence[Hashable]) -> float:
    """Return the tokens that have to be put in, taken out or replaced, per token of the answer (Levenshtein).

    0 for a copy; above 1 where the correction is much longer than the answer. The paper's D (Ji et al., NeurIPS 2024,
    section 3.4).
    """
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(answer, correction) / max(1, len(answer))


def edit_share(answer: Sequence[Hashable], correction: Sequence[Hashable]) -> float:
    """Return the tokens that have to be put in, taken out or replaced, per token of the longer one, from 0 to 1.

    Unlike `edit_ratio`, which has no bound: a single correction that goes on and on does not outweigh all others.
    """
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_distance(answer, correction)


def kept_share(answer: Sequence[Hashable], correction: Sequence[Hashable]) -> float:
    """Return the share of the answer's tokens that the correction has in the same order, from 0 to 1.

    The longest common subsequence; 1 for an answer of no tokens.
    """
    from rapidfuzz.distance import LCSseq

    return LCSseq.similarity(answer, correction) / len(answer) if answer else 1.0


Kind = Literal["same", "removed", "added"]

_STYLES = {"same": "", "removed": "red strike", "added": "green"}
_MARKS = {"same": ("", ""), "removed": ("[-", "-]"), "added": ("{+", "+}")}


_PHRASES = 2_000
"""Pieces of both texts together in which whole phrases are looked for; with more, difflib may take minutes."""

_PRODUCT = 10**8
"""Pieces of the one text times those of the other that are compared at all: about 0.03 seconds."""


@dataclass(frozen=True)
class Segment:
    """A stretch of text that both texts have, or that was removed from the first or added by the second."""

    kind: Kind
    text: str


def word_diff(before: str, after: str) -> tuple[Segment, ...]:
    """Return the segments of two texts in reading order; of a change, what was removed comes first.

    All but the added ones joined are `before`, all but the removed ones `after`. No segment is empty. White space
    between two changes belongs to them, and so does a single word that is shorter than either: a phrase that is
    replaced is one change.
    """
    steps = _compared(before, after)
    segments: list[Segment] = []
    removed: list[str] = []
    added: list[str] = []
    for place, step in enumerate(steps):
        if step.is_same and not _is_bridge(steps, place):
            segments += [*_change(removed, added), Segment("same", step.before)]
            removed, added = [], []
        else:
            removed.append(step.before)
            added.append(step.after)
    return (*segments, *_change(removed, added))


def diff_html(segments: Iterable[Segment]) -> Markup:
    """Return HTML with removed text in `<del>` and added text in `<ins>`, all of it escaped.

    White space stands as it is: the element around it wants `white-space: pre-wrap`.
    """
    from markupsafe import Markup, escape

    tags = {"same": Markup("{}"), "removed": Markup("<del>{}</del>"), "added": Markup("<ins>{}</ins>")}
    return Markup("").join(tags[segment.kind].format(escape(segment.text)) for segment in segments)


def diff_text(segments: Iterable[Segment], *, marks: bool = False) -> Text:
    """Return text for a terminal: removed text red and struck through, added text green.

    Args:
        segments: of a `word_diff`.
        marks: write [-removed-] and {+added+} instead, as `git diff --word-diff` does, where there are no colours.
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
    """Return what both texts have and what they do not, in turns: by words if these are not too many, else by lines."""
    whole = _matched(pieces(before), pieces(after))
    if whole is not None:
        return whole
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    # Where even lines are too many, all between the first and the last change is one.
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
    """Compare pieces, or lines: few of them by phrases, more by the fewest edits; None for too many."""
    if len(old) + len(new) <= _PHRASES:
        found: Iterable[Any] = SequenceMatcher(str.isspace, old, new, autojunk=True).get_opcodes()
    elif len(old) * len(new) <= _PRODUCT:
        from rapidfuzz.distance import Levenshtein

        found = Levenshtein.opcodes(old, new)
    else:
        return None
    return [_Step(what == "equal", "".join(old[a:b]), "".join(new[c:d])) for what, a, b, c, d in found]


def _is_bridge(steps: Sequence[_Step], place: int) -> bool:
    """Whether what both texts have at a place is no more than a short word between two larger changes."""
    if not 0 < place < len(steps) - 1:
        return False
    kept = steps[place].before
    least = min(max(len(step.before), len(step.after)) for step in (steps[place - 1], steps[place + 1]))
    return len(words(kept)) <= 1 and len(kept.strip()) < least


def _change(removed: Sequence[str], added: Sequence[str]) -> list[Segment]:
    texts: tuple[tuple[Kind, str], ...] = (("removed", "".join(removed)), ("added", "".join(added)))
    return [Segment(kind, text) for kind, text in texts if text]
