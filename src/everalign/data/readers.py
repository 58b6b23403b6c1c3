"""Read rows from JSON, JSON Lines, CSV, Parquet or the Hub; a bad row is an error that names file, line and field."""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from everalign.data.records import (
    ANSWER_SCHEMA,
    CORRECTION_SCHEMA,
    DRAFT_SCHEMA,
    PREFERENCE_SCHEMA,
    PROMPT_SCHEMA,
    SCORED_SCHEMA,
    UNCORRECTED_SCHEMA,
    UNSCORED_SCHEMA,
    AnswerSet,
    CorrectionSet,
    DraftSet,
    PreferenceSet,
    PromptSet,
    ScoredSet,
    UncorrectedSet,
    UnscoredSet,
)
from everalign.data.rows import Row, RowSet, Schema
from everalign.errors import InputError

RawRows = Iterator[tuple[str, object]]

_BOM = b"\xef\xbb\xbf"
_MESSAGE_LIST = re.compile(
    r"""\s*\[\s*\{\s*["'](role|content|name|tool_calls|tool_call_id|reasoning_content|reasoning|thinking)["']\s*:"""
)
_LIST = re.compile(r"\s*\[")


def jsonl_rows(path: Path) -> RawRows:
    """One JSON object a line; blank lines count as lines and hold no row."""
    for number, line in enumerate(_lines(path), start=1):
        content = line.removeprefix(_BOM) if number == 1 else line
        if content.strip():
            where = f"{path}:{number}"
            yield where, _parse_line(content, where)


def json_rows(path: Path) -> RawRows:
    """A JSON file that holds one list of rows."""
    text = _text(path)
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise InputError(f"{path}:{error.lineno}: broken JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: JSON that cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: must hold a list of rows, [{{...}}, ...]; one object a line belongs in .jsonl")
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row


def csv_rows(path: Path, schema: Schema) -> RawRows:
    """Comma-separated text with a header line; cells may hold lists as JSON."""
    records = _csv_records(path, _text(path))
    if not records:
        return
    header, rows = records[0], (record for record in records[1:] if record)
    check_table(header, str(path), schema)
    for number, record in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        yield where, _csv_row(header, record, where, schema)


def _csv_row(header: list[str], record: list[str], where: str, schema: Schema) -> object:
    if len(record) != len(header):
        found = f"{len(record)} cells under {len(header)} columns"
        return InputError(f"{where}: {found}; quote the cells that hold commas or line breaks")
    return table_row(dict(zip(header, record, strict=True)), where, schema, numbers_as_text=True)


def parquet_rows(path: Path, schema: Schema) -> RawRows:
    """Parquet; messages are lists of structs, or JSON text. Other columns are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns, others = check_table(file.schema_arrow.names, str(path), schema)
            number = 0
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}: row {number}"
                    yield where, table_row({**row, **others}, where, schema)
    except pa.ArrowException as error:
        raise InputError(f"{path}: damaged, or no Parquet file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


FORMATS: dict[str, Callable[[Path, Schema], RawRows]] = {
    ".json": lambda path, _: json_rows(path),
    ".json.gz": lambda path, _: json_rows(path),
    ".jsonl": lambda path, _: jsonl_rows(path),
    ".jsonl.gz": lambda path, _: jsonl_rows(path),
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}
"""Reader by the end of the file's name."""


def check_table(found: Iterable[str], where: str, schema: Schema) -> tuple[list[str], dict[str, None]]:
    """Checks a table's columns once for all rows; returns those to be read, and the others as cells without a value."""
    names = list(found)
    try:
        schema.check(names)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    for name in schema.columns:
        if names.count(name) > 1:
            raise InputError(f"{where}: field {name!r}: {names.count(name)} columns have this name; keep one")
    # Without the prompt's column a row's error could not say which names the file does have.
    if schema.columns[0] not in names:
        return names, {}
    return [name for name in schema.columns if name in names], {n: None for n in names if n not in schema.columns}


def table_row(row: dict[str, Any], where: str, schema: Schema, *, numbers_as_text: bool = False) -> object:
    """A table's row with lists unpacked from JSON text; an `InputError` where that fails."""
    try:
        cells = {name: _cell(value, name, schema) if name != "weight" else value for name, value in row.items()}
    except InputError as error:
        return InputError(f"{where}: {error}")
    if numbers_as_text and "weight" in cells:
        cells["weight"] = _number(cells["weight"])
    return cells


def _cell(value: Any, field: str, schema: Schema) -> Any:
    """Text that is evidently a list becomes one; all other values stay as they are."""
    pattern, what = (_LIST, "") if field in schema.lists else (_MESSAGE_LIST, " of messages")
    if field not in schema.columns or not isinstance(value, str) or not pattern.match(value):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise InputError(
            f"field {field!r}: looks like a list{what} but is not JSON (Python's own notation?); "
            "write the cell with json.dumps"
        ) from None


