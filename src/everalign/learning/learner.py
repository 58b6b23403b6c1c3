"""The learner: takes tasks one after another and keeps what it learned."""

import sys
from collections.abc import Sequence
from pathlib import Path

from everalign.data.prompts import PromptSet
from everalign.errors import EveralignError, InputError
from everalign.evaluation import PreferenceScore
from everalign.evaluation.scorers import Scorer, make_scorer
from everalign.learning.export import corrector_facts, export_merged
from everalign.learning.held_out import HeldOutTests
from everalign.learning.lesson import teach
from everalign.learning.options import AdapterOptions, CorrectionTaskOptions, RolloutOptions, TrainingOptions
from everalign.learning.row_kinds import AnySet, Rows, as_set, as_tests
from everalign.learning.run import BASE, RunDirectory, data_facts, version_name
from everalign.learning.run_data import RunData, load_run
from everalign.learning.scores import Scores
from everalign.learning.setup import Announce, Progress, make_setup
from everalign.learning.task_rows import TaskRows, prepare_rows
from everalign.methods import LifeAlign, Method, Task
from everalign.training.teaching import SCORED_OBJECTIVES
from everalign.training.weighing import WeightOptions

# Stages of a task use consecutive seeds; tasks are this far apart, and runs of neighbouring seeds further.
_TASK_SEED_STRIDE = 1000
_SEED_RANGE = 2**31
_RUN_SEED_STRIDE = 1_000_003


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _silent(stage: str, done: int, total: int) -> None:
    pass


