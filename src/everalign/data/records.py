"""The records that methods learn from: preferences, scored completions and corrections."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any

from everalign.data.messages import (
    PROMPT_COLUMNS,
    Completion,
    Prompt,
    checked_answer,
    checked_completion,
    checked_prompt,
    completion_column,
    is_same,
    message_text,
    messages,
    prompt_columns,
    prompt_of,
)
from everalign.data.rows import RowSet, Schema, check_text, checked_weight, content_id, is_finite, kind, shown
from everalign.data.rows import kind as kind_of
from everalign.errors import InputError

# What opens an assistant's turn in a text; the first kind that a text has is the one that it is written with.
_TURNS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"\n\nAssistant:",
        r"<\|im_start\|>assistant\n",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        r"<\|assistant\|>\n?",
        r"<start_of_turn>model\n",
        r"\[/INST\]",
        r"^### (?:Response|Assistant):\n?",
        r"(?<=\s)ASSISTANT:",
        r"^(?:Assistant|AI|Bot|Response|Answer|A):",
    )
)
_JOINERS = "\u200d\ufe0e\ufe0f"


def split_conversations(
    prompt: str | None, chosen: list[Any], rejected: list[Any]
) -> tuple[Any, Completion, Completion]:
    """Return the messages that two conversations share, before an assistant's, and what follows in each.

    Args:
        prompt: the row's own, where it repeats one of the messages as text; None where there is none.
        chosen: the better conversation.
        rejected: the worse one.

    Raises:
        InputError: they share no beginning, or the prompt is another text.
    """
    better, worse = messages(chosen, "chosen"), messages(rejected, "rejected")
    shared = 0
    while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
        shared += 1
    while shared and not (better[shared]["role"] == worse[shared]["role"] == "assistant"):
        shared -= 1
    if shared == 0:
        raise InputError(
            "field 'prompt': none found; 'chosen' and 'rejected' are message lists that do not begin alike: "
            'give the prompt as messages too, such as [{"role": "user", "content": "..."}]'
        )
    context = better[:shared]
    if prompt is not None and prompt.strip() not in {message_text(message).strip() for message in context}:
        raise InputError(
            "field 'prompt': its text is no message of the conversations in 'chosen' and 'rejected'; "
            "leave the column out, or give the answers alone"
        )
    return context, checked_completion(better[shared:], "chosen"), checked_completion(worse[shared:], "rejected")


def split_texts(chosen: str, rejected: str, missing: InputError) -> tuple[str, str, str]:
    """Return what two texts share, through the last mark of an assistant's turn, and what follows in each.

    Without such a mark the prompt ends before the first word that differs; a space before it belongs to the answers, as
    in TRL.

    Args:
        chosen: the better text.
        rejected: the worse one.
        missing: raised where they share nothing.
    """
    check_text(chosen, "chosen")
    check_text(rejected, "rejected")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    alike = next((i for i, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    found = ([turn.end() for turn in pattern.finditer(chosen, 0, alike)] for pattern in _TURNS)
    turns = next((ends for ends in found if ends), [])
    # A text that ends with the mark has no answer behind it.
    cut = max((end for end in turns if chosen[end:].strip() and rejected[end:].strip()), default=None)
    cut = _before_word(chosen, rejected, alike) if cut is None else cut
    if not chosen[:cut].strip():
        raise missing
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _before_word(chosen: str, rejected: str, alike: int) -> int:
    """Return where the word begins in which two texts differ, or the space before it."""
    shorter = min(len(chosen), len(rejected))
    cut = alike
    while cut and (cut == shorter or not (_begins(chosen, cut) and _begins(rejected, cut))):
        cut -= 1
    return cut - 1 if cut and chosen[cut - 1] == " " else cut


def _begins(text: str, place: int) -> bool:
    """Whether a word, or a character that is a word of its own, may begin at this place."""
    before, here = text[place - 1], text[place]
    if unicodedata.combining(here) or here in _JOINERS or before == _JOINERS[0]:
        return False
    return not (_is_letter(before) and _is_letter(here))


def _is_letter(character: str) -> bool:
    """Whether a character is part of words that spaces divide; Chinese and Japanese ones, Thai and Khmer are not."""
    code = ord(character)
    spaced = code < 0x0E00 or 0x10A0 <= code < 0x1780 or 0x1E00 <= code < 0x2000 or 0xAC00 <= code < 0xD7B0
    return spaced and (character.isalnum() or character in "'’_")


PREFERENCE_SCHEMA = Schema(
    columns=("prompt", "chosen", "rejected", "weight", *PROMPT_COLUMNS),
    required=("chosen", "rejected"),
    expected="expected 'prompt', 'chosen', 'rejected' and optionally 'weight'",
    other_names={
        "prompt": ("instruction", "question", "query", "input", "messages", "conversations"),
        "chosen": ("preferred", "accepted", "better", "winner", "positive", "output"),
        "rejected": ("dispreferred", "refused", "worse", "loser", "negative"),
    },
)


@dataclass(frozen=True)
class Preference:
    """A prompt, the answer that was preferred and the one that was not.

    Args:
        prompt: plain text that the answer continues, or chat messages that end before the assistant speaks; as a
            `ChatPrompt` where tools or variables of the template belong to them.
        chosen: the better answer: a text, or the assistant's messages where there is more to it. Never altered, not
            even its white space.
        rejected: the worse answer; differs from `chosen` by more than white space at its ends.
        weight: how much this row counts in a mean loss; positive and finite.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt(self.prompt))
        for name in ("chosen", "rejected"):
            object.__setattr__(self, name, checked_completion(getattr(self, name), name, self.prompt))
        if is_same(self.chosen, self.rejected):
            raise InputError("field 'rejected': equal to 'chosen'; a pair needs two different answers")
        object.__setattr__(self, "weight", checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash((self.id, self.weight))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content (prompt, chosen, rejected; not the weight)."""
        return content_id({"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected})

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again."""
        return (self.id,)

    def to_json(self) -> dict[str, Any]:
        """The row as its columns, which are TRL's; those that may be missing only where they say something."""
        answers = {name: completion_column(getattr(self, name)) for name in ("chosen", "rejected")}
        row = {**prompt_columns(self.prompt), **answers}
        return row if self.weight == 1.0 else {**row, "weight": self.weight}

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Preference":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping. `chosen` and `rejected` are text, or a list of messages that begins and ends with one of the
                assistant's. Where the prompt is missing they are whole texts, or whole conversations (which may repeat
                a prompt that is text): see `split_texts` and `split_conversations`.
            where: place of the row (such as `pairs.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'chosen': what is wrong; what to do`.
        """
        try:
            row = PREFERENCE_SCHEMA.row(obj)
            PREFERENCE_SCHEMA.check(row.keys())
            weight = row.get("weight")
            prompt, chosen, rejected = _parts(row)
            return cls(prompt_of(row, prompt), chosen, rejected, 1.0 if weight is None else weight)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def _parts(row: Mapping[Any, Any]) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected as the constructor takes them."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    conversations = isinstance(chosen, list) and isinstance(rejected, list)
    if conversations and (prompt is None or isinstance(prompt, str)):
        return split_conversations(prompt, chosen, rejected)
    if prompt is None:
        if "prompt" in row:
            raise InputError("field 'prompt': is null; it must be text or a list of chat messages")
        missing = PREFERENCE_SCHEMA.missing("prompt", row.keys())
        # Two texts without a prompt may be whole ones, or their prompt's column has another name.
        if not isinstance(chosen, str) or not isinstance(rejected, str) or "; rename " in str(missing):
            raise missing
        return split_texts(chosen, rejected, missing)
    return prompt, chosen, rejected


@dataclass(frozen=True, repr=False)
class PreferenceSet(RowSet[Preference]):
    """An immutable sequence of preferences; a slice is a `PreferenceSet` too."""

    record = Preference


PROMPT_SCHEMA = Schema(
    columns=("prompt", "weight", *PROMPT_COLUMNS),
    required=("prompt",),
    expected="expected 'prompt' and optionally 'weight'",
    other_names={"prompt": ("instruction", "question", "query", "input", "messages", "conversations")},
)


@dataclass(frozen=True)
class PromptRow:
    """A prompt alone.

    Args:
        prompt: plain text that the answers continue, or chat messages that end before the assistant speaks.
        weight: how much the row counts in a mean loss; positive and finite.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    prompt: Prompt
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt(self.prompt))
        object.__setattr__(self, "weight", checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash((self.id, self.weight))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the prompt."""
        return content_id({"prompt": self.prompt})

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again."""
        return (self.id,)

    def answered(self, completions: Sequence[Completion]) -> "Unscored":
        """The row with its answers."""
        return Unscored(self.prompt, tuple(completions), self.weight)

    @classmethod
    def from_json(cls, obj: object, where: str) -> "PromptRow":
        """Reads one row of columns; others are not looked at.

        Raises:
            InputError: `where: field 'prompt': what is wrong; what to do`.
        """
        try:
            row = PROMPT_SCHEMA.row(obj)
            PROMPT_SCHEMA.check(row.keys())
            weight = row.get("weight")
            return cls(prompt_of(row, row["prompt"]), 1.0 if weight is None else weight)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True, repr=False)
