"""Training records: preferences, scored completions and corrections.

A `Scored` row may be a prompt alone, unscored answers or scored answers; a `Correction` may be a question, an answer to
be corrected, a labelled answer for evaluation, or a correction. Code that needs an optional column calls
`row.require("rewards")` or `rows.require("rewards")` first; the type annotations take it as given from there on.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any, ClassVar

from everalign.data.messages import (
    PROMPT_COLUMNS,
    Completion,
    Prompt,
    checked_answer,
    checked_completion,
    checked_prompt,
    completion_column,
    is_same,
    prompt_columns,
    prompt_of,
    split_conversations,
    split_texts,
)
from everalign.data.rows import (
    Row,
    RowSet,
    Schema,
    check_text,
    field_error,
    is_finite,
    kind,
    shown,
)
from everalign.data.rows import kind as kind_of
from everalign.errors import located

# Far above any meaningful weight, and far from the end of fp32.
_LARGEST_WEIGHT = 1e20

PREFERENCE_SCHEMA = Schema(
    columns=("prompt", "chosen", "rejected", "weight", *PROMPT_COLUMNS),
    required=("chosen", "rejected"),
    expected="expected 'prompt', 'chosen', 'rejected' and optionally 'weight'",
)


@dataclass(frozen=True)
class Preference(Row):
    """A prompt with a preferred and a rejected answer.

    Args:
        prompt: text that the answer continues, or chat messages that end before the assistant speaks; a `ChatPrompt` if
            tools or template variables belong to them.
        chosen: the better answer: text, or the assistant's messages if there is more to it. Never altered, not even its
            white space.
        rejected: the worse answer; differs from `chosen` by more than white space at its ends.
        weight: how much the row counts in a mean loss; positive and finite.
        label: what the row belongs to, such as a customer; no part of its content.

    Raises:
        InputError: a field is wrong; names the field and says what to do.
    """

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    weight: float = 1.0
    label: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt(self.prompt))
        for name in ("chosen", "rejected"):
            object.__setattr__(self, name, checked_completion(getattr(self, name), name, self.prompt))
        if is_same(self.chosen, self.rejected):
            raise field_error("rejected", "equal to 'chosen'", "a pair needs two different answers")
        self.check_weight_and_label()

    __hash__ = Row.__hash__  # a dataclass would make one of all fields

    def content(self) -> Any:
        """Prompt and answers."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}

    def preference(self) -> "Preference":
        """Returns the row itself."""
        return self

    def to_json(self) -> dict[str, Any]:
        """Returns the row as TRL's columns, with `weight` only if it is not 1."""
        answers = {name: completion_column(getattr(self, name)) for name in ("chosen", "rejected")}
        row = {**prompt_columns(self.prompt), **answers}
        return row if self.weight == 1.0 else {**row, "weight": self.weight}

    @classmethod
    def from_json(cls, obj: object, where: str, schema: Schema = PREFERENCE_SCHEMA) -> "Preference":
        """Reads a row of columns; other columns are ignored.

        Args:
            obj: a mapping. `chosen` and `rejected` are text, or lists of messages that begin and end with one of the
                assistant's. Without a prompt they are whole texts or conversations, see `split_texts` and
                `split_conversations`; conversations may come with one of their messages as a text prompt.
            where: place of the row, such as `pairs.jsonl:7`, for error messages.
            schema: the columns.

        Raises:
            InputError: `WHERE: field 'chosen': what is wrong; what to do`.
        """
        with located(where):
            row = schema.checked_row(obj)
            prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
            conversations = isinstance(chosen, list) and isinstance(rejected, list)
            if conversations and (prompt is None or isinstance(prompt, str)):
                prompt, chosen, rejected = split_conversations(prompt, chosen, rejected)
            elif prompt is None:
                if "prompt" in row:
                    raise field_error("prompt", "is null", "it must be text or a list of chat messages")
                missing = schema.missing_column("prompt", row.keys())
                # Two texts without a prompt may be whole texts, unless the prompt's column has another name.
                if not isinstance(chosen, str) or not isinstance(rejected, str) or missing.hint:
                    raise missing
                prompt, chosen, rejected = split_texts(chosen, rejected, missing)
            return cls(prompt_of(row, prompt), chosen, rejected, _weight(row))


@dataclass(frozen=True, repr=False)
class PreferenceSet(RowSet[Preference]):
    """An immutable sequence of preferences; a slice is a `PreferenceSet` too."""

    record = Preference


