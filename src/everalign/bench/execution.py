"""Runs side by side, each in a process of its own, with progress and time left."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from everalign.bench.records import Record, Records, Run, code_digest
from everalign.errors import EveralignError, InputError
from everalign.reporting.formats import percent, seconds

START = "forkserver"
"""How processes start. A server that has the libraries loaded forks them: each is fresh, and quick to start."""
_PRELOADED = "everalign.bench.worker"

Log = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How a bench is made.

    Args:
        output: folder of the records and results.
        only: contenders to run; all if empty.
        without: tasks that are learned, and left out of what is compared.
        jobs: runs side by side.
        keep_runs: whether run directories stay.
    """

    output: Path
    only: Sequence[str] = ()
    without: Sequence[str] = ()
    jobs: int = 1
    keep_runs: bool = False


@dataclass
class _Running:
    """A run under way. `done` is how much of it, as a share."""

    run: Run
    process: BaseProcess
    pipe: connection.Connection
    stages: int
    done: float = 0.0
    end: tuple[Any, ...] | None = None
    started: float = field(default_factory=time.monotonic)


def run_all(runs: Sequence[Run], records: Records, settings: Settings, log: Log, progress: Progress) -> None:
    """Makes the runs that are not finished yet, some side by side. Training that diverges is a result, see `Record`.

    Raises:
        EveralignError: a run's process crashed, or it was refused. Others that were under way are stopped, and go on
            where they were the next time.
    """
    # Those that learn nothing come first: they are quick, and find a bad instruction at once.
    output, waiting = settings.output, sorted(records.missing(runs), key=lambda run: run.system is None)
    total = len(waiting)
    if len(runs) > total:
        log(f"  {len(runs) - total} of {len(runs)} runs are finished already")
    if not waiting:
        return
    log(f"  what each run says goes to {output / 'logs'}")
    context: Any = multiprocessing.get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload([_PRELOADED])
    started, finished, tasks = time.monotonic(), 0, sum(len(run.order) for run in waiting)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < settings.jobs:
                running.append(_start(context, waiting.pop(0), records, output, settings.keep_runs))
            for pipe in connection.wait([one.pipe for one in running]):
                one = next(one for one in running if one.pipe is pipe)
                if not _receive(one):
                    running.remove(one)
                    record = _finish(one, records, output)
                    finished += 1
                    work = finished + sum(other.done for other in running)
                    left = (time.monotonic() - started) / work * (total - work)
                    log(_line(one, record, finished, total, left))
            under_way = sum(int(one.done * len(one.run.order)) for one in running)
            progress(
                "runs",
                tasks - sum(len(run.order) for run in waiting) - sum(len(one.run.order) for one in running) + under_way,
                tasks,
            )
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.join()


def _start(context: Any, run: Run, records: Records, output: Path, keep_runs: bool) -> _Running:
    from everalign.bench.worker import Place, run_in_process

    place = Place(
        output / "runs" / run.name,
        records.path(run),
        records.answers(run),
        output / "logs" / f"{run.name}.log",
        output / "cache",
        code_digest(),
        keep_runs,
    )
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_in_process, args=(run, place, theirs), name=run.name)
    process.start()
    theirs.close()  # so that the end of the process ends the pipe
    supervised = (run.recipe.training_options().sft_epochs or 0) > 0
    return _Running(run, process, ours, len(run.order) * (2 if supervised else 1))


def _receive(one: _Running) -> bool:
    """Takes one message; False where the process has ended."""
    try:
        message = one.pipe.recv()
    except EOFError:
        return False
    if message[0] == "progress":
        _, stage, steps, total = message
        number = int(stage.rpartition(" ")[2])
        one.done = min(0.99, max(one.done, (number - 1 + steps / max(1, total)) / one.stages))
    else:
        one.end = message
    return True


def _finish(one: _Running, records: Records, output: Path) -> Record:
    one.process.join()
    one.pipe.close()
    where = output / "logs" / f"{one.run.name}.log"
    if one.end is None:
        why = f"its process ended with code {one.process.exitcode}"
        hint = " (killed; was memory short?)" if one.process.exitcode == -9 else ""
        raise EveralignError(f"{one.run.label}: {why}{hint}; see {where}, then run the same command again")
    if one.end[0] != "done":
        kind = InputError if one.end[0] == "refused" else EveralignError
        raise kind(f"{one.run.label}: {one.end[1]} (log: {where})")
    record = records.get(one.run)
    if record is None:
        raise EveralignError(f"{one.run.label}: has written no record; see {where}")
    return record


def _line(one: _Running, record: Record, finished: int, total: int, left: float) -> str:
    """One line on a finished run, with the time left for the rest."""
    if record.failed is not None:
        what = f"failed: {record.failed}"
    else:
        shares = ((name, record.number(f"{metric}.last")) for name, metric in _SHOWN.items())
        what = ", ".join(f"{name} {percent(value)}" for name, value in shares if value is not None)
    rest = "" if finished == total else f"; about {seconds(left)} left"
    return f"  {finished}/{total} {one.run.label}: {what} ({seconds(time.monotonic() - one.started)}){rest}"


_SHOWN = {"accuracy": "accuracy", "reward accuracy": "reward_accuracy"}