class PromptSet(RowSet[PromptRow]):
    """An immutable sequence of prompts; a slice is a `PromptSet` too."""

    record = PromptRow


UNSCORED_SCHEMA = Schema(
    columns=("prompt", "completions", "chosen", "rejected", "rewards", "weight", *PROMPT_COLUMNS),
    required=(),
    expected="expected 'prompt' and 'completions', or 'prompt', 'chosen' and 'rejected'",
    other_names={
        "prompt": ("instruction", "question", "query", "input", "messages", "conversations"),
        "completions": ("responses", "answers", "outputs", "candidates", "completion"),
    },
    lists=frozenset({"completions", "rewards"}),
)


@dataclass(frozen=True)
class Unscored:
    """A prompt and the completions that are to be scored.

    Args:
        prompt: plain text that the answers continue, or chat messages that end before the assistant speaks.
        completions: the answers, at least one; never altered.
        weight: how much the row counts in a mean loss; positive and finite. Scoring carries it along.
        rewarded: whether the row came with rewards.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    weight: float = 1.0
    rewarded: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt(self.prompt))
        object.__setattr__(self, "completions", checked_completions(self.completions, self.prompt))
        object.__setattr__(self, "weight", checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash((self.id, self.weight))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content (prompt and completions; not the weight)."""
        return content_id({"prompt": self.prompt, "completions": self.completions})

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again."""
        return (self.id,)

    def scored(self, rewards: Sequence[float]) -> "Scored":
        """The row with its rewards, one for each completion."""
        return Scored(self.prompt, self.completions, tuple(rewards), self.weight)

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Unscored":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping with completions, or a preference as `Preference.from_json` reads it.
            where: place of the row (such as `answers.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'completions': what is wrong; what to do`.
        """
        try:
            row = UNSCORED_SCHEMA.row(obj)
            rewarded = row.get("rewards") is not None
            if not _is_preference(row):
                missing = [name for name in ("completions", "prompt") if name not in row]
                if missing:
                    raise UNSCORED_SCHEMA.missing(missing[0], row.keys())
                weight = row.get("weight")
                prompt = prompt_of(row, row["prompt"])
                return cls(prompt, row["completions"], 1.0 if weight is None else weight, rewarded)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return replace(cls.of_pair(Preference.from_json(obj, where)), rewarded=rewarded)

    @classmethod
    def of_pair(cls, pair: Preference) -> "Unscored":
        """The two answers of a preference, the better one first."""
        return cls(pair.prompt, (pair.chosen, pair.rejected), pair.weight)