SCORED_SCHEMA = Schema(
    columns=("prompt", "completions", "rewards", "weight", "weights", "reference_rewards", *PROMPT_COLUMNS),
    required=("prompt", "completions", "rewards"),
    expected="expected 'prompt', 'completions', 'rewards' and optionally 'weight', 'weights' and 'reference_rewards'",
)
PROMPT_SCHEMA = Schema(
    columns=("prompt", "weight", *PROMPT_COLUMNS),
    required=("prompt",),
    expected="expected 'prompt' and optionally 'weight'",
)
_NUMBERS = ("rewards", "weights", "reference_rewards")
# For rows made in Python, of which any column but the prompt may be missing.
_ANY_SCORED = replace(SCORED_SCHEMA, required=("prompt",))


@dataclass(frozen=True)
class Scored(Row):
    """A prompt, alone or with completions, which may have rewards.

    Args:
        prompt: text that the answers continue, or chat messages that end before the assistant speaks.
        completions: the answers; an answer that was sampled twice is there twice. Never altered.
        rewards: one finite number for each completion; larger is better.
        weight: how much the row counts in a mean loss; positive and finite.
        weights: how much each completion counts, at least 0 and not all 0; None where yet to be computed.
        reference_rewards: finite rewards of independent answers of the reference policy to the same prompt, at least
            one, on the scale of `rewards`; not those of the completions.
        label: what the row belongs to, such as a customer; no part of its content.

    Raises:
        InputError: a field is wrong; names the field and says what to do.
    """

    column_types: ClassVar = {"completions": "a list of texts", "rewards": "a list of numbers"}

    prompt: Prompt
    completions: tuple[Completion, ...] = ()
    rewards: tuple[float, ...] = None  # type: ignore[assignment]  # see the module's docstring
    weight: float = 1.0
    weights: tuple[float, ...] | None = None
    reference_rewards: tuple[float, ...] | None = None
    label: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt(self.prompt))
        numbers = [name for name in _NUMBERS if getattr(self, name) is not None]
        if self.completions != () or numbers:
            object.__setattr__(self, "completions", checked_completions(self.completions, self.prompt))
        for name in numbers:
            count = None if name == "reference_rewards" else len(self.completions)
            object.__setattr__(self, name, _numbers(getattr(self, name), name, count))
        if self.weights is not None and not (min(self.weights) >= 0 and 0 < max(self.weights) <= _LARGEST_WEIGHT):
            problem = f"must be from 0 to {_LARGEST_WEIGHT:g} and not all 0"
            raise field_error("weights", problem, "remove rows of no weight")
        self.check_weight_and_label()

    __hash__ = Row.__hash__  # a dataclass would make one of all fields

    def content(self) -> Any:
        """Prompt, completions and rewards, as far as they are there."""
        found = {"prompt": self.prompt, "completions": self.completions, "rewards": self.rewards}
        return {name: value for name, value in found.items() if name == "prompt" or self.has(name)}

    @property
    def fingerprint_line(self) -> str:
        """The id with all weights and reference rewards, if the row is scored."""
        if not self.has("rewards"):
            return super().fingerprint_line
        reference = f" {self.reference_rewards!r}" if self.has("reference_rewards") else ""
        return f"{self.id} {self.weight!r} {self.weights!r}{reference}"

    def to_json(self) -> dict[str, Any]:
        """Returns the row as its columns, without those that are absent and without a `weight` of 1."""
        row = prompt_columns(self.prompt)
        if self.completions:
            row["completions"] = [completion_column(completion) for completion in self.completions]
        for name in _NUMBERS:
            if self.has(name):
                row[name] = list(getattr(self, name))
        return row if self.weight == 1.0 else {**row, "weight": self.weight}

    @classmethod
    def from_json(cls, obj: object, where: str, schema: Schema = _ANY_SCORED) -> "Scored":
        """Reads a row of columns; columns outside `schema` are ignored. Errors as in `Preference.from_json`."""
        with located(where):
            row = schema.checked_row(obj)
            names = [n for n in ("completions", *_NUMBERS) if n in schema.columns and row.get(n) is not None]
            cls.check_present(names, schema)
            return cls(prompt_of(row, row["prompt"]), weight=_weight(row), **{name: row[name] for name in names})

    def only(self, indices: Sequence[int]) -> "Scored":
        """Returns the row with some of its completions, at least one of which has to count."""
        parts = (self.completions, self.rewards, self.weights)
        kept = [None if part is None else tuple(part[i] for i in indices) for part in parts]
        return Scored(self.prompt, kept[0], kept[1], self.weight, kept[2], self.reference_rewards)  # type: ignore[arg-type]

    @classmethod
    def from_preference(cls, pair: Preference, rewards: tuple[float, float] | None = (1.0, 0.0)) -> "Scored":
        """Returns a row of two completions, the chosen one first; unscored if `rewards` is None."""
        return cls(pair.prompt, (pair.chosen, pair.rejected), rewards, pair.weight, label=pair.label)  # type: ignore[arg-type]

    def preference(self) -> Preference | None:
        """Returns the best completion over the worst; None if there are no rewards, or both are equal."""
        if not self.has("rewards"):
            return None
        best, worst = (self.rewards.index(pick(self.rewards)) for pick in (max, min))
        chosen, rejected = self.completions[best], self.completions[worst]
        if self.rewards[best] == self.rewards[worst] or is_same(chosen, rejected):
            return None
        return Preference(self.prompt, chosen, rejected, self.weight, self.label)


