"""Who answers questions, and who corrects answers: models on servers, and a model in this process.

All of them keep what is finished beside an output file, where the same call finds it after a kill.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from everalign.chat_client import ChatClient
from everalign.correction.asking import Cost, Progress, Replies, ask_all, reply_journal
from everalign.correction.editing import INSTRUCTIONS, editing_messages, read_correction
from everalign.correction.templates import Question, question_text
from everalign.data.fields import json_form
from everalign.data.messages import Message
from everalign.data.templating import encode_prompt
from everalign.errors import InputError
from everalign.files import is_partial
from everalign.modeling.kept_samples import sample_kept
from everalign.modeling.loading import (
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_precision,
    sequence_limit,
)
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import prepare_process, training_device
from everalign.modeling.sampling import SamplingOptions
from everalign.storage import Journal

TEMPERATURE = 0.5
"""That of the answers which the Aligner's authors had corrected (Ji et al., arXiv 2402.02416)."""

LONGEST_ANSWER = 512
_LONGEST_CONTEXT = 4096

ANSWERS, CORRECTIONS = "answers", "corrections"
UNFINISHED, EMPTY, UNFINISHED_OR_EMPTY = "unfinished", "empty", "unfinished or empty"


@dataclass(frozen=True)
class Texts:
    """What became of N questions.

    Args:
        texts: one for each; None where there is none.
        lost: why there is none, by the question's index: `UNFINISHED` (cut at the limit of tokens), `EMPTY`, or either.
        failures: questions that failed for good, by their index, and why.
        cost: what it took.
    """

    texts: list[str | None]
    lost: dict[int, str]
    failures: dict[int, str]
    cost: Cost


class Answerer(Protocol):
    """Answers questions."""

    name: str

    def answer(self, questions: Sequence[Question], output: Path, *, keep_going: bool, progress: Progress) -> Texts:
        """Return an answer to each of N questions.

        Args:
            questions: text, or chat messages.
            output: what is finished is kept beside this file.
            keep_going: whether a question that fails for good is passed over.
            progress: called with (stage, done, all).
        """
        ...


class EndpointAnswers:
    """A model on a server answers.

    Args:
        client: asks it.
        temperature: what it samples at.
        max_new_tokens: longest answer; the server's own limit when None.
    """

    def __init__(self, client: ChatClient, temperature: float = TEMPERATURE, max_new_tokens: int | None = None) -> None:
        self.client, self.name = client, client.model
        self._parameters = _parameters(temperature, max_new_tokens)

    def answer(self, questions: Sequence[Question], output: Path, *, keep_going: bool, progress: Progress) -> Texts:
        """Return an answer to each question; errors as in `ask_all`."""
        found = ask_all(
            self.client,
            ANSWERS,
            [_conversation(question) for question in questions],
            [question_text(question) for question in questions],
            reply_journal(output),
            self._parameters,
            keep_going=keep_going,
            progress=progress,
        )
        return _read(found, [reply.text if reply else "" for reply in found.replies])


class Editor:
    """A stronger model on a server corrects answers, at temperature 0.

    Args:
        client: asks it.
        instructions: how answers are to be improved; what is data and how to reply is said besides.
        max_new_tokens: longest correction; the server's own limit when None.

    Raises:
        InputError: the instructions are empty.
    """

    def __init__(self, client: ChatClient, instructions: str = INSTRUCTIONS, max_new_tokens: int | None = None) -> None:
        if not instructions.strip():
            raise InputError("the instructions are empty: say how answers are to be improved")
        self.client, self.name = client, client.model
        self._instructions, self._parameters = instructions, _parameters(0, max_new_tokens)

    def correct(
        self, pairs: Sequence[tuple[Question, str]], output: Path, *, keep_going: bool, progress: Progress
    ) -> Texts:
        """Return a correction of each of N answers.

        Args:
            pairs: questions and their answers.
            output: what is finished is kept beside this file.
            keep_going: whether one that fails for good is passed over.
            progress: called with (stage, done, all).
        """
        found = ask_all(
            self.client,
            CORRECTIONS,
            [editing_messages(question, answer, self._instructions) for question, answer in pairs],
            [question_text(question) for question, _ in pairs],
            reply_journal(output),
            self._parameters,
            keep_going=keep_going,
            progress=progress,
        )
        texts = [
            read_correction(reply.text, answer) if reply else ""
            for reply, (_, answer) in zip(found.replies, pairs, strict=True)
        ]
        return _read(found, texts)


