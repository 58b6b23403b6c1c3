"""Read a run directory: its versions with their scores, which of them are current, and what became of the others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from everalign.errors import InputError
from everalign.learning.run_files import (
    AnswerResult,
    EvaluationFile,
    Manifest,
    ModuleConsolidation,
    RunFile,
    SampleAnswer,
    Score,
    ScoresFile,
    TrainingStep,
    read_json,
    read_json_lines,
    setup_id,
)
from everalign.learning.scores import Regime, Scores
from everalign.storage import differing_files

_VERSION = re.compile(r"\d{3,}-.+(?<!\.partial)")  # a folder being written ends in .partial
_VERSION_FILES = ("manifest.json", "scores.json", "training.jsonl", "consolidation.json")
BASE = "000"
"""The parent of a version that started from the base model."""
BASE_ADAPTER = "base_adapter"
"""Folder of the adapter that was merged into the base model."""
BASE_MODEL = "base_model"
"""Folder of a base model that was given as an object."""
ZERO_SHOT = "zero_shot.json"
"""The base model's scores."""
RESULTS = Path("evaluation", "results.json")
"""What `everalign evaluate` writes into a run."""
TRAINING_LOG = "training.jsonl"
"""What a run writes while it trains, see `learning.tracking`; a version has a file of that name with its own curve."""
_METRICS = ("accuracy", "margin", "reward_accuracy")
Status = Literal["promoted", "", "refused by the gate", "not enough evidence", "rolled back"]
"""What became of a version: it is current, in the lineage, or off it for one of three reasons."""
_REGIMES: dict[str, Regime] = {"mtl": "joint", "stl": "separate"}


@dataclass(frozen=True)
class VersionData:
    """One finished task; `consolidation` and `before` are None for a method that does not consolidate."""

    id: str
    manifest: Manifest
    scores: Mapping[str, Score]
    before: Mapping[str, Score] | None
    training: Sequence[TrainingStep]
    consolidation: Sequence[ModuleConsolidation] | None
    answers: Mapping[str, Sequence[SampleAnswer]] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The task's name as the user wrote it."""
        return self.manifest.name

    @property
    def refused(self) -> bool:
        """Whether the gate did not promote it, because it is worse or for want of evidence that it is not."""
        return self.manifest.gate is not None and not self.manifest.gate.promoted

    def is_called(self, name: str) -> bool:
        """Whether this is its folder's name or number."""
        return name in (self.id, self.id.partition("-")[0])


@dataclass(frozen=True, repr=False)
class RunData:
    """One run: its set-up, the base model's scores, and the versions in the order of learning.

    Args:
        path: the run directory.
        facts: the set-up.
        zero_shot: the base model's scores by task.
        versions: the lineage: the current version and its parents, oldest first. All versions of a method whose tasks
            each start from the base model (STL).
        off_lineage: the others: rolled back, or refused by the gate.
        current: the promoted version, "000" for the base model, None before the first promotion.
        first_answers: the base model's sample answers by task.
    """

    path: Path
    facts: RunFile
    zero_shot: Mapping[str, Score]
    versions: Sequence[VersionData]
    off_lineage: Sequence[VersionData]
    current: str | None
    first_answers: Mapping[str, Sequence[SampleAnswer]] = field(default_factory=dict)

    def __repr__(self) -> str:
        facts, tasks = self.facts, ", ".join(version.task for version in self.versions) or "no task yet"
        about = f"{facts.model!r}, {facts.method.name!r}, {facts.objective!r}"
        return f"RunData({str(self.path)!r}: {about}; current: {self.current or BASE}; learned: {tasks})"

    @property
    def base_adapter(self) -> str | None:
        """The run's copy of the adapter that was merged into the base model; None for none."""
        return None if self.facts.base_adapter is None else str(self.path / BASE_ADAPTER)

    @property
    def all_versions(self) -> list[VersionData]:
        """All versions, in the order in which they were written."""
        return sorted([*self.versions, *self.off_lineage], key=lambda version: version.manifest.index)

    @property
    def head(self) -> str:
        """The version that learning continues from; "000" for the base model."""
        return self.versions[-1].id if self.versions else BASE

    def adapters_at(self, version: VersionData) -> dict[str | None, VersionData]:
        """Returns the versions whose adapters answer as of a version of the lineage: that one alone.

        With labels, the newest of each label up to that version, by label; the version itself comes last.
        """
        found: dict[str | None, VersionData] = {}
        for one in self.versions[: self.versions.index(version) + 1]:
            found.pop(one.manifest.label, None)
            found[one.manifest.label] = one
        return found

    def status(self, version: VersionData) -> Status:
        """What became of a version."""
        if version.id == self.current:
            return "promoted"
        if version in self.versions:
            return ""
        if not version.refused:
            return "rolled back"
        gate = version.manifest.gate
        unsure = gate is not None and gate.outcome == "not enough evidence"
        return "not enough evidence" if unsure else "refused by the gate"

    @property
    def regime(self) -> Regime:
        """How the method learns its tasks."""
        return _REGIMES.get(self.facts.method.name, "sequential")

    @property
    def tasks(self) -> list[str]:
        """The learned tasks in order, then tasks that were only scored.

        A joint run that was given all tasks at once has one version named after none of them: its tasks are
        those it was scored on. One that was given them in turn has learned those that its versions name.
        """
        learned = [version.task for version in self.versions]
        scored = dict.fromkeys([*self.zero_shot, *(task for version in self.versions for task in version.scores)])
        if self.regime == "joint":
            return [task for task in learned if task in scored] or list(scored)
        return list(dict.fromkeys([*learned, *scored]))

    def scores(self, metric: str = "accuracy") -> Scores:
        """Returns the score matrix in "accuracy", "margin" or "reward_accuracy".

        Of a model trained on one task alone (STL) only the score on that task counts.
        """
        tasks = self.tasks
        scored = [self.zero_shot, *(version.scores for version in self.versions)]
        zero, *rows = ([getattr(scores.get(task), metric, None) for task in tasks] for scores in scored)
        if self.regime == "joint":
            # Without test sets no task was measured.
            measured = rows and tasks
            return Scores.joint(tasks, zero, rows[-1]) if measured else Scores(tasks, zero, [], self.regime)
        if self.regime == "separate":
            return Scores.separate(tasks, zero, [row[i] for i, row in enumerate(rows)])
        # A task that got its test set after it was learned, while its version was rolled back, has no score to compare
        # later ones with.
        for start, version in enumerate(self.versions):
            if version.task not in version.scores:
                for row in rows[start:]:
                    row[tasks.index(version.task)] = None
        return Scores(tasks, zero, rows, self.regime)


