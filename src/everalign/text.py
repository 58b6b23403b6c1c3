"""Text normalisation, and quoting of untrusted text inside a model's prompt."""

import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from everalign.data.messages import message_text

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


Quoted = str | Sequence[Mapping[str, Any]]

_MARKS = r"\s*(?:/\s*)?(?:prompt|message|answer)\b"
_MARK = re.compile(rf"<(?={_MARKS})", re.IGNORECASE)
_SHOWN = re.compile(rf"‹(?={_MARKS})", re.IGNORECASE)
_SAFE = "‹"


def quoted(prompt: Quoted, answer: str) -> str:
    """Return a prompt (text, or chat messages) between marks, and its answer between others."""
    return f"<prompt>\n{shown_prompt(prompt)}\n</prompt>\n\n<answer>\n{shown(answer)}\n</answer>"


def shown_prompt(prompt: Quoted) -> str:
    """Return a prompt as `quoted` shows it, without its marks."""
    return shown(prompt) if isinstance(prompt, str) else "\n".join(_turn(message) for message in prompt)


def shown(text: str) -> str:
    """Return a text as `quoted` shows it."""
    return _MARK.sub(_SAFE, text)


def as_written(text: str, original: str) -> str:
    """Return what a model wrote of a text that `quoted` showed it, with the signs that the original has."""
    return text if _SHOWN.search(original) else _SHOWN.sub("<", text)


def _turn(message: Mapping[str, Any]) -> str:
    return f'<message role="{message["role"]}">\n{shown(message_text(message))}\n</message>'
