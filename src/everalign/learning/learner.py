"""The line of versions that a learner goes on from: the current one and its parents."""

import copy
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from everalign.correction.corrector_files import is_corrector
from everalign.correction.objective import Rewritten
from everalign.errors import EveralignError, InputError
from everalign.evaluation import PreferenceScore
from everalign.evaluation.scorers import Scorer, make_scorer
from everalign.learning.context import Log, Progress, RunContext, make_context
from everalign.learning.evaluation_suite import EvaluationSuite
from everalign.learning.export import export_adapter, export_version
from everalign.learning.generated_corrections import compare_written, write_corrections
from everalign.learning.options import AdapterOptions, CorrectionTaskOptions, RolloutOptions, TrainingOptions
from everalign.learning.promotion import (
    Rollback,
    announcement,
    check_tolerance,
    compare_shares,
    judge,
    refusal,
    roll_back,
)
from everalign.learning.run_data import BASE, RunData
from everalign.learning.run_files import Verdict
from everalign.learning.run_store import RunDirectory, data_facts, version_name
from everalign.learning.scores import Scores
from everalign.learning.task_rows import AnySet, Rows, as_set, prepare_rows
from everalign.learning.task_training import task_seed, train_task
from everalign.methods import LifeAlign, Method, Task
from everalign.modeling.model_files import OutputDtype
from everalign.training.base_objective import PreparedRows
from everalign.training.objectives import reads
from everalign.training.options import WeightOptions


class Lineage:
    """What a learner has in memory of its run's line; begins the run, or takes up what its current version had learned.

    Args:
        setup: the learner's parts.
        run: where versions are.

    Attributes:
        versions: the line's versions by task, oldest first.

    Raises:
        InputError: the run was begun with other settings, or a file of its current version is missing or changed.
    """

    def __init__(self, setup: RunContext, run: RunDirectory) -> None:
        self._setup, self._run = setup, run
        self._at_first = copy.deepcopy(setup.method.state_dict())
        self.versions: dict[str, str] = {}
        if not run.exists:
            run.begin(setup.to_dict())
            return
        found = run.data
        run.check_same(setup.to_dict())
        run.finish_promotion(found)
        self.restore()

    @property
    def head(self) -> str:
        """The version that learning goes on from; "000" for the base model."""
        return [BASE, *self.versions.values()][-1]

    def restore(self) -> None:
        """Bring policy and method to where the version left them that is current on disk."""
        found = self._run.data
        self._run.restore(found.head, self._setup.policy, self._setup.method, self._setup.seed, self._at_first)
        self.versions = {version.task: version.id for version in found.versions}

    def check_up_to_date(self) -> None:
        """Refuse to go on where another learner, or a rollback, has changed the line on disk."""
        if [version.id for version in self._run.data.versions] != list(self.versions.values()):
            raise InputError(f"{self._run.path} was continued by another learner: open it again, with resume")


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _has_chats(rows: AnySet) -> bool:
    """Whether prompts are chats, whose answers end as the template ends turns."""
    return any(not isinstance(getattr(row, "prompt", ""), str) for row in rows)


def _silent(stage: str, done: int, total: int) -> None:
    pass


