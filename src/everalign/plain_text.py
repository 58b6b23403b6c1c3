"""What two ways to write the same have in common: texts without differences that nobody sees or means."""

import re
import sys
import unicodedata
from functools import cache
from itertools import pairwise

_LONGEST_RUN = 30
"""Marks behind a letter that are sorted together, as in Unicode's stream-safe form: no language has more."""


def nfkc(text: str) -> str:
    """Return a text with compatible characters replaced, in time that grows with its length.

    Python's own takes the square of the length of a row of combining marks. Here one of more than 30 is taken apart.
    """
    if text.isascii():
        return text
    cuts = [0, *(found.end() for found in _long_runs().finditer(text)), len(text)]
    parts = (text[a:b] for a, b in pairwise(cuts))
    return "".join(unicodedata.normalize("NFKC", part) for part in parts)


def without_invisible(text: str) -> str:
    """Return a text without control and format characters, but for white space."""
    return text.translate(_invisible())


def folded(text: str) -> str:
    """Return a text without case, punctuation, signs that nobody sees, and differences of white space."""
    plain = without_invisible(nfkc(text)).casefold()
    return " ".join("".join(" " if unicodedata.category(char)[0] == "P" else char for char in plain).split())


def topic_of(question: str) -> str:
    """Return what a question asks, however it is written: without case, unseen signs, spaces and a mark at its end."""
    return " ".join(without_invisible(nfkc(question)).casefold().split()).rstrip(" .?!…。")


@cache
def _invisible() -> dict[int, None]:
    codes = (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Cc", "Cf"))
    return {code: None for code in codes if chr(code) not in "\n\t\r"} | dict.fromkeys(_SHOWN_AS_NOTHING)


# Letters and marks by their category, but shown as nothing: fillers, joiners of graphemes, variants of a sign.
_SHOWN_AS_NOTHING = (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10))


@cache
def _long_runs() -> re.Pattern[str]:
    marks = "".join(
        chr(code)
        for code in range(0x300, 0x1F000)
        if unicodedata.combining(unicodedata.normalize("NFKD", chr(code))[0])
    )
    return re.compile(rf"[{marks}]{{{_LONGEST_RUN}}}(?=[{marks}])")
