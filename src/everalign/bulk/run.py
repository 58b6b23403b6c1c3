"""Work on whole datasets in bounded memory, in this process or on Ray.

    make_work = partial(ScoringWork, RewardModel.from_folder("runs/reward"))
    run_bulk(RowStream("answers.jsonl", unscored_reader(False)), make_work, "scored.jsonl", ScoringWork.words)

All rows are checked before the first is computed. Results are journalled batch by batch beside the output, in a file
named after everything they depend on; after a kill the same call goes on from there. The output has the order of the
input, each row once, and appears when it is complete.

On Ray Data each of the workers that hold a model does one partition of the file after the other. A partition is what
`--shard` is: a contiguous part with a journal and an output of its own, in the folder `OUTPUT.parts`. A worker that
dies is replaced by Ray, and its partition goes on from its journal, or starts again where the new worker does not see
that. When all partitions are there they are joined in order.
"""

import hashlib
import logging
import os
import pickle
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everalign.bulk.files import SUFFIXES, OutputFile, join_files
from everalign.bulk.job import BulkOptions, Finished, Log, Pace, Progress, Totals, Words, Work, run_stream
from everalign.data.file_formats import file_size
from everalign.data.streams import CheckedStream, RowStream
from everalign.errors import EveralignError, InputError, not_installed
from everalign.storage import Journal, exclusive, is_url, lock_of

_PARTITION_BYTES, _FEWEST, _MOST = 8 << 20, 16, 10_000
# How often a partition may lose its worker before the job fails.
_RETRIES = 5
# What goes through Ray's store are the descriptions of partitions.
_STORE_BYTES = 256 << 20


def run_bulk(
    stream: RowStream,
    make_work: Callable[[], Work],
    output: str,
    words: Words,
    *,
    options: BulkOptions | None = None,
    overwrite: bool = False,
    log: Log = lambda _: None,
    progress: Progress = lambda *_: None,
    found: Callable[[CheckedStream], None] = lambda _: None,
) -> Finished:
    """Checks all rows, computes what an earlier run has not, and writes the output.

    Args:
        stream: the rows.
        make_work: called once the rows are found to be good; loads models. With Ray each worker calls it.
        output: path or URL of the output; its parts get names of their own.
        words: what the work is called.
        options: how; the defaults when None.
        overwrite: replace the output if it exists.
        log: called with one line for each event.
        progress: called with (words.doing, rows done, rows in all, `rows` and how many are computed in a second).
        found: called with what the check of the input found.

    Raises:
        InputError: a row is bad, there are none, the output cannot be used, or another process writes it.
        EveralignError: the work failed; what was computed before is kept.
    """
    options, target = options or BulkOptions(), OutputFile(output)
    number, count = options.shard_numbers
    if count > 1:
        base, dot, suffix = output.rpartition(".")
        target = OutputFile(f"{base}-{number:05}-of-{count:05}{dot}{suffix}")
        stream = stream.parts(count)[number - 1]
    with exclusive(lock_of(target.local)):
        target.check_new(overwrite)
        if options.engine == "ray":
            return run_on_ray(stream, make_work, target, words, options, log, progress, found)
        checked = stream.check(lambda rows: log(f"  {rows:,} rows checked") if rows % 1_000_000 == 0 else None)
        found(checked)
        stream.require_rows(checked)
        log(f"{checked.rows} rows to {words.do}")
        work = make_work()
        try:
            return run_stream(stream, checked, work, target, words, options.window, log, progress)
        except EveralignError as error:
            if count == 1:
                raise
            raise type(error)(f"shard {number}/{count}: {error}") from error


@dataclass(frozen=True)
class _Job:
    """What every worker has to know.

    Args:
        target: the output.
        count: number of partitions.
        words: what the work is called.
        window: rows in memory at a time.
        make_work: loads the model.
        folder: the driver's working directory, so that relative paths and modules there mean the same in a worker.
    """

    target: OutputFile
    count: int
    words: Words
    window: int
    make_work: Callable[[], Work]
    folder: str

    def enter(self) -> None:
        """Prepare a worker's process."""
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        folder = Path(f"{self.target.name}.parts")
        if not is_url(self.target.name) and not folder.is_dir():
            raise InputError(
                f"{folder}: is not seen on {socket.gethostname()}: all machines need a file system in common, or name "
                "an --output at a URL, such as s3://bucket/scored.jsonl"
            )


