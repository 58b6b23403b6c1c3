"""What writes corrections, and the engine that asks an OpenAI-compatible server for them.

The one that decodes in this process is in `local_engine`; nothing here loads torch.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from everalign.chat_client import ChatClient, ChatError, Completion
from everalign.correction.templates import Question, Template
from everalign.errors import InputError

if TYPE_CHECKING:
    from everalign.modeling.draft_decoding import Verified

Gate = Callable[["Verified"], bool]
Pair = tuple[Question, str]

TOKENS_PER_BATCH = 4096
# How long a correction may become if nothing is said: so many times the answer, and so many tokens more.
TIMES_LONGER, LONGER = 2, 256
_BYTES_PER_TOKEN = 4
_STEP = 16  # characters
_ENDED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")


@dataclass(frozen=True)
class Written:
    """What an engine wrote for one answer.

    Args:
        text: the correction; the answer itself where it was verified or let pass.
        finished: whether it ended by itself.
        reason: `gate` or `too_long` where nothing was written.
        passes: forward passes; None where the engine does not tell, as for the next two.
        accepted: tokens of the draft that were right.
        rejected: those that were not.
        tokens: tokens of the correction, None where the engine does not tell.
    """

    text: str
    finished: bool = True
    reason: str | None = None
    passes: int | None = None
    accepted: int | None = None
    rejected: int | None = None
    tokens: int | None = None


class Engine(Protocol):
    """Writes corrections."""

    @property
    def fingerprint(self) -> str:
        """Names what corrections depend on."""
        ...

    @property
    def template(self) -> Template:
        """What the corrector reads."""
        ...

    def write(
        self, pairs: Sequence[Pair], gate: Gate | None, limit: int | None, strength: float = 0.0
    ) -> list[Written]:
        """Return a correction for each of N questions and answers.

        Args:
            pairs: questions and answers.
            gate: decides which answers pass; None for none of them.
            limit: most tokens of a correction; by the answer's length when None.
            strength: how far to steer from copying (below 0) to correcting (above 0); 0 for the corrector as it is.
        """
        ...

    def follow(
        self, pair: Pair, gate: Gate | None, limit: int | None, strength: float = 0.0
    ) -> Iterator[str | Written]:
        """Yield the text of one correction whenever it has grown, as a whole, and what was written at last."""
        ...


class EndpointEngine:
    """A corrector behind `/v1/completions`, which reads the template's text and tokenises it itself.

    A server finds its special tokens' names in texts too; let it serve no model whose special tokens end a turn in a
    text of users that could harm.

    Args:
        client: of the server and model.
        template: the corrector's.
        objectives: those that it was trained with.
    """

    def __init__(self, client: ChatClient, template: Template, objectives: Sequence[str] = ()) -> None:
        self._client, self._template = client, template
        self._objectives = template.check_objectives(objectives)

    @property
    def fingerprint(self) -> str:
        """sha256 over address, model, template and objectives."""
        content = f"{self._client.base_url} {self._client.model} {self._template.id} {self._objectives}"
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def template(self) -> Template:
        """The one that was named."""
        return self._template

    def write(
        self, pairs: Sequence[Pair], gate: Gate | None, limit: int | None, strength: float = 0.0
    ) -> list[Written]:
        """Return the server's corrections, a few asked for at once; ChatError where a request fails for good."""
        _check(gate, strength)
        found: dict[int, Written] = {}
        # Requests have one limit each: those with the same one are sent together.
        limits = [_limit(answer) if limit is None else limit for _, answer in pairs]
        for most in sorted(set(limits)):
            chosen = [i for i, own in enumerate(limits) if own == most]
            prompts = [self._template.render(*pairs[i], self._objectives) for i in chosen]
            for place, reply in self._client.continue_many(prompts, temperature=0, max_tokens=most):
                found[chosen[place]] = _written(reply)
        return [found[i] for i in range(len(pairs))]

    def follow(
        self, pair: Pair, gate: Gate | None, limit: int | None, strength: float = 0.0
    ) -> Iterator[str | Written]:
        """Yield the text while it comes; what was written when all of it is there, from a server that cannot stream."""
        _check(gate, strength)
        most = _limit(pair[1]) if limit is None else limit
        prompt = self._template.render(*pair, self._objectives)
        text = given = ""
        try:
            for item in self._client.continue_in_pieces(prompt, temperature=0, max_tokens=most):
                if not isinstance(item, str):
                    yield _written(item)
                    return
                text += item
                # Each step compares all of it: the longer the text is, the fewer of them.
                if len(text) - len(given) >= max(_STEP, len(text) >> 6):
                    yield text
                    given = text
        except ChatError as error:
            if not error.refused or text:
                raise
        # It refuses the request, or only to stream it.
        yield from self.write([pair], gate, limit, strength)


def _check(gate: Gate | None, strength: float) -> None:
    if strength != 0:
        raise InputError("strength: a corrector on a server cannot be steered; leave it out, or load the model")
    if gate is not None:
        raise InputError("gate: a server does not say how likely an answer is; leave it out, or load the model")


def _written(reply: Completion) -> Written:
    # Whoever does not say why it ended is taken to be at the end; any other word than these is no good end.
    return Written(reply.text, reply.finish_reason in (None, *_ENDED), tokens=reply.completion_tokens)


def _limit(answer: str) -> int:
    """Most tokens of a correction, in steps, so that many requests have the same limit."""
    tokens = math.ceil(len(answer.encode()) / _BYTES_PER_TOKEN)
    return LONGER * math.ceil((TIMES_LONGER * tokens + LONGER) / LONGER)
