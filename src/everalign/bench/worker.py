"""One run of a bench, in a process of its own: learn the tasks, read the scores and costs, write the record.

A contender that learns nothing, the base model as it is or with an instruction in front of every prompt, is scored
alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch

from everalign.bench.answers import write_answers_file
from everalign.bench.data import with_system
from everalign.bench.records import FORMAT, METRICS, PAIR_METRICS, Run, peak_bytes
from everalign.data.records import PreferenceSet
from everalign.data.tokenization import TokenizedRow, tokenize_preferences
from everalign.errors import DivergedError, EveralignError, InputError
from everalign.evaluation import HeldOut, PreferenceScore, score_base
from everalign.evaluation.preference import score_log_probs
from everalign.learning.context import RunContext, make_context
from everalign.learning.evaluation_suite import prepare_held_out, scored_rows
from everalign.learning.learner import Learner
from everalign.learning.options import RolloutOptions
from everalign.learning.recipe import Recipe
from everalign.learning.run_data import RunData, VersionData
from everalign.learning.run_store import now
from everalign.modeling.lora import WEIGHTS
from everalign.modeling.prompt_pool import PROMPTS_FILE
from everalign.storage import write_json
from everalign.training.options import WeightOptions
from everalign.training.reference import policy_key
from everalign.training.stage import StageFigures

_NO_LIMIT = 10**9


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


def load_base(recipe: Recipe, log: Callable[[str], None]) -> RunContext:
    """Loads a run's base model as a learner would."""
    given = recipe.learner_arguments(needs_tasks=False)
    return make_context(
        model=given["model"],
        base_adapter=None,
        method=given["method"],
        objective=given["objective"],
        options=given["training"],
        adapter=given["adapter"],
        weighting=WeightOptions(),
        scorer=None,
        rollouts=RolloutOptions(),
        correction=None,
        seed=0,
        cache=Path(given["cache"]),
        log=log,
        progress=lambda *_: None,
    )


def base_results(context: RunContext, run: Run) -> dict[str, Any]:
    """Returns what a record keeps of a run that learns nothing: scores at the end, as of tasks learned at once."""
    plain, scored = dict[str, PreferenceScore](), dict[str, PreferenceScore]()
    for task in run.order:
        held_out = prepare_held_out(context, run.rows[task].held_out)
        plain[task] = score_base(held_out)
        system = (run.system or {}).get(task)
        scored[task] = plain[task] if system is None else _with_instruction(context, run, task, held_out, system)
    empty: list[list[None]] = [[None] * len(run.order) for _ in run.order[1:]]
    return {
        "tasks": list(run.order),
        "regime": "joint",
        "scores": {
            metric: {
                "zero_shot": [getattr(plain[task], metric) for task in run.order],
                "matrix": [*empty, [getattr(scored[task], metric) for task in run.order]],
            }
            for metric in METRICS
        },
        "pairs": {
            metric: {task: {"learned": None, "final": getattr(scored[task], field)} for task in run.order}
            for metric, field in PAIR_METRICS.items()
        },
        "cost": {"seconds": 0, "processor_seconds": 0, "peak_bytes": peak_bytes(), "kept": [], "resumed": False},
        "facts": context.to_dict(),
    }


def _with_instruction(context: RunContext, run: Run, task: str, plain: HeldOut, system: str) -> PreferenceScore:
    """Scores the base model with the instruction; what that gains is measured against the base model without it."""
    rows = PreferenceSet.of(scored_rows(run.rows[task].held_out, context))
    whole = tokenize_preferences(rows, context.tokenizer, _NO_LIMIT)
    told = tokenize_preferences(with_system(rows, system), context.tokenizer, _NO_LIMIT)
    pairs = [_behind(*three) for three in zip(told, whole, plain.pairs, strict=True)]
    longest = max(len(row.prompt) + max(map(len, row.responses)) for row in pairs)
    readable = context.policy.head.lengths.longest
    if readable is not None and longest > readable:
        raise InputError(
            f"contenders.{run.contender}.system: with it a row of {task} has {longest} tokens, and the model can read "
            f"{readable}: shorten it, or lower training.max_length"
        )
    key = policy_key(context.model_key, {})
    with context.policy.as_base():
        found = context.cache.logprobs(context.policy, key, pairs, context.options.tokens_per_batch)
    return score_log_probs(torch.stack(found), HeldOut(pairs, plain.base))


def _behind(told: TokenizedRow, whole: TokenizedRow, plain: TokenizedRow) -> TokenizedRow:
    """Puts an instruction before a row that was cut to the length limit, which would cut the instruction first.

    Args:
        told: the row with the instruction, not cut.
        whole: the row without it, not cut.
        plain: the same, cut: prompt on the left, responses on the right.
    """
    responses = tuple(
        own[: max(1, len(own) - len(without) + len(cut))]
        for own, without, cut in zip(told.responses, whole.responses, plain.responses, strict=True)
    )
    lost, prompt = len(whole.prompt) - len(plain.prompt), told.prompt
    if lost:
        # The cut is made behind a leading BOS, which stays.
        first = 1 if plain.prompt == whole.prompt[:1] + whole.prompt[1 + lost :] else 0
        # What both have in common is the prompt itself. Around it templates put what they like: a system message of
        # their own, or, where the row is plain text, the marks of a turn.
        place, same, length = SequenceMatcher(None, prompt, whole.prompt, autojunk=False).find_longest_match()
        start, end = (min(max(cut - same, 0), length) for cut in (first, first + lost))
        prompt = prompt[: place + start] + prompt[place + end :]
    return replace(told, prompt=prompt, responses=responses)
