"""Files as raw rows: what JSON, JSON Lines (both also gzipped), CSV and Parquet have in common.

Every reader yields `(where, value)`: the row's place, such as `pairs.jsonl:7`, and the row as Python values,
or an `InputError` where that one row cannot be read, so that the caller decides whether it may be skipped.
Damage that hides how many rows are lost (a truncated archive, broken CSV quotes) is raised at once.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from everalign.data.schema import Schema
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