@dataclass(frozen=True, repr=False)
class UnscoredSet(RowSet[Unscored]):
    """An immutable sequence of rows to be scored; a slice is an `UnscoredSet` too."""

    record = Unscored


def _is_preference(row: Mapping[Any, Any]) -> bool:
    """Whether a row is a pair; a table's row may have the columns of both kinds, one of them null."""
    pair = [name for name in ("chosen", "rejected") if row.get(name) is not None]
    if pair and row.get("completions") is not None:
        raise InputError(f"field 'completions': the row has {pair[0]!r} too, which is a completion itself; keep one")
    return bool(pair)


# Far above any weight that means something, and far from the end of fp32.
_LARGEST_WEIGHT = 1e20

SCORED_SCHEMA = Schema(
    columns=("prompt", "completions", "rewards", "weight", "weights", "reference_rewards", *PROMPT_COLUMNS),
    required=("prompt", "completions", "rewards"),
    expected="expected 'prompt', 'completions', 'rewards' and optionally 'weight', 'weights' and 'reference_rewards'",
    other_names={
        "prompt": ("instruction", "question", "query", "input", "messages", "conversations"),
        "completions": ("responses", "answers", "outputs", "candidates", "completion"),
        "rewards": ("scores", "ratings", "labels", "reward", "score"),
    },
    lists=frozenset({"completions", "rewards", "weights", "reference_rewards"}),
)


