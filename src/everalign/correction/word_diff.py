"""What was taken out of a text and what was put in, word by word.

    segments = word_diff("Boil them.", "Please boil them.")
    diff_html(segments), diff_text(segments)

White space is kept: both texts can be put together again from the segments. Where a script puts no spaces between
words, its letters are compared one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Literal, NamedTuple

from everalign.correction.edits import pieces, words

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.text import Text

Kind = Literal["same", "removed", "added"]

_STYLES = {"same": "", "removed": "red strike", "added": "green"}
_MARKS = {"same": ("", ""), "removed": ("[-", "-]"), "added": ("{+", "+}")}


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
    old, new = pieces(before), pieces(after)
    # Long texts have common words everywhere: difflib begins no match with those, else it would take minutes.
    found = SequenceMatcher(str.isspace, old, new, autojunk=True).get_opcodes()
    steps = [_Step(what == "equal", "".join(old[a:b]), "".join(new[c:d])) for what, a, b, c, d in found]
    segments: list[Segment] = []
    removed = added = ""
    for place, step in enumerate(steps):
        if step.is_same and not _is_bridge(steps, place):
            segments += [*_change(removed, added), Segment("same", step.before)]
            removed = added = ""
        else:
            removed, added = removed + step.before, added + step.after
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


def _is_bridge(steps: Sequence[_Step], place: int) -> bool:
    """Whether what both texts have at a place is no more than a short word between two larger changes."""
    if not 0 < place < len(steps) - 1:
        return False
    kept = steps[place].before
    least = min(max(len(step.before), len(step.after)) for step in (steps[place - 1], steps[place + 1]))
    return len(words(kept)) <= 1 and len(kept.strip()) < least


def _change(removed: str, added: str) -> list[Segment]:
    found: list[Segment] = []
    if removed:
        found.append(Segment("removed", removed))
    if added:
        found.append(Segment("added", added))
    return found
