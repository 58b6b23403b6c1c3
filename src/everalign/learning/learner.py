"""The learner: takes preference tasks one after another and keeps what it learned."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from everalign.data.encoding import encode_pairs
from everalign.data.readers import PreferenceSet, check_disjoint
from everalign.data.records import Preference
from everalign.data.templating import template_fingerprint
from everalign.errors import InputError
from everalign.evaluation import HeldOut, PreferenceScore, score_preferences
from everalign.learning.export import export_merged
from everalign.learning.options import AdapterOptions, TrainingOptions
from everalign.learning.run import (
    BASE,
    RunDirectory,
    data_facts,
    library_versions,
    machine_facts,
    version_name,
)
from everalign.learning.run_data import RunData, load_run
from everalign.learning.scores import Scores
from everalign.learning.training import Announce, Progress, Setup, train_task
from everalign.memory import LowRankUpdate
from everalign.methods import LifeAlign, Method, Task
from everalign.modeling.loading import load_model, load_tokenizer, model_fingerprint
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import prepare_process
from everalign.training.reference import ReferenceCache, policy_key
from everalign.training.teaching import make_objective

Rows = Sequence[Preference]
# Stages of a task use consecutive seeds; tasks are this far apart.
_TASK_SEED_STRIDE = 1000


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _as_set(rows: Rows) -> PreferenceSet:
    return rows if isinstance(rows, PreferenceSet) else PreferenceSet.of(rows)


def _silent(stage: str, done: int, total: int) -> None:
    pass


class Learner:
    """Learns preference tasks one after another into a run directory.

    Args:
        model: a folder in Hugging Face format, a Hub name, or `tiny` for the embedded assistant.
        method: what is carried from task to task; LifeAlign when None.
        objective: what a pair teaches: `fpo`, `dpo` or `sft`.
        output: the run directory; created when missing.
        training: how every task is trained.
        adapter: shape of the adapter.
        seed: seeds everything random.
        resume: continue the run that `output` holds: finished tasks are taken as they are, and one that was
            interrupted goes on from its newest checkpoint. A run with other settings is refused.
        allow_overlap: let pairs occur in training and test data.
        cache: folder for reference log-probabilities, to be shared between runs; inside `output` when None.
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
        seed: int = 0,
        resume: bool = False,
        allow_overlap: bool = False,
        cache: str | Path | None = None,
        announce: Announce = _print,
        progress: Progress = _silent,
    ) -> None:
        self.method = LifeAlign() if method is None else method
        self.training, self.adapter = training or TrainingOptions(), adapter or AdapterOptions()
        self.seed, self._allow_overlap, self._announce = seed, allow_overlap, announce
        self.model_name, self._run = str(model), RunDirectory(Path(output))
        if self._run.exists and not resume:
            raise InputError(f"{output} holds a run already: resume it (--resume), or choose another output directory")
        if objective == "sft" and self.training.sft_epochs > 0:
            raise InputError("sft_epochs adds a stage before a preference objective; with objective sft set epochs")
        goal = make_objective(objective, self.training.beta, self.method.gamma)
        prepare_process()
        self.tokenizer = load_tokenizer(self.model_name)
        self._pad_id = self.tokenizer.pad_token_id
        if self._pad_id is None:
            self._pad_id = self.tokenizer.eos_token_id
        base = load_model(self.model_name, self.training.precision)
        fingerprint = model_fingerprint(base)
        if torch.cuda.is_available():
            base = base.cuda()
        shape = self.adapter
        self.policy = Policy(base, shape.rank, shape.alpha, shape.module_names(), seed)
        self._base_key = policy_key(fingerprint, {})
        self._setup = Setup(
            policy=self.policy,
            method=self.method,
            objective=goal,
            options=self.training,
            pad_id=self._pad_id,
            model_key=fingerprint,
            cache=ReferenceCache(Path(cache) if cache is not None else self._run.cache),
            announce=announce,
            progress=progress,
        )
        self._held_out: dict[str, HeldOut] = {}
        self._tests: dict[str, PreferenceSet] = {}
        self._zero_shot: dict[str, PreferenceScore] = {}
        self._open(self._facts(fingerprint, goal.name))

    # ---- learning ----

    def learn(self, rows: Rows, name: str, test: Rows | None = None) -> dict[str, PreferenceScore]:
        """Learn one task, score the policy on every known test set, and write a version.

        Args:
            rows: the task's training pairs.
            name: unique in the run.
            test: held-out pairs of the task.

        Returns:
            Scores by task of the policy that has now learned this one.

        Raises:
            InputError: the name is taken by other rows, or training and test rows overlap.
        """
        if test is not None:
            self.announce_test(name, test)
        rows = _as_set(rows)
        index = len(self._finished) + 1
        if name in self._finished:
            return self._already_learned(rows, name)
        for held_out in self._tests.values():
            check_disjoint(rows, held_out, allow=self._allow_overlap)
        task = Task(name, rows, index, self.seed * 1_000_003 + index * _TASK_SEED_STRIDE)
        self._announce(f"task {index}: {name}")
        return self._learn(task, rows, None if test is None else self._tests[name])

    def learn_all(self, tasks: Sequence[tuple[str, Rows, Rows | None]]) -> None:
        """Learn (name, rows, test) tasks in order; every test set is scored from the start, also before its turn.

        A joint method learns them all at once.
        """
        for name, _, test in tasks:
            if test is not None:
                self.announce_test(name, test)
        tests = {name: test for name, _, test in tasks}
        for name, rows in self.method.pool([(name, rows) for name, rows, _ in tasks]):
            self.learn(_as_set(rows), name, tests.get(name))

    def announce_test(self, name: str, test: Rows) -> None:
        """Make a task's held-out pairs known and score the base model on them (the zero-shot row)."""
        test = _as_set(test)
        if name in self._tests and self._tests[name].fingerprint == test.fingerprint:
            return
        self._tests[name] = test
        limit = self.training.test_limit or len(test)
        kept = test[:: max(1, len(test) // limit)][:limit]
        pairs = encode_pairs(kept, self.tokenizer, self.training.max_length)
        with self.policy.as_base():
            base = self._setup.cache.log_probs(
                self.policy, self._base_key, pairs, self._pad_id, self.training.micro_batch_size
            )
            self._held_out[name] = HeldOut(pairs, base)
            self._zero_shot[name] = self._score(self._held_out[name], None)
        self._run.write_zero_shot(self._zero_shot)

    def _learn(self, task: Task, rows: PreferenceSet, test: PreferenceSet | None) -> dict[str, PreferenceScore]:
        version = version_name(task.index, task.name)
        previous = self.policy.total()
        self.method.begin_task(self.policy, task)
        replayed = self.method.rows(task)
        pairs = encode_pairs([*rows, *replayed], self.tokenizer, self.training.max_length)
        if pairs.truncated_prompts or pairs.truncated_responses or pairs.identical_after_truncation:
            self._announce(f"  {pairs.summary()}")
        reports = train_task(self._setup, pairs, len(replayed), self._run.work(version), task.seed)
        before = self._score_all(previous) if self.method.consolidates else None
        records = self.method.end_task(self.policy, task)
        scores = self._score_all(previous)
        manifest = {
            "index": task.index,
            "name": task.name,
            "parent": self._parent(),
            "train": data_facts(rows),
            "test": None if test is None else data_facts(test),
            "seed": task.seed,
            "stages": [report.facts() for report in reports],
            "replay_ids": [] if self.method.buffer is None else self.method.buffer.ids(),
        }
        self._run.write_version(version, manifest, self.policy, self.method, reports, records, scores, before)
        self._finished[task.name] = version
        return scores

    def _already_learned(self, rows: PreferenceSet, name: str) -> dict[str, PreferenceScore]:
        run = self.run
        done = next(version for version in run.versions if version.task == name)
        if done.manifest.train.fingerprint != rows.fingerprint:
            raise InputError(f"task {name!r} was learned from other rows already: give this task another name")
        self._announce(f"task {done.manifest.index}: {name} (learned already)")
        return {task: PreferenceScore(**score.model_dump()) for task, score in done.scores.items()}

    def _score(self, held_out: HeldOut, previous: Mapping[str, LowRankUpdate] | None) -> PreferenceScore:
        batch_size = self.training.micro_batch_size
        return score_preferences(self.policy, held_out, pad_id=self._pad_id, batch_size=batch_size, previous=previous)

    def _score_all(self, previous: Mapping[str, LowRankUpdate]) -> dict[str, PreferenceScore]:
        return {name: self._score(held_out, previous) for name, held_out in self._held_out.items()}

    # ---- what came of it ----

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

        Raises:
            InputError: nothing was learned yet, or the folder exists.
            EveralignError: the merged model's logits differ from the adapter's.
        """
        if not self._finished:
            raise InputError("nothing to export: learn a task first")
        adapter = self._run.path / "versions" / list(self._finished.values())[-1] / "adapter"
        return export_merged(self.model_name, adapter, self.tokenizer, Path(folder))

    # ---- the run directory ----

    def _facts(self, fingerprint: str, objective: str) -> dict[str, Any]:
        gamma = {} if self.method.gamma is None else {"gamma": self.method.gamma}
        return {
            "everalign": library_versions()["everalign"],
            "model": self.model_name,
            "model_fingerprint": fingerprint,
            "template": template_fingerprint(self.tokenizer),
            "method": {"name": self.method.name, **gamma, **self.method.settings()},
            "objective": objective,
            "settings": {**asdict(self.training), **asdict(self.adapter)},
            "seed": self.seed,
            "libraries": library_versions(),
            "machine": {**machine_facts(), "threads": torch.get_num_threads()},
        }

    def _open(self, facts: dict[str, Any]) -> None:
        self._finished: dict[str, str] = {}
        if not self._run.exists:
            self._run.begin(facts)
            return
        self._run.check_same(facts)
        self._finished = {version.task: version.id for version in self.run.versions}
        if self._finished:
            self._run.restore(list(self._finished.values())[-1], self.policy, self.method, self.seed)

    def _parent(self) -> str:
        if self.method.regime == "separate" or not self._finished:
            return BASE
        return list(self._finished.values())[-1]
