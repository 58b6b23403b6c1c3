"""Log-probabilities of response tokens: every prompt computed once, the head on response positions only."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from everalign.data.layout import Batch
from everalign.modeling.cpu_attention import CPU_ATTENTION
from everalign.modeling.flex_attention import FLEX, flex_block_mask
from everalign.modeling.token_log_probs import HeadShape, token_log_probs

MaskKind = Literal["whole", "window", "chunk"]

# As transformers names layers in a mask for each kind of them.
_LAYERS: dict[MaskKind, str] = {
    "whole": "full_attention",
    "window": "sliding_attention",
    "chunk": "chunked_attention",
}
# Attention that takes a mask of four dimensions; others get what they see from lengths alone.
_MASKED = ("sdpa", "eager", FLEX, CPU_ATTENTION)
_CHOICE_LOGITS = 33_554_432


@dataclass(frozen=True)
class Architecture:
    """What a model's classes can do (see `everalign.modeling.architecture`).

    Args:
        separate: decoder and head can be called apart, logit scale and final soft-capping included; else the model
            runs whole.
        masks: what layers see of a shared row, of which block attention masks with restarted positions are made: the
            `whole` past, a `window` of it or their `chunk` of it. One for all layers, or one for each kind of them.
        unshared_because: why a prompt has to be computed for each answer anew; None where the masks reproduce
            separate sequences.
        reached: kinds of the linear modules (see `targets.kind_of`) that a text passes through.
    """

    separate: bool = False
    masks: tuple[MaskKind, ...] = ("whole",)
    unshared_because: str | None = None
    reached: frozenset[str] = frozenset()


class LanguageHead:
    """Computes hidden states once and the head only where a response token is predicted.

    Args:
        model: a Hugging Face causal language model (adapters injected or not).
        architecture: what its classes can do.
    """

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self._model, self._masks = model, architecture.masks
        config = model.config.get_text_config()
        self._config, self._shape = config, HeadShape.of(config)
        attention = getattr(config, "_attn_implementation", None) or "sdpa"
        self._additive, self._flex = attention == "eager", attention == FLEX
        self.separate = architecture.separate and model.base_model is not model
        self.unshared_because = architecture.unshared_because
        if attention not in _MASKED:
            self.unshared_because = f"{attention} attention takes no block attention mask"
        elif self._flex and self._masks != ("whole",) and self.unshared_because is None:
            self.unshared_because = "flex attention is used for layers that attend to the whole past only"

    @property
    def shared(self) -> bool:
        """Whether a prompt and its answers can be one row."""
        return self.unshared_because is None

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        if "attention_mask" in batch:
            return {**inputs, "attention_mask": batch["attention_mask"]}
        if "segments" not in batch:
            return inputs
        positions, layout = batch["position_ids"], (batch["segments"], batch["prefixes"])
        if self._flex:
            return {**inputs, "attention_mask": flex_block_mask(*layout), "position_ids": positions}
        whole = block_mask(*layout)
        masks = {kind: self._finished(self._narrowed(whole, positions, kind)) for kind in self._masks}
        mask = {_LAYERS[kind]: mask for kind, mask in masks.items()} if len(masks) > 1 else masks[self._masks[0]]
        return {**inputs, "attention_mask": mask, "position_ids": positions}

    def _narrowed(self, allowed: Tensor, positions: Tensor, kind: MaskKind) -> Tensor:
        """Take from a block mask (R, 1, T, T) what layers of a kind do not see."""
        query, key = positions[:, None, :, None], positions[:, None, None, :]
        if kind == "window":
            return allowed & (query - key < int(self._config.sliding_window))
        if kind == "chunk":
            size = int(self._config.attention_chunk_size)
            return allowed & (query // size == key // size)
        return allowed

    def _finished(self, allowed: Tensor) -> Tensor:
        """Return a mask as the model's attention takes it."""
        if not self._additive:
            return allowed
        dtype = next(self._model.parameters()).dtype
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def _states(self, batch: Batch) -> Tensor:
        states: Tensor = self._model.base_model(**self._inputs(batch)).last_hidden_state
        return states

    def _hidden(self, batch: Batch) -> Tensor:
        return self._states(batch).flatten(0, 1)[batch["predictors"]]

    def all_logits(self, batch: Batch) -> Tensor:
        """Return what `response_logits` does, from a head that is called on all positions as the model itself does.

        Fewer rows may be rounded another way.
        """
        logits = self._shape.apply(self._model.get_output_embeddings()(self._states(batch)))
        return logits.flatten(0, 1)[batch["predictors"]]

    def response_logits(self, batch: Batch) -> Tensor:
        """Return the logits (K, V) that predict the batch's K response tokens."""
        if self.separate:
            return self._shape.apply(self._model.get_output_embeddings()(self._hidden(batch)))
        logits: Tensor = self._model(**self._inputs(batch)).logits
        return logits.flatten(0, 1)[batch["predictors"]]

    def response_log_probs(self, batch: Batch) -> Tensor:
        """Sum the response tokens' log-probabilities of each of the batch's S sequences: (S,) fp32, in nats."""
        targets = batch["targets"]
        if self.separate:
            head = self._model.get_output_embeddings()
            log_probs = token_log_probs(self._hidden(batch), head, targets, self._shape)
        else:
            log_probs = torch.log_softmax(self.response_logits(batch).float(), dim=-1).gather(1, targets[:, None])[:, 0]
        sums = torch.zeros(len(batch["lengths"]), device=log_probs.device)
        return sums.index_add(0, batch["sequences"], log_probs)

    def response_choices(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return, of the batch's K response tokens, log-probabilities (K,) fp32 and the likeliest tokens (K,) instead.

        Without gradients: logits of a few tokens at a time are all that is held, where the head can be called apart.
        """
        targets = batch["targets"]
        with torch.no_grad():
            if not self.separate:
                return _choices(self.response_logits(batch), targets)
            head, hidden = self._model.get_output_embeddings(), self._hidden(batch)
            rows = max(1, _CHOICE_LOGITS // self._model.config.get_text_config().vocab_size)
            pieces = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
            found = [_choices(self._shape.apply(head(part)), wanted) for part, wanted in pieces]
        log_probs, tokens = (torch.cat(parts) for parts in zip(*found, strict=True))
        return log_probs, tokens


def _choices(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = logits.log_softmax(dim=-1, dtype=torch.float32)
    return log_probs.gather(1, targets[:, None])[:, 0], logits.argmax(dim=-1)


def block_mask(segments: Tensor, prefixes: Tensor) -> Tensor:
    """Allowed (R, 1, T, T): causal, within a segment or from it to its prefix; padding sees itself alone."""
    key = segments[:, None, :]
    allowed = (key == segments[:, :, None]) | (key == prefixes[:, :, None])
    return allowed.tril()[:, None]
