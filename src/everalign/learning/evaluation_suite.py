"""Evaluation suite: the held-out rows of all tasks, scored after every task, with sample answers."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from everalign.data.readers import check_disjoint
from everalign.data.rows import RowSet
from everalign.errors import InputError
from everalign.evaluation import HeldOut, PreferenceScore, score_base, score_preferences
from everalign.learning.context import RunContext
from everalign.learning.run_store import RunDirectory, data_facts
from everalign.learning.sample_answers import Answers, answer_again, first_answers
from everalign.memory import LowRankUpdate
from everalign.training.reference import policy_key


class EvaluationSuite:
    """Every registered test set with the base model's scores on it.

    A run keeps the rows it is tested on: a column of scores never mixes two test sets, and a later task is scored on
    all of them although they are given only once.

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
        self._trained: dict[str, RowSet[Any]] = {}

    def facts(self, name: str) -> dict[str, object] | None:
        """Return what identifies a task's test set, None where it has none."""
        return self._facts.get(name)

    def check(self, tasks: Sequence[tuple[str, RowSet[Any] | None, RowSet[Any] | None]]) -> None:
        """Refuse (name, rows, test) tasks without a name or rows, or that mix training and test rows of any task."""
        for name, rows, test in tasks:
            if not name.strip():
                raise InputError("a task needs a name: found an empty one")
            for what, found in (("training", rows), ("test", test)):
                if found is not None and not len(found):
                    raise InputError(f"task {name!r}: its {what} set {found.source} has no rows")
        tests = {**self._sets, **{name: test for name, _, test in tasks if test is not None}}
        for rows in [*self._trained.values(), *(rows for _, rows, _ in tasks if rows is not None)]:
            for test in tests.values():
                check_disjoint(rows, test, allow=self._allow_overlap)

    def trained_on(self, rows: RowSet[Any]) -> None:
        """Remember training rows, to compare later test sets with them."""
        self._trained[rows.fingerprint] = rows

    def forget_trained(self, kept: Collection[str]) -> None:
        """Forget training rows except those with these fingerprints: rows that were not learned leak nothing."""
        self._trained = {fingerprint: rows for fingerprint, rows in self._trained.items() if fingerprint in kept}

    def register(self, name: str, test: RowSet[Any], learned: Collection[str]) -> None:
        """Register a task's test set and score the base model on it, unless the run holds that score.

        Args:
            name: the task.
            test: its held-out rows: preferences, or corrections.
            learned: names of the tasks learned so far.

        Raises:
            InputError: the run knows other test rows of this task, or some of them were trained on.
        """
        self.check([(name, None, test)])
        known = self._facts.get(name)
        if known is None and name in learned:
            raise InputError(f"task {name!r} was learned without a test set: it cannot get one now")
        if known is not None and known["fingerprint"] != test.fingerprint:
            raise InputError(f"task {name!r} has other test rows in this run ({known['source']}): use those")
        if name in self._sets:
            return
        self._held_out[name] = prepare_held_out(self._setup, test)
        self._sets[name] = test
        if name not in self._zero_shot:
            self._facts[name] = data_facts(test)
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
                self._held_out[name] = prepare_held_out(self._setup, self._sets[name])

    def scores(
        self, previous: Mapping[str, LowRankUpdate] | None, tasks: Sequence[str] | None = None
    ) -> dict[str, PreferenceScore]:
        """Score the policy on the test sets of some tasks, or on all when None.

        `previous` is the policy before this task, which the KL is measured to; None leaves that out.
        """
        names = [name for name in (self._held_out if tasks is None else tasks) if name in self._held_out]
        with nullcontext() if previous is None else self._setup.policy.as_snapshot(previous):
            return {name: self._score(self._held_out[name], previous) for name in names}

    def answers(self) -> Answers:
        """Write the policy's answers to the prompts that the base model has answered."""
        return answer_again(self._setup, self._first_answers, self._sets)

    def rows(self, tasks: Sequence[str]) -> dict[str, RowSet[Any]]:
        """Return the held-out rows of those of the tasks that have some."""
        return {task: self._sets[task] for task in tasks if task in self._sets}

    def _score(self, held_out: HeldOut, previous: Mapping[str, LowRankUpdate] | None) -> PreferenceScore:
        tokens = self._setup.options.tokens_per_batch
        return score_preferences(self._setup.policy, held_out, tokens_per_batch=tokens, previous=previous)


def scored_rows(test: RowSet[Any], setup: RunContext) -> RowSet[Any]:
    """Return those of a task's held-out rows that are scored, `test_limit` of them at most."""
    limit = setup.options.test_limit or len(test)
    return test[:: max(1, len(test) // limit)][:limit]


def prepare_held_out(setup: RunContext, test: RowSet[Any]) -> HeldOut:
    """Encode held-out rows, `test_limit` of them at most, and score them with the base model or take that as known.

    Raises:
        InputError: most of them lose too much by the length limit.
    """
    pairs = setup.objective.tokenize_held_out(scored_rows(test, setup), setup)
    try:
        warnings = pairs.warnings()
    except InputError as error:
        raise InputError(f"{test.source}: {error}") from error
    for warning in warnings:
        setup.log(f"  warning: {test.source}: {warning}")
    base_key = policy_key(setup.model_key, {})
    with setup.policy.as_base():
        base = setup.cache.logprobs(setup.policy, base_key, pairs, setup.options.tokens_per_batch)
    return HeldOut(pairs, torch.stack(base))
