"""A few answers of the policy to held-out prompts, before the first task and after each: what the report shows.

Greedy, so that they say the same whenever they are written; and of the same prompts for as long as the run lasts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from everalign.data.chat_tokens import encode_prompt
from everalign.data.messages import ChatPrompt
from everalign.data.rows import RowSet
from everalign.errors import InputError
from everalign.learning.context import RunContext
from everalign.modeling.options import SamplingOptions
from everalign.modeling.sampling import greedy_answers, greedy_continuations

LONGEST_ANSWER = 160
"""Tokens of an answer; what is longer is shown as cut off."""

_LONGEST_PROMPT = 768

Answers = dict[str, list[dict[str, Any]]]
"""By task, one for each prompt, as `everalign.learning.run_files.SampleAnswer` reads them."""


class SampleAnswers:
    """Writes answers with the policy as it is switched now.

    Args:
        setup: the learner's parts.
        count: prompts of each task; 0 for none.
    """

    def __init__(self, setup: RunContext, count: int) -> None:
        if count < 0:
            raise InputError(f"sample_answers must be at least 0, found {count}")
        self._setup, self._count = setup, count

    def first(self, name: str, test: RowSet[Any]) -> Answers:
        """Choose a task's prompts and answer them; nothing where the model cannot be sampled from."""
        if not self._count:
            return {}
        distinct = list({repr(_asked(row)): row for row in reversed(test.items)}.values())[::-1]
        try:
            # More than are wanted, because some may be too long.
            rows = [row for row in _spread(distinct, 4 * self._count) if len(self._tokens(row)) <= _LONGEST_PROMPT]
            return self._written([(name, row) for row in _spread(rows, self._count)])
        except InputError as error:
            self._setup.log(f"  no answers are written for the report: {error}")
            return {}

    def again(self, before: Answers, tests: Mapping[str, RowSet[Any]]) -> Answers:
        """Answer the prompts of earlier answers."""
        ids = {task: {answer["row"] for answer in answers} for task, answers in before.items()}
        rows = [(task, row) for task, test in tests.items() for row in test if row.id in ids.get(task, ())]
        return self._written(rows)

    def _written(self, rows: Sequence[tuple[str, Any]]) -> Answers:
        setup = self._setup
        if not rows:
            return {}
        if setup.encoder is None:
            options = SamplingOptions(
                completions=1, temperature=1.0, max_new_tokens=LONGEST_ANSWER, max_prompt_tokens=_LONGEST_PROMPT
            )
            found = greedy_answers(setup.policy, setup.tokenizer, [row.prompt for _, row in rows], options)
        else:
            prompts = [self._tokens(row) for _, row in rows]
            written = greedy_continuations(setup.policy, prompts, setup.encoder.ends, LONGEST_ANSWER)
            found = [(setup.encoder.decode(ids), ids[-1] in setup.encoder.ends) for ids in written]
        answers: Answers = {}
        for (task, row), (text, ended) in zip(rows, found, strict=True):
            shown = {"row": row.id, "prompt": _shown(_asked(row)), "draft": getattr(row, "answer", None)}
            answers.setdefault(task, []).append({**shown, "answer": text, "ended": ended})
        return answers

    def _tokens(self, row: Any) -> list[int]:
        encoder = self._setup.encoder
        if encoder is not None:
            return encoder.prompt(row.question, row.answer)
        return encode_prompt(self._setup.tokenizer, row.prompt)


def _spread(rows: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` rows from the first to the last, evenly far apart."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else list(rows)


def _asked(row: Any) -> Any:
    return row.question if hasattr(row, "question") else row.prompt


def _shown(prompt: Any) -> Any:
    """Return a prompt as JSON: text, or its messages."""
    if isinstance(prompt, str):
        return prompt
    messages = prompt.messages if isinstance(prompt, ChatPrompt) else prompt
    return [dict(message) for message in messages]
