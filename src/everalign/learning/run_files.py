"""The JSON files of a run directory, checked on the way in.

Every problem is an `InputError` that names the file and, where there is one, the line or the field.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from everalign import storage as files
from everalign.errors import InputError

T = TypeVar("T")
Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    """Unknown fields are accepted: a newer Everalign may add some without changing the format's number."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Score(_Record):
    """What one policy scored on one task's held-out pairs."""

    accuracy: Annotated[float, Field(ge=0, le=1)]
    margin: FiniteFloat
    reward_accuracy: Annotated[float, Field(ge=0, le=1)]
    kl_previous: FiniteFloat | None = None
    margin_error: FiniteFloat | None = None
    chosen_logprob: FiniteFloat | None = None
    rejected_logprob: FiniteFloat | None = None
    ranked: str = ""
    gained: str = ""
    pairs: Annotated[int, Field(ge=1)]


class DataSource(_Record):
    """Where a task's rows came from; of held-out rows the label whose policy is scored on them, and which are scored.

    Args:
        evenly: whether those that are scored reach from the first row to the last; runs of before may leave out the
            last.
    """

    source: str
    rows: Count
    fingerprint: str
    label: str | None = None
    evenly: bool = False


class SampleAnswer(_Record):
    """What a policy wrote, greedily, to a held-out prompt.

    Args:
        row: id of the held-out row.
        prompt: text, or chat messages.
        draft: of a corrector, the answer that it was given; else None.
        answer: what it wrote, without its end.
        ended: whether it has ended, or was cut at the limit of tokens.
    """

    row: str
    prompt: str | list[dict[str, Any]]
    draft: str | None = None
    answer: str
    ended: bool


Answers = dict[str, list[dict[str, Any]]]
"""By task, one for each prompt, as `SampleAnswer` reads them."""


class ScoresFile(_Record):
    """scores.json of a version, and what zero_shot.json tells of the base model: scores and answers by task."""

    scores: dict[str, Score]
    before_consolidation: dict[str, Score] | None = None
    answers: dict[str, list[SampleAnswer]] = {}


class ZeroShotFile(ScoresFile):
    """zero_shot.json: the base model's scores, and the test sets of the run."""

    tests: dict[str, DataSource]


class AnswerResult(_Record):
    """What `everalign evaluate` measured of one version's answers to a task's prompts.

    Args:
        version: of the run; "000" for the base model.
        task: whose prompts they are.
        prompts: their number.
        metrics: by name the value and the ends of its interval.
        failed: by name how many of a judge's replies could not be read.
    """

    version: str
    task: str
    prompts: int
    metrics: dict[str, tuple[float, float, float]]
    failed: dict[str, int] = {}


class EvaluationFile(_Record):
    """evaluation/results.json, as far as a report reads it."""

    results: list[AnswerResult]