def load_run(path: str | Path) -> RunData:
    """Reads a run directory; a damaged or missing file is an `InputError` that names it."""
    return RunReader(path).read()


class RunReader:
    """Reads a run directory repeatedly: a file that did not change is neither read nor hashed a second time.

    A change shows in the inode, size or times, which every writer changes, also in another process.

    Args:
        path: the run directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stamp: tuple[object, ...] = ()
        self._run: RunData | None = None
        self._versions: dict[str, tuple[object, VersionData]] = {}

    def read(self) -> RunData:
        """Returns the run as it is on disk; errors as in `load_run`."""
        check_is_run(self.path)
        directory = self.path / "versions"
        entries = sorted(directory.iterdir()) if directory.is_dir() else []
        folders = [entry for entry in entries if entry.is_dir() and _VERSION.fullmatch(entry.name)]
        # Before anything is read, so that what is written meanwhile is read the next time.
        stamps = {folder: _stamps(folder, _VERSION_FILES) for folder in folders}
        # A version that is not settled yet has its checkpoints still.
        unsettled = [work_folder(self.path, folder.name).exists() for folder in folders]
        stamp = (_stamps(self.path, ("run.json", ZERO_SHOT, "current")), *stamps.items(), *unsettled)
        if self._run is not None and stamp == self._stamp:
            return self._run

        known, self._versions = self._versions, {}
        for folder, found in stamps.items():
            before, version = known.get(folder.name, (None, None))
            if version is None or before != found:
                version = _load_version(folder)
            self._versions[folder.name] = found, version
        versions = sorted((version for _, version in self._versions.values()), key=lambda v: v.manifest.index)
        facts = read_json(self.path / "run.json", RunFile)
        for version in versions:
            if version.manifest.setup not in (None, setup_id(facts)):
                raise InputError(
                    f"{self.path}/versions/{version.id}: is a version of another run: restore this run's own folder"
                )
        base = read_json(self.path / ZERO_SHOT, ScoresFile)
        current = _current(self.path, versions)
        lineage = versions if facts.method.name == "stl" else _lineage(versions, current)
        off = [version for version in versions if version not in lineage]
        run = RunData(self.path, facts, base.scores, lineage, off, current, base.answers)
        try:
            for metric in _METRICS:
                run.scores(metric)
        except InputError as error:
            raise InputError(f"{self.path}/versions/*/scores.json: {error}") from error
        self._run, self._stamp = run, stamp
        return run


def _stamps(folder: Path, names: Sequence[str]) -> tuple[object, ...]:
    """Inode, size and times of each file, which change when it is written; None for one that is not there."""
    found: list[object] = []
    for name in names:
        try:
            stat = (folder / name).stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(found)


def read_results(run: Path) -> list[AnswerResult]:
    """Reads what `everalign evaluate` measured last; nothing of a run that was not evaluated."""
    path = run / RESULTS
    return read_json(path, EvaluationFile).results if path.exists() else []


def check_is_run(path: Path) -> None:
    """Refuses a folder that is no run directory."""
    if not (path / "run.json").is_file():
        raise InputError(f"{path} is not a run directory, it has no run.json; give the --output directory of a run")


def work_folder(run: Path, version: str) -> Path:
    """Returns the folder for checkpoints of the task that becomes a version; it exists until that is settled."""
    return run / "work" / version


def run_labels(runs: Sequence[RunData]) -> list[str]:
    """A name for each run: its method; with the directory's name, then its path, where that is not unique."""
    methods = [run.facts.method.name for run in runs]
    for labels in (
        methods,
        [f"{method} ({run.path.resolve().name})" for method, run in zip(methods, runs, strict=True)],
        [f"{method} ({run.path})" for method, run in zip(methods, runs, strict=True)],
    ):
        if len(set(labels)) == len(runs):
            return labels
    raise InputError(f"the same run is given twice: {', '.join(str(run.path) for run in runs)}")


