"""Base of all training records: column schemas, field checks, ids, and the immutable row set."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, overload

from everalign.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
Ordered = TypeVar("Ordered", str, list[int])


def field_error(field: str, problem: str, hint: str | None = None) -> InputError:
    """Returns the error `field 'NAME': PROBLEM; HINT`."""
    message = f"field {field!r}: {problem}" + (f"; {hint}" if hint else "")
    return InputError(message, field=field, hint=hint)


_PROMPT_NAMES = ("instruction", "query", "input", "messages", "conversations")
OTHER_NAMES = {
    "prompt": ("question", *_PROMPT_NAMES),
    "question": ("prompt", *_PROMPT_NAMES),
    "chosen": ("preferred", "accepted", "better", "winner", "positive", "output"),
    "rejected": ("dispreferred", "refused", "worse", "loser", "negative"),
    "completions": ("responses", "answers", "outputs", "candidates", "completion"),
    "rewards": ("scores", "ratings", "labels", "reward", "score"),
    "answer": ("original", "response", "completion", "draft", "output", "rejected"),
    "completion": ("original", "response", "draft", "output"),
    "correction": ("corrected", "revision", "revised", "edit", "edited", "rewrite", "improved", "chosen"),
}
"""Common other names of columns, which errors suggest to rename."""


@dataclass(frozen=True)
class Schema:
    """The columns that a reader takes from a table. Others are listed in `RowSet.ignored`.

    Args:
        columns: all columns that are read, the prompt first.
        required: columns without which no row can be read.
        expected: describes the columns in error messages.
        lists: columns of lists, which a CSV file holds as JSON.
        numbers: columns of numbers, which a CSV file holds as text.
    """

    columns: tuple[str, ...]
    required: tuple[str, ...]
    expected: str
    lists: tuple[str, ...] = ("completions", "rewards", "weights", "reference_rewards")
    numbers: tuple[str, ...] = ("weight",)

    def checked_row(self, value: object) -> Mapping[Any, Any]:
        """Returns a raw row if it is a mapping with all required columns."""
        if not isinstance(value, Mapping):
            raise InputError(f"a row must be an object with columns, found {kind(value)}; {self.expected}")
        self.check_columns(value.keys())
        return value

    def check_columns(self, found: Collection[Any]) -> None:
        """Raises an InputError if a required column is not among `found`."""
        for name in self.required:
            if name not in found:
                raise self.missing_column(name, found)

    def missing_column(self, name: str, found: Collection[Any]) -> InputError:
        """Returns the error for a missing column; it suggests a column to rename if one looks right."""
        names = [column for column in found if isinstance(column, str)]
        free = [column for column in names if column not in self.columns]
        near = difflib.get_close_matches(name, free, n=1) or [n for n in OTHER_NAMES.get(name, ()) if n in free]
        hint = f"rename {near[0]!r}?" if near else None
        listed = ", ".join(map(repr, names)) or "none"
        problem = "no such column" + (f"; {hint}" if hint else "")
        message = f"field {name!r}: {problem} (found: {listed}; {self.expected})"
        return InputError(message, field=name, hint=hint)


def check_text(value: Any, field: str) -> None:
    """Raises an InputError unless `value` is text that is not blank and can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise field_error(field, f"must be text, found {kind(value)}")
    if not value.strip():
        raise field_error(field, "is empty", "fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"half a surrogate pair at character {error.start + 1}"
        raise field_error(field, problem, "repair the text's encoding") from None


def is_finite(value: Real) -> bool:
    """Whether a float can hold the number; JSON allows integers of any size."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Real) -> str:
    """Formats a number for a message."""
    try:
        return str(float(value))
    except OverflowError:
        return "a whole number of over 300 digits"


def kind(value: object) -> str:
    """Names the JSON type of a value for a message."""
    names: dict[type, str] = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "text", list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def spread(rows: Sequence[T], count: int) -> list[T]:
    """Returns at most `count` rows from the first to the last, evenly far apart."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else list(rows)


def common_length(sequences: Sequence[Ordered]) -> int:
    """Returns the length of the common beginning of texts, or of lists of tokens."""
    least, most = min(sequences), max(sequences)  # in lexicographic order, so that the others lie between
    if most[: len(least)] == least:
        return len(least)
    return next(i for i, (one, other) in enumerate(zip(least, most, strict=False)) if one != other)


def content_id(content: Any) -> str:
    """Returns 16 hexadecimal digits of the sha256 of `content` as canonical JSON."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=json_form)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def json_form(value: Any) -> Any:
    """`default` for `json.dumps`: a dataclass, such as a `ChatPrompt`, becomes a dict of its fields."""
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} has no JSON form")
    return {field.name: getattr(value, field.name) for field in fields(value)}


class Row:
    """Base of the records. A record is a frozen dataclass whose optional columns are None or () where absent."""

    weight: float
    # What the row belongs to, such as a customer; no part of its content.
    label: str | None
    # What an optional column must be, for the error of a row that lacks it.
    column_types: ClassVar[Mapping[str, str]] = {}

    def check_weight_and_label(self) -> None:
        """Makes the weight a float; called when a record is made.

        Raises:
            InputError: the weight is no finite number above 0, or the label neither None nor text that is not blank.
        """
        weight: Any = self.weight
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise field_error("weight", f"must be a number, found {kind(weight)}")
        if not is_finite(weight) or weight <= 0:
            problem = f"must be positive and finite, found {shown(weight)}"
            raise field_error("weight", problem, "remove rows of no weight")
        object.__setattr__(self, "weight", float(weight))
        if self.label is not None:
            check_text(self.label, "label")

    def __hash__(self) -> int:
        return hash((self.id, self.weight))

    def content(self) -> Any:
        """What `id` is computed from: everything but weights."""
        raise NotImplementedError

    def preference(self) -> Row | None:
        """The better and the worse answer in this row, if it has them."""
        raise NotImplementedError

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that name the content, whatever the weights and the file format."""
        return content_id(self.content())

    @cached_property
    def dedup_keys(self) -> tuple[str, ...]:
        """The row's id and the id of the preference in it: rows that share a key are the same judgement."""
        pair = self.preference()
        return (self.id,) if pair is None or pair.id == self.id else (self.id, pair.id)

    @property
    def fingerprint_line(self) -> str:
        """The row's line in the fingerprint of its set: the id, and the weight if it is not 1."""
        return self.id if self.weight == 1.0 else f"{self.id} {self.weight!r}"

    def has(self, column: str) -> bool:
        """Whether an optional column is present."""
        return getattr(self, column, None) not in (None, ())

    def require(self, *columns: str) -> Self:
        """Returns this row if it has all the columns.

        Raises:
            InputError: `row ID: field 'rewards': must be a list of numbers, found null`.
        """
        for column in columns:
            if not self.has(column):
                raise self.lacks(column).at(f"row {self.id}")
        return self

    @classmethod
    def lacks(cls, column: str) -> InputError:
        """Returns the error for an absent column."""
        return field_error(column, f"must be {cls.column_types.get(column, 'present')}, found null")

    @classmethod
    def check_present(cls, found: Collection[str], schema: Schema) -> None:
        """Raises an InputError if an optional column of the record that the schema requires is not among `found`."""
        for name in schema.required:
            if name in cls.column_types and name not in found:
                raise cls.lacks(name)


AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(frozen=True, repr=False)
class RowSet(Sequence[AnyRow], Generic[AnyRow]):
    """An immutable sequence of rows; a slice is a set of the same type.

    Args:
        items: the rows.
        source: where the rows came from, as the user named it.
        skipped: one message for each bad row that was skipped on request; slices keep them.
        ignored: columns of the source that are not read.
        columns: the source's names of columns that have another name there (see `Renamed`).
    """

    record: ClassVar[Any]
    prompts_alone: ClassVar[bool] = False

    items: tuple[AnyRow, ...]
    source: str = "memory"
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, rows: Iterable[AnyRow | Mapping[str, Any]], source: str = "memory") -> Self:
        """Makes a set from records, or from mappings with the columns of a file."""
        items = (
            row if isinstance(row, cls.record) else cls.record.from_json(row, f"{source}: row {number}")
            for number, row in enumerate(rows, start=1)
        )
        return cls(tuple(items), source)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the rows' ids and weights, in order."""
        return hashlib.sha256("\n".join(row.fingerprint_line for row in self.items).encode()).hexdigest()

    def has(self, column: str) -> bool:
        """Whether every row has the optional column; False for an empty set."""
        return bool(self.items) and all(row.has(column) for row in self.items)

    def require(self, *columns: str) -> Self:
        """Returns this set if every row has all the columns.

        Raises:
            InputError: `SOURCE: row 3: field 'rewards': must be a list of numbers, found null`.
        """
        for number, row in enumerate(self.items, start=1):
            for column in columns:
                if not row.has(column):
                    raise row.lacks(column).at(f"{self.source}: row {number}")
        return self

    @property
    def labels(self) -> list[str]:
        """The labels of the rows, each once, in the order of their first rows; none where no row has one.

        Raises:
            InputError: some rows have a label and others have none.
        """
        found = list(dict.fromkeys(row.label for row in self.items))
        if None in found and len(found) > 1:
            number = [row.label for row in self.items].index(None) + 1
            raise InputError(f"{self.source}: row {number}: field 'label': is null, and other rows have one: add it")
        return [label for label in found if label is not None]

    def by_label(self) -> dict[str, Self]:
        """Returns the rows of each label as a set of their own, in the order of `labels`; errors as there."""
        labels = self.labels
        if len(labels) == 1:
            return {labels[0]: self}
        found = {}
        for label in labels:
            items = tuple(row for row in self.items if row.label == label)
            found[label] = replace(self, items=items, source=f"{self.source} ({label})", skipped=(), ignored=())
        return found

    @overload
    def __getitem__(self, index: int) -> AnyRow: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> AnyRow | Self:
        if isinstance(index, slice):
            return replace(self, items=self.items[index])
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        first = f", first: {self.items[0]!r}" if self.items else ""
        first = first if len(first) <= 200 else f"{first[:200]}..."
        return f"{type(self).__name__}({self.source!r}, {len(self)} rows{skipped}{first})"