class SampledAnswers:
    """A model in this process answers.

    Args:
        name: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` or `smollm2`.
        temperature: what it samples at.
        max_new_tokens: longest answer; `LONGEST_ANSWER` when None.
        seed: seeds the draw.
    """

    def __init__(
        self, name: str, temperature: float = TEMPERATURE, max_new_tokens: int | None = None, seed: int = 0
    ) -> None:
        longest = LONGEST_ANSWER if max_new_tokens is None else max_new_tokens
        self.name, self._seed, self._options = name, seed, SamplingOptions(1, temperature, longest)

    def answer(self, questions: Sequence[Question], output: Path, *, keep_going: bool, progress: Progress) -> Texts:
        """Return an answer to each question.

        Raises:
            InputError: the model cannot be used, or a question leaves no room for an answer and is not to be passed
                over.
        """
        prepare_process()
        device = training_device()
        tokenizer = load_tokenizer(self.name)
        model = load_model(self.name, resolve_precision("auto", device), device=device)
        limit = sequence_limit(None, _LONGEST_CONTEXT, model, tokenizer, self.name)
        room = limit - self._options.max_new_tokens
        if room < 1:
            raise InputError(f"max_new_tokens: {self.name} takes {limit} tokens with the question; ask for fewer")
        failures = _too_long(questions, tokenizer, room)
        if failures and not keep_going:
            raise InputError(f"question {min(failures) + 1}: {failures[min(failures)]}")
        asked = [question for i, question in enumerate(questions) if i not in failures]
        options = replace(self._options, max_prompt_tokens=room)
        facts = [model_fingerprint(model), options.temperature, options.max_new_tokens, self._seed, asked]
        journal = Journal.beside(output, json.dumps(facts, default=json_form))
        earlier = sum(len(chunk) for chunk in journal.read(range(len(asked))).values())
        found = sample_kept(_policy(model), tokenizer, asked, options, journal, seed=self._seed, progress=progress)
        samples = iter(found)
        drawn = [None if i in failures else next(samples) for i in range(len(questions))]
        texts = [sample.texts[0] if sample and sample.texts else None for sample in drawn]
        lost = {i: UNFINISHED_OR_EMPTY for i, sample in enumerate(drawn) if sample and not sample.texts}
        return Texts(texts, lost, failures, Cost(ANSWERS, self.name, len(asked), earlier, len(failures)))


def forget(output: Path) -> None:
    """Delete what is kept beside an output file, once it holds everything."""
    for path in output.parent.iterdir():
        if is_partial(path) and path.name.startswith(f"{output.name}."):
            Journal(path).remove()


def _policy(model: Any) -> Policy:
    # An adapter that was not trained adds nothing.
    return Policy(model, rank=1, alpha=1.0)


def _too_long(questions: Sequence[Question], tokenizer: Any, room: int) -> dict[int, str]:
    lengths = [len(encode_prompt(tokenizer, question)) for question in questions]
    return {
        i: f"{length} tokens leave no room for an answer, {room} at most; shorten the question"
        for i, length in enumerate(lengths)
        if length > room
    }


def _conversation(question: Question) -> list[Message]:
    if isinstance(question, str):
        return [{"role": "user", "content": question}]
    return [dict(message) for message in question]


def _parameters(temperature: float, max_new_tokens: int | None) -> dict[str, Any]:
    """Fields of a request; temperature 0 is for servers only."""
    SamplingOptions(temperature=temperature or 1.0, max_new_tokens=1 if max_new_tokens is None else max_new_tokens)
    return {"temperature": temperature, **({} if max_new_tokens is None else {"max_tokens": max_new_tokens})}


def _read(found: Replies, texts: Sequence[str]) -> Texts:
    """Tell what was said from what was cut or is nothing."""
    lost: dict[int, str] = {}
    kept: list[str | None] = []
    for i, (reply, text) in enumerate(zip(found.replies, texts, strict=True)):
        if reply is not None and (reply.finish_reason == "length" or not text.strip()):
            lost[i] = UNFINISHED if reply.finish_reason == "length" else EMPTY
        kept.append(None if reply is None or i in lost else text)
    return Texts(kept, lost, found.failures, found.cost)
