"""Runs of a bench and what is kept of them: one small JSON file a run, with its scores, pairs and costs."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from everalign.bench.contenders import Choice
from everalign.bench.data import Asked, Part, TaskRows
from everalign.bench.recipe import Bench
from everalign.errors import InputError
from everalign.learning.recipe import Recipe
from everalign.learning.scores import Regime, Scores
from everalign.reporting.formats import elided
from everalign.storage import read_model

METRICS = ("accuracy", "reward_accuracy", "margin", "chosen_logprob", "rejected_logprob")
PAIR_METRICS = {"accuracy": "ranked", "reward_accuracy": "gained"}
"""Metrics that are known of every pair, with the field of a score that holds them."""
FORMAT = 1


@cache
def code_digest() -> str:
    """16 hexadecimal digits of the package's source: what every result depends on."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def peak_bytes() -> int:
    """The largest resident memory of this process; a process that was forked counts from there on."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Run:
    """One run of a bench: a contender, a model, an order of the tasks and a seed, scored on one part of the rows.

    Args:
        contender: its name in the recipe.
        model: the model's name in the recipe.
        order: names of the tasks.
        seed: of the run.
        part: what it is scored on.
        choice: values of the tuned options.
        recipe: how it is learned, without output and cache.
        rows: of every task.
        forward_transfer: whether tasks are scored before they are learned too.
        system: by task the system message of a run that learns nothing; None for one that learns.
        asked: what the final policy is asked at the end; None for nothing.
        model_content: identifies the model's files; no part of the name, but of the record, which is checked.
    """

    contender: str
    model: str
    order: tuple[str, ...]
    seed: int
    part: Part
    choice: Choice
    recipe: Recipe
    rows: Mapping[str, TaskRows]
    forward_transfer: bool = True
    system: Mapping[str, str] | None = None
    asked: Asked | None = None
    model_content: str | None = None

    @cached_property
    def name(self) -> str:
        """Names the run's files: what it is, and a hash of all that its result depends on but the code."""
        data = {name: (rows.train.fingerprint, rows.held_out.fingerprint) for name, rows in self.rows.items()}
        facts = [self.contender, self.model, self.order, self.seed, self.part, self.recipe.complete(), data]
        # What is left out or asked for besides; a record from before there was such a choice keeps its name.
        facts += [] if self.forward_transfer else ["without forward transfer"]
        facts += [] if self.system is None else ["nothing learned", dict(self.system)]
        facts += [] if self.asked is None else ["asked", self.asked.facts]
        limit = self.recipe.training_options().test_limit
        # Before, the first rows were scored where a file had less than twice as many.
        facts += (
            ["scored up to the last row"] if any(0 < limit < len(rows.held_out) for rows in self.rows.values()) else []
        )
        if labels := {name: rows.train.labels for name, rows in self.rows.items() if rows.train.labels}:
            facts.append(labels)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        return f"{re.sub(r'[^A-Za-z0-9_.+-]', '-', self.contender)}.{self.model}.{self.part}.{self.seed}.{digest}"

    @property
    def label(self) -> str:
        """The run in words."""
        chosen = "".join(
            f" {name}={value:g}" if isinstance(value, float) else f" {name}={elided(str(value), 40)}"
            for name, value in self.choice.items()
        )
        return f"{self.contender} on {self.model},{f'{chosen},' if chosen else ''} seed {self.seed}"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Kept(_Record):
    """Bytes that a version keeps: its adapter, the method's state, and the replay buffer."""

    task: str
    adapter: int
    state: int
    buffer: int


class Cost(_Record):
    """What a run took.

    Args:
        seconds: wall-clock time of training.
        processor_seconds: processor time of training and of what the method does before and after a task; without
            scoring, and without reference log-probabilities, which runs share.
        peak_bytes: the process's largest resident memory, scoring included.
        kept: of every version.
        resumed: whether it was interrupted, so that the times are those of its last piece.
    """

    seconds: FiniteFloat
    processor_seconds: FiniteFloat
    peak_bytes: int
    kept: list[Kept]
    resumed: bool


class Matrix(_Record):
    """One metric's scores, as in `everalign.learning.scores.Scores`."""

    zero_shot: list[FiniteFloat | None]
    matrix: list[list[FiniteFloat | None]]


class Pairs(_Record):
    """Outcomes of one task's held-out pairs, a character each: `1`, `0`, or `=` for a tie.

    Args:
        learned: right after the task was learned; None where it was learned with others at once.
        final: at the end of the run.
    """

    learned: str | None
    final: str