@dataclass(frozen=True, repr=False)
class ScoredSet(RowSet[Scored]):
    """An immutable sequence of scored rows, unscored rows or prompts; a slice is a `ScoredSet` too."""

    record = Scored

    @property
    def prompts_alone(self) -> bool:  # type: ignore[override]
        """Whether no row has completions."""
        return not any(row.completions for row in self.items)


def checked_completions(value: Any, prompt: Prompt | None = None) -> tuple[Completion, ...]:
    """Returns completions as records hold them, at least one; see `checked_completion`."""
    if not isinstance(value, list | tuple):
        raise field_error("completions", f"must be a list of texts, found {kind(value)}")
    if not value:
        raise field_error("completions", "the list is empty", "give at least one completion or remove the row")
    return tuple(checked_completion(item, f"completions[{i}]", prompt) for i, item in enumerate(value))


def _numbers(value: Any, field: str, count: int | None) -> tuple[float, ...]:
    """Returns `count` finite numbers; at least one if `count` is None."""
    if not isinstance(value, list | tuple):
        raise field_error(field, f"must be a list of numbers, found {kind(value)}")
    for i, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, Real):
            raise field_error(f"{field}[{i}]", f"must be a number, found {kind(item)}")
        if not is_finite(item):
            raise field_error(f"{field}[{i}]", f"must be finite, found {shown(item)}", "score it again or remove it")
    if count is None and not value:
        raise field_error(field, "the list is empty", "give at least one, or leave the column out of the row")
    if count is not None and len(value) != count:
        raise field_error(field, f"{len(value)} numbers for {count} completions", "give one for each")
    return tuple(float(item) for item in value)


def _weight(row: Mapping[Any, Any]) -> Any:
    weight = row.get("weight")
    return 1.0 if weight is None else weight


CORRECTION_SCHEMA = Schema(
    columns=("question", "answer", "correction", "weight", *PROMPT_COLUMNS),
    required=("question", "answer", "correction"),
    expected="expected 'question', 'answer', 'correction' and optionally 'weight'",
)
LABELLED_SCHEMA = Schema(
    columns=("question", "answer", "correction", "good", "kind", *PROMPT_COLUMNS),
    required=("question", "answer"),
    expected="expected 'question', 'answer' and optionally 'correction', 'good', 'kind'",
)
# For rows made in Python, of which any column but the question may be missing.
_ANY_CORRECTION = Schema(
    columns=("question", "answer", "correction", "weight", "good", "kind", *PROMPT_COLUMNS),
    required=("question",),
    expected="expected 'question' and optionally 'answer', 'correction', 'weight', 'good', 'kind'",
)


