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
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress((lines if ".jsonl" in path.name else json.dumps)(rows).encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text(lines(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in rows)
    return path
