"""Correct an answer while it is being written: where its sentences end, and what of their correction may leave.

A corrector reads the whole answer before it writes, so the correction of a beginning is in general not the beginning of
the correction. What leaves early is therefore fixed: it becomes the beginning of each further correction, which the
corrector only continues. As in simultaneous translation with a forced prefix (such as Liu et al., Interspeech 2020,
arXiv 2005.11185), that trades some quality for time.
"""

import re
from collections.abc import Sequence

from everalign.correction.checks import fence_after
from everalign.correction.edits import Segment, word_diff
from everalign.correction.engines import Begun

LEAST_BYTES = 20
"""A sentence with fewer bytes of UTF-8 is joined to the next: bytes, since dense scripts take more for a character."""

_STOPS, _WIDE_STOPS = ".!?…؟۔।॥։።", "。！？｡"
_CLOSERS = "\"'”’»›)]}*_`」』】）〉》"
_AFTER = re.escape(_CLOSERS)
# From the first stop of several on only, so that a long row of them takes linear time.
_END = re.compile(
    rf"(?<![{_STOPS}{_WIDE_STOPS}])(?:[{_STOPS}]+[{_AFTER}]*(?=\s|$)|[{_WIDE_STOPS}][{_STOPS}{_WIDE_STOPS}{_AFTER}]*)"
)
# What a full stop after it does not end a sentence: one letter, numbers as in lists and dates, `e.g`, `z.B`, `p.m`.
_UNENDED = re.compile(r"[^\W\d_]|\d{1,3}|(?:[^\W\d_]{1,3}\.)+[^\W\d_]{1,3}")
_ABBREVIATIONS = re.compile(
    "al|approx|art|bd|bzw|ca|cf|chap|co|dept|dr|eds?|eg|esp|etc|evtl|figs?|ggf|hr|hrsg|ie|inc|jr|ltd|max|min|mlle|mme|"
    "mrs?|ms|nos?|nr|pp|prof|resp|rev|sec|sr|sra|srta|st|str|tel|usw|vgl|vols?|vs|zzgl",
    re.IGNORECASE,
)
_LONGEST_WORD = 40  # characters before a full stop that are looked at


class SentenceSplitter:
    """Finds where the sentences of a text end while it is being written; in any language, as far as that is possible.

    A sentence ends with a stop (`.`, `!`, `?`, `…`, `。`, ...) and closing quotes or brackets, before white space, and
    with a blank line. It does not end within a fenced block or a span of code, after abbreviations and short numbers,
    or before a small letter; so in doubt two sentences are taken for one. An end is found once what follows it tells.

    Attributes:
        text: the text so far.
        ends: where its sentences end, not counting white space behind them.
    """

    def __init__(self, least_bytes: int = LEAST_BYTES) -> None:
        self.text, self.ends = "", list[int]()
        self._least = least_bytes
        self._line = 0  # where the last line begins
        self._undecided = 0  # before this character of it, every end is found
        self._fence = ""  # of the block of code that the last line stands in
        self._filled = 0  # where the last of the lines before it ends that is not blank

    @property
    def end(self) -> int:
        """Where the last whole sentence ends; 0 for none."""
        return self.ends[-1] if self.ends else 0

    def add(self, piece: str) -> None:
        """Append a piece."""
        searched, self.text = len(self.text), self.text + piece
        while (stop := self.text.find("\n", max(searched, self._line))) >= 0:
            line = self.text[self._line : stop]
            inside, self._fence = self._fence, fence_after(line, self._fence)
            if not (inside or self._fence):
                self._find(stop, is_whole=True)
                if not line.strip():
                    self._end_at(self._filled)
            if line.strip():
                self._filled = self._line + len(line.rstrip())
            self._line = self._undecided = stop + 1
        # A line that begins like a fence may become one.
        begins = self.text[self._line : self._line + _LONGEST_WORD].lstrip()[:1]
        if not self._fence and begins not in ("`", "~"):
            self._find(len(self.text), is_whole=False)

    def _find(self, stop: int, is_whole: bool) -> None:
        """Find ends in the last line, which goes to character `stop`: to its end if it `is_whole`, or so far."""
        for match in _END.finditer(self.text, self._undecided, stop):
            following = self.text[match.end() : stop].lstrip()
            if not following and not is_whole:
                self._undecided = match.start()
                return
            if following[:1].islower() or self.text.count("`", self._line, match.start()) % 2:
                continue
            if match[0].startswith(".") and not match[0].startswith(".."):
                before = self.text[max(self._line, match.start() - _LONGEST_WORD) : match.start()].split()
                word = before[-1].lstrip(_CLOSERS + "([{„“«‹‚‘¿¡#-") if before else ""
                if _UNENDED.fullmatch(word) or _ABBREVIATIONS.fullmatch(word):
                    continue
            self._end_at(match.end())
        self._undecided = stop

    def _end_at(self, end: int) -> None:
        if len(self.text[self.end : end].strip().encode(errors="replace")) >= self._least:
            self.ends.append(end)


