"""Correction engines: greedy decoding in this process, or an OpenAI-compatible server."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from everalign.correction.corrector_files import load_corrector_files
from everalign.correction.templates import Question, Template
from everalign.correction.tokenization import CorrectionEncoder
from everalign.data.collate import batches_by_length
from everalign.errors import InputError
from everalign.llm_client import ChatClient, ChatError, Completion
from everalign.modeling.decoding import RaggedModel
from everalign.modeling.loading import load_model, load_tokenizer, model_fingerprint
from everalign.modeling.options import Precision
from everalign.modeling.speculative import DraftDecoder, DraftedRow, Verified
from everalign.modeling.stopping import special_stop_ids

if TYPE_CHECKING:
    from typing_extensions import Self

Gate = Callable[[Verified], bool]
"""Given what the first forward pass found, says whether the answer may stay as it is."""

Pair = tuple[Question, str]
"""A question and an answer to it."""

TOKENS_PER_BATCH = 4096
# The default limit of a correction: this many times the answer's tokens, and this many more.
_TIMES_LONGER, _LONGER = 2, 256
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
        text: the correction; the answer itself where the model confirmed it or the gate let it pass.
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

    def write(self, pairs: Sequence[Pair], gate: Gate | None, max_new_tokens: int | None) -> list[EngineOutput]:
        """Return a correction for each of N pairs.

        Args:
            pairs: questions and answers.
            gate: decides which answers pass unchanged; None for none of them.
            max_new_tokens: longest correction; depends on the answer's length when None.
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

    def write(self, pairs: Sequence[Pair], gate: Gate | None, max_new_tokens: int | None) -> list[EngineOutput]:
        """Return the server's corrections; raises ChatError when a request fails for good."""
        _refuse_gate(gate)
        outputs: dict[int, EngineOutput] = {}
        # The limit is a parameter of the request: pairs with the same limit are sent together.
        limits = [_endpoint_limit(answer) if max_new_tokens is None else max_new_tokens for _, answer in pairs]
        for limit in sorted(set(limits)):
            chosen = [i for i, own in enumerate(limits) if own == limit]
            prompts = [self.template.render(*pairs[i], self._objectives) for i in chosen]
            for place, reply in self._client.continue_many(prompts, temperature=0, max_tokens=limit):
                outputs[chosen[place]] = _endpoint_output(reply)
        return [outputs[i] for i in range(len(pairs))]

    def stream_events(self, pair: Pair, gate: Gate | None, max_new_tokens: int | None) -> Iterator[str | EngineOutput]:
        """Yield the growing text; only the output where the server cannot stream."""
        _refuse_gate(gate)
        limit = _endpoint_limit(pair[1]) if max_new_tokens is None else max_new_tokens
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


def _refuse_gate(gate: Gate | None) -> None:
    if gate is not None:
        raise InputError("gate: a server does not say how likely an answer is; leave it out, or load the model")


def _endpoint_output(reply: Completion) -> EngineOutput:
    return EngineOutput(reply.text, reply.finish_reason in _ENDED, output_tokens=reply.completion_tokens)


def _endpoint_limit(answer: str) -> int:
    """The default limit in tokens, estimated from bytes and rounded up so that many requests share it."""
    tokens = math.ceil(len(answer.encode()) / _BYTES_PER_TOKEN)
    return _LONGER * math.ceil((_TIMES_LONGER * tokens + _LONGER) / _LONGER)


