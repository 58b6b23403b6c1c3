"""Ask a model on a server many questions, keep every reply as it comes, and count what it takes.

A run that was killed asks for nothing twice: replies are found by what was asked of whom.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everalign.chat_client import ChatClient, ChatError, Completion
from everalign.chat_reply import shortened
from everalign.data.messages import Message
from everalign.errors import EveralignError
from everalign.storage import Journal

Progress = Callable[[str, int, int], None]

PATIENCE = 10
"""So many failures in a row are the server's and not the questions'."""

_SHOWN = 60


@dataclass(frozen=True)
class Cost:
    """What one stage took.

    Args:
        stage: `answers` or `corrections`.
        model: who was asked.
        replies: how many came, those of an earlier, broken-off run included.
        earlier: how many of them an earlier run had.
        failed: questions that failed for good.
        requests: sent by this run, repeated ones included; 0 for a model in this process.
        prompt_tokens: read for all replies, as far as the server told; None for a model in this process.
        completion_tokens: written in all replies, likewise.
        untold: replies whose tokens the server did not tell.
    """

    stage: str
    model: str
    replies: int
    earlier: int
    failed: int
    requests: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    untold: int = 0

    def price(self, of_input: float, of_output: float) -> float:
        """Return what the tokens cost, at prices for a million tokens read and a million written."""
        return ((self.prompt_tokens or 0) * of_input + (self.completion_tokens or 0) * of_output) / 1e6


@dataclass(frozen=True)
class Replies:
    """What became of N questions.

    Args:
        replies: one for each question; None where there is none.
        failures: why, by the question's index.
        cost: what it took.
    """

    replies: list[Completion | None]
    failures: dict[int, str]
    cost: Cost


def reply_journal(output: Path) -> Journal:
    """Return the journal of replies beside an output file, until that is written."""
    return Journal(output.with_name(f"{output.name}.replies.partial"))


def ask_all(
    client: ChatClient,
    stage: str,
    conversations: Sequence[Sequence[Message]],
    named: Sequence[str],
    journal: Journal,
    parameters: Mapping[str, Any],
    *,
    keep_going: bool,
    progress: Progress,
) -> Replies:
    """Ask all that the journal does not hold; equal conversations are asked once.

    Args:
        client: of the model.
        stage: what this is called.
        conversations: the N questions.
        named: what they are about, for messages.
        journal: keeps replies, and, with `keep_going`, failures.
        parameters: of the requests.
        keep_going: whether a question that fails for good is kept as such, so that the others are asked.
        progress: called with (stage, replies, questions).

    Raises:
        EveralignError: a question failed for good and `keep_going` is not set, all of them did, or `PATIENCE` of them
            one after another. What was answered before is kept.
    """
    keys = [_key(client, messages, parameters) for messages in conversations]
    wanted = dict(zip(keys, conversations, strict=True))
    found = _kept(journal, list(wanted))
    if not keep_going:
        # They were passed over then, and nothing says that they are to be now.
        found = {key: reply for key, reply in found.items() if reply.completion is not None}
    earlier, before = len(found), client.usage.requests
    missing = [key for key in wanted if key not in found]
    labels = dict(zip(keys, named, strict=True))
    passing = _Passing(journal, found)
    try:
        for index, reply in _replies(client, [wanted[key] for key in missing], parameters, keep_going):
            key = missing[index]
            if isinstance(reply, ChatError):
                passing.fail(key, _about(labels[key], reply))
            else:
                found[key] = _Reply(reply)
                journal.put({key: found[key].to_json()})
                passing.succeed()
            progress(stage, len(found), len(wanted))
    except ChatError as error:
        label = labels[missing[error.index]]
        raise EveralignError(f"{_about(label, error)}; what was answered before is kept") from error
    passing.finish()
    replies = [found[key].completion for key in keys]
    failures = {i: found[key].failed for i, key in enumerate(keys) if found[key].completion is None}
    requests = client.usage.requests - before
    return Replies(replies, failures, _cost(stage, client.model, found.values(), earlier, requests))


def _kept(journal: Journal, keys: Sequence[str]) -> dict[str, "_Reply"]:
    try:
        return {key: _Reply.from_json(value) for key, value in journal.read(keys).items()}
    except TypeError:
        raise journal.damaged() from None


def _replies(
    client: ChatClient, conversations: Sequence[Sequence[Message]], parameters: Mapping[str, Any], keep_going: bool
) -> Iterable[tuple[int, Completion | ChatError]]:
    if not conversations:
        return ()
    if keep_going:
        return client.attempt_many(conversations, **parameters)
    return client.complete_many(conversations, **parameters)


@dataclass(frozen=True)
class _Reply:
    """What the journal holds of a question: a completion, or why there is none."""

    completion: Completion | None
    failed: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"failed": self.failed} if self.completion is None else asdict(self.completion)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "_Reply":
        return cls(None, value["failed"]) if "failed" in value else cls(Completion(**value))


class _Passing:
    """Passes over questions that failed, once another one shows that the server is there."""

    def __init__(self, journal: Journal, found: dict[str, _Reply]) -> None:
        self._journal, self._found, self._waiting = journal, found, dict[str, _Reply]()

    def fail(self, key: str, message: str) -> None:
        self._waiting[key] = _Reply(None, message)
        if len(self._waiting) == PATIENCE:
            raise EveralignError(
                f"{message}; so did {PATIENCE - 1} others one after another, so it is hardly for the questions; "
                "what was answered before is kept"
            )

    def succeed(self) -> None:
        if self._waiting:
            self._journal.put({key: reply.to_json() for key, reply in self._waiting.items()})
        self._found |= self._waiting
        self._waiting = {}

    def finish(self) -> None:
        if self._waiting and not any(reply.completion for reply in self._found.values()):
            first = next(iter(self._waiting.values()))
            raise EveralignError(f"{first.failed}; and there is no question that did not fail")
        self.succeed()


def _cost(stage: str, model: str, replies: Collection["_Reply"], earlier: int, requests: int) -> Cost:
    came = [reply.completion for reply in replies if reply.completion is not None]
    return Cost(
        stage=stage,
        model=model,
        replies=len(came),
        earlier=earlier,
        failed=sum(reply.completion is None for reply in replies),
        requests=requests,
        prompt_tokens=sum(completion.prompt_tokens or 0 for completion in came),
        completion_tokens=sum(completion.completion_tokens or 0 for completion in came),
        untold=sum(completion.prompt_tokens is None or completion.completion_tokens is None for completion in came),
    )


def _key(client: ChatClient, messages: Sequence[Message], parameters: Mapping[str, Any]) -> str:
    content = [client.base_url, client.model, [dict(message) for message in messages], dict(parameters)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _about(label: str, error: ChatError) -> str:
    return f"'{shortened(label, _SHOWN)}': {error}"