@dataclass(frozen=True)
class Scored:
    """A prompt and what each of its completions is worth.

    Args:
        prompt: plain text that the answers continue, or chat messages that end before the assistant speaks.
        completions: the answers, at least one; the same answer sampled twice stands there twice. Never altered.
        rewards: one finite number for each completion; larger is better.
        weight: how much this row counts in a mean loss; positive and finite.
        weights: how much each completion counts, at least 0 and not all 0; None where it is yet to be computed.
        reference_rewards: finite rewards of independent answers of the reference policy to the same prompt, at least
            one, on the scale of `rewards`; not those of the completions. None where there are none.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float, ...]
    weight: float = 1.0
    weights: tuple[float, ...] | None = None
    reference_rewards: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt(self.prompt))
        object.__setattr__(self, "completions", checked_completions(self.completions, self.prompt))
        each = len(self.completions)
        for field, count in (("rewards", each), ("weights", each), ("reference_rewards", None)):
            if getattr(self, field) is not None or field == "rewards":
                object.__setattr__(self, field, _numbers(getattr(self, field), field, count))
        if self.weights is not None and not (min(self.weights) >= 0 and 0 < max(self.weights) <= _LARGEST_WEIGHT):
            raise InputError(
                f"field 'weights': must be from 0 to {_LARGEST_WEIGHT:g} and not all 0; remove rows of no weight"
            )
        object.__setattr__(self, "weight", checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash((self.id, self.weight, self.weights, self.reference_rewards))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content (prompt, completions, rewards; no weights, nothing beside)."""
        return content_id({"prompt": self.prompt, "completions": self.completions, "rewards": self.rewards})

    def to_json(self) -> dict[str, Any]:
        """The row as its columns; `weight` only where it is not 1, what may be missing only where it is there."""
        completions = [completion_column(completion) for completion in self.completions]
        row = {**prompt_columns(self.prompt), "completions": completions, "rewards": list(self.rewards)}
        for field in ("weights", "reference_rewards"):
            if getattr(self, field) is not None:
                row[field] = list(getattr(self, field))
        return row if self.weight == 1.0 else {**row, "weight": self.weight}

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Scored":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping.
            where: place of the row (such as `scored.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'rewards': what is wrong; what to do`.
        """
        try:
            row = SCORED_SCHEMA.row(obj)
            SCORED_SCHEMA.check(row.keys())
            weight = row.get("weight")
            fields = (
                prompt_of(row, row["prompt"]),
                row["completions"],
                row["rewards"],
                1.0 if weight is None else weight,
            )
            return cls(*fields, weights=row.get("weights"), reference_rewards=row.get("reference_rewards"))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def only(self, indices: Sequence[int]) -> "Scored":
        """The row with some of its completions, at least one of which has to count."""
        parts = (self.completions, self.rewards, self.weights)
        kept = [None if part is None else tuple(part[i] for i in indices) for part in parts]
        return Scored(self.prompt, kept[0], kept[1], self.weight, kept[2], self.reference_rewards)  # type: ignore[arg-type]

    @cached_property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again: its own, and that of the preference in it, if any."""
        pair = self.preference()
        return (self.id,) if pair is None else (self.id, pair.id)

    @classmethod
    def from_preference(cls, pair: Preference) -> "Scored":
        """Two completions: the chosen one, with reward 1, and the rejected one, with reward 0."""
        return cls(pair.prompt, (pair.chosen, pair.rejected), (1.0, 0.0), pair.weight)

    def preference(self) -> Preference | None:
        """The best completion over the worst one; None where all rewards, or these two texts, are equal."""
        best, worst = (self.rewards.index(pick(self.rewards)) for pick in (max, min))
        chosen, rejected = self.completions[best], self.completions[worst]
        if self.rewards[best] == self.rewards[worst] or is_same(chosen, rejected):
            return None
        return Preference(self.prompt, chosen, rejected, self.weight)


@dataclass(frozen=True, repr=False)
class ScoredSet(RowSet[Scored]):
    """An immutable sequence of scored rows; a slice is a `ScoredSet` too."""

    record = Scored

    @staticmethod
    def _line(row: Scored) -> str:
        beside = "" if row.reference_rewards is None else f" {row.reference_rewards!r}"
        return f"{row.id} {row.weight!r} {row.weights!r}{beside}"


def checked_completions(value: Any, prompt: Prompt | None = None) -> tuple[Completion, ...]:
    """Return completions as records hold them, at least one; see `checked_completion`."""
    if not isinstance(value, list | tuple):
        raise InputError(f"field 'completions': must be a list of texts, found {kind(value)}")
    if not value:
        raise InputError("field 'completions': the list is empty; give at least one completion or remove the row")
    return tuple(checked_completion(item, f"completions[{i}]", prompt) for i, item in enumerate(value))


def _numbers(value: Any, field: str, count: int | None) -> tuple[float, ...]:
    """Return finite numbers, as many as there are completions; with None for `count`, at least one."""
    if not isinstance(value, list | tuple):
        raise InputError(f"field {field!r}: must be a list of numbers, found {kind(value)}")
    for i, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, Real):
            raise InputError(f"field '{field}[{i}]': must be a number, found {kind(item)}")
        if not is_finite(item):
            raise InputError(f"field '{field}[{i}]': must be finite, found {shown(item)}; score it again or remove it")
    if count is None and not value:
        raise InputError(f"field {field!r}: the list is empty; give at least one, or leave the column out of the row")
    if count is not None and len(value) != count:
        raise InputError(f"field {field!r}: {len(value)} numbers for {count} completions; give one for each")
    return tuple(float(item) for item in value)


