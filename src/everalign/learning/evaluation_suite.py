"""Evaluation suite: the held-out rows of all tasks, scored after every task, and what the policy writes for them.

What it writes are sample answers for reports, and corrections that a gate compares with those before the task.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from everalign.correction.edits import edit_share, words
from everalign.correction.objective import Rewritten
from everalign.data.chat_tokens import encode_prompt
from everalign.data.messages import Prompt
from everalign.data.readers import check_disjoint
from everalign.data.records import Correction
from everalign.data.rows import RowSet, spread
from everalign.distributed import on_main
from everalign.errors import InputError
from everalign.evaluation import HeldOut, PreferenceScore, score_base, score_preferences
from everalign.evaluation.scorers import Scorer
from everalign.evaluation.scoring import compare_answers
from everalign.learning.context import RunContext
from everalign.learning.promotion import compare_shares, compare_values
from everalign.learning.run_files import Answers, Comparison
from everalign.learning.run_store import RunDirectory, data_facts
from everalign.learning.task_training import GivenTask
from everalign.modeling.policy import Snapshot
from everalign.modeling.sampling import sample_completions
from everalign.options import SamplingOptions
from everalign.training.reference import policy_key

LONGEST_ANSWER = 160
"""Tokens of an answer; what is longer is shown as cut off."""

_LONGEST_PROMPT = 768


def first_answers(context: RunContext, name: str, test: RowSet[Any], count: int) -> Answers:
    """Choose at most `count` prompts of a task and answer them; nothing where the model cannot be sampled from."""
    if not count:
        return {}
    distinct = list({repr(_question(row)): row for row in reversed(test.items)}.values())[::-1]
    try:
        # More than are wanted, because some may be too long.
        some = spread(distinct, 4 * count)
        rows = [row for row in some if len(context.objective.prompt(row, context.tokenizer)) <= _LONGEST_PROMPT]
        return _answer(context, [(name, row) for row in spread(rows, count)])
    except InputError as error:
        context.log(f"  no answers are written for the report: {error}")
        return {}


def _answer(context: RunContext, rows: Sequence[tuple[str, Any]]) -> Answers:
    answers: Answers = {}
    if not rows:
        return answers
    # Once, because they are few, and written in one batch.
    found = on_main(context.objective.answers)(
        context.policy, context.tokenizer, [row for _, row in rows], LONGEST_ANSWER, _LONGEST_PROMPT
    )
    for (task, row), (text, ended) in zip(rows, found, strict=True):
        prompt = _question(row)
        if not isinstance(prompt, str):
            prompt = [dict(message) for message in getattr(prompt, "messages", prompt)]
        shown = {"row": row.id, "prompt": prompt, "draft": getattr(row, "answer", None)}
        answers.setdefault(task, []).append({**shown, "answer": text, "ended": ended})
    return answers


def _question(row: Any) -> Any:
    return row.question if hasattr(row, "question") else row.prompt


def own_answers(context: RunContext, prompts: Sequence[Prompt], seed: int) -> list[tuple[int, str]]:
    """Sample an answer to each prompt from the policy as it is, but for prompts that leave no room for one.

    How many prompts have no answer is logged.

    Returns:
        The numbers of the prompts whose answers ended, with these.
    """
    longest = min(LONGEST_ANSWER, context.max_length // 2)
    room = context.max_length - longest
    fit = [n for n, prompt in enumerate(prompts) if len(encode_prompt(context.tokenizer, prompt)) <= room]
    options = SamplingOptions(completions=1, temperature=1.0, max_new_tokens=longest, max_prompt_tokens=room)
    asked = [prompts[number] for number in fit]
    found = sample_completions(context.policy, context.tokenizer, asked, options, seed=seed) if asked else []
    answers = [(number, samples.texts[0]) for number, samples in zip(fit, found, strict=True) if samples.texts]
    if len(answers) < len(prompts):
        context.log(
            f"  {len(answers)} of {len(prompts)} prompts are answered by the policy before the task: "
            f"{len(fit) - len(answers)} answers did not end within {longest} tokens, or are empty, and "
            f"{len(prompts) - len(fit)} prompts leave no room for one (max_length {context.max_length})"
        )
    return answers


MOST_WRITTEN = 200
"""Held-out rows of a task for which corrections are written."""


def write_corrections(context: RunContext, tests: Mapping[str, RowSet[Correction]]) -> dict[str, Rewritten]:
    """Write the policy's corrections of held-out answers, as it is switched now; nothing where it writes none."""
    found = {}
    for name, test in tests.items():
        progress = partial(context.progress, f"correcting {name}")
        found[name] = context.objective.rewrite(
            context.policy, spread(test, MOST_WRITTEN), context.max_length, progress
        )
    return {name: written for name, written in found.items() if written is not None}


