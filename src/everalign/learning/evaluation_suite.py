"""Evaluation suite: the held-out rows of all tasks, scored after every task, with sample answers."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from everalign.data.readers import check_disjoint
from everalign.data.rows import RowSet, spread
from everalign.errors import InputError
from everalign.evaluation import HeldOut, PreferenceScore, score_base, score_preferences
from everalign.learning.context import RunContext
from everalign.learning.run_store import RunDirectory, data_facts
from everalign.learning.sample_answers import Answers, answer_again, first_answers
from everalign.learning.task_training import GivenTask
from everalign.modeling.policy import Snapshot
from everalign.training.reference import policy_key

# A fact of a test set: which of its rows are scored, see `scored_rows`.
_EVENLY = "evenly"

Labelled = dict[str | None, Snapshot]
"""The policy by the labels of held-out rows; None stands for all rows."""


class EvaluationSuite:
    """Every registered test set with the base model's scores on it.

    A run keeps the rows it is tested on: a column of scores never mixes two test sets, and a later task is scored on
    all of them although they are given only once. Rows with a label are scored with that label's policy.

    Args:
        setup: the learner's parts.
        run: where the base model's scores are kept.
        allow_overlap: let pairs occur in training and test data.
        sample_answers: prompts of each test set that answers are written to, for the report.
    """

    def __init__(self, setup: RunContext, run: RunDirectory, allow_overlap: bool, sample_answers: int = 0) -> None:
        self._setup, self._run, self._allow_overlap = setup, run, allow_overlap
        if sample_answers < 0:
            raise InputError(f"sample_answers must be at least 0, found {sample_answers}")
        self._sample_count = sample_answers
        self._zero_shot, self._facts, self._first_answers = run.read_zero_shot()
        self._sets: dict[str, RowSet[Any]] = {}
        self._held_out: dict[str, HeldOut] = {}
        self._trained: dict[tuple[str, str | None], RowSet[Any]] = {}

    def facts(self, name: str) -> dict[str, object] | None:
        """Return what identifies a task's test set, None where it has none."""
        return self._facts.get(name)

    def check(self, tasks: Sequence[GivenTask]) -> None:
        """Refuse tasks without a name or rows, or that mix training and test rows of any task of the same label."""
        for task in tasks:
            if not task.name.strip():
                raise InputError("a task needs a name: found an empty one")
            for what, found in (("training", task.rows), ("test", task.test)):
                if found is not None and not len(found):
                    raise InputError(f"task {task.name!r}: its {what} set {found.source} has no rows")
        tests = {name: (test, self._label(name)) for name, test in self._sets.items()}
        tests |= {task.name: (task.test, task.label) for task in tasks if task.test is not None}
        trained = [(rows, label) for (_, label), rows in self._trained.items()]
        for rows, label in [*trained, *((task.rows, task.label) for task in tasks if task.rows is not None)]:
            for test, for_label in tests.values():
                if label == for_label:
                    check_disjoint(rows, test, allow=self._allow_overlap)

    def trained_on(self, rows: RowSet[Any], label: str | None) -> None:
        """Remember training rows, to compare later test sets with them."""
        self._trained[rows.fingerprint, label] = rows

    def forget_trained(self, kept: Collection[tuple[str, str | None]]) -> None:
        """Forget training rows but those of these fingerprints and labels: what was not learned leaks nothing."""
        self._trained = {key: rows for key, rows in self._trained.items() if key in kept}

    def register(self, task: GivenTask, learned: Collection[str]) -> None:
        """Register a task's test set, if it has one, and score the base model on it unless the run holds that score.

        Args:
            task: its held-out rows are preferences, or corrections.
            learned: names of the tasks learned so far.

        Raises:
            InputError: the run knows other test rows of this task, or some of them were trained on.
        """
        name, test = task.name, task.test
        if test is None:
            return
        self.check([GivenTask(name, None, test, task.label)])
        known = self._facts.get(name)
        if known is None and name in learned:
            raise InputError(f"task {name!r} was learned without a test set: it cannot get one now")
        if known is not None and known["fingerprint"] != test.fingerprint:
            raise InputError(f"task {name!r} has other test rows in this run ({known['source']}): use those")
        if known is not None and known["label"] != task.label:
            raise InputError(
                f"task {name!r}: its test rows have the label {known['label']!r} in this run, and {task.label!r} now"
            )
        if name in self._sets:
            return
        facts = {**data_facts(test), "label": task.label, _EVENLY: True} if known is None else known
        self._held_out[name] = prepare_held_out(self._setup, test, facts.get(_EVENLY, False))
        self._sets[name] = test
        if name not in self._zero_shot:
            self._facts[name] = facts
            self._run.write_test(test)
            self._zero_shot[name] = score_base(self._held_out[name])
            with self._setup.policy.as_base():
                self._first_answers |= first_answers(self._setup, name, test, self._sample_count)
            self._run.write_zero_shot(self._zero_shot, self._facts, self._first_answers)

    def restore(self) -> None:
        """Read from the run directory the test sets that were not given again, as after a resume."""
        for name, facts in self._facts.items():
            if name not in self._sets:
                self._sets[name] = self._run.read_test(facts, self._setup.objective.load_held_out)
                self._held_out[name] = prepare_held_out(self._setup, self._sets[name], facts.get(_EVENLY, False))

    def policies(self) -> Labelled:
        """Return the policy as it is now, of every label that test sets have."""
        found: Labelled = {}
        for label in self._labels():
            with self._answering(label):
                found[label] = self._setup.policy.snapshot()
        return found

    def scores(self, previous: Labelled | None, tasks: Sequence[str] | None = None) -> dict[str, PreferenceScore]:
        """Score the policy on the test sets of some tasks, or on all when None.

        `previous` is what `policies` returned before this task, which the KL is measured to; None leaves that out.
        """
        names, found = [name for name in (self._held_out if tasks is None else tasks) if name in self._held_out], {}
        for label in dict.fromkeys(map(self._label, names)):
            before = None if previous is None else previous[label]
            snapshot = nullcontext() if before is None else self._setup.policy.as_snapshot(before)
            with self._answering(label), snapshot:
                for name in names:
                    if self._label(name) == label:
                        found[name] = self._score(name, before)
        return {name: found[name] for name in names}

    def answers(self) -> Answers:
        """Write the policy's answers to the prompts that the base model has answered."""
        found: Answers = {}
        for label in self._labels():
            with self._answering(label):
                sets = {name: test for name, test in self._sets.items() if self._label(name) == label}
                found |= answer_again(self._setup, self._first_answers, sets)
        return {name: found[name] for name in self._sets if name in found}

    def rows(self, tasks: Sequence[str]) -> dict[str, RowSet[Any]]:
        """Return the held-out rows of those of the tasks that have some."""
        return {task: self._sets[task] for task in tasks if task in self._sets}

    def _label(self, name: str) -> str | None:
        return self._facts[name]["label"]  # type: ignore[no-any-return]

    def _labels(self) -> list[str | None]:
        return list(dict.fromkeys(map(self._label, self._sets)))

    def _answering(self, label: str | None) -> AbstractContextManager[None]:
        return self._setup.method.answering(self._setup.policy, label)

    def _score(self, name: str, previous: Snapshot | None) -> PreferenceScore:
        return score_preferences(
            self._setup.policy,
            self._held_out[name],
            tokens_per_batch=self._setup.options.tokens_per_batch,
            previous=previous,
            progress=partial(self._setup.progress, f"evaluating {name}"),
        )


