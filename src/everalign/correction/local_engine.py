"""The engine that decodes corrections in this process."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from everalign.correction.encoder import CorrectionEncoder
from everalign.correction.engines import LONGER, TIMES_LONGER, TOKENS_PER_BATCH, Gate, Pair, Written
from everalign.correction.steering_files import VECTORS_FILE, Steering, read_steering
from everalign.correction.templates import Template
from everalign.data.batches import batches_by_length
from everalign.errors import InputError
from everalign.files import sha256_of
from everalign.modeling.draft_decoding import DraftDecoder, DraftedRow
from everalign.modeling.loading import model_fingerprint
from everalign.modeling.ragged_decoding import RaggedModel
from everalign.modeling.residual_stream import decoder_layers, shifted
from everalign.modeling.stops import special_stop_ids


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

    def follow(
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
