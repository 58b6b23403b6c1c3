"""Sample answers of the policy to held-out prompts, before the first task and after each, for the report.

Greedy, so that they are the same whenever they are written; the prompts stay the same for the whole run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from everalign.data.rows import RowSet
from everalign.errors import InputError
from everalign.learning.context import RunContext

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
        some = _spread(distinct, 4 * count)
        rows = [row for row in some if len(context.objective.prompt(row, context.tokenizer)) <= _LONGEST_PROMPT]
        return _answer(context, [(name, row) for row in _spread(rows, count)])
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
    found = context.objective.answers(
        context.policy, context.tokenizer, [row for _, row in rows], LONGEST_ANSWER, _LONGEST_PROMPT
    )
    for (task, row), (text, ended) in zip(rows, found, strict=True):
        prompt = _question(row)
        if not isinstance(prompt, str):
            prompt = [dict(message) for message in getattr(prompt, "messages", prompt)]
        shown = {"row": row.id, "prompt": prompt, "draft": getattr(row, "answer", None)}
        answers.setdefault(task, []).append({**shown, "answer": text, "ended": ended})
    return answers


def _spread(rows: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` rows from the first to the last, evenly far apart."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else list(rows)


def _question(row: Any) -> Any:
    return row.question if hasattr(row, "question") else row.prompt
