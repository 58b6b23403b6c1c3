"""The learner: a loop over preference tasks that trains, evaluates, gates and writes versions into a run directory."""

import copy
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from everalign.correction.objective import Rewritten
from everalign.distributed import on_main
from everalign.errors import EveralignError, InputError, located, naming_nondeterministic
from everalign.evaluation import PreferenceScore
from everalign.evaluation.scorers import Scorer, make_scorer
from everalign.learning.context import Log, Progress, RunContext, make_context
from everalign.learning.evaluation_suite import EvaluationSuite, compare_written, own_answers, write_corrections
from everalign.learning.export import export_adapter, export_version
from everalign.learning.options import (
    DEFAULT_OBJECTIVE,
    AdapterOptions,
    CorrectionTaskOptions,
    RolloutOptions,
    TrainingOptions,
    collect_options,
)
from everalign.learning.promotion import (
    Rollback,
    announcement,
    check_output,
    check_tolerance,
    compare_shares,
    judge,
    refusal,
    roll_back,
)
from everalign.learning.run_data import BASE, RunData, work_folder
from everalign.learning.run_files import Verdict
from everalign.learning.run_store import RunDirectory, data_facts, version_name
from everalign.learning.scores import Scores
from everalign.learning.task_files import loaders
from everalign.learning.task_training import AnySet, GivenTask, Rows, as_set, prepare_rows, task_seed, train_task
from everalign.learning.tracking import Tracker
from everalign.methods import METHODS, Method, Task, as_method
from everalign.modeling.machine import library_versions, machine_facts
from everalign.modeling.model_files import OutputDtype
from everalign.modeling.runtime import peak_memory
from everalign.notebook import default_progress
from everalign.training.base_objective import PreparedRows
from everalign.training.objectives import check_objective, reads
from everalign.training.options import WeightOptions
from everalign.training.stage import StageFigures
from everalign.training.trainer import training_arguments


