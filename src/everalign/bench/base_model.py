"""Contenders that learn nothing: the base model as it is, or with an instruction in front of every prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch

from everalign.bench.data import with_system
from everalign.bench.records import METRICS, PAIR_METRICS, Run, peak_bytes
from everalign.data.records import PreferenceSet
from everalign.data.tokenization import TokenizedRow, tokenize_preferences
from everalign.errors import InputError
from everalign.evaluation import HeldOut, PreferenceScore, score_base
from everalign.evaluation.preference import score_log_probs
from everalign.learning.context import RunContext, make_context
from everalign.learning.evaluation_suite import prepare_held_out, scored_rows
from everalign.learning.options import RolloutOptions
from everalign.learning.recipe import Recipe
from everalign.training.options import WeightOptions
from everalign.training.reference import policy_key

_NO_LIMIT = 10**9


def load_base(recipe: Recipe, log: Callable[[str], None]) -> RunContext:
    """Loads a run's base model as a learner would."""
    given = recipe.learner_arguments(needs_tasks=False)
    return make_context(
        model=given["model"],
        base_adapter=None,
        method=given["method"],
        objective=given["objective"],
        options=given["training"],
        adapter=given["adapter"],
        weighting=WeightOptions(),
        scorer=None,
        rollouts=RolloutOptions(),
        correction=None,
        seed=0,
        cache=Path(given["cache"]),
        log=log,
        progress=lambda *_: None,
    )


def base_results(context: RunContext, run: Run) -> dict[str, Any]:
    """Returns what a record keeps of a run that learns nothing: scores at the end, as of tasks learned at once."""
    plain, scored = dict[str, PreferenceScore](), dict[str, PreferenceScore]()
    for task in run.order:
        held_out = prepare_held_out(context, run.rows[task].held_out)
        plain[task] = score_base(held_out)
        system = (run.system or {}).get(task)
        scored[task] = plain[task] if system is None else _with_instruction(context, run, task, held_out, system)
    empty: list[list[None]] = [[None] * len(run.order) for _ in run.order[1:]]
    return {
        "tasks": list(run.order),
        "regime": "joint",
        "scores": {
            metric: {
                "zero_shot": [getattr(plain[task], metric) for task in run.order],
                "matrix": [*empty, [getattr(scored[task], metric) for task in run.order]],
            }
            for metric in METRICS
        },
        "pairs": {
            metric: {task: {"learned": None, "final": getattr(scored[task], field)} for task in run.order}
            for metric, field in PAIR_METRICS.items()
        },
        "cost": {"seconds": 0, "processor_seconds": 0, "peak_bytes": peak_bytes(), "kept": [], "resumed": False},
        "facts": context.to_dict(),
    }


def _with_instruction(context: RunContext, run: Run, task: str, plain: HeldOut, system: str) -> PreferenceScore:
    """Scores the base model with the instruction; what that gains is measured against the base model without it."""
    rows = PreferenceSet.of(scored_rows(run.rows[task].held_out, context))
    whole = tokenize_preferences(rows, context.tokenizer, _NO_LIMIT)
    told = tokenize_preferences(with_system(rows, system), context.tokenizer, _NO_LIMIT)
    pairs = [_behind(*three) for three in zip(told, whole, plain.pairs, strict=True)]
    longest, readable = max(map(_length, pairs)), context.policy.head.lengths.longest
    if readable is not None and longest > readable:
        raise InputError(
            f"contenders.{run.contender}.system: with it a row of {task} has {longest} tokens, and the model can read "
            f"{readable}: shorten it, or lower training.max_length"
        )
    key = policy_key(context.model_key, {})
    with context.policy.as_base():
        found = context.cache.logprobs(context.policy, key, pairs, context.options.tokens_per_batch)
    return score_log_probs(torch.stack(found), HeldOut(pairs, plain.base))


def _behind(told: TokenizedRow, whole: TokenizedRow, plain: TokenizedRow) -> TokenizedRow:
    """Puts an instruction before a row that was cut to the length limit, which would cut the instruction first.

    Args:
        told: the row with the instruction, not cut.
        whole: the row without it, not cut.
        plain: the same, cut: prompt on the left, responses on the right.
    """
    responses = tuple(
        own[: max(1, len(own) - len(without) + len(cut))]
        for own, without, cut in zip(told.responses, whole.responses, plain.responses, strict=True)
    )
    lost, prompt = len(whole.prompt) - len(plain.prompt), told.prompt
    if lost:
        # The cut is made behind a leading BOS, which stays.
        first = 1 if plain.prompt == whole.prompt[:1] + whole.prompt[1 + lost :] else 0
        # What both have in common is the prompt itself. Around it templates put what they like: a system message of
        # their own, or, where the row is plain text, the marks of a turn.
        place, same, length = SequenceMatcher(None, prompt, whole.prompt, autojunk=False).find_longest_match()
        start, end = (min(max(cut - same, 0), length) for cut in (first, first + lost))
        prompt = prompt[: place + start] + prompt[place + end :]
    return replace(told, prompt=prompt, responses=responses)


def _length(row: TokenizedRow) -> int:
    return len(row.prompt) + max(map(len, row.responses))