def _check(batch: dict[str, Any], job: _Job) -> dict[str, Any]:
    """Check partitions, without a model."""
    return _each(job, batch, lambda _, stream: stream.check())


@dataclass
class _Worker:
    """An actor: loads the model once and does one partition after the other."""

    job: _Job
    work: Work | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _each(self.job, batch, self._do)

    def _do(self, number: int, task: tuple[RowStream, CheckedStream, Any]) -> dict[str, Any]:
        """Return what the driver keeps of a finished partition."""
        job, (stream, checked, kept) = self.job, task
        if self.work is None:
            self.work = job.make_work()
        facts = "\n".join([*self.work.facts, checked.fingerprint])
        digest, suffix = hashlib.sha256(facts.encode()).hexdigest()[:16], job.target.name.rpartition(".")[2]
        part = OutputFile(f"{job.target.name}.parts/{number:05}-of-{job.count:05}-{digest}.{suffix}")
        if kept is not None and kept["output"] == part.name and part.exists():
            return {**kept, "resumed": kept["rows"]}
        # A worker that Ray has given up may still be alive.
        with exclusive(lock_of(part.local), wait=lambda *_: None):
            attempts = _attempts(part)
            done = run_stream(stream, checked, self.work, part, job.words, job.window, lambda _: None, lambda *_: None)
            attempts.unlink()
        return {"output": done.output, "rows": done.rows, "resumed": done.resumed, "totals": dict(done.totals)}


def _attempts(part: OutputFile) -> Path:
    """Count how often a partition was begun, in the file returned: Ray itself would try for ever."""
    path = part.local.with_name(f"{part.local.name}.attempts")
    count = path.stat().st_size if path.exists() else 0
    if count > _RETRIES:
        raise EveralignError(
            f"has lost its worker {count} times (is memory short?): Ray's logs say more; fewer --workers, or a smaller "
            "--batch-size or --window, need less"
        )
    path.write_text("x" * (count + 1))
    return path


def _each(job: _Job, batch: dict[str, Any], work: Callable[[int, Any], Any]) -> dict[str, Any]:
    """Do a batch's partitions in a worker; errors of ours are results, because they would come out of Ray as others."""
    results = []
    for number, task in zip(batch["number"], batch["task"], strict=True):
        try:
            job.enter()
            results.append(pickle.dumps(work(int(number), pickle.loads(task))))
        except EveralignError as error:
            results.append(pickle.dumps(error))
    return {"number": list(batch["number"]), "result": results}


