"""Guess how a row goes on: as the text that it resembles does behind the place where the row's last tokens stand.

Sources: prompt lookup (Saxena 2023), LLMA (Yang et al., arXiv 2304.04487), CopySpec (Dumitru et al., arXiv 2502.08923).
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

LONGEST = 512
"""Tokens proposed at once, at most."""

_LONGEST_MATCH = 3
# One token alone is looked for this close around the place in the draft: further on it means little. Behind an inserted
# token the draft goes on before that place.
_NEAR, _BEFORE = 24, 2
# After so many misses in a row there is a pause, which doubles up to the longest one.
_PATIENCE, _LONGEST_PAUSE = 1, 16
# How often a proposed token is right: what is believed before anything was tried, and how much that counts.
_PRIOR, _PRIOR_COUNT = 0.6, 1.0


class Proposals:
    """Guesses for one row.

    Args:
        draft: tokens that the row resembles.
        prompt: tokens that the row may quote; it may repeat its own as well.

    Attributes:
        rate: estimated probability that the next proposed token is right.
    """

    def __init__(self, draft: list[int], prompt: list[int]) -> None:
        self._draft, self._prompt = draft, prompt
        self._places: tuple[_Places, ...] | None = None
        # The last guess: the whole draft at first. Where it begins in the draft; -1 where it is from elsewhere.
        self._guess, self._begun = draft, 0
        # The place in the draft that the last token written stands at, or in place of; whether it stands behind a
        # token that was guessed rightly.
        self._cursor, self._follows = 0, False
        self._hits, self._tries = 0.0, 0.0
        self._misses, self._pause = 0, 0

    @property
    def rate(self) -> float:
        """Estimated from what was proposed lately."""
        return (self._hits + _PRIOR * _PRIOR_COUNT) / (self._tries + _PRIOR_COUNT)

    def propose(self, written: Sequence[int]) -> list[int]:
        """Return what may come behind the tokens written so far, at most `LONGEST` tokens; nothing in a pause.

        Args:
            written: at least one token; those of the last call and the ones written since.
        """
        self._guess, self._begun = [], -1
        if self._pause:
            self._pause -= 1
            return []
        if self._places is None:
            self._places = (_Places(self._draft), _Places(self._prompt), _Places([]))
        self._places[2].extend(written)
        source, start = self._find(written, self._places)
        self._guess = source.text[start : start + LONGEST]
        if source is self._places[0] and self._guess:
            self._begun = start
        return self._guess

    def learn(self, written: Sequence[int], checked: int) -> None:
        """Compare the last guess, or the draft at first, with what came instead.

        Args:
            written: tokens written since.
            checked: tokens of the guess that a forward pass was spent on. A guess that was not checked is compared
                with the one token that is written anyway: what it would have been worth is learnt for nothing.
        """
        pairs = zip(self._guess, written, strict=False)
        right = next((i for i, (guessed, found) in enumerate(pairs) if guessed != found), None)
        wrong = right is not None
        if right is None:
            right = min(len(self._guess), len(written))
        self._follows = self._begun >= 0 and right > 0
        self._cursor = self._begun + min(right, len(written) - 1) if self._begun >= 0 else self._cursor + len(written)
        # What was before a wrong guess counts half.
        kept = 0.5 if wrong else 1.0
        self._hits, self._tries = self._hits * kept + right, self._tries * kept + right + wrong
        if checked:
            self._misses = 0 if right else self._misses + 1
            if self._misses > _PATIENCE:
                self._pause = min(2 ** (self._misses - _PATIENCE - 1), _LONGEST_PAUSE)

    def _find(self, written: Sequence[int], sources: "tuple[_Places, ...]") -> "tuple[_Places, int]":
        """Return which source goes on in the same way, and from where; the draft's end where nothing does."""
        draft = sources[0]
        for length in range(_LONGEST_MATCH, 1, -1):
            for source in sources:
                start = source.after(tuple(written[-length:]), self._cursor if source is draft else None)
                if start is not None:
                    return source, start
        start = draft.after(tuple(written[-1:]), self._cursor - _BEFORE)
        if start is not None and self._cursor - _BEFORE < start <= self._cursor + _NEAR:
            return draft, start
        # The token that was just written stands for one of the draft's.
        return draft, self._cursor + 1 if self._follows else len(draft.text)


class _Places:
    """Where each run of up to three tokens occurs in a text."""

    def __init__(self, text: Sequence[int]) -> None:
        self.text: list[int] = []
        self._found: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self.extend(text)

    def extend(self, text: Sequence[int]) -> None:
        """Go on with a text that begins with the present one."""
        first = max(1, len(self.text))
        self.text.extend(text[len(self.text) :])
        # Nothing comes behind the text's own end.
        for end in range(first, len(self.text)):
            for length in range(1, min(_LONGEST_MATCH, end) + 1):
                self._found[tuple(self.text[end - length : end])].append(end)

    def after(self, run: tuple[int, ...], place: int | None) -> int | None:
        """Return the end of its first occurrence that ends behind `place`, else of its last one; never the text's."""
        ends = self._found.get(run)
        if not ends:
            return None
        first = len(ends) if place is None else bisect_left(ends, place + 1)
        return ends[first] if first < len(ends) else ends[-1]