class Learner:
    """Learns preference tasks one after another into a run directory.

    Sets the process up for training (`everalign.modeling.runtime.prepare_process`).

    Args:
        model: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` or `smollm2`.
        base_adapter: a PEFT adapter to start from, merged into the base model, which then is what `base` means: the
            reference, what versions sit on, and what an export holds. A `model` that is an adapter itself stands for
            its base model with that adapter.
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
        gate: how far the held-out accuracy of a learned task, or of the new one, may fall for a task to be promoted, as
            a share: 0.02 for two points. Held-out rows have to show it, beyond doubt (see `learning.promotion`);
            of a corrector also by the corrections that it writes. With None every task is promoted.
        gate_scorer: whom the gate asks, too, whether a corrector's corrections got better; named as `reward` is.
        seed: seeds everything random.
        resume: continue the run that `output` holds: finished tasks are taken as they are, and one that was
            interrupted goes on from its newest checkpoint. A run with other settings is refused.
        allow_overlap: let pairs occur in training and test data.
        sample_answers: held-out prompts of each task that the policy answers, greedily, before the first task and after
            each; the report shows the answers. Those of a run that goes on are the prompts it was begun with.
        cache: folder for encoded rows and reference log-probabilities, which runs may share; in `output` when None.
        log: called with one line for each thing that happens; standard error when None.
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
        base_adapter: str | Path | None = None,
        training: TrainingOptions | None = None,
        adapter: AdapterOptions | None = None,
        weighting: WeightOptions | None = None,
        reward: str | Scorer | None = None,
        rollouts: RolloutOptions | None = None,
        correction: CorrectionTaskOptions | None = None,
        gate: float | None = None,
        gate_scorer: str | Scorer | None = None,
        seed: int = 0,
        resume: bool = False,
        allow_overlap: bool = False,
        sample_answers: int = 0,
        cache: str | Path | None = None,
        log: Log = _print,
        progress: Progress = _silent,
    ) -> None:
        if weighting is not None and not reads(objective, "weighting"):
            raise InputError(f"weighting is for rewards, and the objective {objective} has none: leave it out")
        method = LifeAlign() if method is None else method
        check_tolerance(gate, method.name, method.regime)
        if gate_scorer is not None and (gate is None or not reads(objective, "correction")):
            raise InputError(
                "gate_scorer rates what a corrector writes for a gate: give gate, and objective correction"
            )
        self._gate = gate
        self._gate_scorer = make_scorer(gate_scorer) if isinstance(gate_scorer, str) else gate_scorer
        self._run = RunDirectory(Path(output))
        with self._run.exclusive():
            self._run.check_usable(resume)
        self._setup = make_context(
            str(model),
            None if base_adapter is None else str(base_adapter),
            method,
            objective,
            self._run.with_its_precision(training or TrainingOptions()),
            adapter or AdapterOptions(),
            weighting or WeightOptions(),
            make_scorer(reward) if isinstance(reward, str) else reward,
            rollouts or RolloutOptions(),
            correction,
            seed,
            self._run.cache if cache is None else Path(cache),
            log,
            progress,
        )
        self.method, self.policy, self.tokenizer = self._setup.method, self._setup.policy, self._setup.tokenizer
        with self._run.exclusive():
            # Again: loading a model takes long, and another process may have begun a run here meanwhile.
            self._run.check_usable(resume)
            self._line = Lineage(self._setup, self._run)
        self._tests = EvaluationSuite(self._setup, self._run, allow_overlap, sample_answers)
        self._learning = False

    # ---- learning ----

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other processes from writing into the run for the while; `learn` and `rollback` do so by themselves.

        Raises:
            InputError: another one is at it.
        """
        return self._run.exclusive()

    def _as_tests(self, rows: Rows) -> AnySet:
        return self._setup.objective.held_out(as_set(rows), self._setup.log)

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
            GateRefusedError: accuracies fell; or, as NotEnoughEvidenceError, nothing shows that none did. The version
                stays on disk, and the learner is as it was before the task.
            EveralignError: training diverged, or an earlier call was broken off in the middle.
        """
        with self._run.exclusive():
            return self._learn_one(as_set(rows), name, None if test is None else self._as_tests(test))

    def _learn_one(
        self, rows: AnySet, name: str, test: AnySet | None, prepared: PreparedRows | None = None
    ) -> dict[str, PreferenceScore]:
        """Learn one task under the run's lock; `prepared` are its rows where they were prepared before."""
        self._line.check_up_to_date()
        self._tests.check([(name, rows, test)])
        learned = name in self._line.versions
        if learned:
            self._check_same_rows(rows, name)
        elif prepared is None:
            prepared = prepare_rows(self._setup, rows)
        if test is not None:
            self.register_test(name, test)
        self._tests.trained_on(rows)
        if learned or prepared is None:
            done = next(version for version in self.run.versions if version.task == name)
            return {task: PreferenceScore(**score.model_dump()) for task, score in done.scores.items()}
        self._tests.restore()
        self._check_whole()
        self._learning = True
        index = len(self._line.versions) + 1
        for line in (f"task {index}: {name}", *prepared.lines):
            self._setup.log(line)
        number = max((version.manifest.index for version in self.run.all_versions), default=0) + 1
        version = version_name(number, name)
        task = Task(name, prepared.rows, index, task_seed(self._setup.seed, index))
        guarded = [] if self._gate is None else [*self._line.versions, name]
        outcomes, written, previous = self._tests.outcomes(guarded), self._written(guarded), self.policy.total()
        self.method.begin_task(self.policy, task)
        result = train_task(self._setup, task, prepared, self._run.work(version))
        before = self._tests.scores(previous) if self.method.consolidates else None
        records = self.method.end_task(self.policy, result.task)
        scores = self._tests.scores(previous)
        verdict = self._verdict(outcomes, scores, written, self._written(guarded))
        manifest = {
            "index": number,
            "name": name,
            "parent": BASE if self.method.regime == "separate" else self._line.head,
            "train": data_facts(prepared.given),
            "test": self._tests.facts(name),
            "chats": _has_chats(prepared.given),
            "weights": result.weights,
            "rollouts": result.rollouts,
            "gate": None if verdict is None else verdict.model_dump(mode="json"),
            "seed": task.seed,
            "stages": [report.to_dict() for report in result.reports],
            "warnings": list(result.warnings),
            "replay_ids": [] if self.method.buffer is None else self.method.buffer.ids(),
        }
        answers = self._tests.answers()
        self._run.write_version(
            version, manifest, self.policy, self.method, result.reports, records, scores, before, answers
        )
        promoted = verdict is None or verdict.promoted
        if promoted:
            self._line.versions[name] = version
        else:
            self._return_to_current()
        self._learning = False
        if verdict is not None and not promoted:
            raise refusal(version, verdict, self._line.head)
        return scores

    def learn_all(self, tasks: Sequence[tuple[str, Rows, Rows | None]]) -> None:
        """Learn (name, rows, test) tasks in order; every test set is scored from the start, also before its turn.

        A joint method learns them all at once. A task that the gate refuses ends it: those behind are not learned.
        """
        sets = [(name, as_set(rows), None if test is None else self._as_tests(test)) for name, rows, test in tasks]
        with self._run.exclusive():
            self._tests.check(sets)
            if self._setup.rollouts != RolloutOptions() and not any(rows.prompts_alone for _, rows, _ in sets):
                self._setup.log("no task has prompts alone: nothing is sampled, and the sampling options do nothing")
            for name, _, test in sets:
                if test is not None:
                    self.register_test(name, test)
            if self.method.regime == "joint":
                # WeightedRows task by task before they are pooled: rewards of different tasks have no common scale.
                prepared = [(name, prepare_rows(self._setup, rows)) for name, rows, _ in sets]
                if any(rows.to_sample for _, rows in prepared):
                    raise InputError(f"{self.method.name} pools rows, not prompts: learn the tasks one after another")
                weighed = [(name, rows.rows) for name, rows in prepared]
                for name, rows in self.method.pool(weighed):
                    self._learn_one(rows, name, None)
                return
            # All that are still to be learned, before the first of them is.
            new = {name: prepare_rows(self._setup, rows) for name, rows, _ in sets if name not in self._line.versions}
            for name, rows in self.method.pool([(name, rows) for name, rows, _ in sets]):
                self._learn_one(rows, name, None, new.get(name))

    def register_test(self, name: str, test: Rows) -> None:
        """Make a task's held-out pairs known and score the base model on them (the zero-shot row).

        Raises:
            InputError: the run knows other test rows of this task, or rows that were trained on are among them.
        """
        with self._run.exclusive():
            self._tests.register(name, self._as_tests(test), self._line.versions)

    def _check_same_rows(self, rows: AnySet, name: str) -> None:
        """Refuse other rows for a task that was learned already."""
        done = next(version for version in self.run.versions if version.task == name)
        if done.manifest.train.fingerprint != rows.fingerprint:
            raise InputError(f"task {name!r} was learned from other rows already: give this task another name")
        self._setup.log(f"task {[*self._line.versions].index(name) + 1}: {name} (learned already)")

    def _written(self, tasks: Sequence[str]) -> dict[str, Rewritten]:
        """What a corrector's policy writes for the tasks' held-out rows; nothing of other policies."""
        return write_corrections(self._setup, self._tests.rows(tasks))

    def _verdict(
        self,
        before: Mapping[str, PreferenceScore],
        after: Mapping[str, PreferenceScore],
        written: Mapping[str, Rewritten],
        written_now: Mapping[str, Rewritten],
    ) -> Verdict | None:
        if self._gate is None:
            return None
        compared = {
            task: compare_shares(score.outcomes, after[task].outcomes)
            for task, score in before.items()
            if score.outcomes
        }
        for task, now in written_now.items():
            self._setup.log(f"  {task}: {now.one_line}; before, {written[task].one_line}")
        compared |= compare_written(written, written_now, self._gate_scorer)
        same = all(score.margin == after[task].margin for task, score in before.items())
        if written:
            same = all(written[task].texts == now.texts for task, now in written_now.items())
        verdict = judge(self._gate, compared, bool(compared) and same)
        self._setup.log(f"  {announcement(verdict)}")
        return verdict

    # ---- going back ----

    def rollback(self, version: str | None = None, force: bool = False) -> Rollback:
        """Make an earlier version current, or one that was rolled back, and go on learning from there.

        Args:
            version: its folder's name or number, "000" for the base model; the current version's parent when None.
            force: take one that the gate refused.

        Raises:
            InputError: there is no such version, it is damaged or was refused by the gate, or the method's versions do
                not build on each other.
        """
        with self._run.exclusive():
            self._line.check_up_to_date()
            self._check_whole()
            done = roll_back(self.run, version, force)
            self._return_to_current()
        return done

    def _return_to_current(self) -> None:
        self._line.restore()
        self._tests.forget_trained({version.manifest.train.fingerprint for version in self.run.versions})

    def _check_whole(self) -> None:
        if self._learning:
            raise EveralignError(
                "a task was broken off in the middle: continue with a new learner that resumes the run"
            )

    # ---- what came of it ----

    @property
    def gate(self) -> float | None:
        """How far a held-out accuracy may fall; None for as far as it likes."""
        return self._gate

    @property
    def starts_from_corrector(self) -> bool:
        """Whether the run's base model is a corrector already."""
        return is_corrector(self._setup.model_name)

    @property
    def run(self) -> RunData:
        """The run directory as it is on disk; what has not changed since it was read last is not read again."""
        return self._run.data

    @property
    def scores(self) -> Scores:
        """The score matrix of held-out preference accuracy, with Last, BWT, AP and FWT."""
        return self.run.scores("accuracy")

    def export(self, folder: str | Path, version: str | None = None, dtype: OutputDtype = "auto") -> Path:
        """Write a version merged into the base model, in fp32, checked against the adapter's logits, and rounded once.

        What has learned corrections becomes a corrector's folder, which `Corrector.from_pretrained` loads.

        Args:
            folder: must not exist yet.
            version: one of the run's line; the current one when None.
            dtype: of the weights: `fp32`, `bf16`, `fp16`, or the base model's own with `auto`.

        Raises:
            InputError: nothing was learned yet, the folder exists, or the line has no such version.
            EveralignError: the merged model's logits differ from the adapter's.
        """
        return export_version(self.run, Path(folder), version, self._setup.model_name, self.tokenizer, dtype).folder

    def export_adapter(self, folder: str | Path, version: str | None = None, dtype: OutputDtype = "auto") -> Path:
        """Write a version's adapter alone, in PEFT's format, with its tokenizer and a model card.

        Arguments and errors as in `export`; with `auto` it stays in fp32.
        """
        return export_adapter(self.run, Path(folder), version, None, self.tokenizer, dtype).folder