class Learner:
    """Learns preference tasks one after another into a run directory.

    Started by `torchrun` or `accelerate launch`, several processes share the work: all of them make the learner and
    call it with the same arguments, and the main one writes.

    The constructor loads the model and runs it: it sets the process up for training
    (`everalign.modeling.runtime.prepare_process`), rehearses a step on the model's layers, and makes two probes with
    random tokens, whether a prompt can be computed once for all its answers and whether the head can be called apart.
    A run to continue is read and its current version loaded; the first task encodes and scores its held-out rows
    with the base model.

        learner = Learner("tiny", method="er", output="runs/polite", epochs=2, learning_rate=1e-3, replay=0.3)
        learner.learn("polite.csv", name="polite", test="polite.test.csv")
        learner.scores

    Args:
        model: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` or `smollm2`; or a loaded causal
            language model of transformers, which is written into the run first, so that the run can be continued and
            exported.
        base_adapter: a PEFT adapter to start from, merged into the base model, which then is what `base` means: the
            reference, what versions sit on, and what an export holds. A `model` that is an adapter itself stands for
            its base model with that adapter.
        tokenizer: of a model that is given as an object; loaded from where the model was when None.
        method: what is carried from task to task: a method, its name on the command line, or a dictionary of `name` and
            arguments; LifeAlign when None.
        objective: what a row teaches: a preference, `fpo`, `dpo` or `sft`; a scored row, `var`; either, `snkl`; a
            correction, `correction`.
        output: the run directory; created when missing.
        training: how every task is trained. These five sections are options or dictionaries of them.
        adapter: shape of the adapter.
        weighting: how rewards become weights, for `var`, and targets, for `snkl`.
        reward: scorer for answers without rewards: a reward model's folder, `module:function`, a judge's
            `URL#MODEL`, or a scorer. Tasks may then be preferences, whose answers are scored, or prompts alone.
        rollouts: how answers are sampled to prompts alone.
        correction: how corrections are learned, for `correction`.
        gate: how far the held-out accuracy of a learned task, or of the new one, may fall for a task to be promoted, as
            a share: 0.02 for two points. Held-out rows have to show it, beyond doubt (see `learning.promotion`);
            of a corrector also by the corrections that it writes. With None every task is promoted.
        gate_scorer: scorer that the gate also asks whether a corrector's corrections got better; named as `reward` is.
        seed: seeds everything random.
        resume: continue the run that `output` holds: finished tasks are taken as they are, and one that was
            interrupted continues from its newest checkpoint. A run with other settings is refused.
        allow_overlap: let pairs occur in training and test data.
        sample_answers: held-out prompts of each task that the policy answers, greedily, before the first task and after
            each; the report shows the answers. A continued run keeps the prompts that it was started with.
        forward_transfer: score every task also before it is learned. Without it each is scored from its own turn on, of
            a method with a model for each task by its own model alone, and FWT is not known.
        drift: measure after every task how far it has moved the policy on held-out rows, and score the policy before
            consolidation too.
        cache: folder for encoded rows and reference log-probabilities, which runs may share; in `output` when None.
        log_to: experiment trackers that figures, scores and sample answers also go to: `tensorboard` (into the folder
            `tensorboard` of the run), `wandb`, `trackio`, `mlflow`; their packages have to be installed. A run's own
            `training.jsonl` is always written.
        fsdp: have the processes of a machine hold a part of the base model's layers each, and gather a layer when they
            compute it (FSDP2). It changes no result beyond rounding, and a run may be resumed with or without it.
        log: called with one line for each thing that happens; standard error when None.
        progress: called with (stage, steps done, steps in all), of training, evaluation and reference passes.
        figures: called with (stage, steps done, what was measured), see `everalign.training.stage.Figures`.
        options: single options by name, of any section or of the method: `epochs=2`, `rank=4`, `replay=0.3`.

    Raises:
        InputError: model, settings or output directory cannot be used.
    """

    def __init__(
        self,
        model: Any,
        method: Method | type[Method] | str | Mapping[str, Any] | None = None,
        objective: str = DEFAULT_OBJECTIVE,
        output: str | Path = "runs/everalign",
        *,
        tokenizer: Any = None,
        base_adapter: str | Path | None = None,
        training: TrainingOptions | Mapping[str, Any] | None = None,
        adapter: AdapterOptions | Mapping[str, Any] | None = None,
        weighting: WeightOptions | Mapping[str, Any] | None = None,
        reward: str | Scorer | None = None,
        rollouts: RolloutOptions | Mapping[str, Any] | None = None,
        correction: CorrectionTaskOptions | Mapping[str, Any] | None = None,
        gate: float | None = None,
        gate_scorer: str | Scorer | None = None,
        seed: int = 0,
        resume: bool = False,
        allow_overlap: bool = False,
        sample_answers: int = 0,
        forward_transfer: bool = True,
        drift: bool = True,
        cache: str | Path | None = None,
        log_to: str | Sequence[str] = (),
        fsdp: bool = False,
        log: Log = lambda message: print(message, file=sys.stderr, flush=True),
        progress: Progress | None = None,
        figures: StageFigures = lambda stage, step, measured: None,
        **options: Any,
    ) -> None:
        check_objective(objective)
        sections = {"training": training, "adapter": adapter, "weighting": weighting, "rollouts": rollouts}
        chosen, arguments = collect_options({**sections, "correction": correction}, options)
        method = as_method(method, arguments)
        if chosen["weighting"] is not None and not reads(objective, "weighting"):
            raise InputError(f"weighting is for rewards, and the objective {objective} has none: leave it out")
        check_tolerance(gate, method.name, method.regime)
        if gate_scorer is not None and (gate is None or not reads(objective, "correction")):
            raise InputError(
                "gate_scorer rates what a corrector writes for a gate: give gate, and objective correction"
            )
        self.gate = gate
        self._forward_transfer, self._drift = forward_transfer, drift
        self._gate_scorer = make_scorer(gate_scorer) if isinstance(gate_scorer, str) else gate_scorer
        self._run = RunDirectory(Path(output))
        with self._run.exclusive():
            on_main(check_output)(self._run.path, resume)  # one alone: it makes and removes the folder
            self._tracker = Tracker(Path(output), [log_to] if isinstance(log_to, str) else log_to, figures)
            if not isinstance(model, str | os.PathLike):
                model = self._run.keep_model(model, tokenizer)
            elif tokenizer is not None:
                raise InputError("tokenizer: is for a model that is given as an object: leave it out")
        self._setup = make_context(
            str(model),
            None if base_adapter is None else str(base_adapter),
            method,
            objective,
            self._run.with_its_precision(chosen["training"] or TrainingOptions()),
            chosen["adapter"],
            self._run.with_its_temperature(chosen["weighting"] or WeightOptions(), objective),
            make_scorer(reward) if isinstance(reward, str) else reward,
            chosen["rollouts"] or RolloutOptions(),
            chosen["correction"],
            seed,
            self._run.cache if cache is None else Path(cache),
            log,
            progress or default_progress(),
            self._tracker,
            fsdp,
        )
        stage = self._setup.options.stage()
        self._tracker.connect(partial(training_arguments, Path(output), stage, seed))
        self.method, self.policy, self.tokenizer = self._setup.method, self._setup.policy, self._setup.tokenizer
        with self._run.exclusive():
            # Again: loading a model takes long, and another process may have begun a run here meanwhile.
            on_main(check_output)(self._run.path, resume)
            # A user's own method may have a state from the start; ours have none.
            if method.buffer or (type(method) in METHODS.values() and method.state_dict()):
                raise InputError(f"this {method.name} has learned in another run already: make a new one for each run")
            self._at_first = copy.deepcopy(method.state_dict())
            self._lineage: dict[str, str] = {}
            if self._run.exists:
                found = self._run.data
                self._run.check_same(self._setup.to_dict())
                self._run.finish_promotion(found)
                self._restore()
            else:
                self._run.begin(self._setup.to_dict())
        self._tests = EvaluationSuite(self._setup, self._run, allow_overlap, sample_answers)
        self._learning = False

    def __repr__(self) -> str:
        setup, learned = self._setup, ", ".join(self._lineage) or "no task yet"
        return (
            f"Learner({setup.model_name!r}, {self.method!r}, {setup.objective.name!r}, {str(self._run.path)!r}; "
            f"learned: {learned})"
        )

    # ---- learning ----

    def exclusive(self) -> AbstractContextManager[None]:
        """Context manager that keeps other processes from writing into the run; `learn` and `rollback` use it.

        Raises:
            InputError: another process is writing into it.
        """
        return self._run.exclusive()

    def learn(self, rows: Rows, name: str, test: Rows | None = None) -> dict[str, PreferenceScore]:
        """Learns one task, scores the policy on every known test set, and writes a version.

        Args:
            rows: the task's training rows: preferences, scored rows for the objectives `var` and `snkl`, or corrections
                for `correction`. A set that a `load_*` function returned, or whatever they take: a path, a list of
                dictionaries, a pandas DataFrame, a `datasets.Dataset`. A method that reads labels takes the task's name
                for that of rows without one.
            name: unique in the run.
            test: held-out preferences of the task; of scored rows, the best completion over the worst; corrections for
                a corrector, where a correction is to be likelier than the answer as it is.

        Returns:
            Scores by task of the policy that has now learned this one.

        Raises:
            InputError: the name is taken by other rows, the task has no rows, or it mixes training and test rows, or
                rows of several labels.
            GateRefusedError: accuracies fell; or, as NotEnoughEvidenceError, nothing shows that none did. The version
                stays on disk, and the learner is as it was before the task.
            EveralignError: training diverged, or an earlier call was interrupted.
        """
        with self._run.exclusive():
            return self._learn(self._given(name, rows, test))

    def learn_all(self, tasks: Sequence[tuple[str, Rows, Rows | None]]) -> None:
        """Learns (name, rows, test) tasks in order; every test set is scored from the start, also before its turn.

        A joint method learns them all at once. A task that the gate refuses ends it: later ones are not learned.
        """
        given = [self._given(name, rows, test) for name, rows, test in tasks]
        sets = [(task.name, task.rows) for task in given if task.rows is not None]
        with self._run.exclusive():
            self._tests.check(given)
            if self._setup.rollouts != RolloutOptions() and not any(rows.prompts_alone for _, rows in sets):
                self._setup.log("no task has prompts alone: nothing is sampled, and the sampling options do nothing")
            for task in given:
                self._tests.register(task, self._lineage)
            joint = self.method.regime == "joint"
            # All that are still to be learned, before the first of them is. Rewards of different tasks have no common
            # scale, so that rows are weighted task by task before a joint method pools them.
            ahead = [(name, rows) for name, rows in sets if joint or name not in self._lineage]
            new = {name: prepare_rows(self._setup, rows) for name, rows in ahead}
            if joint and any(prepared.to_sample for prepared in new.values()):
                raise InputError(f"{self.method.name} pools rows, not prompts: learn the tasks one after another")
            pooled = [(name, new[name].rows if joint else rows) for name, rows in sets]
            labels = {task.name: task.label for task in given}
            for name, rows in self.method.pool(pooled):
                self._learn(GivenTask(name, rows, None, labels.get(name)), None if joint else new.get(name))

    def register_test(self, name: str, test: Rows) -> None:
        """Registers a task's held-out rows and scores the base model on them (the zero-shot row).

        Raises:
            InputError: the run knows other test rows of this task, or rows that were trained on are among them.
        """
        with self._run.exclusive():
            self._tests.register(self._given(name, None, test), self._lineage)

    def _given(self, name: str, rows: Rows | None, test: Rows | None) -> GivenTask:
        load, load_test = loaders(self._setup.objective.name, self._setup.scorer is not None)
        with located(f"task {name!r}: its training set"):
            loaded = None if rows is None else as_set(rows, load)
        with located(f"task {name!r}: its test set"):
            held_out = (
                None if test is None else self._setup.objective.held_out(as_set(test, load_test), self._setup.log)
            )
        return GivenTask.of(self._setup, name, loaded, held_out)

    @naming_nondeterministic()
    def _learn(self, given: GivenTask, prepared: PreparedRows | None = None) -> dict[str, PreferenceScore]:
        """Learns one task with the run's lock held; `prepared` are its rows where they are prepared already."""
        setup, tests, method = self._setup, self._tests, self.method
        name, rows, label = given.name, given.rows, given.label
        assert rows is not None  # a task to learn has some
        self._check_up_to_date()
        tests.check([given])
        if name in self._lineage:
            return self._already_learned(rows, given)
        prepared = prepare_rows(setup, rows) if prepared is None else prepared
        tests.register(given, self._lineage)
        tests.restore()
        tests.trained_on(rows, label)
        self._check_whole()
        self._learning = True

        # Tasks of other labels were learned by other policies, and this one changes nothing of what they taught.
        before = [version.task for version in self.run.versions if version.manifest.label == label]
        index = len(before) + 1
        whose = "" if label is None else f", task {index} of the label {label!r}"
        setup.log(f"task {len(self._lineage) + 1}: {name}{whose}")
        for line in prepared.lines:
            setup.log(line)
        started, all_busy = time.perf_counter(), time.process_time()
        number = max((version.manifest.index for version in self.run.all_versions), default=0) + 1
        version = version_name(number, name)
        guarded = [] if self.gate is None else [*before, name]
        with method.answering(self.policy, label):
            scores_before, written_before = tests.scores(None, guarded), write_corrections(setup, tests.rows(guarded))
        previous = tests.policies()
        task = Task(name, prepared.rows, index, task_seed(setup.seed, index), partial(own_answers, setup), label)
        busy = time.process_time()
        before_task = self.policy.snapshot() if method.starts_elsewhere else None
        method.begin_task(self.policy, task)
        method_seconds = time.process_time() - busy
        result = train_task(setup, task, prepared, work_folder(self._run.path, version), before_task)
        scored, moved_from = self._scored(name), previous if self._drift else None
        before_consolidation = tests.scores(previous, scored) if method.consolidates and self._drift else None
        busy = time.process_time()
        records = method.end_task(self.policy, result.task)
        method_seconds += time.process_time() - busy
        scores = tests.scores(moved_from, scored)
        verdict = None
        if self.gate is not None:
            verdict = self._verdict(
                scores_before, scores, written_before, write_corrections(setup, tests.rows(guarded))
            )
        answers = tests.answers()
        manifest = {
            "index": number,
            "name": name,
            "label": label,
            "parent": BASE if method.regime == "separate" else self._head,
            "train": data_facts(prepared.given),
            "test": tests.facts(name),
            # Answers to chats end as the template ends turns.
            "chats": any(not isinstance(getattr(row, "prompt", ""), str) for row in prepared.given),
            "weights": result.weights,
            "rollouts": result.rollouts,
            "gate": None if verdict is None else verdict.model_dump(mode="json"),
            "seed": task.seed,
            "stages": [report.to_dict() for report in result.reports],
            "method_seconds": round(method_seconds, 3),
            "actual": {
                "seconds": round(time.perf_counter() - started, 3),
                "processor_seconds": round(time.process_time() - all_busy, 3),
                "memory": peak_memory(next(self.policy.parameters()).device),
            },
            "warnings": list(result.warnings),
            # Another machine than the run was begun on may go on with it.
            "machine": machine_facts(),
            "libraries": library_versions(),
            "precision": setup.options.precision,
            "deterministic": setup.options.deterministic,
            "replay_ids": [] if method.buffer is None else method.buffer.ids(),
        }
        self._run.write_version(
            *(version, manifest, self.policy, method, result.reports, records),
            *(scores, before_consolidation, answers),
        )
        refused = verdict is not None and not verdict.promoted
        if refused:
            self._return_to_current()
        else:
            self._lineage[name] = version
        self._learning = False
        self._tracker.task_done(name, self.scores, scores, answers)
        if verdict is not None and refused:
            raise refusal(version, verdict, self._head)
        return scores

    def _scored(self, name: str) -> list[str] | None:
        """The tasks to score after learning one; None for all."""
        if self._forward_transfer or self.method.regime == "joint":
            return None
        return [name] if self.method.regime == "separate" else [*self._lineage, name]

    def _already_learned(self, rows: AnySet, given: GivenTask) -> dict[str, PreferenceScore]:
        name = given.name
        done = next(version for version in self.run.versions if version.task == name)
        if done.manifest.train.fingerprint != rows.fingerprint:
            raise InputError(f"task {name!r} was learned from other rows already: give this task another name")
        if done.manifest.label != given.label:
            labels = f"{done.manifest.label!r}, not {given.label!r}"
            raise InputError(f"task {name!r} was learned with the label {labels}: give this task another name")
        self._setup.log(f"task {[*self._lineage].index(name) + 1}: {name} (learned already)")
        self._tests.register(given, self._lineage)
        self._tests.trained_on(rows, given.label)
        return {task: PreferenceScore(**score.model_dump()) for task, score in done.scores.items()}

    def _verdict(
        self,
        before: Mapping[str, PreferenceScore],
        after: Mapping[str, PreferenceScore],
        written_before: Mapping[str, Rewritten],
        written: Mapping[str, Rewritten],
    ) -> Verdict:
        """The gate's verdict by held-out accuracies and, of a corrector, by what it writes."""
        compared = {
            task: compare_shares(score.outcomes, after[task].outcomes)
            for task, score in before.items()
            if score.outcomes
        }
        for task, now in written.items():
            self._setup.log(f"  {task}: {now.one_line}; before, {written_before[task].one_line}")
        # Once: the scorer may be a function or a judge, which costs money and may answer otherwise the second time.
        compared |= on_main(compare_written)(written_before, written, self._gate_scorer)
        if written_before:
            same = all(written_before[task].texts == now.texts for task, now in written.items())
        else:
            same = all(score.margin == after[task].margin for task, score in before.items())
        verdict = judge(float(self.gate or 0.0), compared, bool(compared) and same)
        self._setup.log(f"  {announcement(verdict)}")
        return verdict

    # ---- going back ----

    def rollback(self, version: str | None = None, force: bool = False) -> Rollback:
        """Makes an earlier version current, or one that was rolled back, and continues learning from there.

        Args:
            version: its folder's name or number, "000" for the base model; the current version's parent when None.
            force: take one that the gate refused.

        Raises:
            InputError: there is no such version, it is damaged or was refused by the gate, or the method's versions do
                not build on each other.
        """
        with self._run.exclusive():
            self._check_up_to_date()
            self._check_whole()
            done = on_main(roll_back)(self.run, version, force)
            self._return_to_current()
        return done

    @property
    def _head(self) -> str:
        """The version that learning continues from; "000" for the base model."""
        return [BASE, *self._lineage.values()][-1]

    def _restore(self) -> None:
        """Loads the version that is current on disk; `_lineage` is it with its parents, by task, oldest first."""
        found = self._run.data
        self._run.restore(found, self._setup.policy, self._setup.method, self._setup.seed, self._at_first)
        self._lineage = {version.task: version.id for version in found.versions}

    def _return_to_current(self) -> None:
        self._restore()
        kept = {(version.manifest.train.fingerprint, version.manifest.label) for version in self.run.versions}
        self._tests.forget_trained(kept)

    def _check_up_to_date(self) -> None:
        """Refuses to continue where another learner, or a rollback, has changed the lineage on disk."""
        if [version.id for version in self.run.versions] != list(self._lineage.values()):
            raise InputError(f"{self._run.path} was continued by another learner: open it again, with resume")

    def _check_whole(self) -> None:
        if self._learning:
            raise EveralignError("a task was interrupted: continue with a new learner that resumes the run")

    # ---- results ----

    @property
    def context(self) -> RunContext:
        """What the run is made of: model, objective and options."""
        return self._setup

    @property
    def run(self) -> RunData:
        """The run directory as it is on disk; only files that another process or a new version changed are read."""
        return self._run.data

    @property
    def scores(self) -> Scores:
        """The score matrix of held-out preference accuracy, with Last, BWT, AP and FWT."""
        return self.run.scores("accuracy")

    def export(
        self,
        folder: str | Path,
        version: str | None = None,
        dtype: OutputDtype = "auto",
        label: str | None = None,
        base: str | Path | None = None,
    ) -> Path:
        """Writes a version merged into the base model, in fp32, checked against the adapter's logits, and rounded once.

        A run that learned corrections gives a corrector's folder, which `Corrector.from_pretrained` loads.

        Args:
            folder: must not exist yet.
            version: one of the lineage; the current one when None.
            dtype: of the weights: `fp32`, `bf16`, `fp16`, or the base model's own with `auto`.
            label: whose adapter, of a run that keeps one for each label.
            base: the model in full precision to merge into, where the run learned on a published quantised copy of it.

        Raises:
            InputError: nothing was learned yet, the folder exists, the lineage has no such version or label, or logits
                on `base` are further from those on the quantised weights than quantisation explains.
            EveralignError: the merged model's logits differ from the adapter's.
        """
        name, plain = self._setup.model_name, None if base is None else str(base)
        return export_version(self.run, Path(folder), version, name, self.tokenizer, dtype, label, plain).folder

    def export_adapter(
        self,
        folder: str | Path,
        version: str | None = None,
        dtype: OutputDtype = "auto",
        label: str | None = None,
        pad_rank: bool = False,
    ) -> Path:
        """Writes a version's adapter alone, in PEFT's format, with its tokenizer and a model card.

        Arguments and errors as in `export`; with `auto` it stays in fp32. `pad_rank` fills it up with zeros to a rank
        that every server takes.
        """
        return export_adapter(self.run, Path(folder), version, None, self.tokenizer, dtype, label, pad_rank).folder