def compare_written(
    before: Mapping[str, Rewritten], after: Mapping[str, Rewritten], scorer: Scorer | None
) -> dict[str, Comparison]:
    """Compare corrections by task, as a gate reads it: how near they are to people's, and what a scorer finds better.

    People's corrections are good answers: what used to be left alone and no longer is has been forgotten, too.

    Args:
        before: of the policy before the task.
        after: of the policy that has learned it.
        scorer: rates them too, if there is one.
    """
    found: dict[str, Comparison] = {}
    for name, new in after.items():
        if not new.rows:
            continue
        if len(new.kept) > 1:
            kept = (_nearness(new.rows, texts) for texts in (before[name].kept, new.kept))
            found[f"{name}: good answers left as they are"] = compare_values(*kept)
        answers = [row.answer for row in new.rows]
        for what, texts in (("those before", before[name].texts), ("the answers as they are", answers)):
            if len(new.rows) > 1:
                pair = _nearness(new.rows, texts), _nearness(new.rows, new.texts)
                found[f"{name}: nearness to people's corrections, against {what}"] = compare_values(*pair)
            if scorer is not None:
                verdicts = compare_answers(scorer, [row.question for row in new.rows], texts, new.texts)
                won = [(1 + verdict) / 2 for verdict in verdicts]
                found[f"{name}: share found better, against {what}"] = compare_shares([1 - one for one in won], won)
    return found


def _nearness(rows: Sequence[Correction], texts: Sequence[str]) -> list[float]:
    return [1 - edit_share(words(text), words(row.correction)) for row, text in zip(rows, texts, strict=True)]


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
        method, policy = self._setup.method, self._setup.policy
        found: Labelled = {}
        for label in dict.fromkeys(map(self._label, self._sets)):
            with method.answering(policy, label):
                found[label] = policy.snapshot()
        return found

    def scores(self, previous: Labelled | None, tasks: Sequence[str] | None = None) -> dict[str, PreferenceScore]:
        """Score the policy on the test sets of some tasks, or on all when None.

        `previous` is what `policies` returned before this task, which the KL is measured to; None leaves that out.
        """
        names, found = [name for name in (self._held_out if tasks is None else tasks) if name in self._held_out], {}
        for label in dict.fromkeys(map(self._label, names)):
            before = None if previous is None else previous[label]
            snapshot = nullcontext() if before is None else self._setup.policy.as_snapshot(before)
            with self._setup.method.answering(self._setup.policy, label), snapshot:
                for name in (name for name in names if self._label(name) == label):
                    found[name] = score_preferences(
                        self._setup.policy,
                        self._held_out[name],
                        tokens_per_batch=self._setup.options.tokens_per_batch,
                        previous=before,
                        progress=partial(self._setup.progress, f"evaluating {name}"),
                    )
        return {name: found[name] for name in names}

    def answers(self) -> Answers:
        """Write the policy's answers to the prompts that the base model has answered."""
        asked = {name: {answer["row"] for answer in answers} for name, answers in self._first_answers.items()}
        found: Answers = {}
        for label in dict.fromkeys(map(self._label, self._sets)):
            own = [(name, test) for name, test in self._sets.items() if self._label(name) == label]
            rows = [(name, row) for name, test in own for row in test if row.id in asked.get(name, ())]
            with self._setup.method.answering(self._setup.policy, label):
                found |= _answer(self._setup, rows)
        return {name: found[name] for name in self._sets if name in found}

    def rows(self, tasks: Sequence[str]) -> dict[str, RowSet[Any]]:
        """Return the held-out rows of those of the tasks that have some."""
        return {task: self._sets[task] for task in tasks if task in self._sets}

    def _label(self, name: str) -> str | None:
        return self._facts[name]["label"]  # type: ignore[no-any-return]


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
