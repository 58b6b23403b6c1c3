"""The feedback loop: feedback that was not learned yet becomes a run's next task, and the run's gate decides."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from everalign.correction.corrector_files import is_corrector
from everalign.data import Correction, load_corrections, load_preferences, load_scored
from everalign.data.rows import RowSet
from everalign.errors import GateRefusedError, InputError, NotEnoughEvidenceError
from everalign.learning.learner import Learner
from everalign.learning.promotion import rows_needed
from everalign.learning.run_data import BASE
from everalign.serving.feedback.task import NextTask, NextTaskOptions, NotEnoughFeedback, TaskReport, build_task
from everalign.serving.store import FeedbackStore
from everalign.storage import is_partial, json_line, new_folder, read_json, write_json, write_text

GATE = 0.05
"""Default of how far a held-out accuracy may fall: five points, which 52 held-out rows can show."""

_KINDS = {"correction": "corrections", "var": "scored"}
_LOADERS: dict[str, Callable[[Path], RowSet[Any]]] = {
    "corrections": load_corrections,
    "preferences": load_preferences,
    "scored": load_scored,
}
_PREFIX = "feedback-"
_FOLDER = "feedback"


@dataclass(frozen=True)
class LearnedFeedback:
    """Result of one round of learning from feedback.

    Args:
        name: of the task.
        version: the version that it made.
        refusal: why the gate did not promote it (NotEnoughEvidenceError: it could not tell); None if it did.
        report: what the task was made of, and what was left out.
    """

    name: str
    version: str
    refusal: GateRefusedError | None
    report: TaskReport

    @property
    def promoted(self) -> bool:
        return self.refusal is None


def learn_from_feedback(
    store: FeedbackStore,
    learner: Learner,
    options: NextTaskOptions | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> LearnedFeedback:
    """Learn all feedback that was not learned yet as one task, and mark it as learned in the store.

    Feedback of a task that the gate refuses is marked too, because it would only be refused again; feedback of a task
    that the gate cannot judge for lack of held-out rows is not. The next call finishes one that was killed, with the
    same rows.

    Args:
        store: holds the feedback.
        learner: of the run, begun or resumed; best with a gate.
        options: how the task is made; its kind is always that of the learner's objective.
        log: called with lines of progress.

    Raises:
        NotEnoughFeedback: there is no task yet, or its held-out rows could not show the gate that nothing fell.
        InputError: the run's files were changed, or it starts from a model that is no corrector, while the feedback is
            on answers of one.
    """
    if learner.method.labelled:
        raise InputError(
            f"feedback has no labels, and {learner.method.name} keeps an adapter for each: choose another method"
        )
    kind = _KINDS.get(learner.run.facts.objective, "preferences")
    options = (options or NextTaskOptions()).replace(kind=kind)
    with learner.exclusive():
        pending = _Pending.find(learner.run.path)
        if pending is None:
            found = list(store.feedback(unlearned=True))
            task = build_task(found, options)
            _check_evidence(task, learner)
            if kind == "corrections":
                _check_start(learner, {exchange.corrector for exchange, _ in found} - {None})
            pending = _Pending.write(learner, task, kind)
        else:
            log(f"{pending.name}: finishing an interrupted call")
        task = pending.read()
        log(f"{pending.name}: {task.report.one_line()}")
        refusal = None
        try:
            learner.learn(task.rows, pending.name, task.test)
        except GateRefusedError as error:
            refusal = error
        version = learner.run.head if refusal is None else refusal.version
        if not isinstance(refusal, NotEnoughEvidenceError):
            store.mark_learned(task.feedback_ids, pending.name if refusal is None else f"{pending.name} (refused)")
        # From here on the next call starts a new task.
        write_json(pending.folder / "done.json", {"version": version, "promoted": refusal is None})
    return LearnedFeedback(pending.name, version, refusal, task.report)


def _check_evidence(task: NextTask, learner: Learner) -> None:
    """Refuse to train for hours if no gate could promote the result: too few held-out rows can show nothing."""
    if learner.gate is None:
        return
    needed = rows_needed(learner.gate)
    held_out = sum(not isinstance(row, Correction) or not row.is_identity for row in task.test or ())
    if held_out < needed:
        raise NotEnoughFeedback(
            f"not enough evidence: {held_out} held-out rows have a better and a worse answer, and at least {needed} "
            f"are needed to tell a fall by {learner.gate:.1%} from chance; wait for more, hold out a larger share, or "
            f"let accuracies fall further (gate); {task.report.one_line()}",
            task.report,
        )


def _check_start(learner: Learner, correctors: set[str | None]) -> None:
    """Refuse to start from a model that never corrected, if the feedback is on the answers of a corrector."""
    known = {version.id for version in learner.run.all_versions}
    if learner.run.head == BASE and not correctors <= known and not is_corrector(learner.context.model_name):
        raise InputError(
            f"the feedback is on answers of the corrector {', '.join(sorted(map(str, correctors)))}, and the run "
            f"starts from {learner.run.facts.model}, which is not a corrector: give the corrector in service as the "
            "model, or its run as the output"
        )


@dataclass(frozen=True)
class _Pending:
    """A task that is being learned: a folder of the run with its rows and the ids of their feedback."""

    folder: Path
    name: str

    @classmethod
    def find(cls, run: Path) -> "_Pending | None":
        """Return the task of an interrupted call, of which there is one at most."""
        begun = (path.parent for path in (run / _FOLDER).glob("*/task.json") if not is_partial(path.parent))
        left = next((folder for folder in begun if not (folder / "done.json").exists()), None)
        return None if left is None else cls(left, left.name)

    @classmethod
    def write(cls, learner: Learner, task: NextTask, kind: str) -> "_Pending":
        """Write a new task under a name that no version and no earlier task has."""
        tasks = learner.run.path / _FOLDER
        taken = {version.task for version in learner.run.all_versions} | {folder.name for folder in tasks.glob("*")}
        name = next(f"{_PREFIX}{i}" for i in range(1, len(taken) + 2) if f"{_PREFIX}{i}" not in taken)
        with new_folder(tasks / name) as folder:
            for file, rows in (("train.jsonl", task.rows), ("test.jsonl", task.test)):
                if rows is not None:
                    write_text(folder / file, "".join(json_line(row.to_json()) for row in rows))
            facts = {"kind": kind, "feedback": list(task.feedback_ids), "report": task.report.to_dict()}
            write_json(folder / "task.json", facts)
        return cls(tasks / name, name)

    def read(self) -> NextTask:
        """Return the task; InputError names the file that was changed."""
        path = self.folder / "task.json"
        facts: dict[str, Any] = read_json(path)
        try:
            load, ids, report = _LOADERS[facts["kind"]], tuple(facts["feedback"]), TaskReport(**facts["report"])
            sets: dict[str, RowSet[Any]] = {}
            for file in ("train.jsonl", "test.jsonl"):
                if (self.folder / file).exists():
                    sets[file] = replace(load(self.folder / file), source=f"feedback ({self.name})")
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: was changed since it was written ({error}); restore the file") from None
        if "train.jsonl" not in sets:
            raise InputError(f"{self.folder / 'train.jsonl'}: is missing; restore the file")
        return NextTask(sets["train.jsonl"], sets.get("test.jsonl"), ids, report)
