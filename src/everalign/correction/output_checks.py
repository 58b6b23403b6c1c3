"""When a correction is not to be trusted, so that the original answer is returned instead."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from everalign.correction.templates import Question, Template
from everalign.errors import InputError

# What may begin or end a block of code; matched against one line.
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)")
_URL = re.compile(r"https?://[^\s<>\"'`)\]}]+")
# What ends a sentence is no part of an address in it.
_BEHIND_URL = ".,;:!?"


class Approver(Protocol):
    """Has the last word on corrections, such as `everalign.evaluation.ScorerApprover`."""

    @property
    def fingerprint(self) -> str:
        """Names what the approval depends on."""
        ...

    def approve(self, questions: Sequence[Question], answers: Sequence[str], corrections: Sequence[str]) -> list[bool]:
        """Return, for each of N corrections that differ from their answers, whether it may be returned."""
        ...


@dataclass(frozen=True)
class Guards:
    """What a correction has to be like; each guard's name is the reason that is recorded.

    Args:
        unfinished: it has an end, instead of having been stopped at the length limit.
        empty: it is not empty.
        echo: it has none of the template's marks, unless the answer has them.
        growth: it has at most this many times the answer's characters; None for any number.
        growth_characters: more than `growth` allows is no growth yet up to so many characters above the answer's:
            the correction of a short refusal is long.
        code: it has the answer's fenced code blocks, character by character.
        url: it has the answer's addresses.
    """

    unfinished: bool = True
    empty: bool = True
    echo: bool = True
    growth: float | None = 4.0
    growth_characters: int = 2000
    code: bool = True
    url: bool = True

    def __post_init__(self) -> None:
        if self.growth is not None and not (math.isfinite(self.growth) and self.growth >= 1):
            raise InputError(f"growth: must be at least 1, or None to allow any, found {self.growth}")
        if self.growth_characters < 0:
            raise InputError(f"growth characters: must be at least 0, found {self.growth_characters}")

    @property
    def any(self) -> bool:
        """Whether any guard is on."""
        return self.growth is not None or any((self.unfinished, self.empty, self.echo, self.code, self.url))

    def objection(self, answer: str, correction: str, finished: bool, template: Template) -> str | None:
        """Return the name of the first guard that refuses a correction, None if none does.

        Args:
            answer: the original.
            correction: what the corrector wrote.
            finished: whether it ended by itself.
            template: the corrector's.
        """
        refused = {
            "unfinished": self.unfinished and not finished,
            "empty": self.empty and not correction.strip(),
            "echo": self.echo and not {*template.marks_in(correction)} <= {*template.marks_in(answer)},
            "growth": self._has_grown(len(answer), len(correction)),
            "code": self.code and not _blocks(answer) <= _blocks(correction),
            "url": self.url and not _urls(answer) <= _urls(correction),
        }
        return next((name for name, is_so in refused.items() if is_so), None)

    def _has_grown(self, before: int, after: int) -> bool:
        return self.growth is not None and after > max(self.growth * before, before + self.growth_characters)


NO_GUARDS = Guards(unfinished=False, empty=False, echo=False, growth=None, code=False, url=False)
"""Every correction is returned, whatever it is."""


def _blocks(text: str) -> set[str]:
    """Return a text's fenced blocks of code, in one pass over its lines; one that is never closed is none.

    As in CommonMark, a fence is closed by one of the same sign that is at least as long and has nothing behind it, and
    what opens a block of backticks has none further on in its line.
    """
    found: set[str] = set()
    fence, block = "", [""]
    for line in text.split("\n"):
        match = _FENCE.fullmatch(line.rstrip())
        if fence:
            block.append(line)
            if match is not None and match[1].startswith(fence) and not match[2]:
                found.add("\n".join(block).strip())
                fence = ""
        elif match is not None and not (match[1][0] == "`" and "`" in match[2]):
            fence, block = match[1], [line]
    return found


def _urls(text: str) -> set[str]:
    return {found.rstrip(_BEHIND_URL) for found in _URL.findall(text)}
