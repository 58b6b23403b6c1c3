"""Typed rows: column schemas, field checks and the immutable row set."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, overload

from everalign.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Schema:
    """Columns that a record is made of; others are named in `RowSet.ignored`.

    Args:
        columns: all that are read; the first of them is the prompt.
        required: those that a table must have, whatever its rows hold.
        expected: says so in an error.
        other_names: what else people call a column, to suggest the right one.
        lists: columns whose cells are lists, which a CSV file holds as JSON.
    """

    columns: tuple[str, ...]
    required: tuple[str, ...]
    expected: str
    other_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lists: frozenset[str] = frozenset()

    def row(self, found: object) -> Mapping[Any, Any]:
        """Return a raw row, once it is one with columns."""
        if not isinstance(found, Mapping):
            raise InputError(f"a row must be an object with columns, found {kind(found)}; {self.expected}")
        return found

    def check(self, found: Collection[Any]) -> None:
        """Refuse columns without a required one, naming those found and the nearest ones."""
        missing = [name for name in self.required if name not in found]
        if missing:
            raise self.missing(missing[0], found)

    def missing(self, name: str, found: Collection[Any]) -> InputError:
        """Return the error for a column that is not among those found."""
        names = [column for column in found if isinstance(column, str)]
        free = [column for column in names if column not in self.columns]
        near = difflib.get_close_matches(name, free, n=1) or [n for n in self.other_names.get(name, ()) if n in free]
        hint = f"; rename {near[0]!r}?" if near else ""
        listed = ", ".join(repr(column) for column in names) or "none"
        return InputError(f"field {name!r}: no such column{hint} (found: {listed}; {self.expected})")


def check_text(value: Any, field: str) -> None:
    """Refuse what is no text, empty, or not encodable."""
    if not isinstance(value, str):
        raise InputError(f"field {field!r}: must be text, found {kind(value)}")
    if not value.strip():
        raise InputError(f"field {field!r}: is empty; fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"field {field!r}: half a surrogate pair at character {error.start + 1}; repair the text's encoding"
        ) from None


def checked_weight(value: Any) -> float:
    """Return a row's weight: a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"field 'weight': must be a number, found {kind(value)}")
    if not is_finite(value) or value <= 0:
        raise InputError(f"field 'weight': must be positive and finite, found {shown(value)}; remove rows of no weight")
    return float(value)


def is_finite(value: Real) -> bool:
    """Whether a number is one that a float holds; JSON knows whole numbers of any size."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Real) -> str:
    """Return a number for a message, in a few digits."""
    try:
        return str(float(value))
    except OverflowError:
        return "a whole number of over 300 digits"


def kind(value: object) -> str:
    """What a JSON value is called, for messages."""
    names: dict[type, str] = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "text", list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def content_id(content: Any) -> str:
    """Name what a record holds by 16 hexadecimal digits; the same content has the same name in every kind of file."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=json_form)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def json_form(value: Any) -> Any:
    """Return a part that JSON does not know, such as a chat prompt with its tools, as its fields."""
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} has no JSON form")
    return {field.name: getattr(value, field.name) for field in fields(value)}


class Row(Protocol):
    """What every kind of row has: a name of its content, and how much it counts."""

    @property
    def id(self) -> str:
        """Name of the content, without the weight."""
        ...

    @property
    def judgements(self) -> tuple[str, ...]:
        """Ids under which the same judgement may be found in another row, whatever its kind."""
        ...

    @property
    def weight(self) -> float:
        """How much the row counts in a mean loss."""
        ...


AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(frozen=True, repr=False)
class RowSet(Sequence[AnyRow], Generic[AnyRow]):
    """An immutable sequence of rows; a slice is a set of the same kind.

    Args:
        items: the rows.
        source: where they came from, as the user named it.
        skipped: one message for each bad row that was left out on request; slices keep them.
        ignored: columns of the source that nothing is learned from.
    """

    record: ClassVar[Any]

    items: tuple[AnyRow, ...]
    source: str = "memory"
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[AnyRow | Mapping[str, Any]], source: str = "memory") -> Self:
        """A set made in Python from records or from rows with the columns that files have."""
        items = (
            row if isinstance(row, cls.record) else cls.record.from_json(row, f"{source}: row {number}")
            for number, row in enumerate(rows, start=1)
        )
        return cls(tuple(items), source)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the ids in order, with the weights that are not 1."""
        return hashlib.sha256("\n".join(self._line(row) for row in self.items).encode()).hexdigest()

    @staticmethod
    def _line(row: AnyRow) -> str:
        return row.id if row.weight == 1.0 else f"{row.id} {row.weight!r}"

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
        return f"{type(self).__name__}({self.source!r}, {len(self)} rows{skipped})"
