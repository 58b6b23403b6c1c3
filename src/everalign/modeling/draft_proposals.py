"""What a row is going to be, guessed from a text that it resembles: where its last tokens occur, it goes on as that does.

Sources: prompt lookup (Saxena 2023), LLMA (Yang et al., arXiv 2304.04487), CopySpec (Dumitru et al., arXiv 2502.08923).
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

LONGEST = 512
"""Tokens proposed at once, at most."""

_LONGEST_MATCH = 3
# One token alone is looked for this close behind the place that was copied last: further on it means little.
_NEAR = 24
# After so many misses in a row there is a pause, which doubles up to the longest one.
_PATIENCE, _LONGEST_PAUSE = 2, 8
# How often a proposed token is right: what is believed before anything was tried, and how much that counts.
_PRIOR, _PRIOR_COUNT = 0.6, 1.0


class Proposals:
    """Guesses for one row.

    Args:
        draft: tokens that the row resembles.
        prompt: tokens that the row may quote.

    Attributes:
        rate: estimated probability that the next proposed token is right.
    """

    def __init__(self, draft: list[int], prompt: list[int]) -> None:
        self._sources = (draft, prompt)
        self._places: tuple[_Places, ...] | None = None
        # Where the draft goes on, if it is followed; where the proposal under way began, if it is the draft's.
        self._cursor, self._begun = 0, 0
        self._follows = False
        self._hits, self._tries = 0.0, 0.0
        self._misses, self._pause = 0, 0

    @property
    def rate(self) -> float:
        """Estimated from what was proposed lately."""
        return (self._hits + _PRIOR * _PRIOR_COUNT) / (self._tries + _PRIOR_COUNT)

    def propose(self, written: Sequence[int]) -> list[int]:
        """Return what may come behind the tokens written so far, at most `LONGEST` tokens; nothing in a pause."""
        self._begun = -1
        if self._pause:
            self._pause -= 1
            return []
        source, start = self._find(written)
        found = self._sources[source][start : start + LONGEST]
        if source == 0 and found:
            self._begun = start
        return found

    def learn(self, proposed: int, accepted: int) -> None:
        """Take note of how many of the tokens of the last proposal were right; of an empty one too."""
        # One more token was written than accepted: in place of the draft's next one, as long as it is followed.
        if self._begun >= 0:
            self._follows = accepted > 0
            self._cursor = self._begun + accepted
        else:
            self._follows = False
            self._cursor += 1
        if not proposed:
            return
        self._hits = self._hits / 2 + accepted
        self._tries = self._tries / 2 + accepted + (accepted < proposed)
        self._misses = 0 if accepted else self._misses + 1
        if self._misses > _PATIENCE:
            self._pause = min(2 ** (self._misses - _PATIENCE - 1), _LONGEST_PAUSE)

    def _find(self, written: Sequence[int]) -> tuple[int, int]:
        """Return which source goes on in the same way, and from where; the draft's end where nothing does."""
        if self._places is None:
            self._places = tuple(_Places(source) for source in self._sources)
        for length in range(_LONGEST_MATCH, 1, -1):
            for number, places in enumerate(self._places):
                start = places.after(tuple(written[-length:]), self._cursor if number == 0 else 0)
                if start is not None:
                    return number, start
        start = self._places[0].after(tuple(written[-1:]), self._cursor)
        if start is not None and self._cursor < start <= self._cursor + _NEAR:
            return 0, start
        # The token that was just written stands for one of the draft's.
        return 0, self._cursor + 1 if self._follows else len(self._sources[0])


class _Places:
    """Where each run of up to three tokens occurs in a text."""

    def __init__(self, text: list[int]) -> None:
        self._found: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for length in range(1, _LONGEST_MATCH + 1):
            for end in range(length, len(text)):
                self._found[tuple(text[end - length : end])].append(end)

    def after(self, run: tuple[int, ...], place: int) -> int | None:
        """Return the end of its first occurrence that ends behind `place`, else of its last one; never the text's."""
        ends = self._found.get(run)
        if not ends:
            return None
        first = bisect_left(ends, place + 1)
        return ends[first] if first < len(ends) else ends[-1]