def _number(text: str) -> Any:
    """An empty cell is no weight; what is no number stays text, for the record to refuse."""
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _csv_records(path: Path, text: str) -> list[list[str]]:
    # Python refuses cells above 128 KiB by default, which long conversations exceed; the limit is global.
    limit = csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return list(reader)
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: broken CSV: {error}; check the quotes") from None
    finally:
        csv.field_size_limit(limit)


def _parse_line(line: bytes, where: str) -> object:
    try:
        value: object = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        return InputError(f"{where}: {_not_utf8(line, error)}")
    except json.JSONDecodeError as error:
        hint = "; a file with one JSON list belongs in .json" if line.lstrip().startswith(b"[") else ""
        return InputError(f"{where}: broken JSON at character {error.colno}: {error.msg}{hint}")
    except (ValueError, RecursionError) as error:
        return InputError(f"{where}: JSON that cannot be read: {error}")
    return value


def _text(path: Path) -> str:
    data = b"".join(_lines(path)).removeprefix(_BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: {_not_utf8(data, error)}") from None


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    kind = "looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8"
    return f"{kind} (byte 0x{data[error.start]:02x}); save the file as UTF-8"


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            yield from stream
    except EOFError:
        raise InputError(f"{path}: the gzip archive is truncated; copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged, or not gzip: {error}; copy it again or drop the .gz") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


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


def load_scored(source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False) -> ScoredSet:
    """Reads scored rows from a file or from the Hub; arguments and errors as in `load_preferences`."""
    return load_rows(ScoredSet, SCORED_SCHEMA, source, split, skip_bad_rows)


def load_judged(
    source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False
) -> ScoredSet | PreferenceSet:
    """Reads scored rows, or preferences where the first row has `chosen` or `rejected` and no `completions`.

    Arguments and errors as in `load_preferences`; all rows must be of one kind.
    """
    first = first_columns(source, split, ("completions", "chosen", "rejected"))
    if first and "completions" not in first:
        return load_preferences(source, split=split, skip_bad_rows=skip_bad_rows)
    return load_scored(source, split=split, skip_bad_rows=skip_bad_rows)


def load_prompts(source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False) -> PromptSet:
    """Reads prompts from a file or from the Hub; arguments and errors as in `load_preferences`."""
    return load_rows(PromptSet, PROMPT_SCHEMA, source, split, skip_bad_rows)


def load_unscored(
    source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False, overwrite: bool = False
) -> UnscoredSet:
    """Reads answers to be scored from a file or from the Hub; arguments and errors as in `load_preferences`.

    Args:
        source: a file, or a name on the Hub.
        split: which split of a Hub dataset.
        skip_bad_rows: leave bad rows out and keep one message for each in `.skipped`.
        overwrite: take rows that have rewards already, which are then ignored.

    Raises:
        InputError: also where a row has rewards and `overwrite` is not set; names the first such row.
    """
    rows = load_rows(UnscoredSet, UNSCORED_SCHEMA, source, split, skip_bad_rows)
    rewarded = [number for number, row in enumerate(rows, start=1) if row.rewarded]
    if rewarded and not overwrite:
        raise InputError(
            f"{rows.source}: row {rewarded[0]}: field 'rewards': {len(rewarded)} rows have rewards already; "
            "ask for --overwrite to score them anew, or remove the column"
        )
    return rows


def load_corrections(
    source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False
) -> CorrectionSet:
    """Reads corrections from a file or from the Hub; arguments and errors as in `load_preferences`."""
    return load_rows(CorrectionSet, CORRECTION_SCHEMA, source, split, skip_bad_rows)


def load_edits(
    source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False
) -> CorrectionSet | PreferenceSet:
    """Reads corrections, or preferences where the first row has `chosen` or `rejected` and no `correction`.

    Arguments and errors as in `load_preferences`; all rows must be of one kind. `CorrectionSet.of_preferences` makes
    the one of the other.
    """
    first = first_columns(source, split, ("correction", "chosen", "rejected"))
    if first and "correction" not in first:
        return load_preferences(source, split=split, skip_bad_rows=skip_bad_rows)
    return load_corrections(source, split=split, skip_bad_rows=skip_bad_rows)


def load_uncorrected(
    source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False
) -> UncorrectedSet:
    """Reads answers to be corrected from a file or from the Hub; arguments and errors as in `load_preferences`."""
    return load_rows(UncorrectedSet, UNCORRECTED_SCHEMA, source, split, skip_bad_rows)


def load_drafts(source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False) -> DraftSet:
    """Reads drafts from a file or from the Hub; arguments and errors as in `load_preferences`."""
    return load_rows(DraftSet, DRAFT_SCHEMA, source, split, skip_bad_rows)


def load_answers(source: str | os.PathLike[str], *, split: str = "train", skip_bad_rows: bool = False) -> AnswerSet:
    """Reads answers from a file or from the Hub; arguments and errors as in `load_preferences`."""
    return load_rows(AnswerSet, ANSWER_SCHEMA, source, split, skip_bad_rows)


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
