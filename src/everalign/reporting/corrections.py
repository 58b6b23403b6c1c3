"""A corrector at work, as reports show it: figures over held-out answers, and some answers with their word diffs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from everalign.correction.word_diff import diff_html, diff_text, word_diff
from everalign.reporting.formats import count, percent

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.console import RenderableType


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

    def facts(self) -> dict[str, Any]:
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