CORRECTION_SCHEMA = Schema(
    columns=("question", "answer", "correction", "weight", *PROMPT_COLUMNS),
    required=("question", "answer", "correction"),
    expected="expected 'question', 'answer', 'correction' and optionally 'weight'",
    other_names={
        "question": ("prompt", "instruction", "query", "input", "messages", "conversations"),
        "answer": ("original", "response", "completion", "draft", "output", "rejected"),
        "correction": ("corrected", "revision", "revised", "edit", "edited", "rewrite", "improved", "chosen"),
    },
)


@dataclass(frozen=True)
class Correction:
    """A question, an answer, and what the answer should have been.

    Args:
        question: plain text, or chat messages that end before the assistant speaks.
        answer: the answer that somebody gave. Never altered, not even its white space.
        correction: the better answer; equal to `answer` where nothing has to change. Never altered.
        weight: how much this row counts in a mean loss; positive and finite.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    question: Prompt
    answer: str
    correction: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", checked_prompt(self.question, "question", "answer"))
        for name in ("answer", "correction"):
            object.__setattr__(self, name, checked_answer(getattr(self, name), name))
        object.__setattr__(self, "weight", checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash((self.id, self.weight))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content (question, answer, correction; not the weight)."""
        return content_id({"question": self.question, "answer": self.answer, "correction": self.correction})

    @cached_property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again: its own, and that of the preference in it, if any."""
        pair = self.preference()
        return (self.id,) if pair is None else (self.id, pair.id)

    @property
    def is_identity(self) -> bool:
        """Whether the answer is its own correction, letter by letter."""
        return self.answer == self.correction

    def to_json(self) -> dict[str, Any]:
        """The row as its columns; `weight` only where it is not 1."""
        row = {**prompt_columns(self.question, "question"), "answer": self.answer, "correction": self.correction}
        return row if self.weight == 1.0 else {**row, "weight": self.weight}

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Correction":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping. `answer` and `correction` are text or a list with one assistant message.
            where: place of the row (such as `edits.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'correction': what is wrong; what to do`.
        """
        try:
            row = CORRECTION_SCHEMA.row(obj)
            CORRECTION_SCHEMA.check(row.keys())
            weight = row.get("weight")
            question = prompt_of(row, row["question"], "question")
            return cls(question, row["answer"], row["correction"], 1.0 if weight is None else weight)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def preference(self) -> Preference | None:
        """The correction over the answer; None where they differ by no more than white space at their ends."""
        if self.answer.strip() == self.correction.strip():
            return None
        return Preference(self.question, self.correction, self.answer, self.weight)

    def scored(self) -> Scored | None:
        """The correction with reward 1 and the answer with reward 0; None where there is no preference."""
        pair = self.preference()
        return None if pair is None else Scored.from_preference(pair)


