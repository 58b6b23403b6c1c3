"""How rows are worked through: a window at a time, batched by length, journalled batch by batch, written in order."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import Field, model_validator

from everalign.bulk.files import Columns, OutputFile
from everalign.data.streams import CheckedStream, RowStream
from everalign.errors import InputError
from everalign.options import Options
from everalign.storage import Journal

Log = Callable[[str], None]
Progress = Callable[[str, int, int, str], None]
Totals = Counter[str]
"""Sums over rows, such as how many were changed."""

WINDOW = 4096
_SHARD = re.compile(r"([1-9]\d*)/([1-9]\d*)")

KEEP_SECONDS = 1.0
"""How often results are written to the journal."""


class BulkOptions(Options, title="Whole datasets"):
    """How a dataset is worked through."""

    window: int = Field(
        default=WINDOW,
        ge=1,
        title="ROWS",
        description="Rows in memory at a time, batched by length.\nMore of them pad less. They change no result.",
    )
    shard: str | None = Field(
        default=None,
        title="I/N",
        description="Do the I-th of N contiguous parts of the rows, such as 3/8.\nEach part has an output of its own, "
        "named after it; see `join_files`.",
    )
    engine: Literal["local", "ray"] = Field(
        default="local", description="What computes: this process, or the workers of a Ray cluster."
    )
    workers: int | None = Field(
        default=None, ge=1, description="Ray workers, each with a model; by default one for each GPU, or two."
    )
    gpus_per_worker: float | None = Field(
        default=None, ge=0, description="GPUs of a Ray worker; by default one where the cluster has any."
    )
    partitions: int | None = Field(
        default=None,
        ge=1,
        description="Parts of the rows for Ray workers to take by turns; by default one for every 8 MiB, at least 16.\n"
        "A finished part is kept when the rest is interrupted.",
    )

    @model_validator(mode="after")
    def _check(self) -> "BulkOptions":
        if self.shard is not None:
            number, count = self.shard_numbers
            if number > count:
                raise InputError(f"shard: {number} of {count} parts: the first number is at most the second")
        if self.engine == "ray" and self.shard is not None:
            raise InputError("shard: Ray shares the rows between its workers itself: leave it out, or --engine ray")
        for name in ("workers", "gpus_per_worker", "partitions"):
            if self.engine != "ray" and getattr(self, name) is not None:
                raise InputError(f"{name.replace('_', '-')}: is for --engine ray; leave it out", field=name)
        return self

    @property
    def shard_numbers(self) -> tuple[int, int]:
        """The part's number from 1, and how many parts there are; (1, 1) without parts."""
        if self.shard is None:
            return 1, 1
        found = _SHARD.fullmatch(self.shard)
        if not found:
            raise InputError(f"shard: must be I/N, such as 3/8, found {self.shard!r}", field="shard")
        return int(found[1]), int(found[2])


class Words(NamedTuple):
    """What the work is called: (`score`, `scoring`, `scored`)."""

    do: str
    doing: str
    done: str


def numbered_rows(numbers: Sequence[int]) -> str:
    """Names the rows of a batch for an error: `row 3`, `rows 3 to 5`, `5 rows (3, 17, 18, ...)`."""
    first, last = min(numbers), max(numbers)
    if len(numbers) == 1:
        return f"row {first}"
    if last - first + 1 == len(numbers):
        return f"rows {first} to {last}"
    some = ", ".join(map(str, sorted(numbers)[:3]))
    return f"{len(numbers)} rows ({some}, ...)"


