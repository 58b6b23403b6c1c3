"""What a corrector reads: templates with a name each, which is stored with every corrector.

A corrector is only worth something behind the very text it was trained behind, and four texts of the Aligner are
about (Ji et al., NeurIPS 2024, arXiv 2402.02416): so a template has an id, an id's text never changes, and a corrector
is not used with another one than its own.

| id | whose text |
|---|---|
| `everalign-1` | ours; the only one with a place for objectives |
| `aligner-1` | the released checkpoint `aligner/aligner-7b-v1.0` |
| `aligner-paper` | the paper's Algorithm 1 |
| `aligner-2` | the authors' repository since December 2024 |
| `aligner-empathy` | the authors' variant for empathy |

No text of a user can forge a template's structure: where it has one of the template's marks, a space is put before the
mark's last character; a bar that stands alone in a question, where the bar divides question from answer, becomes `¦`.
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

# The full-width bar is one too, to a tokenizer that replaces compatible characters.
_LONE_BAR = re.compile(r"(?<!\S)[|｜](?!\S)")
_TURN = re.compile(r"^([^\S\n]*(?:system|user|assistant)):", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Template:
    """The text around a question and an answer; the correction follows it directly and ends with EOS.

    Args:
        id: its name, which is stored with a corrector.
        before: what stands before the question.
        between: what stands between question and answer.
        after: what stands between answer and correction.
        marks: texts that divide the parts, which neither question nor answer may contain.
        aims: the line between `before` and the question's mark that names objectives, with `{}` for them; None where
            the template has no place for any.
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
        """Return what a corrector reads before it writes.

        Args:
            question: text, or chat messages: the text of a single user message, else one paragraph a turn, such as
                `User: ...`.
            answer: the answer to correct.
            objectives: in words, such as `helpful`; see `check_objectives`.
        """
        safe = self.neutralised(question_text(question))
        if self.bar:
            safe = _LONE_BAR.sub("¦", safe)
        return f"{self._opening(objectives)}{safe}{self.between}{self.neutralised(answer)}{self.after}"

    def _opening(self, objectives: Sequence[str]) -> str:
        if not self.check_objectives(objectives) or self.aims is None:
            return self.before
        instruction, mark = self.before.split("\n", 1)
        return f"{instruction}\n{self.aims.format(', '.join(objectives))}\n{mark}"

    def check_objectives(self, objectives: Sequence[str]) -> tuple[str, ...]:
        """Return objectives that the template can name.

        Raises:
            InputError: the template has no place for any, or one is empty, twice there, more than a line of plain
                words, or has a comma or one of the template's marks.
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
        """Return a user's text without the template's marks.

        A mark that shows only once compatible characters are replaced and invisible ones removed (as some tokenizers
        do) counts too; such a text is taken in that form.
        """
        text = self._broken(text)
        plain = _plain(text)
        return self._broken(plain) if self._pattern.search(plain) else text

    def marks_in(self, text: str) -> tuple[str, ...]:
        """Return the marks that a text has, such as a correction that goes on writing the template."""
        return tuple(dict.fromkeys(self._pattern.findall(text)))

    def _broken(self, text: str) -> str:
        return self._pattern.sub(lambda found: f"{found[0][:-1]} {found[0][-1]}", text)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(mark) for mark in self.marks))


def question_text(question: Question) -> str:
    """Return a question as one text: that of a single user message, else a paragraph for each turn.

    A line inside a message that looks like the beginning of a turn gets a space before its colon.
    """
    if isinstance(question, str):
        return question
    if len(question) == 1 and question[0]["role"] == "user":
        return message_text(question[0])
    turns = ((message["role"].capitalize(), _TURN.sub(r"\1 :", message_text(message))) for message in question)
    return "\n\n".join(f"{role}: {content}" for role, content in turns)


def _plain(text: str) -> str:
    """Return a text as a normalising tokenizer may see it: compatible characters replaced, invisible ones removed."""
    return without_invisible(nfkc(text))


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
    """Return the template of an id; raises InputError that lists the known ones."""
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"unknown template {name!r}{hint}: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