class Record(_Record):
    """Everything that is kept of one run; `failed` says why there are no scores.

    `model_content` identifies the model's files; records from before it was kept have none.
    """

    format: Literal[1]
    contender: str
    model: str
    order: list[str]
    seed: int
    part: Part
    choice: dict[str, Any]
    code: str
    created: str
    model_content: str | None = None
    failed: str | None = None
    tasks: list[str] = []
    regime: Regime = "sequential"
    scores: dict[str, Matrix] = {}
    pairs: dict[str, dict[str, Pairs]] = {}
    cost: Cost | None = None
    facts: dict[str, Any] = {}
    warnings: list[str] = []

    @property
    def learns(self) -> bool:
        """Whether anything was learned; what learns nothing comes out alike with every seed."""
        return self.cost is not None and bool(self.cost.kept)

    def matrix(self, metric: str) -> Scores:
        """The score matrix in one metric."""
        found = self.scores[metric]
        return Scores(self.tasks, found.zero_shot, found.matrix, self.regime)

    def without(self, tasks: Sequence[str]) -> Record:
        """The same run with some tasks left out of every score; they were learned all the same."""
        kept = [task not in tasks for task in self.tasks]

        def blank(row: Sequence[float | None]) -> list[float | None]:
            return [score if keep else None for score, keep in zip(row, kept, strict=True)]

        scores = {
            metric: Matrix(zero_shot=blank(found.zero_shot), matrix=[blank(row) for row in found.matrix])
            for metric, found in self.scores.items()
        }
        pairs = {
            metric: {task: outcomes for task, outcomes in found.items() if task not in tasks}
            for metric, found in self.pairs.items()
        }
        return self.model_copy(update={"scores": scores, "pairs": pairs})

    def number(self, measure: str) -> float | None:
        """A number such as `accuracy.last`."""
        metric, _, name = measure.partition(".")
        scores = self.matrix(metric)
        if name == "worst":
            known = [score for score in final_scores(scores) if score is not None]
            return min(known) if known else None
        found: float | None = getattr(scores, name)
        return found

    def change(self, metric: str) -> float | None:
        """Mean over the tasks of what learning has changed of a metric in the end."""
        scores = self.matrix(metric)
        moved = [
            after - before
            for before, after in zip(scores.zero_shot, final_scores(scores), strict=True)
            if before is not None and after is not None
        ]
        return sum(moved) / len(moved) if moved else None

    def mean(self, measures: Sequence[str]) -> float | None:
        """Mean of some numbers; None where one of them is not there."""
        found = [self.number(measure) for measure in measures]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if len(known) == len(found) else None


def final_scores(scores: Scores) -> list[float | None]:
    """Each task's score at the end; of a separate model for each task, that task's own model's."""
    if scores.regime == "separate":
        return [row[i] for i, row in enumerate(scores.matrix)]
    return list(scores.matrix[-1]) if scores.matrix else [None] * len(scores.tasks)


class Records:
    """The records in a bench's output folder.

    Args:
        output: the folder.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output / "records"
        self._read: dict[str, Record] = {}

    def path(self, run: Run) -> Path:
        """A run's file."""
        return self.folder / f"{run.name}.json"

    def answers(self, run: Run) -> Path:
        """The file of what a run's final policies said."""
        return self.folder.parent / "answers" / f"{run.name}.json"

    def get(self, run: Run) -> Record | None:
        """A finished run's record; None where it is not finished."""
        path = self.path(run)
        if path.name not in self._read and path.exists():
            self._read[path.name] = read_model(path, Record, "delete this file, and the run is made again")
        return self._read.get(path.name)

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Those of the runs that are not finished."""
        found = []
        for run in runs:
            record = self.get(run)
            said = run.asked is None or self.answers(run).exists()
            if record is None or not (said or record.failed is not None):
                found.append(run)
        return found

    def check_models(self, runs: Sequence[Run]) -> list[str]:
        """Refuses records of runs whose model's files have changed since; returns notes on records that do not say.

        Raises:
            InputError: names the model, the records and what to do.
        """
        unsure: dict[str, int] = {}
        for run in runs:
            record = self.get(run)
            if record is None or run.model_content is None:
                continue
            if record.model_content is None:
                unsure[run.model] = unsure.get(run.model, 0) + 1
            elif record.model_content != run.model_content:
                raise InputError(
                    f"models.{run.model}: its files are others than those of finished runs, such as {self.path(run)}: "
                    f"put the earlier model back, choose another output, or delete {self.folder}/*.{run.model}.*.json "
                    "to make the runs again"
                )
        return [
            f"{model}: {count} records do not say which files of the model they were made with; whether it is still "
            "the same is not checked"
            for model, count in unsure.items()
        ]


def plan(
    bench: Bench,
    part: Part,
    rows: Mapping[str, TaskRows],
    chosen: Mapping[str, Mapping[str, Choice]],
    only: Sequence[str],
    asked: Mapping[str, Asked] | None = None,
    models: Mapping[str, str | None] | None = None,
) -> list[Run]:
    """Returns the runs of the comparison: contenders within seeds within orders within models.

    Args:
        bench: the recipe.
        part: what they are scored on.
        rows: of every task.
        chosen: by model and contender, the values of its tuned options.
        only: names of the contenders; all if empty.
        asked: by model, what final policies are asked; nothing when None.
        models: by model, what identifies its files; not known when None.
    """
    contents, questions = models or {}, asked or {}
    return [
        _run(bench, part, rows, (name, model, chosen[model][name]), order, seed, contents, questions.get(model))
        for model in bench.models
        for order in bench.task_orders()
        for seed in bench.seeds
        for name in bench.contenders
        if not only or name in only
    ]


def plan_trials(
    bench: Bench,
    rows: Mapping[str, TaskRows],
    only: Sequence[str],
    models: Mapping[str, str | None] | None = None,
) -> list[Run]:
    """Returns the runs of the trials; arguments as in `plan`."""
    return [
        _run(bench, "validation", rows, trial, order, seed, models or {})
        for order in bench.task_orders(tuning=True)
        for seed in bench.tuning.seeds
        for trial in bench.all_trials()
        if not only or trial[0] in only
    ]


def _run(
    bench: Bench,
    part: Part,
    rows: Mapping[str, TaskRows],
    trial: tuple[str, str, Choice],
    order: tuple[str, ...],
    seed: int,
    models: Mapping[str, str | None],
    asked: Asked | None = None,
) -> Run:
    name, model, choice = trial
    scored = bench.contenders[name].scored
    if scored is not None:  # the contender learns from these in place of pairs
        rows = {task: replace(found, train=found.scored[scored]) for task, found in rows.items()}
    return Run(
        name,
        model,
        order,
        seed,
        part,
        choice,
        bench.learn_recipe(name, choice, model, seed),
        rows,
        bench.forward_transfer is not False,
        bench.instruction(name, choice),
        asked,
        models.get(model),
    )