def run_on_ray(
    stream: RowStream,
    make_work: Callable[[], Work],
    target: OutputFile,
    words: Words,
    options: BulkOptions,
    log: Log,
    progress: Progress,
    found: Callable[[CheckedStream], None],
) -> Finished:
    """Do the work on Ray; arguments and errors as in `run_bulk`, whose lock is held.

    A cluster is used that RAY_ADDRESS names or that is in use already; else one is started on this machine.
    """
    if not stream.name.lower().endswith(SUFFIXES):
        raise InputError(
            f"{stream.name}: Ray's workers read parts of a file, for which it must be a .jsonl or .parquet file: "
            "convert it, or leave out --engine ray"
        )
    output = target.name
    folder = Path()
    if not is_url(target.name):
        target = OutputFile(os.path.abspath(target.name))
        folder = Path(f"{target.name}.parts")
        folder.mkdir(parents=True, exist_ok=True)
    count = options.partitions or min(max(file_size(stream.name) // _PARTITION_BYTES, _FEWEST), _MOST)
    for attempts in folder.glob(f"*-of-{count:05}-*.attempts"):
        attempts.unlink()
    streams = stream.parts(count)
    job = _Job(target, count, words, options.window, make_work, os.getcwd())
    # Ray prints what becomes of its workers on standard output, where only results belong.
    with redirect_stdout(sys.stderr), _cluster(options) as workers:
        checks: dict[int, CheckedStream] = {}
        log(f"{count} partitions to check")
        for number, one in _mapped(job, dict(enumerate(streams)), _check, fn_kwargs={"job": job}):
            checks[number] = one
        checked = _sum_of([checks[number] for number in range(count)])
        found(checked)
        stream.require_rows(checked)
        log(f"{checked.rows} rows to {words.do}, by {workers[0]} workers in {count} partitions")
        parts = _computed(job, streams, checks, checked.rows, workers, log, progress)
    done = [parts[number] for number in sorted(parts)]
    join_files([one["output"] for one in done], target.name, overwrite=True)
    Journal.beside(target.local, "partitions", str(count)).remove()
    if is_url(target.name):
        for one in done:
            OutputFile(one["output"]).remove()
    else:
        shutil.rmtree(folder)
    totals: Totals = Counter()
    for one in done:
        totals.update(one["totals"])
    return Finished(output, checked.rows, sum(one["resumed"] for one in done), totals, checked)


def _computed(
    job: _Job,
    streams: list[RowStream],
    checks: dict[int, CheckedStream],
    rows: int,
    workers: tuple[int, float],
    log: Log,
    progress: Progress,
) -> dict[int, dict[str, Any]]:
    """Have the workers do all partitions that have rows; returns what is known of each."""
    from ray.data import ActorPoolStrategy

    journal = Journal.beside(job.target.local, "partitions", str(job.count))
    kept = journal.read(range(job.count))
    tasks = {
        number: (streams[number], checks[number], kept.get(number))
        for number in range(job.count)
        if checks[number].rows
    }
    parts: dict[int, dict[str, Any]] = {}
    pace, done = Pace(), 0
    size, gpus = workers
    # One partition at a time, so that none waits for a busy worker while another has nothing to do.
    pool = ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)
    actors = {"compute": pool, "num_cpus": 1, "num_gpus": gpus or None, "fn_constructor_args": [job]}
    for number, one in _mapped(job, tasks, _Worker, **actors):
        journal.put({number: one})
        parts[number] = one
        done += one["rows"]
        progress(job.words.doing, done, rows, pace.add(one["rows"] - one["resumed"]))
    if resumed := sum(one["resumed"] for one in parts.values()):
        log(f"  {resumed} of {rows} rows were {job.words.done} by an earlier run, or by workers that were lost")
    return parts


def _mapped(job: _Job, tasks: dict[int, Any], work: Any, **how: Any) -> Iterator[tuple[int, Any]]:
    """Yield the results of partitions as they are finished.

    Args:
        job: the job.
        tasks: what to do with each partition, by its number.
        work: a function of batches, or a class of actors.
        how: further arguments of Ray's `map_batches`.

    Raises:
        EveralignError: what a partition failed with, or Ray itself has failed.
    """
    import ray

    items = [{"number": number, "task": pickle.dumps(task)} for number, task in tasks.items()]
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(work, batch_size=1, **how)
    try:
        for row in results.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, EveralignError):
                raise type(result)(f"partition {row['number'] + 1} of {job.count}: {result}") from result
            yield row["number"], result
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise EveralignError(f"Ray gave up: {reason}; the same command goes on from the finished partitions") from error


@contextmanager
def _cluster(options: BulkOptions) -> Iterator[tuple[int, float]]:
    """Context manager for a Ray cluster; gives the number of workers and of each one's GPUs."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise not_installed("--engine ray", "Ray Data", "ray") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours = not ray.is_initialized()
    if ours and os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="ERROR")
    elif ours:
        cpus = max(os.cpu_count() or 1, options.workers or 2)
        ray.init(
            address="local", num_cpus=cpus, object_store_memory=_STORE_BYTES, include_dashboard=False,
            log_to_driver=False, logging_level="ERROR",
        )  # fmt: skip
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        available = int(ray.cluster_resources().get("GPU", 0))
        gpus = options.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if available else 0.0
        yield options.workers or (max(int(available / gpus), 1) if gpus else 2), gpus
    finally:
        if ours:
            ray.shutdown()


def _sum_of(checks: list[CheckedStream]) -> CheckedStream:
    """Return what was found in all partitions together."""
    ignored = dict.fromkeys(name for one in checks for name in one.ignored)
    return CheckedStream(
        sum(one.rows for one in checks),
        " ".join(one.fingerprint for one in checks),
        sum(one.skipped for one in checks),
        next((one.first for one in checks if one.first), ""),
        tuple(ignored),
    )
