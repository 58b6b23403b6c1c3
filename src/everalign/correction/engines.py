"""Correction engines: what every engine does, and the one that asks an OpenAI-compatible server (loads no torch)."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from everalign.correction.templates import Question, Template
from everalign.errors import InputError
from everalign.llm_client import ChatClient, ChatError
from everalign.llm_reply import Completion

if TYPE_CHECKING:
    from everalign.modeling.speculative import Verified

Gate = Callable[["Verified"], bool]
"""Given what the first forward pass found, says whether the answer may stay as it is."""

Pair = tuple[Question, str]
"""A question and an answer to it."""


@dataclass(frozen=True)
class Begun:
    """The beginning of a correction, which stays as it is: the corrector only goes on with it.

    Args:
        text: the beginning; empty for none.
        covers: characters of the answer, from its first one, that the beginning stands for.
    """

    text: str = ""
    covers: int = 0

    def rest(self, answer: str) -> str:
        """Return the rest of the answer as it follows the beginning."""
        # Nothing of the answer parts its first word from a sentence that was put before it.
        before_it = self.text and not self.covers and not answer[:1].isspace()
        return (" " if before_it and self.text[-1].isascii() else "") + answer[self.covers :]

    def with_rest(self, answer: str) -> str:
        """Return the beginning with the rest of the answer, as it is."""
        return self.text + self.rest(answer)


TOKENS_PER_BATCH = 4096
# The default limit of a correction: this many times the answer's tokens, and this many more.
TIMES_LONGER, LONGER = 2, 256
_BYTES_PER_TOKEN = 4
# A streamed text is passed on whenever it has grown by this many characters, or by a share of a long one: each time,
# all of it is compared with the answer.
_STEP, _STEP_SHIFT = 16, 6
# Why a server's reply ended, where that was a proper end.
_ENDED = (None, "stop", "eos", "eos_token", "end_turn", "stop_sequence")


@dataclass(frozen=True)
class EngineOutput:
    """What an engine wrote for one answer; see `Corrected` for the counts.

    Args:
        text: the correction; where the model confirmed the answer or the gate let it pass, the answer itself, behind
            what was begun.
        finished: whether it ended with an end token, not at the limit.
        reason: `gate` or `too_long` where nothing was written.
    """

    text: str
    finished: bool = True
    reason: str | None = None
    forward_passes: int | None = None
    accepted_draft_tokens: int | None = None
    rejected_draft_tokens: int | None = None
    output_tokens: int | None = None


class Engine(Protocol):
    """Writes corrections."""

    @property
    def fingerprint(self) -> str:
        """Digest of everything that corrections depend on."""
        ...

    @property
    def template(self) -> Template:
        """The prompt's template."""
        ...

    def write(
        self,
        pairs: Sequence[Pair],
        gate: Gate | None,
        max_new_tokens: int | None,
        begun: Sequence[Begun] | None = None,
    ) -> list[EngineOutput]:
        """Return a correction for each of N pairs.

        Args:
            pairs: questions and answers.
            gate: decides which answers pass unchanged; None for none of them. Of an answer whose correction is begun
                it sees the rest.
            max_new_tokens: longest correction, without what is begun; depends on the answer's length when None.
            begun: N beginnings of corrections; no correction is begun when None.
        """
        ...

    def stream_events(self, pair: Pair, gate: Gate | None, max_new_tokens: int | None) -> Iterator[str | EngineOutput]:
        """Yield the whole text so far each time it has grown, and finally the output."""
        ...


class EndpointEngine:
    """A corrector behind `/v1/completions`; the server tokenises the rendered template itself.

    Servers recognise the names of special tokens in any text, so serve no model in which a user's text could do harm
    by containing one.

    Args:
        client: for the server and the model.
        template: the corrector's.
        objectives: the ones the corrector was trained with.
    """

    def __init__(self, client: ChatClient, template: Template, objectives: Sequence[str] = ()) -> None:
        self.template = template
        self._client, self._objectives = client, template.check_objectives(objectives)

    @property
    def fingerprint(self) -> str:
        """sha256 over address, model, template and objectives."""
        content = f"{self._client.base_url} {self._client.model} {self.template.id} {self._objectives}"
        return hashlib.sha256(content.encode()).hexdigest()

    def write(
        self,
        pairs: Sequence[Pair],
        gate: Gate | None,
        max_new_tokens: int | None,
        begun: Sequence[Begun] | None = None,
    ) -> list[EngineOutput]:
        """Return the server's corrections; raises ChatError when a request fails for good."""
        begun = begun or [Begun()] * len(pairs)
        outputs: dict[int, EngineOutput] = {}
        # The limit is a parameter of the request: pairs with the same limit are sent together.
        rests = [one.rest(answer) for (_, answer), one in zip(pairs, begun, strict=True)]
        limits = _request_limits(rests, gate, max_new_tokens)
        for limit in sorted(set(limits)):
            chosen = [i for i, own in enumerate(limits) if own == limit]
            prompts = [self.template.render(*pairs[i], self._objectives) + begun[i].text for i in chosen]
            for place, reply in self._client.continue_many(prompts, temperature=0, max_tokens=limit):
                output = _endpoint_output(reply)
                outputs[chosen[place]] = replace(output, text=begun[chosen[place]].text + output.text)
        return [outputs[i] for i in range(len(pairs))]

    def stream_events(self, pair: Pair, gate: Gate | None, max_new_tokens: int | None) -> Iterator[str | EngineOutput]:
        """Yield the growing text; only the output where the server cannot stream."""
        [limit] = _request_limits([pair[1]], gate, max_new_tokens)
        prompt = self.template.render(*pair, self._objectives)
        text = yielded = ""
        try:
            for event in self._client.stream_continuation(prompt, temperature=0, max_tokens=limit):
                if not isinstance(event, str):
                    yield _endpoint_output(event)
                    return
                text += event
                if len(text) - len(yielded) >= max(_STEP, len(text) >> _STEP_SHIFT):
                    yield text
                    yielded = text
        except ChatError as error:
            if not error.refused or text:
                raise
        # The server refused the request, or refused to stream it.
        yield from self.write([pair], gate, max_new_tokens)


def _endpoint_output(reply: Completion) -> EngineOutput:
    return EngineOutput(reply.text, reply.finish_reason in _ENDED, output_tokens=reply.completion_tokens)


def _request_limits(answers: Sequence[str], gate: Gate | None, max_new_tokens: int | None) -> list[int]:
    """Return the most tokens of each answer's correction; refuses a gate, the one option that no request has.

    The default is estimated from bytes, and rounded up so that many requests share it.
    """
    if gate is not None:
        raise InputError("gate: a server does not say how likely an answer is; leave it out, or load the model")
    if max_new_tokens is not None:
        return [max_new_tokens] * len(answers)
    tokens = (math.ceil(len(answer.encode()) / _BYTES_PER_TOKEN) for answer in answers)
    return [LONGER * math.ceil((TIMES_LONGER * count + LONGER) / LONGER) for count in tokens]
