"""One run of a bench, in a process of its own: learn the tasks, read the scores and costs, write the record."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch

from everalign.bench.answers import write_answers_file
from everalign.bench.base_model import base_results, load_base
from everalign.bench.records import FORMAT, METRICS, PAIR_METRICS, Run, peak_bytes
from everalign.errors import DivergedError, EveralignError, InputError
from everalign.learning.learner import Learner
from everalign.learning.recipe import Recipe
from everalign.learning.run_data import RunData, VersionData
from everalign.learning.run_store import now
from everalign.modeling.lora import WEIGHTS
from everalign.modeling.prompt_pool import PROMPTS_FILE
from everalign.storage import write_json
from everalign.training.stage import StageFigures


@dataclass(frozen=True)
class Place:
    """Where a run works and what it leaves.

    Args:
        run: its run directory.
        record: its record, written at the end.
        answers: what its final policies said, if they are asked.
        log: what it says meanwhile.
        cache: reference log-probabilities and encoded rows, which all runs share.
        code: the version of the code, for the record.
        keep_run: whether the run directory stays.
    """

    run: Path
    record: Path
    answers: Path
    log: Path
    cache: Path
    code: str
    keep_run: bool


Say = Callable[[str, int, int], None]
"""Takes a stage's name, the steps done, and the steps in all."""


def run_in_process(run: Run, place: Place, pipe: connection.Connection) -> None:
    """Entry of a run's process: reports through the pipe, and ends when the process that started it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what libraries hold is given back
    _end_with_parent()
    place.log.parent.mkdir(parents=True, exist_ok=True)
    with place.log.open("a", buffering=1, encoding="utf-8") as log:
        # What libraries print belongs to the run, not into the parent's progress.
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        sys.stdout = sys.stderr = log
        try:
            execute(
                run, place, lambda *progress: pipe.send(("progress", *progress)), lambda line: print(line, file=log)
            )
            pipe.send(("done",))
        except EveralignError as error:
            pipe.send(("refused" if isinstance(error, InputError) else "failed", str(error)))
        except Exception as error:  # whatever it is, the parent names it
            pipe.send(("crashed", f"{type(error).__name__}: {error}"))
            raise


def execute(run: Run, place: Place, say: Say, log: Callable[[str], None]) -> None:
    """Learns a run's tasks in its folder, or goes on where an earlier call was stopped, and writes its record."""
    torch.set_num_threads(1)
    resumed = (place.run / "run.json").exists()
    log(f"{now()} {run.label}: {' > '.join(run.order)}")
    # Output and cache are no part of what names the run.
    recipe = run.recipe.model_copy(update={"output": str(place.run), "cache": str(place.cache), "sample_answers": 0})
    record: dict[str, Any] = {
        "format": FORMAT,
        "contender": run.contender,
        "model": run.model,
        "order": list(run.order),
        "seed": run.seed,
        "part": run.part,
        "choice": dict(run.choice),
        "code": place.code,
        "model_content": run.model_content,
    }
    if replace(run).name != place.record.stem:
        raise InputError(f"contenders.{run.contender}: the method's file has changed meanwhile: run the command again")
    try:
        if run.system is not None:
            base = load_base(recipe, log)
            record |= base_results(base, run)
            policy, tokenizer, data = base.policy, base.tokenizer, None
        else:
            learner = _learned(run, recipe, say, log)
            policy, tokenizer, data = learner.policy, learner.tokenizer, learner.run
            record |= results(data, resumed)
        if run.asked is not None:
            write_answers_file(run, policy, tokenizer, data, place.run, place.answers, log)
    except DivergedError as error:
        if run.system is not None:
            raise  # nothing was trained
        # Training that diverges is a result: it would do so again. Whatever else fails may not.
        record["failed"] = str(error)
    place.record.parent.mkdir(parents=True, exist_ok=True)
    write_json(place.record, {**record, "created": now()})
    if not place.keep_run:
        shutil.rmtree(place.run, ignore_errors=True)


def _learned(run: Run, recipe: Recipe, say: Say, log: Callable[[str], None]) -> Learner:
    """Learns all tasks, or what is left of them."""
    arguments = recipe.learner_arguments(needs_tasks=False)
    # Scores that no record holds are not computed.
    ahead = run.forward_transfer and arguments["method"].regime != "separate"
    progress, figures = _by_stage(say)
    learner = Learner(
        **arguments,
        forward_transfer=ahead,
        drift=False,
        resume=True,
        log=log,
        progress=progress,
        figures=figures,
    )
    learner.learn_all([(name, run.rows[name].train, run.rows[name].held_out) for name in run.order])
    return learner


def _by_stage(say: Say) -> tuple[Say, StageFigures]:
    """Turns progress of stages into that of the run: says how many were begun; passes over rows do not count."""
    begun: list[str] = []

    def figures(stage: str, step: int, measured: Mapping[str, float]) -> None:
        if not measured:
            begun.append(stage)

    def progress(stage: str, done: int, total: int) -> None:
        if begun and begun[-1] == stage:
            say(f"{stage} {len(begun)}", done, total)

    return progress, figures


def results(data: RunData, resumed: bool) -> dict[str, Any]:
    """Returns what a record keeps of a finished run."""
    versions = {version.task: version for version in data.versions}
    last = data.versions[-1]
    stages = [stage for version in data.versions for stage in version.manifest.stages]
    method = sum(version.manifest.method_seconds or 0.0 for version in data.versions)
    scores, pairs = {}, {}
    for metric in METRICS:
        found = data.scores(metric)
        scores[metric] = {"zero_shot": list(found.zero_shot), "matrix": [list(row) for row in found.matrix]}
    for metric, field in PAIR_METRICS.items():
        pairs[metric] = {
            task: {
                "learned": getattr(versions[task].scores[task], field) if task in versions else None,
                "final": getattr((versions[task] if data.regime == "separate" else last).scores[task], field),
            }
            for task in data.tasks
        }
    return {
        "tasks": data.tasks,
        "regime": data.regime,
        "scores": scores,
        "pairs": pairs,
        "cost": {
            "seconds": round(sum(stage.seconds for stage in stages), 3),
            "processor_seconds": round(sum(stage.processor_seconds or 0.0 for stage in stages) + method, 3),
            "peak_bytes": peak_bytes(),
            "kept": [_kept(data, version) for version in data.versions],
            "resumed": resumed,
        },
        "facts": data.facts.model_dump(mode="json"),
        "warnings": [f"{version.task}: {text}" for version in data.versions for text in version.manifest.warnings],
    }


def _kept(data: RunData, version: VersionData) -> dict[str, Any]:
    """Bytes that learning goes on from after a version; with labels, the adapters of all labels so far."""

    def size(one: VersionData, name: str) -> int:
        path = data.path / "versions" / one.id / name
        return path.stat().st_size if path.exists() else 0

    adapters = data.adapters_at(version).values()
    return {
        "task": version.task,
        "adapter": sum(size(one, f"adapter/{name}") for one in adapters for name in (WEIGHTS, PROMPTS_FILE)),
        "state": size(version, "method.safetensors"),
        "buffer": size(version, "replay.jsonl"),
    }


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, even if that was killed: nobody would read its result."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
