"""From a path or a Hub name to a checked, immutable set of preferences.

    pairs = load_preferences("pairs.jsonl.gz")
    pairs[:100].fingerprint

Exact duplicates of a row are kept: the same judgement given twice counts twice.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from everalign.data.records import PREFERENCE_SCHEMA, Preference
from everalign.data.row_set import Row, RowSet
from everalign.data.schema import Schema
from everalign.data.tables import FORMATS, RawRows, check_table, table_row
from everalign.errors import InputError

Set = TypeVar("Set", bound=RowSet[Any])

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = {
    ".json",
    ".jsonl",
    ".ndjson",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".txt",
    ".gz",
    ".zip",
    ".zst",
    ".bz2",
}


@dataclass(frozen=True, repr=False)
class PreferenceSet(RowSet[Preference]):
    """An immutable sequence of preferences; a slice is a `PreferenceSet` too."""

    record = Preference


def load_preferences(
    source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False
) -> PreferenceSet:
    """Reads preferences from a file, or from the Hugging Face Hub where no such file exists.

    Args:
        source: a path that ends in .json (one list), .jsonl, .json.gz, .jsonl.gz, .csv or .parquet; or a name
            on the Hub.
        split: which split of a Hub dataset; a file has no splits.
        skip_bad_rows: leave bad rows out and keep one message for each in `.skipped`, instead of stopping at
            the first.

    Raises:
        InputError: the source cannot be read, holds no usable row, or a row is bad; names the file, the line
            and the field.
    """
    return load_rows(PreferenceSet, PREFERENCE_SCHEMA, source, split, skip_bad_rows)


def load_rows(kind: type[Set], schema: Schema, source: str | os.PathLike[str], split: str, skip_bad_rows: bool) -> Set:
    """Read any kind of rows as `load_preferences` reads preferences."""
    return _collect(kind, schema, _raw_rows(source, split, schema), str(source), skip_bad_rows)


def first_columns(source: str | os.PathLike[str], split: str, columns: tuple[str, ...]) -> set[str]:
    """Return those of some columns that the first row has which can be read, to tell what kind of rows they are."""
    schema = Schema(("prompt", *columns), required=(), expected=f"expected some of {', '.join(columns)}")
    rows = (value for _, value in _raw_rows(source, split, schema) if isinstance(value, Mapping))
    first = next(rows, {})
    return {name for name in columns if first.get(name) is not None}


def _raw_rows(source: str | os.PathLike[str], split: str, schema: Schema) -> RawRows:
    path = Path(source).expanduser()
    if os.path.exists(path) or not _is_hub_name(source):
        return _file_rows(path, split, schema)
    return _hub_rows(str(source), split, schema)


def check_disjoint(train: Iterable[Row], test: Iterable[Row], allow: bool = False) -> tuple[str, ...]:
    """Refuses a test set that shares rows (same prompt and answers) with the training set.

    A scored row is the same as a preference, or as another scored row, if its best and worst completions are.

    Returns:
        The shared ids in the order of the test set; they can only be non-empty with `allow`.
    """
    seen = {name for row in train for name in row.judgements}
    shared = tuple(dict.fromkeys(row.id for row in test if not seen.isdisjoint(row.judgements)))
    if shared and not allow:
        names = " and ".join(rows.source for rows in (train, test) if isinstance(rows, RowSet))
        first = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
        raise InputError(
            f"{names or 'train and test'}: {len(shared)} rows are in both the training and the test set "
            f"(ids {first}); remove them from one, or allow the overlap explicitly"
        )
    return shared


def _collect(kind: type[Set], schema: Schema, rows: RawRows, source: str, skip_bad_rows: bool) -> Set:
    items: list[Any] = []
    skipped: list[str] = []
    ignored: dict[str, None] = {}
    for where, value in rows:
        if isinstance(value, Mapping):
            ignored |= dict.fromkeys(name for name in value if name not in schema.columns)
        try:
            if isinstance(value, InputError):
                raise value
            items.append(kind.record.from_json(value, where))
        except InputError as error:
            if not skip_bad_rows:
                raise
            skipped.append(str(error))
    if not items:
        found = f"all {len(skipped)} rows are bad, the first: {skipped[0]}" if skipped else "no rows in it"
        raise InputError(f"{source}: {found}")
    return kind(tuple(items), source, tuple(skipped), tuple(map(str, ignored)))


def _is_hub_name(source: str | os.PathLike[str]) -> bool:
    """Whether a source that does not exist may be a dataset's name; what looks like a file never is."""
    if not isinstance(source, str) or not _HUB_NAME.fullmatch(source):
        return False
    owner, _, name = source.rpartition("/")
    in_local_folder = bool(owner) and Path(owner).is_dir()
    return Path(name).suffix.lower() not in _FILE_SUFFIXES and not in_local_folder


def _file_rows(path: Path, split: str, schema: Schema) -> RawRows:
    # Unlike Path.exists, this is no error for names that no file can have.
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name one file in it ({', '.join(FORMATS)})")
    if split != "train":
        raise InputError(f"{path}: split={split!r} means nothing for a file; name the file of that split")
    for suffix, reader in FORMATS.items():
        if path.name.lower().endswith(suffix):
            return reader(path, schema)
    raise InputError(f"{path}: unknown kind of file; the name must end in {', '.join(FORMATS)}")


def _hub_rows(name: str, split: str, schema: Schema) -> RawRows:
    """Rows of a Hub dataset; fails with everything that was tried."""
    import datasets
    from datasets.exceptions import DatasetsError

    # The Hub client reports a missing name, a missing split and no network as one of these.
    try:
        dataset = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{name}: no such file, and from the Hugging Face Hub datasets.load_dataset({name!r}, "
            f"split={split!r}) failed: {type(error).__name__}: {reason}; "
            "check the name, the split and the network, or give a file"
        ) from None
    columns, others = check_table(dataset.column_names, f"{name}[{split}]", schema)
    for number, row in enumerate(dataset.select_columns(columns), start=1):
        where = f"{name}[{split}]: row {number}"
        yield where, table_row({**row, **others}, where, schema)