@dataclass(frozen=True)
class Correction(Row):
    """A question, alone or with an answer, which may have a correction or a label.

    Args:
        question: text, or chat messages that end before the assistant speaks.
        answer: the answer that somebody gave. Never altered, not even its white space.
        correction: the better answer; equal to `answer` if nothing has to change. Never altered.
        weight: how much the row counts in a mean loss; positive and finite.
        good: whether the answer is good as it is; None if the correction tells, or nobody knows.
        kind: the row's group in an evaluation report, such as `medical`.
        name: the row's own `id` in its file.
        place: the file's row, such as `questions.jsonl:7`, where one row may give several corrections.
        label: what the row belongs to, such as a customer; no part of its content.

    Raises:
        InputError: a field is wrong or contradicts another; names the field and says what to do.
    """

    column_types: ClassVar = {"answer": "text", "correction": "text"}

    question: Prompt
    answer: str = None  # type: ignore[assignment]  # see the module's docstring
    correction: str = None  # type: ignore[assignment]
    weight: float = 1.0
    good: bool | None = None
    kind: str | None = None
    name: str | None = None
    place: str | None = field(default=None, compare=False, repr=False)
    label: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", checked_prompt(self.question, "question", "answer"))
        for name in ("answer", "correction"):
            if self.has(name):
                object.__setattr__(self, name, checked_answer(getattr(self, name), name))
        if self.has("correction") and not self.has("answer"):
            raise field_error("answer", "no such column, though there is an edit of it", "add it")
        self.check_weight_and_label()
        if self.has("kind"):
            check_text(self.kind, "kind")
        if self.good is None:
            return
        if not isinstance(self.good, bool):
            raise field_error("good", f"must be true or false, found {kind_of(self.good)}")
        if self.has("correction") and self.good != (self.answer == self.correction):
            told = "the correction is another text than the answer" if self.good else "the answer is its own correction"
            raise field_error("good", f"is {str(self.good).lower()}, but {told}", "leave one of them out")

    __hash__ = Row.__hash__  # a dataclass would make one of all fields

    def content(self) -> Any:
        """Question, answer and correction as far as they are there; all columns for a labelled answer."""
        names = ("question", "answer", "correction", "good", "kind")
        found = {name: getattr(self, name) for name in names}
        if self.good is None and self.kind is None:
            return {name: value for name, value in found.items() if value is not None}
        return found

    @property
    def is_identity(self) -> bool:
        """Whether the answer is its own correction, letter by letter."""
        return self.has("correction") and self.answer == self.correction

    @property
    def is_good(self) -> bool:
        """Whether the answer is known to need no correction."""
        return self.is_identity if self.good is None else self.good

    def to_json(self) -> dict[str, Any]:
        """Returns the row as its columns, without those that are absent and without a `weight` of 1."""
        texts = {name: getattr(self, name) for name in ("answer", "correction", "good", "kind") if self.has(name)}
        row = {**prompt_columns(self.question, "question"), **texts}
        return row if self.weight == 1.0 else {**row, "weight": self.weight}

    @classmethod
    def from_json(cls, obj: object, where: str, schema: Schema = _ANY_CORRECTION) -> "Correction":
        """Reads a row of columns; columns outside `schema` are ignored. Errors as in `Preference.from_json`.

        `answer` and `correction` are text, or a list with one message of the assistant. A CSV file writes `good` as
        `true` or `false`; empty cells of `good` and `kind` are absent.
        """
        with located(where):
            row = schema.checked_row(obj)
            names = [n for n in ("answer", "correction", "good", "kind") if n in schema.columns and n in row]
            known = {name: row[name] for name in names if row[name] is not None}
            cls.check_present(known, schema)
            good = known.get("good")
            if isinstance(good, str):
                known["good"] = {"": None, "true": True, "false": False}.get(good.strip().lower(), good)
            known["kind"] = known.get("kind") or None
            weight = _weight(row) if "weight" in schema.columns else 1.0
            return cls(prompt_of(row, row["question"], "question"), weight=weight, **known)

    def preference(self) -> Preference | None:
        """Returns the correction over the answer; None without a correction, or if only white space differs."""
        if not self.has("correction") or self.answer.strip() == self.correction.strip():
            return None
        return Preference(self.question, self.correction, self.answer, self.weight, self.label)

    def scored(self) -> Scored | None:
        """Returns the correction with reward 1 and the answer with reward 0; None where there is no preference."""
        pair = self.preference()
        return None if pair is None else Scored.from_preference(pair)


def correction_of(pair: Preference) -> Correction:
    """Returns the rejected answer, corrected into the chosen one.

    Raises:
        InputError: one of the answers is more than a text.
    """
    rejected, chosen = checked_answer(pair.rejected, "rejected"), checked_answer(pair.chosen, "chosen")
    return Correction(pair.prompt, rejected, chosen, pair.weight)


@dataclass(frozen=True, repr=False)
class CorrectionSet(RowSet[Correction]):
    """An immutable sequence of corrections, or of answers without one; a slice is a `CorrectionSet` too."""

    record = Correction

    @cached_property
    def row_numbers(self) -> list[int]:
        """For each correction, the number from 1 of the file's row that it is from."""
        numbers: dict[object, int] = {}
        return [numbers.setdefault(row.place or i, len(numbers) + 1) for i, row in enumerate(self.items)]

    @classmethod
    def of_preferences(cls, pairs: Iterable[Preference]) -> "CorrectionSet":
        """Makes the correction of every pair's rejected answer; a `PreferenceSet` keeps its source."""
        found = {name: getattr(pairs, name) for name in ("source", "skipped") if isinstance(pairs, PreferenceSet)}
        return cls(tuple(correction_of(pair) for pair in pairs), **found)