def _load_version(directory: Path) -> VersionData:
    manifest = read_json(directory / "manifest.json", Manifest)
    optional = directory / "consolidation.json"
    listed = {name: manifest.files[name] for name in _VERSION_FILES[1:] if name in manifest.files}
    if wrong := differing_files(directory, listed):
        raise InputError(
            f"{directory / wrong[0]} is missing or has changed since it was written (its manifest lists "
            f"SHA-256 {listed[wrong[0]][:16]}...); restore the file, or learn the task again"
        )
    scores = read_json(directory / "scores.json", ScoresFile)
    return VersionData(
        id=directory.name,
        manifest=manifest,
        scores=scores.scores,
        before=scores.before_consolidation,
        answers=scores.answers,
        training=read_json_lines(directory / "training.jsonl", TrainingStep),
        consolidation=read_json(optional, list[ModuleConsolidation]) if optional.exists() else None,
    )


def _lineage(versions: Sequence[VersionData], current: str | None) -> list[VersionData]:
    """The current version and its parents, oldest first; where none is named, the newest that was not refused."""
    by_id = {version.id: version for version in versions}
    lineage = [by_id[current]] if current in by_id else []
    if current is None:
        lineage = [version for version in versions if not version.refused][-1:]
    while lineage and (parent := lineage[0].manifest.parent) != BASE:
        if parent not in by_id or by_id[parent] in lineage:
            raise InputError(
                f"{lineage[0].id}/manifest.json: field parent: {parent!r} is not an earlier version of this run "
                f"({', '.join(by_id)})"
            )
        lineage.insert(0, by_id[parent])
    return lineage


def _current(run: Path, versions: Sequence[VersionData]) -> str | None:
    """The promoted version's name; None before the first promotion.

    A kill between writing the newest version and promoting it leaves its checkpoints: it counts as promoted, unless
    the gate refused it.
    """
    if versions and not versions[-1].refused and work_folder(run, versions[-1].id).exists():
        return versions[-1].id
    path, names = run / "current", [version.id for version in versions]
    if not path.exists():
        return None
    name = path.read_text(encoding="utf-8").strip()
    if name not in (*names, BASE):
        raise InputError(f"{path}: {name!r} is not a version of this run ({', '.join(names) or 'it has none'})")
    return name


def version_rows(run: RunData) -> list[dict[str, Any]]:
    """Returns all versions in the order of learning, those off the lineage too.

    `then` is a version's accuracy on its own task, `now` the promoted version's on that task; null where it was not
    measured, or where versions do not build on each other (STL). `status` is what became of a version, `gate` the
    gate's verdict where there was one. `predicted` and `actual` are what its task was to take and what it took.
    """
    promoted = next((version.scores for version in run.versions if version.id == run.current), run.zero_shot)
    rows = []
    for version in run.all_versions:
        facts = version.manifest
        records = {"gate": facts.gate, "predicted": run.facts.predicted.get(version.task), "actual": facts.actual}
        rows.append(
            {
                "index": facts.index,
                "version": version.id,
                "task": version.task,
                "label": facts.label,
                "created": facts.created,
                "then": getattr(version.scores.get(version.task), "accuracy", None),
                "now": None if run.regime == "separate" else getattr(promoted.get(version.task), "accuracy", None),
                "promoted": version.id == run.current,
                "status": run.status(version),
                "warnings": facts.warnings,
                **{name: None if one is None else one.model_dump(mode="json") for name, one in records.items()},
            }
        )
    return rows