class Learner:
    """Learns preference tasks one after another into a run directory.

    Sets the process up for training (`everalign.modeling.runtime.prepare_process`).

    Args:
        model: a folder in Hugging Face format, a Hub name, or `tiny` for the embedded assistant.
        method: what is carried from task to task; LifeAlign when None.
        objective: what a row teaches: a preference, `fpo`, `dpo` or `sft`; a scored row, `var`; either, `snkl`; a
            correction, `correction`.
        output: the run directory; created when missing.
        training: how every task is trained.
        adapter: shape of the adapter.
        weighting: how rewards become weights, for `var`, and targets, for `snkl`.
        reward: who gives rewards to answers that have none: a reward model's folder, `module:function`, a judge's
            `URL#MODEL`, or a scorer. Tasks may then be preferences, whose answers are scored, or prompts alone.
        rollouts: how answers are sampled to prompts alone.
        correction: how corrections are learned, for `correction`.
        seed: seeds everything random.
        resume: continue the run that `output` holds: finished tasks are taken as they are, and one that was
            interrupted goes on from its newest checkpoint. A run with other settings is refused.
        allow_overlap: let pairs occur in training and test data.
        cache: folder for encoded rows and reference log-probabilities, which runs may share; in `output` when None.
        announce: called with one line for each thing that happens; standard error when None.
        progress: called with (stage, steps done, steps in all).

    Raises:
        InputError: model, settings or output directory cannot be used.
    """

    def __init__(
        self,
        model: str,
        method: Method | None = None,
        objective: str = "fpo",
        output: str | Path = "runs/everalign",
        *,
        training: TrainingOptions | None = None,
        adapter: AdapterOptions | None = None,
        weighting: WeightOptions | None = None,
        reward: str | Scorer | None = None,
        rollouts: RolloutOptions | None = None,
        correction: CorrectionTaskOptions | None = None,
        seed: int = 0,
        resume: bool = False,
        allow_overlap: bool = False,
        cache: str | Path | None = None,
        announce: Announce = _print,
        progress: Progress = _silent,
    ) -> None:
        if weighting is not None and objective not in SCORED_OBJECTIVES:
            raise InputError(f"weighting is for rewards, and the objective {objective} has none: leave it out")
        self._run = RunDirectory(Path(output))
        self._run.check_usable(resume)
        self._setup = make_setup(
            str(model),
            LifeAlign() if method is None else method,
            objective,
            training or TrainingOptions(),
            adapter or AdapterOptions(),
            weighting or WeightOptions(),
            make_scorer(reward) if isinstance(reward, str) else reward,
            rollouts or RolloutOptions(),
            correction,
            seed,
            self._run.cache if cache is None else Path(cache),
            announce,
            progress,
        )
        self.method, self.policy, self.tokenizer = self._setup.method, self._setup.policy, self._setup.tokenizer
        self._finished = self._open()
        self._tests = HeldOutTests(self._setup, self._run, allow_overlap)
        self._learning = False

    def _open(self) -> dict[str, str]:
        """Begin the run, or go on with it; returns the finished versions by task."""
        if not self._run.exists:
            self._run.begin(self._setup.facts())
            return {}
        versions = self.run.versions
        self._run.check_same(self._setup.facts())
        if versions:
            self._run.restore(versions[-1].id, self.policy, self.method, self._setup.seed)
        return {version.task: version.id for version in versions}

    # ---- learning ----

    def _as_tests(self, rows: Rows) -> AnySet:
        return as_tests(rows, self._setup.encoder is not None, self._setup.announce)

    def learn(self, rows: Rows, name: str, test: Rows | None = None) -> dict[str, PreferenceScore]:
        """Learn one task, score the policy on every known test set, and write a version.

        Args:
            rows: the task's training rows: preferences, scored rows for the objectives `var` and `snkl`, or corrections
                for `correction`.
            name: unique in the run.
            test: held-out preferences of the task; of scored rows, the best completion over the worst; corrections for
                a corrector, where a correction is to be likelier than the answer as it is.

        Returns:
            Scores by task of the policy that has now learned this one.

        Raises:
            InputError: the name is taken by other rows, the task has no rows, or it mixes training and test rows.
            EveralignError: training diverged, or an earlier call was broken off in the middle.
        """
        with self._run.alone():
            return self._learn_alone(as_set(rows), name, None if test is None else self._as_tests(test))

    def _learn_alone(
        self, rows: AnySet, name: str, test: AnySet | None, prepared: TaskRows | None = None
    ) -> dict[str, PreferenceScore]:
        if [version.id for version in self.run.versions] != list(self._finished.values()):
            raise InputError(f"{self._run.path} was continued by another learner: open it again, with resume")
        self._tests.check([(name, rows, test)])
        if name in self._finished:
            done = self._already_learned(rows, name)
            if test is not None:
                self.announce_test(name, test)
            self._tests.trained_on(rows)
            return done
        task = prepare_rows(self._setup, rows) if prepared is None else prepared
        if test is not None:
            self.announce_test(name, test)
        self._tests.restore()
        self._tests.trained_on(rows)
        return self._learn(task, name)

    def learn_all(self, tasks: Sequence[tuple[str, Rows, Rows | None]]) -> None:
        """Learn (name, rows, test) tasks in order; every test set is scored from the start, also before its turn.

        A joint method learns them all at once.
        """
        sets = [(name, as_set(rows), None if test is None else self._as_tests(test)) for name, rows, test in tasks]
        with self._run.alone():
            self._tests.check(sets)
            if self._setup.rollouts != RolloutOptions() and not any(isinstance(rows, PromptSet) for _, rows, _ in sets):
                self._setup.announce(
                    "no task has prompts alone: nothing is sampled, and the sampling options do nothing"
                )
            for name, _, test in sets:
                if test is not None:
                    self.announce_test(name, test)
            if self.method.regime == "joint":
                # Weighed task by task before they are pooled: rewards of different tasks have no common scale.
                prepared = [(name, prepare_rows(self._setup, rows)) for name, rows, _ in sets]
                if any(rows.prompts for _, rows in prepared):
                    raise InputError(f"{self.method.name} pools rows, not prompts: learn the tasks one after another")
                weighed = [(name, rows.rows) for name, rows in prepared]
                for name, rows in self.method.pool(weighed):
                    self._learn_alone(rows, name, None)
                return
            # All that are still to be learned, before the first of them is.
            new = {name: prepare_rows(self._setup, rows) for name, rows, _ in sets if name not in self._finished}
            for name, rows in self.method.pool([(name, rows) for name, rows, _ in sets]):
                self._learn_alone(rows, name, None, new.get(name))

    def announce_test(self, name: str, test: Rows) -> None:
        """Make a task's held-out pairs known and score the base model on them (the zero-shot row).

        Raises:
            InputError: the run knows other test rows of this task, or rows that were trained on are among them.
        """
        with self._run.alone():
            self._tests.announce(name, self._as_tests(test), self._finished)

    def _learn(self, rows: TaskRows, name: str) -> dict[str, PreferenceScore]:
        if self._learning:
            raise EveralignError(
                "a task was broken off in the middle: continue with a new learner that resumes the run"
            )
        self._learning = True
        index = int(self._newest.partition("-")[0]) + 1
        # Random generators take 32 bits, and a task's stages count on from its seed.
        seed = (self._setup.seed * _RUN_SEED_STRIDE + index * _TASK_SEED_STRIDE) % _SEED_RANGE
        self._setup.announce(f"task {index}: {name}")
        for line in rows.lines:
            self._setup.announce(line)
        scores = self._learn_task(Task(name, rows.rows, index, seed), rows)
        self._learning = False
        return scores

    def _learn_task(self, task: Task, rows: TaskRows) -> dict[str, PreferenceScore]:
        version = version_name(task.index, task.name)
        previous = self.policy.total()
        self.method.begin_task(self.policy, task)
        lesson = teach(self._setup, task, rows, self._run.work(version))
        before = self._tests.scores(previous) if self.method.consolidates else None
        records = self.method.end_task(self.policy, lesson.task)
        scores = self._tests.scores(previous)
        manifest = {
            "index": task.index,
            "name": task.name,
            "parent": BASE if self.method.regime == "separate" else self._newest,
            "train": data_facts(rows.given),
            "test": self._tests.facts(task.name),
            "weights": lesson.weights,
            "rollouts": lesson.rollouts,
            "seed": task.seed,
            "stages": [report.facts() for report in lesson.reports],
            "replay_ids": [] if self.method.buffer is None else self.method.buffer.ids(),
        }
        self._run.write_version(version, manifest, self.policy, self.method, lesson.reports, records, scores, before)
        self._finished[task.name] = version
        return scores

    def _already_learned(self, rows: AnySet, name: str) -> dict[str, PreferenceScore]:
        done = next(version for version in self.run.versions if version.task == name)
        if done.manifest.train.fingerprint != rows.fingerprint:
            raise InputError(f"task {name!r} was learned from other rows already: give this task another name")
        self._setup.announce(f"task {done.manifest.index}: {name} (learned already)")
        return {task: PreferenceScore(**score.model_dump()) for task, score in done.scores.items()}

    # ---- what came of it ----

    @property
    def _newest(self) -> str:
        return [BASE, *self._finished.values()][-1]

    @property
    def run(self) -> RunData:
        """The run directory as it is on disk."""
        return load_run(self._run.path)

    @property
    def scores(self) -> Scores:
        """The score matrix of held-out preference accuracy, with Last, BWT, AP and FWT."""
        return self.run.scores("accuracy")

    def export(self, folder: str | Path) -> Path:
        """Write the newest version merged into the base model, in fp32, checked against the adapter's logits.

        What has learned corrections becomes a corrector's folder, which `Corrector.from_pretrained` loads.

        Raises:
            InputError: nothing was learned yet, or the folder exists.
            EveralignError: the merged model's logits differ from the adapter's.
        """
        if not self._finished:
            raise InputError("nothing to export: learn a task first")
        adapter = self._run.path / "versions" / self._newest / "adapter"
        facts = corrector_facts(self._setup, self.run.versions)
        return export_merged(self._setup.model_name, adapter, self.tokenizer, Path(folder), facts)
