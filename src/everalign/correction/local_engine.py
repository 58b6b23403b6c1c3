"""Correction engine of a model in this process: greedy decoding with the answer as the draft."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from everalign.correction.corrector_files import load_corrector_files
from everalign.correction.engines import LONGER, TIMES_LONGER, TOKENS_PER_BATCH, Begun, EngineOutput, Gate, Pair
from everalign.correction.templates import Template
from everalign.correction.tokenization import CorrectionEncoder
from everalign.data.collate import batches_by_length
from everalign.errors import InputError
from everalign.modeling.decoding import RaggedModel
from everalign.modeling.loading import load_model, load_tokenizer, model_fingerprint
from everalign.modeling.sampling import special_stop_ids
from everalign.modeling.speculative import DraftDecoder, DraftedRow
from everalign.options import Precision

if TYPE_CHECKING:
    from typing_extensions import Self


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
        self._model, self.encoder, self._tokens_per_batch = RaggedModel(model), encoder, tokens_per_batch
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
        content = f"{model_fingerprint(self._model.model)} {self._model.dtype} {self.encoder.fingerprint}"
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def template(self) -> Template:
        """The template it was trained with."""
        return self.encoder.template

    def decoding_context(self) -> AbstractContextManager[None]:
        """The context of every forward pass; a subclass may change activations in it."""
        return nullcontext()

    def write(
        self,
        pairs: Sequence[Pair],
        gate: Gate | None,
        max_new_tokens: int | None,
        begun: Sequence[Begun] | None = None,
    ) -> list[EngineOutput]:
        """Return the corrections, decoded in batches of similar length; pairs that are too long are not corrected."""
        begun = begun or [Begun()] * len(pairs)
        kept = [one.with_rest(answer) for (_, answer), one in zip(pairs, begun, strict=True)]
        firsts, drafts = [], []
        for (_, answer), one in zip(pairs, begun, strict=True):
            first, draft = self.encoder.continuation(one.text, one.rest(answer))
            firsts.append(first)
            drafts.append(draft)
        prompts = [[*self.encoder.prompt(*pair), *first] for pair, first in zip(pairs, firsts, strict=True)]
        lengths = [len(prompt) + len(draft) for prompt, draft in zip(prompts, drafts, strict=True)]
        fitting = [i for i, length in enumerate(lengths) if self._context is None or length <= self._context]
        outputs = [EngineOutput(text, reason="too_long", forward_passes=0) for text in kept]
        for places in batches_by_length([lengths[i] for i in fitting], self._tokens_per_batch):
            batch = [fitting[place] for place in places]
            decoder = self._decoder([prompts[i] for i in batch], [drafts[i] for i in batch], gate, max_new_tokens)
            with self.decoding_context():
                decoder.run()
            for i, row in zip(batch, decoder.rows, strict=True):
                outputs[i] = self._output(row, kept[i], begun[i].text, firsts[i])
        return outputs

    def stream_events(self, pair: Pair, gate: Gate | None, max_new_tokens: int | None) -> Iterator[str | EngineOutput]:
        """Yield the text after each forward pass, up to its last complete character, and finally the output."""
        prompt, draft = self.encoder.prompt(*pair), self.encoder.response(pair[1])
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
                yield self.encoder.decode(row.tokens).rstrip("\ufffd")
        yield self._output(row, pair[1])

    def _decoder(
        self, prompts: list[list[int]], drafts: list[list[int]], gate: Gate | None, max_new_tokens: int | None
    ) -> DraftDecoder:
        limits = []
        for prompt, draft in zip(prompts, drafts, strict=True):
            limit = TIMES_LONGER * len(draft) + LONGER if max_new_tokens is None else max_new_tokens
            limits.append(limit if self._context is None else min(limit, self._context - len(prompt)))
        return DraftDecoder(self._model, prompts, drafts, sorted(self.encoder.ends), limits, gate)

    def _output(self, row: DraftedRow, kept: str, begun: str = "", first: Sequence[int] = ()) -> EngineOutput:
        """Return what a row comes to; `kept` is its text if the answer, or what is left of it, stays as it is."""
        stays = row.accepted_by_gate or row.tokens == row.draft
        return EngineOutput(
            # Decoding the answer's own tokens could still change it, where the tokenizer normalises.
            text=kept if stays else self.encoder.continued(begun, first, row.tokens),
            finished=row.accepted_by_gate or row.ended,
            reason="gate" if row.accepted_by_gate else None,
            forward_passes=row.passes,
            accepted_draft_tokens=row.accepted,
            rejected_draft_tokens=row.rejected,
            output_tokens=0 if row.accepted_by_gate else len(row.tokens),
        )
