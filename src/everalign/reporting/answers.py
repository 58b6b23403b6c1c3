"""Sampled answers before and after learning, and a corrector's corrections, with their word diffs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from everalign.correction.edits import Segment, diff_html, diff_text, word_diff
from everalign.learning.run_data import RunData
from everalign.reporting.formats import count, percent

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.console import RenderableType

# With less text in common, marks would cover nearly everything and help nobody.
_LEAST_COMMON = 0.2


@dataclass(frozen=True)
class AnswerPair:
    """One prompt, and what the base model and the policy wrote to it.

    Args:
        prompt: text, or chat messages.
        draft: the answer that a corrector was given; None where the policy is none.
        before: the base model's answer.
        after: the policy's.
        ended_before: whether the base model's answer ended before the token limit.
        ended_after: whether the policy's did.
        course: what was learned last, and the answer by then, after each task but the last.
        last: the task that was learned last.
    """

    prompt: str | list[dict[str, Any]]
    draft: str | None
    before: str
    after: str
    ended_before: bool
    ended_after: bool
    course: Sequence[tuple[str, str]] = ()
    last: str = ""

    @property
    def question(self) -> str:
        """The prompt, or the last message of a chat."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content") or "")

    @property
    def note(self) -> str:
        """What the two texts do not show: earlier messages, answers that were cut, and whether they are equal."""
        earlier = 0 if isinstance(self.prompt, str) else len(self.prompt) - 1
        notes = [f"after {earlier} earlier messages"] if earlier > 1 else ["after an earlier message"] * earlier
        if not self.ended_before and not self.ended_after:
            notes.append("neither answer ended within the limit of tokens")
        elif not self.ended_before or not self.ended_after:
            notes.append("one of the answers was cut at the limit")
        if self.unchanged:
            notes.append("unchanged")
        elif self._diff is None:
            notes.append("rewritten completely: no words are marked")
        return "; ".join(notes)

    @property
    def unchanged(self) -> bool:
        """Whether both answers are the same."""
        return (self.before, self.ended_before) == (self.after, self.ended_after)

    @property
    def steps(self) -> list[tuple[str, Markup]]:
        """After each task the answer, with what has changed since the one before marked; the base model's first."""
        texts = [
            ("base model", self.before if self.ended_before else f"{self.before} …"),
            *self.course,
            (self.last, self.after if self.ended_after else f"{self.after} …"),
        ]
        marked = [diff_html([Segment("same", texts[0][1])])]
        for (_, old), (_, new) in pairwise(texts):
            marked.append(diff_html(marked_edit(old, new) or [Segment("same", new)]))
        return [(name, html) for (name, _), html in zip(texts, marked, strict=True)]

    @property
    def before_html(self) -> Markup:
        """The first answer with what the second does not have marked as removed."""
        return self._marked("removed", self.before, self.ended_before)

    @property
    def after_html(self) -> Markup:
        """The second answer with what the first does not have marked as added."""
        return self._marked("added", self.after, self.ended_after)

    @cached_property
    def _diff(self) -> Sequence[Segment] | None:
        """The word diff; None where the second answer is no edit of the first."""
        return marked_edit(self.before, self.after)

    def _marked(self, kind: str, text: str, ended: bool) -> Markup:
        segments = [Segment("same", text)] if self._diff is None else self._diff
        shown = [segment for segment in segments if segment.kind in ("same", kind)]
        return diff_html(shown if ended else [*shown, Segment("same", " …")])


def marked_edit(before: str, after: str) -> Sequence[Segment] | None:
    """Return the word diff of two texts; None where the second is no edit of the first."""
    diff = word_diff(before, after)
    common = sum(len(segment.text) for segment in diff if segment.kind == "same")
    return diff if common >= _LEAST_COMMON * max(len(before), len(after)) else None


def answer_pairs(run: RunData) -> dict[str, list[AnswerPair]]:
    """Return, by task, the base model's answers beside those of the run's current policy.

    Where each task has a policy of its own (regime `separate`), beside that policy's.
    """
    found: dict[str, list[AnswerPair]] = {}
    for task, first in run.first_answers.items():
        written = [
            (version.task, {answer.row: answer for answer in version.answers[task]})
            for version in run.versions
            if task in version.answers and (run.regime != "separate" or version.task == task)
        ]
        last = written[-1][1] if written else {}
        pairs = []
        for old in (answer for answer in first if answer.row in last):
            course = tuple((name, rows[old.row]) for name, rows in written[:-1] if old.row in rows)
            texts = tuple((name, one.answer if one.ended else f"{one.answer} …") for name, one in course)
            new = last[old.row]
            ends = (old.answer, new.answer, old.ended, new.ended)
            pairs.append(AnswerPair(old.prompt, old.draft, *ends, texts, written[-1][0]))
        if pairs:
            found[task] = pairs
    return found


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
        """Whether the answer was changed, and how many forward passes that took."""
        passes = f"{count(self.forward_passes)} forward {'pass' if self.forward_passes == 1 else 'passes'}"
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
        training_rows: number of rows that it was trained on.
        answers: number of held-out answers.
        right: how many of them kept the rule before correction.
        kept_before: share of the answers that keep the rule before correction.
        kept_after: the same after correction.
        over_edit_rate: share of the right answers that were changed; None without right answers.
        verified: number of answers that were returned unchanged after a single forward pass.
        forward_passes: over all answers, counted separately.
        tokens: number of tokens returned; plain decoding takes one forward pass for each.
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
        """How many answers keep the rule before and after, in a sentence."""
        return (
            f"{percent(self.kept_before)} of {count(self.answers)} held-out answers keep the rule as they are, "
            f"{percent(self.kept_after)} after correction."
        )

    @property
    def figures(self) -> list[tuple[str, str, str]]:
        """Name, value and meaning of each figure."""
        passes, tokens = count(self.forward_passes), count(self.tokens)
        return [
            ("keep the rule before", percent(self.kept_before), f"of {count(self.answers)} held-out answers"),
            ("keep the rule after", percent(self.kept_after), "of the same answers, corrected"),
            ("right answers changed", percent(self.over_edit_rate), f"of {count(self.right)} that kept the rule"),
            ("verified at once", count(self.verified), "answers left as they were after 1 forward pass"),
            ("forward passes", passes, f"for {tokens} tokens; plain decoding: one each"),
        ]


def corrector_texts(show: CorrectorShow, *, marks: bool = False) -> list[RenderableType]:
    """Return what the terminal shows: a table of the figures, then each example; `marks` as in `diff_text`."""
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