class LocalEngine:
    """Greedy decoding in this process, with the answer as the draft to verify.

    Args:
        model: a causal language model.
        encoder: of its tokenizer and template.
        tokens_per_batch: prompt and draft tokens computed at once, padding included.

    Raises:
        InputError: `tokens_per_batch` is below 1.
    """

    def __init__(self, model: Any, encoder: CorrectionEncoder, tokens_per_batch: int = TOKENS_PER_BATCH) -> None:
        if tokens_per_batch < 1:
            raise InputError(f"tokens per batch: must be at least 1, found {tokens_per_batch}")
        self._model, self._encoder, self._tokens_per_batch = RaggedModel(model), encoder, tokens_per_batch
        encoder.ends |= special_stop_ids(model, encoder.tokenizer)
        self._context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        template: str | None = None,
        device: str | None = None,
        precision: Precision = "fp32",
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> "Self":
        """Load a corrector's folder; arguments and errors as in `Corrector.from_pretrained`."""
        encoder = load_corrector_files(folder, template).encoder(load_tokenizer(str(folder)))
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(1, device=place)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {place!r}: cannot be used: {str(error).splitlines()[0]}") from error
        return cls(load_model(str(folder), precision, device=torch.device(place)), encoder, tokens_per_batch)

    @property
    def fingerprint(self) -> str:
        """sha256 over weights, precision, template and tokenizer."""
        content = f"{model_fingerprint(self._model.model)} {self._model.dtype} {self._encoder.fingerprint}"
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def template(self) -> Template:
        """The template it was trained with."""
        return self._encoder.template

    def decoding_context(self) -> AbstractContextManager[None]:
        """The context of every forward pass; a subclass may change activations in it."""
        return nullcontext()

    def write(self, pairs: Sequence[Pair], gate: Gate | None, max_new_tokens: int | None) -> list[EngineOutput]:
        """Return the corrections, decoded in batches of similar length; pairs that are too long are not corrected."""
        prompts = [self._encoder.prompt(*pair) for pair in pairs]
        drafts = [self._encoder.response(answer) for _, answer in pairs]
        lengths = [len(prompt) + len(draft) for prompt, draft in zip(prompts, drafts, strict=True)]
        fitting = [i for i, length in enumerate(lengths) if self._context is None or length <= self._context]
        outputs = [EngineOutput(answer, reason="too_long", forward_passes=0) for _, answer in pairs]
        for places in batches_by_length([lengths[i] for i in fitting], self._tokens_per_batch):
            batch = [fitting[place] for place in places]
            decoder = self._decoder([prompts[i] for i in batch], [drafts[i] for i in batch], gate, max_new_tokens)
            with self.decoding_context():
                decoder.run()
            for i, row in zip(batch, decoder.rows, strict=True):
                outputs[i] = self._output(row, pairs[i][1])
        return outputs

    def stream_events(self, pair: Pair, gate: Gate | None, max_new_tokens: int | None) -> Iterator[str | EngineOutput]:
        """Yield the text after each forward pass, up to its last complete character, and finally the output."""
        prompt, draft = self._encoder.prompt(*pair), self._encoder.response(pair[1])
        if self._context is not None and len(prompt) + len(draft) > self._context:
            yield EngineOutput(pair[1], reason="too_long", forward_passes=0)
            return
        decoder = self._decoder([prompt], [draft], gate, max_new_tokens)
        row = decoder.rows[0]
        while not decoder.done:
            # Left before each yield: what the caller computes in between must not run in it.
            with self.decoding_context():
                decoder.step()
            if not decoder.done:
                # A character may take several tokens; until all are there it decodes to U+FFFD.
                yield self._encoder.decode(row.tokens).rstrip("\ufffd")
        yield self._output(row, pair[1])

    def _decoder(
        self, prompts: list[list[int]], drafts: list[list[int]], gate: Gate | None, max_new_tokens: int | None
    ) -> DraftDecoder:
        limits = []
        for prompt, draft in zip(prompts, drafts, strict=True):
            limit = _TIMES_LONGER * len(draft) + _LONGER if max_new_tokens is None else max_new_tokens
            limits.append(limit if self._context is None else min(limit, self._context - len(prompt)))
        return DraftDecoder(self._model, prompts, drafts, sorted(self._encoder.ends), limits, gate)

    def _output(self, row: DraftedRow, answer: str) -> EngineOutput:
        return EngineOutput(
            # Decoding the answer's own tokens could still change it, where the tokenizer normalises.
            text=answer if row.accepted_by_gate or row.tokens == row.draft else self._encoder.decode(row.tokens),
            finished=row.accepted_by_gate or row.ended,
            reason="gate" if row.accepted_by_gate else None,
            forward_passes=row.passes,
            accepted_draft_tokens=row.accepted,
            rejected_draft_tokens=row.rejected,
            output_tokens=0 if row.accepted_by_gate else len(row.tokens),
        )