def correction_of(pair: Preference) -> Correction:
    """The rejected answer, corrected into the chosen one.

    Raises:
        InputError: one of them is more than a text.
    """
    rejected, chosen = checked_answer(pair.rejected, "rejected"), checked_answer(pair.chosen, "chosen")
    return Correction(pair.prompt, rejected, chosen, pair.weight)


@dataclass(frozen=True, repr=False)
class CorrectionSet(RowSet[Correction]):
    """An immutable sequence of corrections; a slice is a `CorrectionSet` too."""

    record = Correction

    @classmethod
    def of_preferences(cls, pairs: Iterable[Preference]) -> "CorrectionSet":
        """Every pair as the correction of its rejected answer; a `PreferenceSet` keeps its source."""
        found = {name: getattr(pairs, name) for name in ("source", "skipped") if isinstance(pairs, PreferenceSet)}
        return cls(tuple(correction_of(pair) for pair in pairs), **found)


_COLUMNS = ("question", "answer", "prompt", "completion")

UNCORRECTED_SCHEMA = Schema(
    columns=(*_COLUMNS, *PROMPT_COLUMNS),
    required=(),
    expected="expected 'question' and 'answer', or 'prompt' and 'completion'",
    other_names={
        "question": ("instruction", "query", "input", "messages", "conversations"),
        "answer": ("original", "response", "draft", "output"),
        "completion": ("original", "response", "draft", "output"),
    },
)


@dataclass(frozen=True)
class Uncorrected:
    """A question and the answer that is to be corrected.

    Args:
        question: plain text, or chat messages that end before the assistant speaks.
        answer: the answer; never altered.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    question: Prompt
    answer: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", checked_prompt(self.question, "question", "answer"))
        check_text(self.answer, "answer")

    def __hash__(self) -> int:
        return hash(self.id)

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content."""
        return content_id({"question": self.question, "answer": self.answer})

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again."""
        return (self.id,)

    @property
    def weight(self) -> float:
        """Every row counts alike."""
        return 1.0

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Uncorrected":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping with `question` and `answer`, or `prompt` and `completion`.
            where: place of the row (such as `answers.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'answer': what is wrong; what to do`.
        """
        try:
            row = UNCORRECTED_SCHEMA.row(obj)
            given = {name for name in _COLUMNS if row.get(name) is not None}
            names = ("prompt", "completion") if given & {"prompt", "completion"} else ("question", "answer")
            if others := sorted(given - set(names)):
                raise InputError(f"field {others[0]!r}: the row has {names[0]!r} or {names[1]!r} too; keep one pair")
            for name in names:
                if name not in row:
                    raise UNCORRECTED_SCHEMA.missing(name, row.keys())
            return cls(prompt_of(row, row[names[0]], names[0]), row[names[1]])
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True, repr=False)
class UncorrectedSet(RowSet[Uncorrected]):
    """An immutable sequence of answers to be corrected; a slice is an `UncorrectedSet` too."""

    record = Uncorrected


