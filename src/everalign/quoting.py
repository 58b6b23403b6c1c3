"""Prompts and answers as data for a model that is asked about them.

They stand between marks that their own text cannot hold: a "<" that could begin or end a mark is shown as a sign that
looks like it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from everalign.data.messages import message_text

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
