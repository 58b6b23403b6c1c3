"""Tokenise corrections: the encoder of a corrector's prompts and texts, and the rows for training and evaluation."""

import bisect
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from everalign.correction.templates import Question, Template, question_text
from everalign.data.records import Correction, CorrectionSet
from everalign.data.tokenization import TokenizedRow, TokenizedRows, check_max_length
from everalign.errors import InputError, check_shortfall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts that a continuation may be tokenised after, to be cut off again. The first, which is none, is used where it
# works; other tokenizers put a space before the first word of a text.
_ANCHORS = ("", ":", "\n", "x", "0.")
# What anchors are tried with: each probe, as a continuation of the context, has to come out as written.
_CONTEXT, _PROBES = "end:", ("a b", " a", "(a)", "1")
_FINGERPRINTED = "Mixed CASE,  two spaces\n\ttab; 12345 naïve ½ 漢字."


class CorrectionEncoder:
    """Converts questions, answers and corrections to tokens and back, for one tokenizer and one template.

    `decode(response(text))` is `text` unless the tokenizer normalises it (lower case, NFKC, collapsed spaces) or has
    no token for a character.

    Args:
        tokenizer: the corrector's.
        template: of the prompt.
        objectives: in words, such as `helpful`, where the template has a place for them.

    Raises:
        InputError: the tokenizer has no EOS token or cannot continue a text, or the template cannot name the
            objectives.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: Template, objectives: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.objectives = template.check_objectives(objectives)
        self._name = tokenizer.name_or_path or "tokenizer"
        if tokenizer.eos_token_id is None:
            raise InputError(f"{self._name}: the tokenizer has no EOS token, so a correction would have no end")
        self.ends: set[int] = {tokenizer.eos_token_id}
        """Tokens any of which ends a correction."""
        self._special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        # What the tokenizer puts before every text, such as BOS.
        marked: list[int] = tokenizer("a", verbose=False)["input_ids"]
        self._head = marked[: marked.index(self._ids("a")[0])]

        def continues(anchor: str, probe: str) -> bool | None:
            tokens, context = self._behind(anchor, probe), self._tokens(_CONTEXT)
            # Decoded in a context, as some tokenizers put a space before a text's first word.
            return None if tokens is None else self._text([*context, *tokens]) == self._text(context) + probe

        # The anchors after which every probe either comes out as written or merges with the anchor.
        found = {anchor: {continues(anchor, probe) for probe in _PROBES} for anchor in _ANCHORS}
        self._anchors = tuple(anchor for anchor, results in found.items() if True in results and False not in results)
        if not self._anchors:
            raise InputError(
                f"{self._name}: this tokenizer changes the text that it is given to continue, so a correction would "
                "not be what is learned; use another model"
            )
        self._template_tokens = len(self._prompt("", ""))

    # ---- prompts ----

    def prompt(self, question: Question, answer: str, room: int | None = None) -> list[int]:
        """Return the tokens before the correction, with BOS where the tokenizer adds one.

        Args:
            question: text, or chat messages.
            answer: the answer to correct.
            room: most tokens; None for no limit. If needed, first the question loses its beginning, but keeps a
                quarter of what the template leaves; then the answer loses its end.

        Raises:
            InputError: the template itself does not fit.
        """
        text = question_text(question)
        tokens = self._prompt(text, answer)
        if room is None or len(tokens) <= room:
            return tokens
        template = self._template_tokens
        if room <= template:
            raise InputError(
                f"max_length: {room} tokens for a prompt are too few, the template {self.template.id!r} alone takes "
                f"{template}; raise it"
            )

        def fits(characters: int, answer: str, room: int) -> bool:
            return len(self._prompt(text[len(text) - characters :], answer)) <= room

        least = _largest(len(text), lambda n: fits(n, "", template + (room - template) // 4))
        kept = _largest(len(text), lambda n: fits(n, answer, room), least)
        end = _largest(len(answer), lambda n: fits(kept, answer[:n], room))
        return self._prompt(text[len(text) - kept :], answer[:end])

    def prompt_room(self, response: Sequence[int], max_length: int) -> int:
        """Return how many tokens a response leaves for its prompt; 0 if that is less than a quarter of `max_length`.

        A response is never cut: without its end it would teach a corrector not to stop.
        """
        left = max_length - len(response)
        return left if left - self._template_tokens >= max_length // 4 else 0

    def _prompt(self, question: str, answer: str) -> list[int]:
        return [*self._head, *self._tokens(self.template.render(question, answer, self.objectives))]

    # ---- responses ----

    def response(self, text: str) -> list[int]:
        """Return the tokens of a correction (or of an answer, as the draft of one) and the end token.

        Raises:
            InputError: the text cannot be tokenised as a continuation.
        """
        for anchor in (self.template.after, *self._anchors):
            if (tokens := self._behind(anchor, text)) is not None:
                return [*tokens, self.tokenizer.eos_token_id]
        raise InputError(f"{self._name}: {text[:40]!r} cannot be tokenised as a continuation; change its beginning")

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of a correction: of the tokens up to the first end token."""
        end = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        before = self._tokens(self._anchors[0]) if self._anchors[0] else []
        return self._text([*before, *tokens[:end]])[len(self._text(before)) :]

    def continuation(self, begun: str, rest: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a text's beginning, and those of its rest and the end token.

        Where one token holds the end of the beginning and white space after it, as `.` and a line break in many
        vocabularies, it is the last one of the beginning: a model that never saw the two apart would not go on with
        the white space. Errors as in `response`.
        """
        tokens = self.response(begun + rest)
        if not begun:
            return [], tokens
        split = _largest(len(tokens), lambda n: not self.decode(tokens[:n]).startswith(begun)) + 1
        first = self.decode(tokens[:split])
        if first.startswith(begun) and not first[len(begun) :].strip():
            return tokens[:split], tokens[split:]
        return self.response(begun)[:-1], self.response(rest)

    def continued(self, begun: str, first: Sequence[int], tokens: Sequence[int]) -> str:
        """Return a text that was begun with the tokens that follow it; `first` is from `continuation`."""
        head = self.decode(first)
        text = self.decode([*first, *tokens])[len(head) :]
        # The white space of the last token of the beginning leads on to what follows, if anything does.
        space = head[len(begun) :] if head.startswith(begun) else ""
        return begun + space + text if text else begun

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over what decides how text becomes tokens: template, objectives, vocabulary, ends, and a sample."""
        facts = {
            "vocabulary": sorted(self.tokenizer.get_vocab().items()),
            "prompt": self.prompt(_FINGERPRINTED, _FINGERPRINTED),
            "response": self.response(_FINGERPRINTED),
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _behind(self, anchor: str, text: str) -> list[int] | None:
        """Return the tokens of a text that follows an anchor; None where a token spans both."""
        before, both = self._tokens(anchor) if anchor else [], self._tokens(anchor + text)
        return both[len(before) :] if both[: len(before)] == before else None

    # ---- the tokenizer ----

    def _tokens(self, text: str) -> list[int]:
        """Tokenise a text so that nothing in it becomes a special token."""
        ids = self._ids(text)
        if self._special.isdisjoint(ids):
            return ids
        # Some tokenizers have the name of a special token among their ordinary tokens.
        for name in self.tokenizer.all_special_tokens:
            text = text.replace(name, f"{name[:-1]} {name[-1]}")
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        ids: list[int] = encoded["input_ids"]
        return ids

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _largest(longest: int, fits: Callable[[int], bool], least: int = 0) -> int:
    """Return the largest number from `least` to `longest` that fits, or `least`; if n does not fit, nor does n + 1."""
    return max(least, bisect.bisect_left(range(longest + 1), True, lo=least, key=lambda n: not fits(n)) - 1)


# ---- rows ----

Targets = Callable[[Correction], tuple[str, ...]]
"""Which texts of a row follow its prompt."""


def correction_only(row: Correction) -> tuple[str, ...]:
    """The correction: what a corrector learns to write."""
    return (row.correction,)


def answer_only(row: Correction) -> tuple[str, ...]:
    """The unchanged answer: what the warm-up learns to write."""
    return (row.answer,)


def both(row: Correction) -> tuple[str, ...]:
    """Correction and unchanged answer: what a corrector is evaluated on."""
    return (row.correction, row.answer)


@dataclass(frozen=True)
class TokenizedCorrections:
    """Tokenised corrections, and what the length limit cost.

    Args:
        rows: those that fit; `truncated_prompts` counts the rows whose question or answer was cut.
        dropped: how many rows do not fit.
    """

    rows: TokenizedRows
    dropped: int

    def warnings(self) -> tuple[str, ...]:
        """Return a warning for each large loss.

        Raises:
            InputError: most rows do not fit.
        """
        total = len(self.rows) + self.dropped
        remedy = f"raise --max-length (max_length), {self.rows.max_length} now"
        what = "rows have their question or answer cut"
        return (
            *check_shortfall(self.dropped, total, "rows are too long and left out", remedy),
            *check_shortfall(self.rows.truncated_prompts, total, what, remedy, refuse=False),
        )


def tokenize_corrections(
    rows: Iterable[Correction],
    encoder: CorrectionEncoder,
    max_length: int,
    targets: Targets = correction_only,
    most: int | None = None,
) -> TokenizedCorrections:
    """Tokenise corrections; prompts are shortened as in `CorrectionEncoder.prompt`, the texts after them never.

    Args:
        rows: the corrections.
        encoder: for the corrector's tokenizer and template.
        max_length: most tokens of prompt and longest text together, at least 8.
        targets: which texts follow a row's prompt.
        most: stop after this many rows that fit; None for all.

    Raises:
        InputError: `max_length` is too small, or a text cannot be tokenised; names the row.
    """
    check_max_length(max_length)
    tokenized: list[TokenizedRow] = []
    dropped = shortened = 0
    for number, row in enumerate(rows, start=1):
        if len(tokenized) == most:
            break
        try:
            responses = tuple(encoder.response(text) for text in targets(row))
            longest = max(responses, key=len)
            prompt = encoder.prompt(row.question, row.answer)
            too_long = len(prompt) + len(longest) > max_length
            if too_long:
                room = encoder.prompt_room(longest, max_length)
                if not room:
                    dropped += 1
                    continue
                prompt = encoder.prompt(row.question, row.answer, room)
        except InputError as error:
            raise error.at(f"row {number} (id {row.id})") from None
        shortened += too_long
        tokenized.append(TokenizedRow(row.id, prompt, responses, (1.0,) * len(responses), row.weight))
    return TokenizedCorrections(TokenizedRows(tuple(tokenized), max_length, shortened), dropped)


def prepare_corrections(
    rows: CorrectionSet, encoder: CorrectionEncoder, max_length: int, identity_share: float, seed: int
) -> tuple[CorrectionSet, tuple[str, ...], tuple[str, ...]]:
    """Return the rows of a task that are learned, lines for the log, and warnings.

    Args:
        rows: the task's rows.
        encoder: for the corrector's tokenizer and template.
        max_length: most tokens of prompt and correction; longer rows are left out.
        identity_share: rows that leave a good answer unchanged, relative to the number of other rows. Where there are
            fewer, corrections are added as answers that are their own corrections.
        seed: draws them.

    Raises:
        InputError: no row fits.
    """
    edits = [row for row in rows if not row.is_identity]
    added = max(0, round(identity_share * len(edits)) - (len(rows) - len(edits)))
    drawn = random.Random(seed).sample(edits, added)
    given = (*rows, *(replace(row, answer=row.correction) for row in drawn))
    tokenized = tokenize_corrections(given, encoder, max_length)
    fitting = {row.id for row in tokenized.rows}
    if not fitting:
        raise InputError(f"no correction fits max_length, {max_length} tokens with its prompt; raise it")
    lines = [f"  {describe_template(encoder)}"]
    if added:
        lines.append(f"  {added} corrections are learned as answers that stay as they are, too")
    if tokenized.dropped:
        lines.append(f"  {tokenized.dropped} of {len(given)} rows are left out, too long for {max_length} tokens")
    kept = tuple(row for row in given if row.id in fitting)
    return replace(rows, items=kept), tuple(lines), tokenized.warnings()


def tokenize_held_out(
    rows: Sequence[Correction], encoder: CorrectionEncoder, max_length: int, log: Callable[[str], None]
) -> TokenizedRows:
    """Tokenise held-out corrections as pairs: the correction over the unchanged answer.

    Raises:
        InputError: none fits.
    """
    tokenized = tokenize_corrections(rows, encoder, max_length, both)
    if not tokenized.rows:
        raise InputError(f"no held-out correction fits max_length, {max_length} tokens with its prompt; raise it")
    if tokenized.dropped:
        log(f"  {tokenized.dropped} of {len(rows)} held-out rows are left out, too long for {max_length} tokens")
    for warning in tokenized.warnings():
        log(f"  warning: held-out: {warning}")
    return tokenized.rows


def describe_template(encoder: CorrectionEncoder) -> str:
    """Return template and objectives for a log."""
    objectives = f", objectives {', '.join(encoder.objectives)}" if encoder.objectives else ""
    return f"template {encoder.template.id}{objectives}"
