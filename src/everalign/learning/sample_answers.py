"""Answers and corrections that the policy writes for held-out rows: for reports, and for the gate."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from everalign.correction.edits import edit_share, words
from everalign.correction.objective import Rewritten
from everalign.data.chat_tokens import encode_prompt
from everalign.data.messages import Prompt
from everalign.data.records import Correction
from everalign.data.rows import RowSet, spread
from everalign.distributed import on_main
from everalign.errors import InputError
from everalign.evaluation.scorers import Scorer
from everalign.evaluation.scoring import compare_answers
from everalign.learning.context import RunContext
from everalign.learning.promotion import compare_shares, compare_values
from everalign.learning.run_files import Comparison
from everalign.modeling.options import SamplingOptions
from everalign.modeling.sampling import sample_completions

LONGEST_ANSWER = 160
"""Tokens of an answer; what is longer is shown as cut off."""

_LONGEST_PROMPT = 768

Answers = dict[str, list[dict[str, Any]]]
"""By task, one for each prompt, as `everalign.learning.run_files.SampleAnswer` reads them."""


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


def answer_again(context: RunContext, before: Answers, tests: Mapping[str, RowSet[Any]]) -> Answers:
    """Answer the prompts of earlier answers with the policy as it is switched now."""
    ids = {task: {answer["row"] for answer in answers} for task, answers in before.items()}
    return _answer(
        context, [(task, row) for task, test in tests.items() for row in test if row.id in ids.get(task, ())]
    )


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
