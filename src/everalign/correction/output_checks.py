"""Checks of a correction (guards) and the approver: a correction that fails any of them is replaced by the answer."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from everalign.correction.templates import Question, Template
from everalign.errors import InputError

# A line that may open or close a fenced block of code.
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)")
_URL = re.compile(r"https?://[^\s<>\"'`)\]}]+")
# Punctuation after an address that ends the sentence, not the address.
_AFTER_URL = ".,;:!?"


class Approver(Protocol):
    """Has the last word on corrections; see `everalign.evaluation.scoring.ScorerApprover`."""

    @property
    def fingerprint(self) -> str:
        """Digest of everything that approval depends on."""
        ...

    def approve(self, questions: Sequence[Question], answers: Sequence[str], corrections: Sequence[str]) -> list[bool]:
        """Say of each of N corrections, all of which change their answer, whether it may be returned."""
        ...


@dataclass(frozen=True)
class Guards:
    """Conditions on a correction; the name of the guard that rejects it is recorded as the reason.

    Args:
        unfinished: it ends before the length limit.
        empty: it is not empty.
        echo: it contains no mark of the template that the answer does not contain.
        growth: it has at most this many times the answer's characters; None for no limit.
        growth_characters: characters it may always add, whatever `growth` says: the correction of a short refusal is
            long.
        code: it contains the answer's fenced code blocks, character by character.
        url: it contains the answer's addresses.

    Raises:
        InputError: `growth` or `growth_characters` is out of its range.
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

    def first_violation(self, answer: str, correction: str, finished: bool, template: Template) -> str | None:
        """Return the name of the first guard that rejects a correction, None if all accept it.

        Args:
            answer: the original.
            correction: what the corrector wrote.
            finished: whether it ended before the token limit.
            template: the corrector's.
        """
        before, after = len(answer), len(correction)
        allowed = None if self.growth is None else max(self.growth * before, before + self.growth_characters)
        violations = {
            "unfinished": self.unfinished and not finished,
            "empty": self.empty and not correction.strip(),
            "echo": self.echo and not {*template.marks_in(correction)} <= {*template.marks_in(answer)},
            "growth": allowed is not None and after > allowed,
            "code": self.code and not _code_blocks(answer) <= _code_blocks(correction),
            "url": self.url and not _urls(answer) <= _urls(correction),
        }
        return next((name for name, violated in violations.items() if violated), None)


NO_GUARDS = Guards(unfinished=False, empty=False, echo=False, growth=None, code=False, url=False)
"""Accepts every correction."""


def fence_after(line: str, fence: str) -> str:
    """Return the fence of the code block that is open after a line; empty for none.

    As in CommonMark, the closing fence repeats the opening one's character, is at least as long, and has nothing
    after it; the line that opens a block of backticks contains no others.

    Args:
        line: without its line break.
        fence: of the block that is open before the line; empty for none.
    """
    match = _FENCE.fullmatch(line.rstrip())
    if match is None:
        return fence
    if fence:
        return "" if match[1].startswith(fence) and not match[2] else fence
    return "" if match[1][0] == "`" and "`" in match[2] else match[1]


def _code_blocks(text: str) -> set[str]:
    """Return a text's fenced code blocks, in one pass over its lines; a block that is never closed is none."""
    blocks: set[str] = set()
    fence, block = "", [""]
    for line in text.split("\n"):
        before, fence = fence, fence_after(line, fence)
        if before:
            block.append(line)
            if not fence:
                blocks.add("\n".join(block).strip())
        elif fence:
            block = [line]
    return blocks


def _urls(text: str) -> set[str]:
    return {url.rstrip(_AFTER_URL) for url in _URL.findall(text)}
