"""Correction engines: a model in this process, or an OpenAI-compatible server."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from everalign.contrib.activations import decoder_layers, shifted
from everalign.contrib.steering_vectors import VECTORS_FILE, Steering, read_steering
from everalign.correction.templates import Question, Template
from everalign.correction.tokenization import CorrectionEncoder
from everalign.data.collate import batches_by_length
from everalign.errors import InputError
from everalign.llm_client import ChatClient, ChatError, Completion
from everalign.modeling.decoding import RaggedModel
from everalign.modeling.loading import model_fingerprint
from everalign.modeling.speculative import DraftDecoder, DraftedRow
from everalign.modeling.stopping import special_stop_ids
from everalign.storage import sha256_of

if TYPE_CHECKING:
    from everalign.modeling.speculative import Verified

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

    def stream_events(
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

    def stream_events(
        self, pair: Pair, gate: Gate | None, limit: int | None, strength: float = 0.0
    ) -> Iterator[str | Written]:
        """Yield the text while it comes; what was written when all of it is there, from a server that cannot stream."""
        _check(gate, strength)
        most = _limit(pair[1]) if limit is None else limit
        prompt = self._template.render(*pair, self._objectives)
        text = given = ""
        try:
            for item in self._client.stream_continuation(prompt, temperature=0, max_tokens=most):
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


class LocalEngine:
    """Greedy decoding in this process, with the answer as the draft.

    Args:
        model: a causal language model.
        encoder: of its tokenizer and template.
        tokens_per_batch: tokens of the prompts and drafts that are computed at once.
        name: what it is called in messages, and where its steering is, if it is a corrector's folder.
        steering: what a strength means; read from the folder when it is first needed if None.
    """

    def __init__(
        self,
        model: Any,
        encoder: CorrectionEncoder,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        name: str = "corrector",
        steering: Steering | None = None,
    ) -> None:
        self._model, self._encoder, self._steering = RaggedModel(model), encoder, steering
        encoder.ends |= special_stop_ids(model, encoder.tokenizer)
        if tokens_per_batch < 1:
            raise InputError(f"tokens per batch: must be at least 1, found {tokens_per_batch}")
        self._tokens_per_batch, self._name = tokens_per_batch, name
        self._context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def fingerprint(self) -> str:
        """sha256 over weights, template, tokenizer, and the steering if there is one."""
        content = f"{model_fingerprint(self._model.model)} {self._model.dtype} {self._encoder.fingerprint}"
        vectors = Path(self._name) / VECTORS_FILE
        if vectors.is_file():
            content += f" {sha256_of(vectors)}"
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def template(self) -> Template:
        """The one it was trained behind."""
        return self._encoder.template

    def write(
        self, pairs: Sequence[Pair], gate: Gate | None, limit: int | None, strength: float = 0.0
    ) -> list[Written]:
        """Return the corrections, of answers of similar length at once; too long ones are not corrected."""
        steered = self._steered(strength)
        found: dict[int, Written] = {}
        prompts = [self._encoder.prompt(*pair) for pair in pairs]
        drafts = [self._encoder.response(answer) for _, answer in pairs]
        lengths = [len(prompt) + len(draft) for prompt, draft in zip(prompts, drafts, strict=True)]
        fitting = [i for i, length in enumerate(lengths) if self._context is None or length <= self._context]
        for places in batches_by_length([lengths[i] for i in fitting], self._tokens_per_batch):
            batch = [fitting[place] for place in places]
            decoder = self._decoder([prompts[i] for i in batch], [drafts[i] for i in batch], gate, limit)
            with steered():
                decoder.run()
            for i, row in zip(batch, decoder.rows, strict=True):
                found[i] = self._written(row, pairs[i][1])
        return [found.get(i, Written(answer, reason="too_long", passes=0)) for i, (_, answer) in enumerate(pairs)]

    def stream_events(
        self, pair: Pair, gate: Gate | None, limit: int | None, strength: float = 0.0
    ) -> Iterator[str | Written]:
        """Yield the text so far after each forward pass, without a character that is not whole yet."""
        steered = self._steered(strength)
        prompt, draft = self._encoder.prompt(*pair), self._encoder.response(pair[1])
        if self._context is not None and len(prompt) + len(draft) > self._context:
            yield Written(pair[1], reason="too_long", passes=0)
            return
        decoder = self._decoder([prompt], [draft], gate, limit)
        row = decoder.rows[0]
        while not decoder.over:
            # Not around the loop: what the caller computes between two pieces must not be steered.
            with steered():
                decoder.step()
            if not decoder.over:
                # The bytes of a character may be tokens of their own; until all are there it reads as U+FFFD.
                yield self._encoder.decode(row.tokens).rstrip("\ufffd")
        yield self._written(row, pair[1])

    def _steered(self, strength: float) -> Callable[[], AbstractContextManager[None]]:
        """Return what to decode in: nothing at all at strength 0, else every layer's shift."""
        if strength == 0:
            return nullcontext
        model = self._model.model
        if self._steering is None:
            self._steering = read_steering(Path(self._name), model, self.template.id)
        shifts = {layer: shift.to(model.device) for layer, shift in self._steering.at(strength).items()}
        return partial(shifted, decoder_layers(model), shifts)

    def _decoder(
        self, prompts: list[list[int]], drafts: list[list[int]], gate: Gate | None, limit: int | None
    ) -> DraftDecoder:
        limits = []
        for prompt, draft in zip(prompts, drafts, strict=True):
            most = TIMES_LONGER * len(draft) + LONGER if limit is None else limit
            limits.append(most if self._context is None else min(most, self._context - len(prompt)))
        return DraftDecoder(self._model, prompts, drafts, sorted(self._encoder.ends), limits, gate)

    def _written(self, row: DraftedRow, answer: str) -> Written:
        same = row.kept or row.tokens == row.draft
        text = answer if same else self._encoder.decode(row.tokens)
        tokens = 0 if row.kept else len(row.tokens)
        reason = "gate" if row.kept else None
        return Written(text, row.kept or row.ended, reason, row.passes, row.accepted, row.rejected, tokens)
