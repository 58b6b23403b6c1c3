"""Guess how a row goes on: as the text that it resembles does behind the place where the row's last tokens stand.

Where a pass has shown that a guess goes wrong, it has also shown what the model expects further on in it. Such tokens
take the place of the guess's, so that differences scattered over a draft are found together and not one by one.

Sources: prompt lookup (Saxena 2023), LLMA (Yang et al., arXiv 2304.04487), CopySpec (Dumitru et al., arXiv 2502.08923),
and for what is expected further on, Jacobi decoding (Santilli et al., arXiv 2305.10427).
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby

LONGEST = 512
"""Tokens proposed at once, at most."""

_LONGEST_MATCH = 3
# One token alone is looked for this close around the place in the draft: further on it means little. Behind an inserted
# token the draft goes on before that place.
_NEAR, _BEFORE = 24, 2
# Where the place is known, runs of so many tokens are looked for no further ahead than this.
_REACH = {3: 24, 2: 8, 1: 4}
# How often a proposed token is right: what is believed before anything was tried, and how much that counts. With each
# miss before it a guess's first token is believed half as likely, down to the last of so many steps.
_PRIOR, _PRIOR_COUNT, _STEPS = 0.6, 1.0, 5
# A guess from elsewhere, or one further on in which most was not expected, is believed as after so many misses more.
_DISCOURAGED = 2
# What was seen of first tokens is forgotten by this share with each one.
_FORGOTTEN = 0.1
# A token that the model expects instead of a guess's further on is believed if it is likelier by so many nats.
_CLEAR = 6.0
# So many differing tokens in a row are differences of their own; more of them are another passage.
_PASSAGE = 3
_UNKNOWN = -1
# What agrees further on was computed behind tokens that are wrong: however much it is, it counts like so many tokens.
_HEARSAY = 12
# Answers stay or change: one that was right for so many tokens will probably stay as it is.
_BELIEVED = 16


class Proposals:
    """Guesses for one row.

    Args:
        draft: tokens that the row resembles.
        prompt: tokens that the row may quote; it may repeat its own as well.

    Attributes:
        rate: estimated probability that a proposed token is right if those before it are.
        first: that of the first one.
    """

    def __init__(self, draft: list[int], prompt: list[int]) -> None:
        self._draft, self._prompt = draft, prompt
        # The draft with tokens that the model expected in it.
        self._mended, self._mending, self._mendings = list(draft), True, 1
        self._places: tuple[_Places, ...] | None = None
        # The last guess: the whole draft at first. Where it begins in the draft; -1 where it is from elsewhere.
        self._guess, self._begun = draft, 0
        # The place in the draft that the last token written stands at, or in place of; whether it stands behind a
        # token that was guessed rightly.
        self._cursor, self._follows = 0, False
        self._hits, self._tries = 0.0, 0.0
        # First tokens of guesses by the misses before them: how many were right, of how many.
        self._chances = [[_PRIOR * 0.5**step * _PRIOR_COUNT, _PRIOR_COUNT] for step in range(_STEPS)]
        self._misses, self._goes_on = 0, True

    @property
    def rate(self) -> float:
        """Estimated from what was proposed lately; 1 where so much was right that the draft is believed."""
        if self._hits == self._tries >= _BELIEVED:
            return 1.0
        return (self._hits + _PRIOR * _PRIOR_COUNT) / (self._tries + _PRIOR_COUNT)

    @property
    def first(self) -> float:
        """Estimated from the first tokens proposed after as many misses; behind a right guess as any other token."""
        right, tried = self._chances[self._step]
        return self.rate if self._goes_on else right / tried

    @property
    def _near(self) -> bool:
        """Whether the guess is of the draft, from the place in it on or nearly so."""
        return self._begun >= 0 and abs(self._begun - self._cursor - 1) <= _REACH[1]

    @property
    def _step(self) -> int:
        return min(self._misses + (0 if self._near else _DISCOURAGED), _STEPS - 1)

    def propose(self, written: Sequence[int]) -> list[int]:
        """Return what may come behind the tokens written so far, at most `LONGEST` tokens.

        Args:
            written: at least one token; those of the last call and the ones written since.
        """
        if self._places is None:
            self._places = (_Places(self._draft), _Places(self._prompt), _Places([]))
        self._places[2].extend(written)
        source, start = self._find(written, self._places)
        drafted = source is self._places[0]
        self._guess = (self._mended if drafted else source.text)[start : start + LONGEST]
        if _UNKNOWN in self._guess:
            self._guess = self._guess[: self._guess.index(_UNKNOWN)]
        self._begun = start if drafted and self._guess else -1
        return self._guess

    def learn(
        self, written: Sequence[int], checked: int, expected: Sequence[int] = (), behind: Sequence[float] = ()
    ) -> None:
        """Compare the last guess, or the draft at first, with what came instead.

        Args:
            written: tokens written since.
            checked: tokens of the guess that a forward pass was spent on. A guess that was not checked is compared
                with the one token that is written anyway: what it would have been worth is learnt for nothing.
            expected: what the model expects in place of each of these, given the guess before it; may end early.
            behind: by how much the guess's token is less likely than each of these, in nats.
        """
        pairs = zip(self._guess, written, strict=False)
        right = next((i for i, (guessed, found) in enumerate(pairs) if guessed != found), None)
        wrong = right is not None
        if right is None:
            right = min(len(self._guess), len(written))
        # A token that is right far from the place may be so by chance; two hardly are.
        follows = self._begun >= 0 and right > (0 if self._near else 1)
        if self._guess:
            self._count(right, wrong, follows)
        self._follows = follows
        self._cursor = self._begun + min(right, len(written) - 1) if follows else self._cursor + len(written)
        if self._begun >= 0:
            self._judge(right, written[right] if wrong else None)
        if self._begun >= 0 and wrong and right < checked:
            self._mend(right, expected[:checked], behind)

    def _count(self, right: int, wrong: bool, follows: bool) -> None:
        """Take into account how much of a guess was right."""
        if not self._goes_on:
            chance = self._chances[self._step]
            chance[:] = [(1 - _FORGOTTEN) * chance[0] + (right > 0), (1 - _FORGOTTEN) * chance[1] + 1]
        if right or self._goes_on:
            # What was before a wrong guess counts half.
            kept, further = (0.5 if wrong else 1.0), right - (not self._goes_on)
            self._hits, self._tries = self._hits * kept + further, self._tries * kept + further + wrong
        else:
            self._hits, self._tries = self._hits / 2, self._tries / 2
        self._misses = 0 if right else self._misses + 1
        self._goes_on = not wrong and (follows or right > 1)

    def _judge(self, right: int, found: int | None) -> None:
        """Count what was taken into the draft and has come out right or wrong; go back for good if much was wrong.

        Args:
            right: tokens of the guess that were right.
            found: the token that came instead of the one behind them.
        """
        places = range(self._begun, self._begun + right)
        self._mendings += sum(self._mended[place] != self._draft[place] for place in places)
        wrong = self._begun + right
        if found is not None and self._mended[wrong] != found == self._draft[wrong]:
            self._mendings -= 2
            if self._mendings < 0:
                self._mended, self._mending = list(self._draft), False

    def _mend(self, wrong: int, expected: Sequence[int], behind: Sequence[float]) -> None:
        """Take what is expected behind the first wrong token of a guess into the draft, if most of it is the guess."""
        differs = [expected[number] != self._guess[number] for number in range(wrong + 1, len(expected))]
        right = differs.count(False)
        if 2 * right < len(differs):
            self._misses += _DISCOURAGED
            return
        if not self._mending:
            return
        self._hits, self._tries = self._hits + min(right, _HEARSAY), self._tries + min(right, _HEARSAY)
        for differing, run in groupby(range(wrong + 1, len(expected)), key=lambda number: differs[number - wrong - 1]):
            places = list(run)
            if not differing:
                continue
            if len(places) > _PASSAGE:
                # A passage of its own: neither the draft's tokens nor what is expected behind them mean anything.
                self._mended[self._begun + places[0] : self._begun + places[-1] + 1] = [_UNKNOWN] * len(places)
            # What is expected just behind a token that is wrong means little: the draft's own is kept there.
            elif places[0] > wrong + 1 and behind[places[0]] >= _CLEAR:
                self._mended[self._begun + places[0]] = expected[places[0]]

    def _find(self, written: Sequence[int], sources: "tuple[_Places, ...]") -> "tuple[_Places, int]":
        """Return which source goes on in the same way, and from where: the draft in its place where nothing does."""
        draft = sources[0]
        if self._follows:
            # The place in the draft is known: the next token stands for the one there, or a few of the draft's are
            # missing, or one was put between.
            for length in range(_LONGEST_MATCH, 0, -1):
                start = draft.after(tuple(written[-length:]), self._cursor - _BEFORE)
                if start is not None and self._cursor - _BEFORE < start <= self._cursor + _REACH[length]:
                    return draft, start
            return draft, self._cursor + 1
        for length in range(_LONGEST_MATCH, 1, -1):
            for source in sources:
                start = source.after(tuple(written[-length:]), self._cursor if source is draft else None)
                if start is not None:
                    return source, start
        start = draft.after(tuple(written[-1:]), self._cursor - _BEFORE)
        if start is not None and self._cursor - _BEFORE < start <= self._cursor + _NEAR:
            return draft, start
        return draft, self._cursor + 1


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