_ANSWERED = ("answer", "chosen", "rejected", "completions")

DRAFT_SCHEMA = Schema(
    columns=(
        "question",
        "prompt",
        *_ANSWERED,
        "correction",
        "edited_text",
        "rewards",
        "weight",
        "id",
        *PROMPT_COLUMNS,
    ),
    required=(),
    expected="expected 'question' or 'prompt', alone or with 'answer' (and 'correction' or 'edited_text'), "
    "'chosen' and 'rejected', or 'completions' (and 'rewards')",
    other_names={"question": ("instruction", "query", "input", "messages", "conversations")},
    lists=frozenset({"completions", "rewards"}),
)


@dataclass(frozen=True)
class Draft:
    """A question on its way to a correction.

    Args:
        question: plain text, or chat messages that end before the assistant speaks.
        answers: those that the row has, which a better one may be asked for: an answer, a preference's rejected one,
            or a scored row's completions. Never altered.
        edit: the correction that the row has itself: an edit, a preference's chosen over its rejected answer, or a
            scored row's best over its worst completion. None where there is none.
        weight: how much the row counts in a mean loss; positive and finite.
        name: what the row itself calls its `id`; None where it does not.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    question: Prompt
    answers: tuple[str, ...] = ()
    edit: Correction | None = None
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", checked_prompt(self.question, "question", "answer"))
        for text in self.answers:
            check_text(text, "answer")
        object.__setattr__(self, "weight", checked_weight(self.weight))

    def __hash__(self) -> int:
        return hash(self.id)

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content (question, answers and edit)."""
        return content_id([self.question, self.answers, None if self.edit is None else self.edit.id])

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again."""
        return (self.id,)

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Draft":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping. A preference is read as `Preference.from_json` reads it.
            where: place of the row (such as `questions.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'question': what is wrong; what to do`.
        """
        try:
            row = DRAFT_SCHEMA.row(obj)
            answered = _answered(row)
            name = _name(row.get("id"))
            if answered == "chosen":
                return _of_preference(row, name)
            question = _only(row, "question", "prompt")
            if question is None:
                raise DRAFT_SCHEMA.missing("question", row.keys())
            question = prompt_of(row, question, "question")
            weight = 1.0 if row.get("weight") is None else row["weight"]
            if answered == "completions":
                return _of_completions(row, question, weight, name)
            return _of_answer(row, question, weight, name)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True, repr=False)
class DraftSet(RowSet[Draft]):
    """An immutable sequence of drafts; a slice is a `DraftSet` too."""

    record = Draft


def _of_answer(row: Mapping[Any, Any], question: Any, weight: Any, name: str | None) -> Draft:
    original, better = row.get("answer"), _only(row, "correction", "edited_text")
    if original is None:
        if better is not None:
            raise InputError("field 'answer': no such column, though there is an edit of it; add it")
        return Draft(question, (), None, weight, name)
    text = checked_answer(original, "answer")
    if better is None:
        return Draft(question, (text,), None, weight, name)
    edit = Correction(question, text, checked_answer(better, "correction"), weight)
    return Draft(edit.question, (text,), edit, weight, name)


def _of_preference(row: Mapping[Any, Any], name: str | None) -> Draft:
    question = _only(row, "question", "prompt")
    asked = {} if question is None else {"prompt": question}
    pair = Preference.from_json({**row, **asked}, "as a preference")
    edit = correction_of(pair)
    return Draft(pair.prompt, (edit.answer,), edit, pair.weight, name)


def _of_completions(row: Mapping[Any, Any], question: Any, weight: Any, name: str | None) -> Draft:
    if row.get("rewards") is None:
        return Draft(question, _texts(checked_completions(row["completions"])), None, weight, name)
    scored = Scored(question, row["completions"], row["rewards"], weight)
    pair = scored.preference()
    edit = None if pair is None else correction_of(pair)
    return Draft(scored.prompt, _texts(scored.completions), edit, weight, name)


