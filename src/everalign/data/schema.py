"""The columns of one kind of row: which are read, which must be there, and what to say when one is not."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from everalign.data.fields import kind
from everalign.errors import InputError


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
