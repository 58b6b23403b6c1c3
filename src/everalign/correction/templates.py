"""Prompt templates of correctors.

A corrector works only with the text it was trained with, and four different texts of the Aligner are in use (Ji et al.,
NeurIPS 2024, arXiv 2402.02416). So each template has an id, which is stored with a corrector, and the text of an id
never changes.

| id | source |
|---|---|
| `everalign-1` | ours; the only one with a place for objectives |
| `aligner-1` | the released checkpoint `aligner/aligner-7b-v1.0` |
| `aligner-paper` | the paper's Algorithm 1 |
| `aligner-2` | the authors' repository since December 2024 |
| `aligner-empathy` | the authors' variant for empathy |

A user's text cannot forge a template's structure: a space is inserted before the last character of any of the
template's marks in it; where a bar divides question from answer, a bar that stands alone in a question becomes `¦`.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from everalign.data.messages import Message, message_text
from everalign.errors import InputError
from everalign.text import nfkc, without_invisible

Question = str | Sequence[Message]

DEFAULT_TEMPLATE = "everalign-1"

# Tokenizers that normalise to NFKC turn the full-width bar into the plain one.
_LONE_BAR = re.compile(r"(?<!\S)[|｜](?!\S)")
_TURN = re.compile(r"^([^\S\n]*(?:system|user|assistant)):", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Template:
    """The text around a question and an answer; the correction follows it directly and ends with EOS.

    Args:
        id: its name.
        before: text before the question.
        between: text between question and answer.
        after: text between answer and correction.
        marks: texts that separate the parts; neither question nor answer may contain them.
        aims: a line, inserted before the last line of `before`, that names objectives in place of `{}`; None where the
            template has no place for any.
        bar: whether a bar that stands alone divides question from answer.
    """

    id: str
    before: str
    between: str
    after: str
    marks: tuple[str, ...]
    aims: str | None = None
    bar: bool = False

    def render(self, question: Question, answer: str, objectives: Sequence[str] = ()) -> str:
        """Return the corrector's prompt.

        Args:
            question: text, or chat messages (see `question_text`).
            answer: the answer to correct.
            objectives: in words, such as `helpful`; see `check_objectives`.
        """
        safe = self.neutralised(question_text(question))
        if self.bar:
            safe = _LONE_BAR.sub("¦", safe)
        before = self.before
        if self.check_objectives(objectives) and self.aims is not None:
            instruction, mark = before.split("\n", 1)
            before = f"{instruction}\n{self.aims.format(', '.join(objectives))}\n{mark}"
        return f"{before}{safe}{self.between}{self.neutralised(answer)}{self.after}"

    def check_objectives(self, objectives: Sequence[str]) -> tuple[str, ...]:
        """Check that the template can name the objectives, and return them.

        Raises:
            InputError: the template has no place for any, or one of them is empty, repeated, longer than a line, not
                printable, or contains a comma or one of the template's marks.
        """
        if isinstance(objectives, str):
            raise InputError(f"objectives: must be a list of words, found the text {objectives!r}")
        if objectives and self.aims is None:
            raise InputError(
                f"objectives: the template {self.id!r} has no place for any; leave them out, "
                f"or use {DEFAULT_TEMPLATE!r}"
            )
        for i, words in enumerate(objectives):
            if not words.strip() or words != words.strip() or not words.isprintable() or "," in words:
                raise InputError(f"objectives[{i}]: must be one line of words without commas, found {words!r}")
            if self.neutralised(words) != words:
                raise InputError(f"objectives[{i}]: {words!r} has a mark of the template {self.id!r}; reword it")
            if words in objectives[:i]:
                raise InputError(f"objectives[{i}]: {words!r} stands there twice; name it once")
        return tuple(objectives)

    def neutralised(self, text: str) -> str:
        """Return a user's text with the template's marks broken up.

        Some tokenizers normalise to NFKC or drop invisible characters. A text in which a mark appears only then is
        returned in that form.
        """

        def broken(text: str) -> str:
            return self._pattern.sub(lambda found: f"{found[0][:-1]} {found[0][-1]}", text)

        text = broken(text)
        plain = without_invisible(nfkc(text))
        return broken(plain) if self._pattern.search(plain) else text

    def marks_in(self, text: str) -> tuple[str, ...]:
        """Return the template's marks that a text contains, such as a correction that continues the template."""
        return tuple(dict.fromkeys(self._pattern.findall(text)))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(mark) for mark in self.marks))


def question_text(question: Question) -> str:
    """Return a question as one text: that of a single user message, otherwise a paragraph a turn, such as `User: ...`.

    A line inside a message that looks like the beginning of a turn gets a space before its colon.
    """
    if isinstance(question, str):
        return question
    if len(question) == 1 and question[0]["role"] == "user":
        return message_text(question[0])
    turns = ((message["role"].capitalize(), _TURN.sub(r"\1 :", message_text(message))) for message in question)
    return "\n\n".join(f"{role}: {content}" for role, content in turns)


_ROLES = ("BEGINNING OF CONVERSATION:", "USER:", "ASSISTANT:")

TEMPLATES: dict[str, Template] = {
    template.id: template
    for template in (
        Template(
            id="everalign-1",
            before=(
                "Improve the answer to the question. Keep what is good; where nothing has to change, repeat it.\n"
                "[[question]]\n"
            ),
            between="\n[[answer]]\n",
            after="\n[[correction]]\n",
            marks=("[[question]]", "[[answer]]", "[[correction]]"),
            aims="It should be more: {}",
        ),
        Template(
            id="aligner-1",
            before=(
                "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more helpful and "
                "harmless: "
            ),
            between=" | ",
            after=" ASSISTANT:",
            marks=_ROLES,
            bar=True,
        ),
        Template(
            id="aligner-paper",
            before=(
                "BEGINNING OF CONVERSATION:\nUSER: Editing the following Question-Answer pair to make it more helpful "
                "and harmless:\nQuestion: "
            ),
            between=" | Answer: ",
            after="\nASSISTANT:",
            marks=(*_ROLES, "| Answer:"),
            bar=True,
        ),
        Template(
            id="aligner-2",
            before="BEGINNING OF CONVERSATION: USER: ##Question: ",
            between="\n##Answer: ",
            after="\n##Correction:  ASSISTANT:",
            marks=(*_ROLES, "##Question:", "##Answer:", "##Correction:"),
        ),
        Template(
            id="aligner-empathy",
            before=(
                "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more empathic "
                "and helpful: "
            ),
            between=" | ",
            after=" ASSISTANT:",
            marks=_ROLES,
            bar=True,
        ),
    )
}


def get_template(name: str) -> Template:
    """Return the template with an id; raises InputError that lists the known ids."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"unknown template {name!r}{hint}: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
