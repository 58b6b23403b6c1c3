"""Answers and corrections as reports show them: figures, and some texts with their word diffs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from everalign.correction.edits import Segment, diff_html, diff_text, word_diff
from everalign.learning.run_data import RunData
from everalign.learning.run_files import SampleAnswer
from everalign.reporting.formats import count, percent

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.console import RenderableType

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


@dataclass(frozen=True)
class CorrectedAnswer:
    """One answer and what the corrector returned, with the forward passes and tokens that took."""

    question: str
    answer: str
    correction: str
    forward_passes: int
    tokens: int

    @property
    def effort(self) -> str:
        """What became of the answer, and at which price."""
        passes = _passes(self.forward_passes)
        if self.answer == self.correction:
            return f"left as it was: {'verified in' if self.forward_passes == 1 else 'after'} {passes}"
        return f"{passes} for {count(self.tokens)} tokens"

    @property
    def html(self) -> Markup:
        """The word diff as HTML."""
        return diff_html(word_diff(self.answer, self.correction))


@dataclass(frozen=True)
class CorrectorShow:
    """What a corrector did to held-out answers.

    Args:
        rule: what answers should be like, as a clause.
        path: the corrector's folder.
        training_rows: that it learned from.
        answers: held-out answers.
        right: those of them that kept the rule before correction.
        kept_before: share of the answers that keep the rule before correction.
        kept_after: the same after correction.
        over_edit_rate: share of the right answers that were changed; None where there are none.
        verified: answers that were returned as they are after a single forward pass.
        forward_passes: over all answers, each counted by itself.
        tokens: of what is returned, for which plain decoding takes one forward pass each.
        examples: answers to show.
    """

    rule: str
    path: str
    training_rows: int
    answers: int
    right: int
    kept_before: float
    kept_after: float
    over_edit_rate: float | None
    verified: int
    forward_passes: int
    tokens: int
    examples: Sequence[CorrectedAnswer]

    @property
    def headline(self) -> str:
        """What it is worth, in a sentence."""
        return (
            f"{percent(self.kept_before)} of {count(self.answers)} held-out answers keep the rule as they are, "
            f"{percent(self.kept_after)} after correction."
        )

    @property
    def figures(self) -> list[tuple[str, str, str]]:
        """Name, value and meaning of each figure."""
        return [
            ("keep the rule before", percent(self.kept_before), f"of {count(self.answers)} held-out answers"),
            ("keep the rule after", percent(self.kept_after), "of the same answers, corrected"),
            ("right answers changed", percent(self.over_edit_rate), f"of {count(self.right)} that kept the rule"),
            ("verified at once", count(self.verified), "answers left as they were after 1 forward pass"),
            (
                "forward passes",
                count(self.forward_passes),
                f"for {count(self.tokens)} tokens; plain decoding: one each",
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)


def corrector_texts(show: CorrectorShow, *, marks: bool = False) -> list[RenderableType]:
    """What the terminal shows: a table of the figures, then each example; `marks` as in `diff_text`."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"corrector: {show.rule}"), title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("meaning", overflow="fold")
    for cells in show.figures:
        table.add_row(*cells)
    lines: list[RenderableType] = [table]
    for example in show.examples:
        diff = diff_text(word_diff(example.answer, example.correction), marks=marks)
        lines += [Text(""), Text(example.question, style="bold")]
        effort = Text(example.effort, style="dim")
        lines += [Padding(text, (0, 0, 0, 2), expand=False) for text in (diff, effort)]
    return [*lines, Text("")]


def _passes(number: int) -> str:
    return f"{count(number)} forward {'pass' if number == 1 else 'passes'}"