class Work(Protocol):
    """What is done with each row, in batches.

    Attributes:
        columns: of the output.
        facts: everything that results depend on, beside the rows.
    """

    columns: ClassVar[Columns]
    facts: tuple[str, ...]

    def begin(self, output: OutputFile) -> None:
        """Called before the first row."""
        ...

    def end(self) -> Mapping[str, float]:
        """Called once the output is written; returns sums of its own since `begin`, such as requests to a server."""
        ...

    def length(self, row: Any) -> int:
        """Returns how long the row is, in any unit."""
        ...

    def batches(self, rows: Sequence[Any]) -> Iterator[Sequence[int]]:
        """Cuts rows into batches of indices, in their order."""
        ...

    def run(self, rows: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
        """Returns a result as JSON for each row of a batch; `numbers` are the rows' from 1, for errors."""
        ...

    def is_result(self, row: Any, result: Any) -> bool:
        """Whether this can be the row's result; one of a damaged journal may not be."""
        ...

    def output(self, row: Any, result: Any) -> Mapping[str, Any]:
        """Returns the output's row."""
        ...

    def totals(self, row: Any, result: Any) -> Mapping[str, float]:
        """Returns what the row adds to the totals."""
        ...


@dataclass(frozen=True)
class Finished:
    """A finished output.

    Args:
        output: its name.
        rows: how many it has.
        resumed: how many of them an earlier, interrupted run had computed.
        totals: the sums over all rows.
        checked: what was found in the input, such as bad rows.
    """

    output: str
    rows: int
    resumed: int
    totals: Totals
    checked: CheckedStream


class Pace:
    """How fast rows are computed, from when it is made."""

    def __init__(self) -> None:
        self._rows, self._start = 0, time.monotonic()

    def add(self, rows: int) -> str:
        """Counts rows that were computed; returns the unit of progress with the rate, `rows, 117.3 rows/s`."""
        self._rows += rows
        return f"rows, {self._rows / max(time.monotonic() - self._start, 1e-9):,.1f} rows/s"


def run_stream(
    stream: RowStream,
    checked: CheckedStream,
    work: Work,
    target: OutputFile,
    words: Words,
    window: int,
    log: Log,
    progress: Progress,
) -> Finished:
    """Computes checked rows and writes them; errors as in `run_bulk`. Callers hold the output's lock."""
    journal = Journal.beside(target.local, *work.facts, checked.fingerprint)
    if resumed := journal.count():
        log(f"  {resumed} of {checked.rows} rows were {words.done} by an earlier run")
    totals: Totals = Counter()
    pace = Pace()
    work.begin(target)
    with target.writer(work.columns) as write, _kept(journal) as keep:
        first = 0
        for rows in stream.windows(window, checked):
            results = {key - first: value for key, value in journal.read(range(first, first + len(rows))).items()}
            if not all(work.is_result(rows[i], result) for i, result in results.items()):
                raise journal.damaged()
            done = first + len(results)
            # Batches of similar length, the longest first.
            missing = [i for i in range(len(rows)) if i not in results]
            missing.sort(key=lambda i: (-work.length(rows[i]), i))
            for places in work.batches([rows[i] for i in missing]):
                batch = [missing[place] for place in places]
                computed = work.run([rows[i] for i in batch], [first + i + 1 for i in batch])
                keep({first + i: result for i, result in zip(batch, computed, strict=True)})
                results |= zip(batch, computed, strict=True)
                done += len(batch)
                progress(words.doing, done, checked.rows, pace.add(len(batch)))
            write([work.output(row, results[i]) for i, row in enumerate(rows)])
            for i, row in enumerate(rows):
                totals.update(work.totals(row, results[i]))
            first += len(rows)
    journal.remove()
    totals.update(work.end())
    return Finished(target.name, first, resumed, totals, checked)


@contextmanager
def _kept(journal: Journal) -> Iterator[Callable[[Mapping[int, Any]], None]]:
    """Context manager that gives a function which journals results, at most once in `KEEP_SECONDS`.

    A kill loses the work of so many seconds; an error, or Ctrl-C, loses none. To wait for the disk after every batch
    took longer than quick batches themselves.
    """
    held: dict[int, Any] = {}
    last = -math.inf

    def keep(results: Mapping[int, Any]) -> None:
        nonlocal last
        held.update(results)
        if time.monotonic() - last >= KEEP_SECONDS:
            journal.put(held)
            held.clear()
            last = time.monotonic()

    try:
        yield keep
    except BaseException:
        if held:
            journal.put(held)
        raise