def scored_rows(test: RowSet[Any], setup: RunContext, evenly: bool = True) -> RowSet[Any]:
    """Return those of a task's held-out rows that are scored, `test_limit` of them at most.

    Args:
        test: all of them.
        setup: the learner's parts.
        evenly: from the first to the last; False for the choice of older runs, which may leave out the last rows.
    """
    limit = setup.options.test_limit or len(test)
    if evenly:
        return replace(test, items=tuple(spread(test, limit)))
    return test[:: max(1, len(test) // limit)][:limit]


def prepare_held_out(setup: RunContext, test: RowSet[Any], evenly: bool = True) -> HeldOut:
    """Encode the held-out rows that are scored, and score them with the base model or take that as known.

    Arguments as in `scored_rows`.

    Raises:
        InputError: most of them lose too much by the length limit.
    """
    pairs = setup.objective.tokenize_held_out(scored_rows(test, setup, evenly), setup)
    try:
        warnings = pairs.warnings()
    except InputError as error:
        raise InputError(f"{test.source}: {error}") from error
    for warning in warnings:
        setup.log(f"  warning: {test.source}: {warning}")
    base_key = policy_key(setup.model_key, {})
    with setup.policy.as_base():
        progress = partial(setup.progress, "evaluating the base model")
        base = setup.cache.logprobs(setup.policy, base_key, pairs, setup.options.tokens_per_batch, progress)
    return HeldOut(pairs, torch.stack(base))
