"""What the final policies of a run were asked, and said: greedy answers and log-likelihoods of chat, one file a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from everalign.bench.data import prompt_with_system
from everalign.bench.records import Run
from everalign.evaluation.answers import Answer, answer_kls, response_log_probs, write_answers
from everalign.learning.run_data import RunData
from everalign.modeling.policy import Policy
from everalign.storage import Journal, write_json

_TOKENS_PER_BATCH = 4096


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Written(_File):
    """One answer.

    Args:
        prompt: text, or chat messages, without an instruction.
        text: the answer.
        ended: whether it ended within the limit of tokens.
        kl: how far the policy is from the base model along it, nats per token; None where that was not measured.
    """

    prompt: str | list[dict[str, Any]]
    text: str
    ended: bool
    kl: FiniteFloat | None


class Chat(_File):
    """Log-likelihoods per token of the chat rows' answers, nats, and their numbers of tokens."""

    log_probs: list[FiniteFloat]
    tokens: list[int]


class AnswersFile(_File):
    """answers/NAME.json: the answers by task, and what the policy makes of the chat rows, where it is one policy."""

    format: Literal[1] = 1
    answers: dict[str, list[Written]] = {}
    chat: Chat | None = None


def write_answers_file(
    run: Run, policy: Policy, tokenizer: Any, data: RunData | None, work: Path, target: Path, log: Callable[[str], None]
) -> None:
    """Asks the final policies of a finished run everything, and writes what they say.

    Args:
        run: the run; `asked` says what.
        policy: can be switched to every version of the run.
        tokenizer: the model's.
        data: the finished run; None where nothing was learned, and the policy is the base model.
        work: holds answers until all are written, for a call that is killed.
        target: the file.
        log: called with a line for each task.
    """
    asked = run.asked
    assert asked is not None
    found: dict[str, list[Written]] = {}
    journal = Journal(work / "answers.sqlite")
    for task, prompts in asked.prompts.items():
        log(f"  answers: {task}")
        with _final(policy, data, task) as version:
            system = (run.system or {}).get(task)
            told = [prompt if system is None else prompt_with_system(prompt, system) for prompt in prompts]
            answers = write_answers(
                *(policy, tokenizer, told, journal, version),
                max_new_tokens=asked.max_new_tokens,
                max_prompt_tokens=asked.max_prompt_tokens,
            )
            longest = asked.max_prompt_tokens + asked.max_new_tokens
            kls: Sequence[float | None] = [None] * len(answers)
            if not run.system:
                kls = answer_kls(policy, tokenizer, prompts, answers, max_length=longest)
        found[task] = [_written(*three) for three in zip(prompts, answers, kls, strict=True)]
    chat = None
    # Of a model for each task or label there is no one policy, and an instruction is one for tasks.
    apart = data is not None and (data.regime == "separate" or data.versions[-1].manifest.label is not None)
    if asked.chat and not run.system and not apart:
        log("  perplexity of chat")
        with _final(policy, data, run.order[-1]):
            scored = response_log_probs(
                *(policy, tokenizer, [row.prompt for row in asked.chat], [row.answer for row in asked.chat]),
                max_length=asked.max_chat_tokens or run.recipe.training_options().max_length,
                tokens_per_batch=_TOKENS_PER_BATCH,
            )
        chat = Chat(log_probs=list(scored.values), tokens=list(scored.tokens))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, AnswersFile(answers=found, chat=chat).model_dump())


@contextmanager
def _final(policy: Policy, data: RunData | None, task: str) -> Iterator[str]:
    """Switches to what answers a task's prompts in the end and yields its name.

    That is the last version; of a model for each task the task's own, and with labels the last of the task's label.
    """
    if data is None:
        policy.reset(0)
        yield "base"
        return
    own: Mapping[str, Any] = {version.task: version for version in data.versions}
    label = own[task].manifest.label if task in own else None
    version = own[task] if data.regime == "separate" else data.adapters_at(data.versions[-1])[label]
    policy.load_adapter(data.path / "versions" / version.id / "adapter", long_term=True, seed=0)
    yield version.id


def _written(prompt: Any, answer: Answer, kl: float | None) -> Written:
    shown = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    return Written(prompt=shown, text=answer.text, ended=answer.ended, kl=kl)
