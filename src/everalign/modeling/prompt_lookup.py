"""Prompt lookup: guess how a row goes on from the draft that it resembles, its prompt, and what it wrote before.

Sources: prompt lookup decoding (Saxena 2023), LLMA (Yang et al., arXiv 2304.04487).
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

MAX_GUESS = 512
"""Tokens guessed at once, at most."""

# The last tokens written are looked for near the place in the draft where the row stands: three of them at most so many
# tokens ahead, two or one of them less far, where they mean less; and a little behind it, for inserted tokens.
_REACH, _BACK = {3: 24, 2: 8, 1: 4}, 2
# How often a guessed token is right before any was checked, and how many checked ones this weighs as much as.
_PRIOR, _PRIOR_WEIGHT = 0.6, 1.0
# By what factor the first token of a guess is less likely after each miss in a row.
_AFTER_A_MISS = 0.8
# A draft that was right for so many tokens, and never wrong, will probably stay as it is.
_CERTAIN = 16
_SEPARATOR = -1


class PromptLookup:
    """Guesses for one row.

    Args:
        draft: tokens that the row resembles.
        prompt: tokens that the row may quote.
    """

    def __init__(self, draft: list[int], prompt: list[int]) -> None:
        # Everything that may be copied, one text after the other, and where each run of up to three tokens ends in it.
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._draft, self._prompt = draft, prompt
        # Where the draft goes on, if the row does as it does, and whether the row's last token was in its place there.
        self._place, self._follows = 0, False
        self._guess, self._start = draft, 0  # the last guess, and where in the text it begins
        self._right, self._tried, self._misses = 0.0, 0.0, 0

    @property
    def rate(self) -> float:
        """Estimated probability that a guessed token is right if those before it are."""
        if self._right == self._tried >= _CERTAIN:
            return 1.0
        return (self._right + _PRIOR * _PRIOR_WEIGHT) / (self._tried + _PRIOR_WEIGHT)

    @property
    def first(self) -> float:
        """Estimated probability that the first token of a guess is right: lower after each miss in a row."""
        return self.rate * _AFTER_A_MISS**self._misses

    def propose(self, written: Sequence[int]) -> list[int]:
        """Return what may follow the tokens written so far, at most `MAX_GUESS` tokens.

        Args:
            written: at least one token; those of the last call and the ones written since.
        """
        if not self._text:
            self._extend([*self._draft, _SEPARATOR, *self._prompt])
        behind = len(self._draft) + 1 + len(self._prompt)
        self._extend(written[len(self._text) - behind :])
        self._start = self._find(written)
        self._guess = self._text[self._start : self._start + MAX_GUESS]
        if _SEPARATOR in self._guess:
            self._guess = self._guess[: self._guess.index(_SEPARATOR)]
        return self._guess

    def update(self, written: Sequence[int]) -> None:
        """Compare the last guess, or the draft at first, with the tokens written since, checked or not."""
        pairs = zip(self._guess, written, strict=False)
        compared = min(len(self._guess), len(written))
        right = next((i for i, (guessed, found) in enumerate(pairs) if guessed != found), compared)
        drafted = self._start < len(self._draft)
        if self._guess:
            # What was before a wrong guess counts half.
            kept = 0.5 if right < compared else 1.0
            self._right, self._tried = self._right * kept + right, self._tried * kept + right + (right < compared)
            self._misses = 0 if right else self._misses + 1
        self._follows = drafted and right > 0
        # A token that differs takes the place of the draft's.
        self._place = self._start + len(written) if self._follows else self._place + len(written)

    def _find(self, written: Sequence[int]) -> int:
        """Return where in the text the row's last tokens stand: near its place in the draft, else anywhere."""
        runs = {length: self._ends.get(tuple(written[-length:]), []) for length in _REACH}
        for length, reach in _REACH.items():
            ends = runs[length]
            near = bisect_right(ends, self._place - 1 - _BACK)
            if near < len(ends) and ends[near] < min(self._place + reach, len(self._draft)):
                return ends[near]
        if not self._follows:
            for length in (3, 2):
                if runs[length]:
                    return runs[length][-1]
        return min(self._place, len(self._draft))

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # Runs are entered once something follows them.
            end = len(self._text)
            for length in range(1, min(3, end) + 1):
                run = tuple(self._text[end - length :])
                if _SEPARATOR not in run:
                    self._ends[run].append(end)
            self._text.append(token)
