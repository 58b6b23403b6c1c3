"""Rows of a file that are read again and again, one after the other, and never held all at once."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from everalign.data.file_formats import WHOLE, Part, cut, source_name
from everalign.data.readers import RowReader, Source, no_rows
from everalign.errors import InputError

REPORTED = 100_000
"""Rows after which `RowStream.check` reports how far it is."""


@dataclass(frozen=True)
class CheckedStream:
    """What a first reading of all rows found.

    Args:
        rows: number of good rows.
        fingerprint: what `RowSet.fingerprint` is for the same rows.
        skipped: number of bad rows that were skipped.
        first: the message of the first of them.
        ignored: columns that are not read.
    """

    rows: int
    fingerprint: str
    skipped: int = 0
    first: str = ""
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowStream:
    """A file, or a part of it, as rows; memory holds only those in use. Can be sent to other processes.

    Args:
        source: path or URL of the file, or a dataset's name on the Hub; `renamed` where columns have other names.
        reader: makes rows of it.
        skip_bad_rows: leave bad rows out.
        part: the part of the file.
    """

    source: Source
    reader: RowReader
    skip_bad_rows: bool = False
    part: Part = WHOLE

    @property
    def name(self) -> str:
        """What errors call the source."""
        return source_name(self.source)

    def parts(self, count: int) -> list["RowStream"]:
        """Cuts the file into contiguous parts; see `cut`."""
        return [replace(self, part=part) for part in cut(self.source, "train", self.reader.schema, count)]

    def check(self, report: Callable[[int], None] = lambda _: None) -> CheckedStream:
        """Reads all rows once, so that a bad one is found before anything is computed.

        Args:
            report: called now and then with the number of rows read.

        Raises:
            InputError: the file cannot be read, or a row is bad; names the file, the line and the field.
        """
        digest, rows, skipped, first = hashlib.sha256(), 0, 0, ""
        ignored: dict[str, None] = {}

        def skip(message: str) -> None:
            nonlocal skipped, first
            skipped, first = skipped + 1, first or message

        on_bad = skip if self.skip_bad_rows else None
        for row in self.reader.rows(self.source, part=self.part, skipped=on_bad, ignored=ignored):
            digest.update((("\n" if rows else "") + row.fingerprint_line).encode())
            rows += 1
            if rows % REPORTED == 0:
                report(rows)
        return CheckedStream(rows, digest.hexdigest(), skipped, first, tuple(ignored))

    def windows(self, size: int, checked: CheckedStream) -> Iterator[list[Any]]:
        """Yields the rows again, `size` at a time.

        Raises:
            InputError: they are not those that were checked.
        """
        digest, total = hashlib.sha256(), 0
        rows = self.reader.rows(self.source, part=self.part, skipped=(lambda _: None) if self.skip_bad_rows else None)
        while window := list(islice(rows, size)):
            lines = "\n".join(row.fingerprint_line for row in window)
            digest.update((("\n" if total else "") + lines).encode())
            total += len(window)
            yield window
        if digest.hexdigest() != checked.fingerprint:
            raise InputError(f"{self.name}: has changed since the start: leave it alone, and start again")

    def require_rows(self, checked: CheckedStream) -> None:
        """Raises an InputError if no usable row was found."""
        if not checked.rows:
            raise no_rows(self.name, [checked.first] * checked.skipped)