def _texts(completions: Sequence[Completion]) -> tuple[str, ...]:
    return tuple(checked_answer(text, f"completions[{i}]") for i, text in enumerate(completions))


def _answered(row: Mapping[Any, Any]) -> str | None:
    """Tell which columns hold the row's answers; a table's row may have those of all kinds, the others null."""
    found = [name for name in _ANSWERED if row.get(name) is not None]
    kinds = list(dict.fromkeys("chosen" if name == "rejected" else name for name in found))
    if len(kinds) > 1:
        raise InputError(
            f"field {found[0]!r}: the row has {found[-1]!r} too, which is another kind of answer; keep one"
        )
    return kinds[0] if kinds else None


def _only(row: Mapping[Any, Any], first: str, second: str) -> Any:
    """Return the one of two columns that is there, None where neither is."""
    if row.get(first) is not None and row.get(second) is not None:
        raise InputError(f"field {first!r}: the row has {second!r} too, which is another name of it; keep one")
    return row.get(second) if row.get(first) is None else row[first]


def _name(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"field 'id': must be text or a whole number, found {kind(value)}")
    return str(value)


ANSWER_SCHEMA = Schema(
    columns=("question", "answer", "correction", "good", "kind", *PROMPT_COLUMNS),
    required=("question", "answer"),
    expected="expected 'question', 'answer' and optionally 'correction', 'good', 'kind'",
    other_names={
        "question": ("prompt", "instruction", "query", "input", "messages", "conversations"),
        "answer": ("original", "response", "completion", "draft", "output", "rejected"),
    },
)
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class Answer:
    """A question and an answer, and what is known of the answer.

    Args:
        question: plain text, or chat messages that end before the assistant speaks.
        answer: the answer; never altered.
        correction: the answer as it should be; None where nobody said so.
        good: whether the answer is good as it is; None where it is told by the correction, or not at all.
        kind: what kind of row it is, such as `medical`; None for none.

    Raises:
        InputError: a field is wrong, or contradicts another; the message names the field and says what to do.
    """

    question: Prompt
    answer: str
    correction: str | None = None
    good: bool | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", checked_prompt(self.question, "question", "answer"))
        check_text(self.answer, "answer")
        if self.correction is not None:
            check_text(self.correction, "correction")
        if self.kind is not None:
            check_text(self.kind, "kind")
        if self.good is not None and not isinstance(self.good, bool):
            raise InputError(f"field 'good': must be true or false, found {kind_of(self.good)}")
        if None not in (self.good, self.correction) and self.good != (self.answer == self.correction):
            told = "the correction is another text than the answer" if self.good else "the answer is its own correction"
            raise InputError(f"field 'good': is {str(self.good).lower()}, but {told}; leave one of them out")

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def is_good(self) -> bool:
        """Whether the answer is known to need no correction."""
        return self.answer == self.correction if self.good is None else self.good

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content."""
        names = ("question", "answer", "correction", "good", "kind")
        return content_id({name: getattr(self, name) for name in names})

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the row may be found again."""
        return (self.id,)

    @property
    def weight(self) -> float:
        """Every row counts alike."""
        return 1.0

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Answer":
        """Reads one row of columns; others are not looked at.

        Args:
            obj: a mapping. In a CSV file `good` is `true` or `false`, and empty cells of `good` and `kind` say nothing.
            where: place of the row (such as `answers.jsonl:7`), the start of every error message.

        Raises:
            InputError: `where: field 'good': what is wrong; what to do`.
        """
        try:
            row = ANSWER_SCHEMA.row(obj)
            ANSWER_SCHEMA.check(row.keys())
            question = prompt_of(row, row["question"], "question")
            return cls(question, row["answer"], row.get("correction"), _flag(row.get("good")), _label(row))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def _flag(value: Any) -> Any:
    if isinstance(value, str):
        return None if not value.strip() else _WORDS.get(value.strip().lower(), value)
    return value


def _label(row: Any) -> Any:
    return row.get("kind") or None


@dataclass(frozen=True, repr=False)
class AnswerSet(RowSet[Answer]):
    """An immutable sequence of answers; a slice is an `AnswerSet` too."""

    record = Answer
