"""Text normalization (Unicode, case, punctuation), and quoting of untrusted text inside a model's prompt."""

import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from everalign.data.messages import message_text

_LONGEST_RUN = 30
"""Combining marks that are sorted together, as in Unicode's stream-safe text format; no language has more."""

# Letters and marks by their category, but invisible: fillers, the grapheme joiner, variation selectors.
_INVISIBLE_LETTERS = (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10))


def nfkc(text: str) -> str:
    """Return a text in Unicode's NFKC form, in linear time.

    Python's own needs quadratic time for a run of combining marks; here runs of more than 30 are split.
    """
    if text.isascii():
        return text
    cuts = [0, *(found.end() for found in _long_runs().finditer(text)), len(text)]
    parts = (text[a:b] for a, b in pairwise(cuts))
    return "".join(unicodedata.normalize("NFKC", part) for part in parts)


def without_invisible(text: str) -> str:
    """Return a text without control and format characters, except white space."""
    return text.translate(_invisible())


def folded(text: str) -> str:
    """Return a text for comparison: without case, punctuation, invisible characters and differences of white space."""
    plain = without_invisible(nfkc(text)).casefold()
    return " ".join("".join(" " if unicodedata.category(char)[0] == "P" else char for char in plain).split())


def topic_of(question: str) -> str:
    """Return a question for comparison: without case, invisible characters, extra spaces and the mark at its end."""
    return " ".join(without_invisible(nfkc(question)).casefold().split()).rstrip(" .?!…。")


@cache
def _invisible() -> dict[int, None]:
    codes = (code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Cc", "Cf"))
    return {code: None for code in codes if chr(code) not in "\n\t\r"} | dict.fromkeys(_INVISIBLE_LETTERS)


@cache
def _long_runs() -> re.Pattern[str]:
    marks = "".join(
        chr(code)
        for code in range(0x300, 0x1F000)
        if unicodedata.combining(unicodedata.normalize("NFKD", chr(code))[0])
    )
    return re.compile(rf"[{marks}]{{{_LONGEST_RUN}}}(?=[{marks}])")


Quoted = str | Sequence[Mapping[str, Any]]

_TAGS = r"\s*(?:/\s*)?(?:prompt|message|answer)\b"
_TAG = re.compile(rf"<(?={_TAGS})", re.IGNORECASE)
_ESCAPED_TAG = re.compile(rf"‹(?={_TAGS})", re.IGNORECASE)


def quoted(prompt: Quoted, answer: str) -> str:
    """Return a prompt (text, or chat messages) and its answer between tags that neither can close."""
    return f"<prompt>\n{shown_prompt(prompt)}\n</prompt>\n\n<answer>\n{shown(answer)}\n</answer>"


def shown_prompt(prompt: Quoted) -> str:
    """Return a prompt as in `quoted`, without the tags around it."""
    if isinstance(prompt, str):
        return shown(prompt)
    return "\n".join(f'<message role="{one["role"]}">\n{shown(message_text(one))}\n</message>' for one in prompt)


def shown(text: str) -> str:
    """Return a text as in `quoted`, with ‹ in place of < in its own tags."""
    return _TAG.sub("‹", text)


def as_written(text: str, original: str) -> str:
    """Undo `shown` in what a model wrote about a text, unless the original text has ‹ itself."""
    return text if _ESCAPED_TAG.search(original) else _ESCAPED_TAG.sub("<", text)