class Method(_Record):
    """The method's name and, as extra fields, its arguments."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str


class Predicted(_Record):
    """What a task was predicted to take, before it was learned.

    Args:
        steps: optimiser steps.
        seconds: at least and at most, on a machine that does nothing else.
        memory: bytes at the highest.
    """

    steps: Count
    seconds: tuple[FiniteFloat, FiniteFloat]
    memory: FiniteFloat


class Actual(_Record):
    """What a task took.

    Args:
        seconds: wall-clock time, of the last uninterrupted piece.
        processor_seconds: processor time of all threads meanwhile.
        memory: bytes that the process, or the GPU, had held at the highest by then.
    """

    seconds: FiniteFloat
    processor_seconds: FiniteFloat
    memory: FiniteFloat


class RunFile(_Record):
    """run.json: how the run was set up; `predicted` is by task."""

    format: Literal[1]
    everalign: str
    model: str
    base_adapter: str | None = None
    model_fingerprint: str
    method: Method
    objective: str
    settings: dict[str, Any]
    seed: int
    created: str
    libraries: dict[str, str]
    machine: dict[str, Any]
    predicted: dict[str, Predicted] = {}


def setup_id(facts: RunFile) -> str:
    """A digest that tells a run's versions from another run's.

    It leaves out settings: one that is new in a later Everalign is added to runs that began without it.
    """
    own = facts.model_dump(include={"model_fingerprint", "seed", "created"})
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


class Stage(_Record):
    """One stage of training a task."""

    stage: str
    reference: str | None = None
    steps: Count
    epochs: FiniteFloat
    seconds: FiniteFloat
    processor_seconds: FiniteFloat | None = None
    step0_margin: FiniteFloat | None = None
    step0_log_ratio: FiniteFloat | None = None
    rows: Count
    replayed: Count


class Comparison(_Record):
    """What a version and something else came to on the same held-out rows.

    Args:
        before: mean of the other, a share.
        after: of the version.
        low: lower end of the fall's 90 % interval, above 0 where it fell, as a share: 95 % certain on either side.
        high: upper end.
        rows: that were compared.
    """

    before: FiniteFloat
    after: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    rows: Count


Outcome = Literal["promoted", "refused", "not enough evidence"]


class Verdict(_Record):
    """What the gate made of a finished task.

    Args:
        tolerance: how far a held-out accuracy may fall, a share.
        promoted: whether none fell further, beyond doubt.
        fell: those that did, beyond doubt: before and after, by task.
        outcome: the same in one of three words; None in files from before there were three.
        compared: what was compared, by task, or by what else it was.
        unchanged: whether nothing differs from the version before.
    """

    tolerance: Annotated[float, Field(ge=0, le=1)]
    promoted: bool
    fell: dict[str, tuple[FiniteFloat, FiniteFloat]]
    outcome: Outcome | None = None
    compared: dict[str, Comparison] = {}
    unchanged: bool = False


class Manifest(_Record):
    """manifest.json of one version; `setup` is the `setup_id` of its run, None before there was one."""

    format: Literal[1]
    index: Annotated[int, Field(ge=1)]
    name: Annotated[str, Field(min_length=1)]
    parent: str
    created: str
    label: str | None = None
    train: DataSource
    test: DataSource | None
    chats: bool | None = None
    weights: dict[str, float | None] | None = None
    rollouts: list[dict[str, float]] = []
    warnings: list[str] = []
    gate: Verdict | None = None
    stages: list[Stage]
    method_seconds: FiniteFloat | None = None
    actual: Actual | None = None
    setup: str | None = None
    files: dict[str, str]


class TrainingStep(_Record):
    """One line of training.jsonl. A diverged run may log NaN; a stage logs only what it has."""

    stage: str
    step: Count
    loss: float | None = None
    margin: float | None = None
    accuracy: float | None = None


class LoggedStep(TrainingStep):
    """One line of the run's training.jsonl, with what else was measured as extra fields.

    Args:
        task: its name.
        version: that it becomes.
        round: of sampled answers, from 1.
        stage_number: of the stage in the task, from 0.
        time: when it was logged, in seconds since 1970.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    task: str
    version: str
    round: Count
    stage_number: Count
    time: FiniteFloat


class ModuleConsolidation(_Record):
    """One module's line of consolidation.json; energies are shares of squared Frobenius norms, 0 to 1."""

    module: str
    energy_kept: FiniteFloat
    rank: Count
    projected_energy: FiniteFloat
    norm_before: FiniteFloat
    norm_after: FiniteFloat
    memory_rank: Count
    discarded_energy: FiniteFloat
    bank_lost_energy: FiniteFloat = 0.0


def read_json(path: Path, kind: type[T]) -> T:
    """The file's content as `kind` (a record, or a list of records)."""
    return _validated(files.read_json(path), kind, str(path))


def read_json_lines(path: Path, kind: type[T], growing: bool = False) -> list[T]:
    """One `kind` for each line that is not empty; of a file that is `growing`, for each that ends."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = (text[: text.rfind("\n") + 1] if growing else text).split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the run directory is incomplete") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; restore the file") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: damaged JSON (column {error.colno}: {error.msg}); restore the file") from error
        found.append(_validated(value, kind, where))
    return found


def _validated(value: Any, kind: type[T], where: str) -> T:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise InputError(f"{where}: field {field}: {first['msg']} (found {first['input']!r})") from error