class GrowingCorrection:
    """The correction of an answer that is still being written.

        growing.add(piece)
        if (answer := growing.next_answer()) is not None:
            (found,) = corrector.correct_batch([(question, answer)], begun=[growing.begun])
            send(growing.accept(answer, found.text))

    Attributes:
        begun: the text that has left, and how much of the answer it stands for.
    """

    def __init__(self, least_bytes: int = LEAST_BYTES) -> None:
        self.begun = Begun()
        self._splitter = SentenceSplitter(least_bytes)
        self._tried = 0

    @property
    def answer(self) -> str:
        """The answer so far."""
        return self._splitter.text

    def add(self, piece: str) -> None:
        """Append a piece of the answer."""
        self._splitter.add(piece)

    def next_answer(self) -> str | None:
        """Return the answer through its last whole sentence; None if no further sentence ended since the last call."""
        if self._splitter.end <= self._tried:
            return None
        self._tried = self._splitter.end
        return self.answer[: self._tried]

    def accept(self, answer: str, correction: str) -> str:
        """Return the text that may leave now, of a correction of `next_answer` that nothing rejects.

        It has at most as many sentences as the answer so far: a corrector that was taught with whole answers goes on to
        what it expects. Nor has it sentences that are appended to the answer's last words, and may be its closing.
        """
        before, length = self.begun, len(self.begun.text)
        ends = sentence_ends(correction)[: len(sentence_ends(answer))]
        given, further = answer[before.covers :], correction[length : max([length, *ends])]
        if correction[length:].rstrip() == given:
            covers, further = len(answer), given
        else:
            segments = word_diff(given, correction[length:].rstrip())
            if [one.kind for one in segments[-2:]] == ["same", "added"]:
                appended = len(segments[-1].text)
                further = further[: len(correction[length:].rstrip()) - appended].rstrip()
            covers = before.covers + covered(segments, len(further))
        if before.text or further:
            self.begun = Begun(before.text + further, covers)
        return further


def sentence_ends(text: str) -> list[int]:
    """Return where the sentences of a whole text end, short ones among them."""
    splitter = SentenceSplitter(least_bytes=1)
    splitter.add(f"{text}\n\n")
    return splitter.ends


def covered(segments: Sequence[Segment], length: int) -> int:
    """Return how many characters of the first text of a diff the first `length` ones of the second stand for.

    A change counts once it is there as a whole.
    """
    place = reached = removed = 0
    for one in segments:
        if one.kind == "removed":
            removed = len(one.text)
            continue
        if reached + len(one.text) > length:
            inside = one.kind == "same" and length > reached
            return place + (removed + length - reached if inside else 0)
        reached += len(one.text)
        place += removed + (len(one.text) if one.kind == "same" else 0)
        removed = 0
    return place + removed
