"""A language model as judge: rewards for answers from any OpenAI-compatible server.

judge = JudgeScorer(ChatClient("http://127.0.0.1:8000/v1", "qwen2.5"))
score_rows(rows, judge, "scored.jsonl")
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from everalign.data.messages import Completion as Answered
from everalign.data.messages import Message, Prompt, completion_text
from everalign.errors import EveralignError, InputError
from everalign.evaluation.judge_prompts import (
    FORMAT,
    INSTRUCTIONS,
    Scale,
    asked_again,
    instruction_text,
    judge_messages,
    pair_asked_again,
    pair_messages,
    pair_text,
    read_score,
    read_verdict,
)
from everalign.llm_client import ChatClient, ChatError, Completion, read_instructions, shortened
from everalign.storage import Journal

SCALE: Scale = (1.0, 10.0)
_CACHE = "rewards.sqlite"

# How much of an answer and of a reply a message shows.
_ANSWER_SHOWN, _REPLY_SHOWN = 60, 200


@dataclass(frozen=True)
class JudgeOptions:
    """How a judge is asked; None stands for the default.

    Args:
        instructions: a file that says what makes an answer good.
        cache: a folder where rewards are kept for good, for whatever is scored later.
        concurrency: requests under way at once.
        requests_per_minute: at most so many requests are begun.
        timeout: seconds for one attempt.
    """

    instructions: Path | None = None
    cache: Path | None = None
    concurrency: int | None = None
    requests_per_minute: float | None = None
    timeout: float | None = None

    @property
    def given(self) -> list[str]:
        """The names of what is not left to its default."""
        return [name.replace("_", " ") for name, value in asdict(self).items() if value is not None]


class JudgeScorer:
    """Asks a model to rate each answer by itself, at temperature 0; the reward is the score it gives.

    A reply other than `{"score": 7}` or `7` is asked for once more.

    Args:
        client: asks the judge; `client.usage` tells what it cost.
        instructions: what makes an answer good; what is data and how to reply is said besides.
        scale: the worst and the best score, finite and in this order.
        cache: where each reward is kept as soon as it is there; None to keep none.

    Raises:
        InputError: the instructions are empty, or the scale is none.
    """

    def __init__(
        self,
        client: ChatClient,
        *,
        instructions: str = INSTRUCTIONS,
        scale: Scale = SCALE,
        cache: Journal | None = None,
    ) -> None:
        if not instructions.strip():
            raise InputError("the judge's instructions are empty: say what makes an answer good")
        if not (all(map(math.isfinite, scale)) and scale[0] < scale[1]):
            raise InputError(f"scale: must go from a worst to a better best score, found {scale[0]} to {scale[1]}")
        self.client, self.cache = client, cache
        self._instructions, self._scale = instructions, scale
        facts = [FORMAT, client.base_url, client.model, instruction_text(instructions, scale), list(map(float, scale))]
        self._fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @classmethod
    def from_name(cls, name: str, options: JudgeOptions | None = None, api_key: str | None = None) -> "JudgeScorer":
        """Return the judge of a name such as `http://127.0.0.1:8000/v1#qwen2.5`: the server's address, # and the model.

        Its key is `api_key`, empty for none; OPENAI_API_KEY when None.

        Raises:
            InputError: the name lacks a part, or an option or a file cannot be used.
        """
        options = options or JudgeOptions()
        limits = {name: getattr(options, name) for name in ("concurrency", "requests_per_minute", "timeout")}
        client = ChatClient.from_name(name, "a judge", api_key, **limits)
        instructions = INSTRUCTIONS if options.instructions is None else _instructions(options.instructions)
        cache = None if options.cache is None else reward_cache(options.cache)
        return cls(client, instructions=instructions, cache=cache)

    @property
    def fingerprint(self) -> str:
        """sha256 over the server's address, model, instructions, scale, and how replies are read."""
        return self._fingerprint

    def with_cache(self, cache: Journal) -> "JudgeScorer":
        """Return the same judge, asked through the same client, with rewards kept in `cache`."""
        return JudgeScorer(self.client, instructions=self._instructions, scale=self._scale, cache=cache)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Answered]) -> list[float]:
        """Return the scores of N completions; equal ones behind equal prompts are asked for once.

        Raises:
            EveralignError: a request failed for good, or a second reply could not be read either; names the answer.
                Scores that came before it are in the cache, if there is one.
        """
        pairs = list(zip(prompts, map(completion_text, completions), strict=True))
        keys = [reward_key(self._fingerprint, *pair) for pair in pairs]
        asked = {
            key: _Question(judge_messages(*pair, self._instructions, self._scale), _named(pair[1]))
            for key, pair in zip(keys, pairs, strict=True)
        }
        scores = self._answered(
            asked,
            lambda reply: read_score(reply, self._scale),
            lambda messages, reply: asked_again(messages, reply, self._scale),
            "score",
        )
        return [scores[key] for key in keys]

    def compare(self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
        """Return which of two answers to each of N prompts is better: 1 or 2, or 0 for neither.

        A judge may prefer an answer for where it stands: ask in both orders. Errors as in `score`.
        """
        pairs = list(zip(prompts, firsts, seconds, strict=True))
        facts = [FORMAT, self._fingerprint, pair_text(self._instructions)]
        judge = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        keys = [reward_key(judge, prompt, json.dumps([first, second])) for prompt, first, second in pairs]
        asked = {
            key: _Question(pair_messages(*pair, self._instructions), _named(pair[1]))
            for key, pair in zip(keys, pairs, strict=True)
        }
        verdicts = self._answered(asked, read_verdict, pair_asked_again, "verdict")
        return [verdicts[key] for key in keys]

    def _answered(
        self,
        questions: Mapping[str, "_Question"],
        read: Callable[[str], float | None],
        again: Callable[[Sequence[Message], str], list[Message]],
        what: str,
    ) -> dict[str, float]:
        """Return what the judge says to each question, asked once more where that is `what` no one can read."""
        found = self.cache.read(list(questions)) if self.cache else {}
        missing = {key: question for key, question in questions.items() if key not in found}
        unread = self._ask(missing, read, found)
        repeated = {
            key: replace(missing[key], messages=again(missing[key].messages, reply.text))
            for key, reply in unread.items()
        }
        for key, reply in self._ask(repeated, read, found).items():
            raise EveralignError(
                f"{missing[key].name}: the judge's reply is no {what}, asked twice{_cut(reply)}: "
                f"{shortened(reply.text, _REPLY_SHOWN) or '(nothing)'}; take a model that follows instructions better"
            )
        return found

    def _ask(
        self, questions: Mapping[str, "_Question"], read: Callable[[str], float | None], found: dict[str, float]
    ) -> dict[str, Completion]:
        """Add what is said to `found` and the cache; return the replies that cannot be read."""
        keys, unread = list(questions), dict[str, Completion]()
        if not keys:
            return {}
        try:
            conversations = [question.messages for question in questions.values()]
            for index, reply in self.client.complete_many(conversations, temperature=0):
                value = read(reply.text)
                if value is None:
                    unread[keys[index]] = reply
                    continue
                found[keys[index]] = value
                if self.cache:
                    self.cache.put({keys[index]: value})
        except ChatError as error:
            raise EveralignError(f"{questions[keys[error.index]].name}: {error}") from error
        return unread


@dataclass(frozen=True)
class _Question:
    """A conversation, and what it is about, for messages."""

    messages: Sequence[Message]
    name: str


def reward_cache(folder: Path) -> Journal:
    """Return the cache of rewards that a folder holds; processes may share it.

    Raises:
        InputError: there is a file of that name.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: must be a folder; name another one to keep rewards in")
    return Journal(folder / _CACHE)


def reward_key(fingerprint: str, prompt: Prompt, completion: str) -> str:
    """Name an answer and who scores it: a hexadecimal sha256."""
    messages = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    content = json.dumps([fingerprint, messages, completion], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _instructions(path: Path) -> str:
    return read_instructions(path, "the judge's", "what makes an answer good")


def _named(completion: str) -> str:
    return f"the answer '{shortened(completion, _ANSWER_SHOWN)}'"


def _cut(reply: Completion) -> str:
    return " (the second reply was cut at the limit of tokens)" if reply.finish_reason == "length" else ""
