"""Raw rows of JSON, JSON Lines, CSV, TSV and Parquet files, of Hub datasets and of tables in memory, with their places.

A row that cannot be read is yielded as an `InputError`, which the caller may skip; what makes the whole file unreadable
is raised. JSON Lines and Parquet are read piece by piece, whatever their size. A file may be at a URL that
fsspec opens.
"""

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from everalign.data.rows import Schema, field_error
from everalign.errors import InputError, located
from everalign.storage import is_url, open_url

RawRows = Iterator[tuple[str, object]]

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")
"""Ends of the names of files that can be read."""

_BOM = b"\xef\xbb\xbf"
_MESSAGE_LIST = re.compile(
    r"""\s*\[\s*\{\s*["'](role|content|name|tool_calls|tool_call_id|reasoning_content|reasoning|thinking)["']\s*:"""
)
_LIST = re.compile(r"\s*\[")
_ROWS_AT_ONCE = 1024  # of a Parquet file
_BLOCK = 1 << 20
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_ENDINGS = (
    ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zip", ".zst", ".bz2",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A contiguous part of a file, see `cut`.

    Args:
        start: where it begins: a byte of a .jsonl file, the number of a row from 0 in any other.
        stop: where the next part begins.
        lines: lines of a .jsonl file before it, for the numbers in error messages.
    """

    start: int = 0
    stop: int = sys.maxsize
    lines: int = 0


WHOLE = Part()


@dataclass(frozen=True)
class Renamed:
    """A source in which some columns have other names.

    Args:
        source: a file, a name on the Hub, or a table in memory.
        columns: the source's names of columns, by the names that are read here: `{"question": "query"}`.
    """

    source: Any
    columns: Mapping[str, str]

    def __str__(self) -> str:
        return source_name(self.source)


def source_name(source: Any) -> str:
    """Returns what errors call a source: a file's or dataset's name, or `memory`."""
    return str(source) if isinstance(source, str | os.PathLike | Renamed) else "memory"


def check_source(source: str | os.PathLike[str], split: str = "train") -> Path | str | None:
    """Returns the path or URL of a source, or None of a Hub dataset.

    It is one if no such file exists and the name can be that of a dataset.

    Raises:
        InputError: it is neither, or a file of an unknown kind.
    """
    path = _local_or_url(source)
    if isinstance(path, Path):
        # Unlike Path.exists, this is no error for names that no file can have.
        exists = os.path.exists(path)
        if not exists and isinstance(source, str):
            # The name of a dataset, and not that of a missing file.
            owner, _, last = source.rpartition("/")
            file = Path(last).suffix.lower() in _FILE_ENDINGS or (bool(owner) and Path(owner).is_dir())
            if _HUB_NAME.fullmatch(source) and not file:
                return None
        if not exists:
            raise _error(path, "no such file")
        if path.is_dir():
            raise _error(path, f"is a directory; name one file in it ({', '.join(SUFFIXES)})")
    if split != "train":
        raise _error(path, f"split={split!r} means nothing for a file; name the file of that split")
    if not str(path).lower().endswith(SUFFIXES):
        raise _error(path, f"unknown kind of file; the name must end in {', '.join(SUFFIXES)}")
    return path


def file_size(source: str) -> int:
    """Returns the size of a file in bytes; InputError if it cannot be read."""
    with _opened(_local_or_url(source)) as file:
        return file.seek(0, os.SEEK_END)


def _local_or_url(source: str | os.PathLike[str]) -> Path | str:
    return str(source) if is_url(source) else Path(source).expanduser()


def raw_rows(source: Any, split: str, schema: Schema, part: Part = WHOLE) -> RawRows:
    """Reads a file or a Hub dataset (see `check_source`), a table in memory, or one of them `Renamed`; or a part."""
    if not isinstance(source, Renamed):
        return _rows_by_kind(source, split, schema, part)
    columns = {name: theirs for name, theirs in source.columns.items() if name in schema.columns}
    theirs, required, lists, numbers = (
        tuple(columns.get(name, name) for name in names)
        for names in (schema.columns, schema.required, schema.lists, schema.numbers)
    )
    found = replace(schema, columns=theirs, required=required, lists=lists, numbers=numbers)
    return _renamed(_rows_by_kind(source.source, split, found, part), columns, found)


def _renamed(rows: RawRows, columns: Mapping[str, str], found: Schema) -> RawRows:
    """Gives the columns their names here; one that a row does not have is an error, also where it may be left out."""
    for where, value in rows:
        if not isinstance(value, Mapping):
            yield where, value
            continue
        lost = next((theirs for theirs in columns.values() if theirs not in value), None)
        if lost is not None:
            yield where, found.missing_column(lost, value.keys()).at(where)
            continue
        others = {name: cell for name, cell in value.items() if name not in {*columns, *columns.values()}}
        yield where, {**others, **{name: value[theirs] for name, theirs in columns.items()}}


def _rows_by_kind(source: Any, split: str, schema: Schema, part: Part) -> RawRows:
    if isinstance(source, str | os.PathLike):
        path = check_source(source, split)
        name = str(path).lower()
        if path is not None and name.endswith(".jsonl"):
            return jsonl_rows(path, part)
        if path is not None and name.endswith(".parquet"):
            return _parquet_rows(path, schema, part)
        # What can only be read from its beginning, and mostly is held whole.
        if path is None:
            rows = _hub_rows(str(source), split, schema)
        elif name.endswith((".json", ".json.gz")):
            rows = _json_rows(path)
        else:
            rows = jsonl_rows(path) if name.endswith(".jsonl.gz") else _csv_rows(path, schema)
    else:
        rows = _table_in_memory(source, schema)
    return islice(rows, part.start, part.stop)


def cut(source: Any, split: str, schema: Schema, parts: int) -> list[Part]:
    """Cuts a file into contiguous parts that hold every row once: a .jsonl file by bytes, any other by rows.

    A .jsonl file is read once to count its lines; of a Parquet file the footer is enough; any other file is parsed.

    Returns:
        `parts` parts; some are empty where rows are few or long.
    """
    name = source_name(source)
    if not name.lower().endswith(".jsonl"):
        place = _local_or_url(name)
        # A Parquet file says how many rows it has, unless the name is that of a dataset on the Hub.
        if name.lower().endswith(".parquet") and not (isinstance(place, Path) and not place.is_file()):
            with _parquet_file(place) as table:
                rows = int(table.metadata.num_rows)
        else:
            rows = sum(1 for _ in raw_rows(source, split, schema))
        return [Part(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]
    with _opened(_local_or_url(name)) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        # A part begins at the first line that begins at or after its share of the bytes.
        starts, lines, position = [(0, 0)], 0, 0
        for i in range(1, parts):
            aim = size * i // parts
            while position < aim - 1 and (block := file.read(min(_BLOCK, aim - 1 - position))):
                position += len(block)
                lines += block.count(b"\n")
            if position < aim:
                rest = file.readline()
                position += len(rest)
                lines += rest.endswith(b"\n")
            starts.append((position, lines))
    stops = [start for start, _ in starts[1:]] + [size]
    return [Part(start, stop, before) for (start, before), stop in zip(starts, stops, strict=True)]


def _table_in_memory(source: Any, schema: Schema) -> RawRows:
    """Reads a list of mappings, a pandas DataFrame or a `datasets.Dataset`; records are yielded as they are."""
    if isinstance(source, Mapping) and all(hasattr(part, "column_names") for part in source.values()):
        raise InputError(f"the dataset has the splits {', '.join(map(repr, source))}: give one of them")
    if hasattr(source, "column_names") and hasattr(source, "select_columns"):
        return _dataset_rows(source, "memory", schema)
    if hasattr(source, "columns") and hasattr(source, "itertuples"):
        return _frame_rows(source, schema)
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        return ((f"memory: row {number}", row) for number, row in enumerate(source, start=1))
    raise InputError(
        f"rows cannot be read from {type(source).__name__}: give the path of a file, a name on the Hub, a list of "
        "dictionaries, a pandas DataFrame or a datasets.Dataset"
    )


def _frame_rows(frame: Any, schema: Schema) -> RawRows:
    """Reads a DataFrame, in which NaN and NA stand for what is missing."""
    columns, others = _check_header(map(str, frame.columns), "memory", schema)
    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)[columns]
    for number, cells in enumerate(frame.itertuples(index=False, name=None), start=1):
        # numpy's numbers and arrays as Python's; NaN and NA alone differ from themselves, or cannot be compared.
        values = [cell.tolist() if hasattr(cell, "tolist") else cell for cell in cells]
        missing = [type(value).__name__ in ("NAType", "NaTType") or value != value for value in values]
        row = {name: None if lost else value for name, value, lost in zip(columns, values, missing, strict=True)}
        where = f"memory: row {number}"
        yield where, _table_row({**row, **others}, where, schema)


def jsonl_rows(path: Path | str, part: Part = WHOLE) -> RawRows:
    """Reads one JSON object a line; blank lines are counted but hold no row."""
    for number, line in enumerate(_lines(path, part), start=part.lines + 1):
        content = line.removeprefix(_BOM) if number == 1 else line
        if not content.strip():
            continue
        where = f"{path}:{number}"
        value: object
        try:
            value = json.loads(content.decode().rstrip())
        except UnicodeDecodeError as error:
            value = _error(where, _not_utf8(content, error))
        except json.JSONDecodeError as error:
            hint = "; a file with one JSON list belongs in .json" if content.lstrip().startswith(b"[") else ""
            value = _error(where, f"broken JSON at character {error.colno}: {error.msg}{hint}")
        except (ValueError, RecursionError) as error:
            value = _error(where, f"JSON that cannot be read: {error}")
        yield where, value


def _json_rows(path: Path | str) -> RawRows:
    text = _text(path)
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        raise _error(f"{path}:{error.lineno}", f"broken JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise _error(path, f"JSON that cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise _error(path, "must hold a list of rows, [{...}, ...]; one object a line belongs in .jsonl")
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row


def _csv_rows(path: Path | str, schema: Schema) -> RawRows:
    """Reads comma- or tab-separated text with a header line; cells may hold lists as JSON."""
    text = _text(path)
    tabs = str(path).lower().endswith(".tsv")
    kind, separator = ("TSV", "tabs") if tabs else ("CSV", "commas")
    # Python refuses cells above 128 KiB by default, which long conversations exceed; the limit is global.
    limit = csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter="\t" if tabs else ",")
    try:
        records = list(reader)
    except csv.Error as error:
        raise _error(f"{path}:{reader.line_num}", f"broken {kind}: {error}; check the quotes") from None
    finally:
        csv.field_size_limit(limit)
    if not records:
        return
    header = records[0]
    _check_header(header, str(path), schema)
    for number, record in enumerate(filter(None, records[1:]), start=1):
        where = f"{path}: row {number}"
        if len(record) != len(header):
            found = f"{len(record)} cells under {len(header)} columns"
            yield where, _error(where, f"{found}; quote the cells that hold {separator} or line breaks")
            continue
        cells: dict[str, Any] = dict(zip(header, record, strict=True))
        for name in schema.numbers:
            # An empty cell is absent; text that is no number is left for the record to refuse.
            if name in cells:
                with suppress(ValueError):
                    cells[name] = float(cells[name]) if cells[name].strip() else None
        yield where, _table_row(cells, where, schema)


def _parquet_rows(path: Path | str, schema: Schema, part: Part) -> RawRows:
    """Reads the schema's columns, one row group after the other; messages are lists of structs, or JSON text."""
    with _parquet_file(path) as file:
        columns, others = _check_header(file.schema_arrow.names, str(path), schema)
        number = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if number + size <= part.start or number >= part.stop:
                number += size
                continue
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    if part.start < number <= part.stop:
                        where = f"{path}: row {number}"
                        yield where, _table_row({**row, **others}, where, schema)


@contextmanager
def _parquet_file(path: Path | str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _opened(path) as stream, pq.ParquetFile(stream) as file:
            yield file
    except pa.ArrowException as error:
        raise _error(path, f"damaged, or not a Parquet file: {error}") from None


def _hub_rows(name: str, split: str, schema: Schema) -> RawRows:
    import datasets
    from datasets.exceptions import DatasetsError

    # The Hub client reports a missing name, a missing split and no network as one of these.
    try:
        dataset = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise _error(
            name,
            f"no such file, and from the Hugging Face Hub datasets.load_dataset({name!r}, "
            f"split={split!r}) failed: {type(error).__name__}: {reason}; "
            "check the name, the split and the network, or give a file",
        ) from None
    yield from _dataset_rows(dataset, f"{name}[{split}]", schema)


def _dataset_rows(dataset: Any, name: str, schema: Schema) -> RawRows:
    columns, others = _check_header(dataset.column_names, name, schema)
    for number, row in enumerate(dataset.select_columns(columns), start=1):
        where = f"{name}: row {number}"
        yield where, _table_row({**row, **others}, where, schema)


def _check_header(found: Iterable[str], where: str, schema: Schema) -> tuple[list[str], dict[str, None]]:
    """Checks a table's columns once for all rows; returns those to read, and the others with None as their value."""
    names = list(found)
    with located(where):
        schema.check_columns(names)
        for name in schema.columns:
            if names.count(name) > 1:
                raise field_error(name, f"{names.count(name)} columns have this name", "keep one")
    # Without the prompt's column a row's error could not say which names the file does have.
    if schema.columns[0] not in names:
        return names, {}
    return [name for name in schema.columns if name in names], {n: None for n in names if n not in schema.columns}


def _table_row(row: dict[str, Any], where: str, schema: Schema) -> object:
    """Parses the cells that are evidently JSON lists; returns an InputError if one is broken."""
    cells = dict(row)
    for name, value in row.items():
        pattern, what = (_LIST, "") if name in schema.lists else (_MESSAGE_LIST, " of messages")
        if name not in schema.columns or not isinstance(value, str) or not pattern.match(value):
            continue
        try:
            cells[name] = json.loads(value)
        except ValueError:
            problem = f"looks like a list{what} but is not JSON (Python's own notation?)"
            return field_error(name, problem, "write the cell with json.dumps").at(where)
    return cells


def _text(path: Path | str) -> str:
    data = b"".join(_lines(path)).removeprefix(_BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _error(f"{path}:{line}", _not_utf8(data, error)) from None


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    what = "looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8"
    return f"{what} (byte 0x{data[error.start]:02x}); save the file as UTF-8"


def _lines(path: Path | str, part: Part = WHOLE) -> Iterator[bytes]:
    with _opened(path) as file:
        if str(path).endswith(".gz"):
            try:
                with gzip.open(file, "rb") as unpacked:
                    yield from unpacked
            except EOFError:
                raise _error(path, "the gzip archive is truncated; copy or download it again") from None
            except (gzip.BadGzipFile, zlib.error) as error:
                raise _error(path, f"damaged, or not gzip: {error}; copy it again or drop the .gz") from None
            return
        position = file.seek(part.start) if part.start else 0
        while position < part.stop and (line := file.readline()):
            position += len(line)
            yield line


@contextmanager
def _opened(path: Path | str) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") if isinstance(path, Path) else open_url(path) as file:
            yield file
    except FileNotFoundError:
        raise _error(path, "no such file") from None
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror or error}") from None


def _error(where: str | Path, problem: str) -> InputError:
    return InputError(problem).at(str(where))
