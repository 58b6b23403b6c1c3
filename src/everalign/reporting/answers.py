"""Answers before and after learning, as reports show them: what was taken out, and what was put in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from everalign.correction.word_diff import Segment, diff_html, word_diff
from everalign.learning.run_data import RunData
from everalign.learning.run_files import SampleAnswer

if TYPE_CHECKING:
    from markupsafe import Markup

_CUT = " \u2026"
# Where less is common to both texts, marks would cover nearly all of them and help nobody.
_LEAST_COMMON = 0.2


@dataclass(frozen=True)
class AnswerPair:
    """One prompt, and what the base model and the policy wrote to it.

    Args:
        prompt: text, or chat messages.
        draft: the answer that a corrector was given; None where the policy is none.
        before: the base model's answer.
        after: the policy's.
        ended_before: whether the base model's answer has ended, or was cut at the limit of tokens.
        ended_after: whether the policy's has.
    """

    prompt: str | list[dict[str, Any]]
    draft: str | None
    before: str
    after: str
    ended_before: bool
    ended_after: bool

    @property
    def question(self) -> str:
        """What was asked last."""
        if isinstance(self.prompt, str):
            return self.prompt
        return str(self.prompt[-1].get("content") or "")

    @property
    def note(self) -> str:
        """What the texts do not show by themselves."""
        earlier = 0 if isinstance(self.prompt, str) else len(self.prompt) - 1
        notes = [f"after {earlier} earlier messages"] if earlier > 1 else ["after an earlier message"] * earlier
        if not (self.ended_before and self.ended_after):
            who = "neither answer" if self.ended_before == self.ended_after else "one of the answers"
            notes.append(f"{who} ended within the limit of tokens" if who[0] == "n" else f"{who} was cut at the limit")
        if self.unchanged:
            notes.append("unchanged")
        elif not self._is_edit:
            notes.append("written anew, so no words are marked")
        return "; ".join(notes)

    @property
    def unchanged(self) -> bool:
        """Whether both answers are the same."""
        return (self.before, self.ended_before) == (self.after, self.ended_after)

    @property
    def before_html(self) -> Markup:
        """The first answer with what the second does not have marked as removed."""
        return diff_html([*self._segments("removed"), *_cut(self.ended_before)])

    @property
    def after_html(self) -> Markup:
        """The second answer with what the first does not have marked as added."""
        return diff_html([*self._segments("added"), *_cut(self.ended_after)])

    @cached_property
    def _diff(self) -> tuple[Segment, ...]:
        return word_diff(self.before, self.after)

    @property
    def _is_edit(self) -> bool:
        """Whether enough of the one text is in the other for the rest to be called a change."""
        common = sum(len(segment.text) for segment in self._diff if segment.kind == "same")
        return common >= _LEAST_COMMON * max(len(self.before), len(self.after))

    def _segments(self, kind: str) -> list[Segment]:
        if not self._is_edit:
            return [Segment("same", self.before if kind == "removed" else self.after)]
        return [segment for segment in self._diff if segment.kind in ("same", kind)]


def answer_pairs(run: RunData) -> dict[str, list[AnswerPair]]:
    """Return, by task, the answers of the base model beside those of the policy that the run has come to.

    Where each task has a policy of its own, beside that one's.
    """
    found: dict[str, list[AnswerPair]] = {}
    for task, first in run.first_answers.items():
        last: Sequence[SampleAnswer] = ()
        for version in run.versions:
            if run.regime != "separate" or version.task == task:
                last = version.answers.get(task, last)
        after = {answer.row: answer for answer in last}
        pairs = [_pair(answer, after[answer.row]) for answer in first if answer.row in after]
        if pairs:
            found[task] = pairs
    return found


def _pair(before: SampleAnswer, after: SampleAnswer) -> AnswerPair:
    return AnswerPair(before.prompt, before.draft, before.answer, after.answer, before.ended, after.ended)


def _cut(ended: bool) -> list[Segment]:
    return [] if ended else [Segment("same", _CUT)]
