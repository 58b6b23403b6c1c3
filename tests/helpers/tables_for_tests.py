"""Rows written as every kind of file that is read."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_table(path: Path, rows) -> Path:
    """Write rows as the kind of file that the name says; in CSV files lists are JSON."""
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress((lines if ".jsonl" in path.name else json.dumps)(rows).encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text(lines(rows), encoding="utf-8")
    else:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        # A column of Parquet has one type: lists beside texts are written as JSON, as in CSV.
        mixed = {
            key for key in columns if len({isinstance(row[key], list) for row in rows if row.get(key) is not None}) > 1
        }
        as_text = set(columns) if path.suffix == ".csv" else mixed
        table = [
            {key: json.dumps(v) if isinstance(v := row.get(key), list) and key in as_text else v for key in columns}
            for row in rows
        ]
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(table), path)
        else:
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, columns)
                writer.writeheader()
                writer.writerows(table)
    return path
