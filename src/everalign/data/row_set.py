"""An immutable set of rows of one kind, with where they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, overload

if TYPE_CHECKING:
    from typing_extensions import Self


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
