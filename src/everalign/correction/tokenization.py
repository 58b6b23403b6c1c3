"""Tokenise questions, answers and corrections for training and evaluation."""

import bisect
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from everalign.correction.templates import Question, Template, question_text
from everalign.data.records import Correction, CorrectionSet
from everalign.data.tokenization import TokenizedRow, TokenizedRows, check_max_length
from everalign.errors import InputError, check_shortfall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts in front of which a continuation may be tokenised, to be cut off again. Where the first one, which is none, will
# do, it is used: other tokenizers put a space before the first word of a text.
_ANCHORS = ("", ":", "\n", "x", "0.")
_CONTEXT = "end:"
_PROBES = ("a b", " a", "(a)", "1")
_PROBE_TEXT = "Mixed CASE,  two spaces\n\ttab; 12345 naïve ½ 漢字."


class CorrectionEncoder:
    """Texts to tokens and back for one tokenizer and one template.

    Args:
        tokenizer: the corrector's.
        template: what it reads.
        objectives: in words, such as `helpful`, where the template has a place for them.

    Raises:
        InputError: the tokenizer has no EOS token or cannot continue a text, or the template cannot name the
            objectives.

    `decode(response(text))` is `text` unless the tokenizer itself changes it: where it normalises (lower case, NFKC,
    collapsed spaces) or has no token for a character, what was lost is lost.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: Template, objectives: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.objectives = template.check_objectives(objectives)
        if tokenizer.eos_token_id is None:
            raise InputError(f"{self._name}: the tokenizer has no EOS token, so a correction would have no end")
        self.ends: set[int] = {tokenizer.eos_token_id}
        """Tokens any of which ends a correction."""
        self._special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        self._head = self._special_head()
        self._anchors = self._usable_anchors()
        self._bare = len(self._prompt("", ""))

    @property
    def _name(self) -> str:
        return self.tokenizer.name_or_path or "tokenizer"

    def prompt(self, question: Question, answer: str, room: int | None = None) -> list[int]:
        """Return the tokens before the correction, with BOS where the tokenizer adds one.

        Args:
            question: text, or chat messages.
            answer: the answer to correct.
            room: tokens there are for all of it; None for any number. Where they do not suffice, first the question
                loses its beginning, down to a quarter of what the template leaves; then the answer loses its end.

        Raises:
            InputError: there is no room for the template itself.
        """
        text = question_text(question)
        tokens = self._prompt(text, answer)
        return tokens if room is None or len(tokens) <= room else self._shortened(text, answer, room)

    def response(self, text: str) -> list[int]:
        """Return the tokens of a correction (or of an answer, as the draft of one) with the end token."""
        return [*self._continuation(text), self.tokenizer.eos_token_id]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of a correction: of the tokens up to the first end token."""
        end = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        before = self._tokens(self._anchors[0]) if self._anchors[0] else []
        return self._text([*before, *tokens[:end]])[len(self._text(before)) :]

    def fits(self, prompt: Sequence[int], response: Sequence[int], max_length: int) -> bool:
        """Whether a prompt and a correction are at most `max_length` tokens together."""
        return len(prompt) + len(response) <= max_length

    def room(self, response: Sequence[int], max_length: int) -> int:
        """Return how many tokens a correction leaves for its prompt; 0 where that is less than a quarter of the limit.

        A correction is never cut: without its end it would teach a corrector not to stop.
        """
        left = max_length - len(response)
        return left if left - self._bare >= max_length // 4 else 0

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over what decides how text becomes tokens: template, objectives, vocabulary, ends, and a probe."""
        facts = {
            "vocabulary": sorted(self.tokenizer.get_vocab().items()),
            "prompt": self.prompt(_PROBE_TEXT, _PROBE_TEXT),
            "response": self.response(_PROBE_TEXT),
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    # ---- prompts ----

    def _prompt(self, question: str, answer: str) -> list[int]:
        return [*self._head, *self._tokens(self.template.render(question, answer, self.objectives))]

    def _shortened(self, question: str, answer: str, room: int) -> list[int]:
        if room <= self._bare:
            raise InputError(
                f"max_length: {room} tokens for a prompt are too few, the template {self.template.id!r} alone takes "
                f"{self._bare}; raise it"
            )
        least = _most(len(question), lambda n: self._fit(_tail(question, n), "", self._bare + (room - self._bare) // 4))
        kept = _most(len(question), lambda n: self._fit(_tail(question, n), answer, room), least)
        short = _tail(question, kept)
        return self._prompt(short, answer[: _most(len(answer), lambda n: self._fit(short, answer[:n], room))])

    def _fit(self, question: str, answer: str, room: int) -> bool:
        return len(self._prompt(question, answer)) <= room

    # ---- tokens ----

    def _tokens(self, text: str) -> list[int]:
        tokens = self._raw_tokens(text)
        if self._special.isdisjoint(tokens):
            return tokens
        # Some tokenizers find a special token's name among their ordinary pieces.
        for name in self.tokenizer.all_special_tokens:
            text = text.replace(name, f"{name[:-1]} {name[-1]}")
        return self._raw_tokens(text)

    def _raw_tokens(self, text: str) -> list[int]:
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        tokens: list[int] = encoded["input_ids"]
        return tokens

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _special_head(self) -> list[int]:
        """Return what the tokenizer puts before every text, such as BOS."""
        plain = self._raw_tokens("a")
        marked: list[int] = self.tokenizer("a", verbose=False)["input_ids"]
        return marked[: marked.index(plain[0])]

    def _usable_anchors(self) -> tuple[str, ...]:
        """Return the anchors behind which ordinary texts come out as written, or straddle the border."""
        found = {anchor: {self._continues(anchor, probe) for probe in _PROBES} for anchor in _ANCHORS}
        usable = tuple(anchor for anchor, results in found.items() if True in results and False not in results)
        if not usable:
            raise InputError(
                f"{self._name}: this tokenizer changes the text that it is given to continue, so a correction would "
                "not be what is learnt; use another model"
            )
        return usable

    def _continues(self, anchor: str, text: str) -> bool | None:
        tokens = self._behind(anchor, text)
        # Some tokenizers put a space before a text, which is no part of what follows it.
        before = self._tokens(_CONTEXT)
        return None if tokens is None else self._text([*before, *tokens]) == self._text(before) + text

    def _continuation(self, text: str) -> list[int]:
        found = (self._behind(anchor, text) for anchor in (self.template.after, *self._anchors))
        tokens = next((tokens for tokens in found if tokens is not None), None)
        if tokens is None:
            raise InputError(f"{self._name}: {text[:40]!r} cannot be tokenised as a continuation; change its beginning")
        return tokens

    def _behind(self, anchor: str, text: str) -> list[int] | None:
        """Return the tokens of a text that follows an anchor; None where a token straddles their border."""
        before, both = self._tokens(anchor) if anchor else [], self._tokens(anchor + text)
        return both[len(before) :] if both[: len(before)] == before else None


def _tail(text: str, length: int) -> str:
    return text[len(text) - length :]


def _most(longest: int, fits: Callable[[int], bool], least: int = 0) -> int:
    """Return the largest number from `least` to `longest` that fits, or `least`; what is longer fits no better."""
    return max(least, bisect.bisect_left(range(longest + 1), True, lo=least, key=lambda n: not fits(n)) - 1)


Texts = Callable[[Correction], tuple[str, ...]]


@dataclass(frozen=True)
class EncodedCorrections:
    """Encoded rows, and what the length limit cost.

    Args:
        groups: prompt and texts of every row whose texts fit.
        dropped: rows where one does not.
        shortened: rows of `groups` whose question or answer lost tokens.
    """

    groups: tuple[TokenizedRow, ...]
    dropped: int
    shortened: int

    def warnings(self, max_length: int) -> tuple[str, ...]:
        """Return what the limit cost where that is much.

        Raises:
            InputError: most rows are left out.
        """
        total, remedy = len(self.groups) + self.dropped, f"raise --max-length (max_length), {max_length} now"
        dropped = check_shortfall(self.dropped, total, "rows are too long and left out", remedy)
        what = "rows have their question or answer cut"
        return (*dropped, *check_shortfall(self.shortened, total, what, remedy, refuse=False))


def taught(row: Correction) -> tuple[str, ...]:
    """What a corrector learns to write: the correction."""
    return (row.correction,)


def copied(row: Correction) -> tuple[str, ...]:
    """What the warm-up learns to write: the answer as it is."""
    return (row.answer,)


def compared(row: Correction) -> tuple[str, ...]:
    """What a corrector is judged by: the correction, and the answer as it is."""
    return (row.correction, row.answer)


def tokenize_corrections(
    rows: Iterable[Correction],
    encoder: CorrectionEncoder,
    max_length: int,
    texts: Texts = taught,
    most: int | None = None,
) -> EncodedCorrections:
    """Tokenises corrections; prompts are shortened as `CorrectionEncoder.prompt` says, what follows them never.

    Args:
        rows: the corrections.
        encoder: of the corrector's tokenizer and template.
        max_length: tokens of prompt and the longest text together, at least 8.
        texts: what may follow a row's prompt.
        most: stop when so many rows fit; None for all.

    Raises:
        InputError: `max_length` is too small, or a text cannot be tokenised; names the row.
    """
    check_max_length(max_length)
    groups: list[TokenizedRow] = []
    dropped = shortened = 0
    for number, row in enumerate(rows, start=1):
        if len(groups) == most:
            break
        try:
            group, was_shortened = _group(row, texts(row), encoder, max_length)
        except InputError as error:
            raise InputError(f"row {number} (id {row.id}): {error}") from None
        if group is None:
            dropped += 1
        else:
            groups.append(group)
            shortened += was_shortened
    return EncodedCorrections(tuple(groups), dropped, shortened)


def _group(
    row: Correction, texts: tuple[str, ...], encoder: CorrectionEncoder, max_length: int
) -> tuple[TokenizedRow | None, bool]:
    """Return a row, its prompt in the room that the longest text leaves, or None where that is too little."""
    responses = tuple(encoder.response(text) for text in texts)
    longest = max(responses, key=len)
    prompt = encoder.prompt(row.question, row.answer)
    short = not encoder.fits(prompt, longest, max_length)
    if short:
        if not (room := encoder.room(longest, max_length)):
            return None, False
        prompt = encoder.prompt(row.question, row.answer, room)
    return TokenizedRow(row.id, prompt, responses, (1.0,) * len(responses), row.weight), short


def learned_corrections(
    rows: CorrectionSet, encoder: CorrectionEncoder, max_length: int, identity: float, seed: int
) -> tuple[CorrectionSet, tuple[str, ...], tuple[str, ...]]:
    """Return the rows that are learned of those given, what is to be announced of that, and warnings.

    Args:
        rows: a task's rows.
        encoder: of the corrector's template.
        max_length: tokens of prompt and correction; longer ones are left out.
        identity: as many rows as this share of those that change anything are to leave a good answer as it is. Those
            that do count; the others are made of corrections, which are good answers.
        seed: draws them.

    Raises:
        InputError: no row fits.
    """
    made, copies = _with_identities(rows, identity, seed)
    encoded = tokenize_corrections(made, encoder, max_length)
    fitting = {group.id for group in encoded.groups}
    kept = tuple(row for row in made if row.id in fitting)
    if not kept:
        raise InputError(f"no correction fits max_length, {max_length} tokens with its prompt; raise it")
    lines = [f"  template {encoder.template.id}" + _named(encoder.objectives)]
    if copies:
        lines.append(f"  {copies} corrections are learned as answers that stay as they are, too")
    if encoded.dropped:
        lines.append(f"  {encoded.dropped} of {len(made)} rows are left out, too long for {max_length} tokens")
    return replace(rows, items=kept), tuple(lines), encoded.warnings(max_length)


def encode_learned(rows: Sequence[Any], encoder: CorrectionEncoder, max_length: int) -> TokenizedRows:
    """Return corrections as tokens, each the one text that is to follow its prompt; rows are known to fit."""
    encoded = tokenize_corrections(rows, encoder, max_length)
    return TokenizedRows(encoded.groups, max_length, encoded.shortened)


def encode_held_out(
    rows: Sequence[Correction], encoder: CorrectionEncoder, max_length: int, log: Callable[[str], None]
) -> TokenizedRows:
    """Return held-out corrections as pairs behind the template's prompt: the correction over the answer as it is.

    Raises:
        InputError: none fits.
    """
    encoded = tokenize_corrections(rows, encoder, max_length, compared)
    if not encoded.groups:
        raise InputError(f"no held-out correction fits max_length, {max_length} tokens with its prompt; raise it")
    if encoded.dropped:
        log(f"  {encoded.dropped} of {len(rows)} held-out rows are left out, too long for {max_length} tokens")
    for warning in encoded.warnings(max_length):
        log(f"  warning: held-out: {warning}")
    return TokenizedRows(encoded.groups, max_length, encoded.shortened)


def _with_identities(rows: CorrectionSet, identity: float, seed: int) -> tuple[CorrectionSet, int]:
    """Add corrections of what is good already, as many as are missing; returns how many were made."""
    edits = [row for row in rows if not row.is_identity]
    missing = round(identity * len(edits)) - (len(rows) - len(edits))
    if missing <= 0:
        return rows, 0
    drawn = random.Random(seed).sample(edits, missing)
    made = tuple(replace(row, answer=row.correction) for row in drawn)
    return replace(rows, items=rows.items + made), missing


def _named(objectives: Sequence[str]) -> str:
    return f", objectives {', '.join(objectives)}" if objectives else ""
