"""What the benches share: where the data is, the machine's facts, JSON results."""

import gzip
import json
import os
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from everalign.evaluation.statistics import Array, Interval, crossed_bootstrap
from everalign.modeling.machine import library_versions, machine_facts
from everalign.storage import read_json, write_json

REPOSITORY = Path(__file__).resolve().parent.parent
OUT = Path(__file__).resolve().parent / "out"


def data_folder() -> Path:
    """The folder with `data/` and `base-model/`: $EVERALIGN_BENCH_DATA, or `shared` beside the checkout."""
    folder = Path(os.environ.get("EVERALIGN_BENCH_DATA", REPOSITORY.parent / "shared"))
    if not (folder / "data" / "pref").is_dir():
        sys.exit(
            f"{folder}/data/pref is missing: set EVERALIGN_BENCH_DATA to the folder that holds data/ and base-model/"
        )
    return folder


def preference_rows(name: str, split: str) -> list[dict[str, Any]]:
    """The rows of one preference set, with all their columns."""
    return _rows("pref", name, split)


def correction_rows(name: str, split: str) -> list[dict[str, Any]]:
    """The rows of one set of corrections, with all their columns."""
    return _rows("correction", name, split)


def sft_rows(name: str, split: str) -> list[dict[str, Any]]:
    """The rows of one set of good answers, with all their columns."""
    return _rows("sft", name, split)


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Keep the settings that a folder's results were made with, or refuse to add results of other ones."""
    if not path.exists():
        write_json(path, settings)
    written, now = read_json(path), json.loads(json.dumps(settings))
    if other := [name for name in {**written, **now} if written.get(name) != now.get(name)]:
        sys.exit(
            f"{path}: results were made with other {', '.join(other)}: delete the folder, or name another --output"
        )


def _rows(kind: str, name: str, split: str) -> list[dict[str, Any]]:
    with gzip.open(data_folder() / "data" / kind / f"{name}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """`mean ± standard deviation` of what is there."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.3f}{spread}"


def over_runs(values: Array) -> Interval:
    """The mean of (runs, rows) values, with a 95 % interval over both at once."""
    return crossed_bootstrap([values], np.ones((len(values), 1)))


def write_blind_pairs(path: Path, rows: Sequence[tuple[str, str, str]], names: tuple[str, str], most: int) -> None:
    """Write pairs of answers to be read blind, in random order, and in another file what is what.

    Args:
        path: a .md file; the key is a .key.json file beside it.
        rows: question, an answer of the first kind, and one of the second; equal ones are left out.
        names: of the two kinds.
        most: how many are drawn.
    """
    draw, texts, key = random.Random(0), list[str](), list[dict[str, Any]]()
    different = [i for i, (_, one, other) in enumerate(rows) if one != other]
    for number, i in enumerate(draw.sample(different, min(most, len(different))), start=1):
        question, one, other = rows[i]
        first = draw.random() < 0.5
        key.append({"number": number, "row": i, "A": names[not first], "B": names[first]})
        a, b = (one, other) if first else (other, one)
        texts.append(f"## {number}\n{question}\n\nA: {a}\n\nB: {b}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(texts), encoding="utf-8")
    write_json(path.with_suffix(".key.json"), key)
    print(f"written: {path}; what is what is in {path.stem}.key.json")


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a bench's result with the machine, the libraries and the command that made it."""
    command = " ".join(["python", *sys.argv])
    write_json(path, {"command": command, "machine": machine_facts(), "libraries": library_versions(), **result})
    print(f"\nwritten: {path}")
