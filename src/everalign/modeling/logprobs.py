"""Log-probabilities of response tokens: every prompt computed once, the head on response positions only."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from everalign.data.collate import Batch, sequence_ends, split_by_length
from everalign.errors import EveralignError, InputError
from everalign.modeling.attention import CPU_ATTENTION, FLEX, flex_inputs, runs_of
from everalign.modeling.positions import Lengths, PositionState
from everalign.modeling.shrinking import MODEL_ERRORS

# Logits that are held at once. With a large vocabulary the output matrix itself has to be read for every chunk, so that
# a product has no fewer rows than this. A processor takes further steps in blocks that stay near its cache.
_CHUNK_LOGITS = {"cpu": 16_777_216, "cuda": 67_108_864}
_CHUNK_ROWS = 128
_BLOCK_LOGITS = {"cpu": 262_144, "cuda": 67_108_864}
# Rows are filled up to a multiple of this: a processor's library prepares each product anew for another number.
_HEAD_ROW_STEP = 32
# Where a distribution over the whole vocabulary is needed: numbers of (positions x vocabulary) held at once, all copies
# and temporaries counted.
_LIVE_LOGITS = 67_108_864

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the output matrix.

    Args:
        scale: factor of all logits (Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`).
        softcap: c of the final soft-capping c·tanh(logit / c) (Gemma 2); None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """Read a model's configuration."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return cls(scale, softcap)

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits as the model would give them; without gradients they are written over."""
        if not torch.is_grad_enabled():
            if self.scale != 1.0:
                logits.mul_(self.scale)
            return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Carry a gradient back through `apply`, whose result was `logits`."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap).square())
        return gradient if self.scale == 1.0 else gradient * self.scale


def token_log_probs(
    hidden: Tensor, head: Head, targets: Tensor, shape: LogitTransform, chunk_rows: int | None = None
) -> Tensor:
    """Return log softmax(shape(head(hidden)))[targets].

    Args:
        hidden: (K, d) hidden states; autocast decides the precision of the products.
        head: the output embeddings, `nn.Linear` or what has the same meaning (adapted, for instance).
        targets: (K,) token ids.
        shape: what follows the output matrix.
        chunk_rows: rows whose logits are held at once; chosen by the vocabulary when None.

    Returns:
        (K,) fp32, in nats. Differentiable with respect to `hidden` and to what learns in `head`.
    """
    if isinstance(head, nn.Linear):
        vocabulary = head.out_features
    else:  # the weights of a quantised or wrapped head need not show it
        with torch.no_grad():
            vocabulary = head(hidden[:1]).shape[-1]
    device = hidden.device.type
    block, chunk = (sizes.get(device, sizes["cuda"]) // vocabulary for sizes in (_BLOCK_LOGITS, _CHUNK_LOGITS))
    rows = chunk_rows or max(_CHUNK_ROWS, chunk - chunk % _HEAD_ROW_STEP)
    if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        sizes = (rows, max(1, block))
        result: Tensor = _FrozenHead.apply(hidden, head, targets, shape, *sizes)  # type: ignore[no-untyped-call]
        return result

    def log_probs(part: Tensor, wanted: Tensor) -> Tensor:
        logits = shape.apply(head(part))
        return logits.log_softmax(dim=-1, dtype=torch.float32).gather(1, wanted[:, None])[:, 0]

    parts = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    return torch.cat([checkpoint(log_probs, part, wanted, use_reentrant=False) for part, wanted in parts])


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Linear, targets: Tensor, shape: LogitTransform, rows: int, block: int
    ) -> Tensor:
        """Compute log-probabilities (K,) chunk by chunk, and their gradients (K, d) where they are wanted."""
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        filled = F.pad(hidden, (0, 0, 0, -len(hidden) % _HEAD_ROW_STEP))
        for start in range(0, len(hidden), rows):
            part = slice(start, min(start + rows, len(hidden)))
            logits = shape.apply(head(filled[start : start + rows]))
            sums = torch.ones(len(logits), 1, dtype=torch.float32, device=hidden.device)
            count = part.stop - start
            pieces = (torch.split(t, block) for t in (result[part], logits[:count], targets[part], sums[:count]))
            for log_probs, piece, chosen, total in zip(*pieces, strict=True):
                _fill(log_probs, piece, chosen[:, None], total, shape, wanted)
            if gradient is not None:
                gradient[part] = ((logits @ head.weight.to(logits.dtype)) / sums)[:count]
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients, which are those of the negative log-probability."""
        (gradient,) = ctx.saved_tensors
        return gradient * -upstream[:, None].to(gradient.dtype), None, None, None, None, None


def _fill(log_probs: Tensor, logits: Tensor, chosen: Tensor, sums: Tensor, shape: LogitTransform, wanted: bool) -> None:
    """Write log-probabilities (K,) and the sums of exp(logit - largest logit) over the vocabulary (K, 1).

    Where `wanted`, the logits (K, V) are replaced by the gradient of the negative log-probability times that sum.
    """
    largest = logits.amax(dim=-1, keepdim=True).float()
    exponentials = logits.to(torch.float32, copy=True).sub_(largest).exp_()
    torch.sum(exponentials, dim=-1, keepdim=True, out=sums)
    log_probs.copy_((logits.gather(1, chosen).float() - largest - sums.log())[:, 0])
    if wanted:
        logits.copy_(shape.backward(exponentials.scatter_add_(1, chosen, -sums), logits))


MaskKind = Literal["whole", "window", "chunk"]

# Where a configuration says how far layers see.
_SIZES: dict[str, str] = {"window": "sliding_window", "chunk": "attention_chunk_size"}
# As transformers names layers in a mask for each kind of them.
_LAYERS: dict[MaskKind, str] = {
    "whole": "full_attention",
    "window": "sliding_attention",
    "chunk": "chunked_attention",
}
# Attention that takes a mask of four dimensions; others get what they see from lengths alone.
_MASKED = ("sdpa", "eager", FLEX, CPU_ATTENTION)
# Logits, what a model of its own makes of them on the way, and their log-softmax.
_CHOICE_COPIES = 6
# A processor's library prepares each product anew for a number of rows that it has not seen lately.
_ROW_STEP = 64


@dataclass(frozen=True)
class Architecture:
    """What a model's classes can do (see `everalign.modeling.architecture`).

    Args:
        separate: decoder and head can be called apart, logit scale and final soft-capping included; else the model
            runs whole.
        masks: what layers see of a shared row, of which block attention masks with restarted positions are made: the
            `whole` past, a `window` of it or their `chunk` of it. One for all layers, or one for each kind of them.
        why_no_prefix_sharing: why a prompt has to be computed for each answer anew; None where the masks reproduce
            separate sequences.
        reached: kinds of the linear modules (see `targets.kind_of`) that a text passes through.
        resumable: what the model itself does behind its decoder can be run on given hidden states; asked for where
            `separate` is False.
        lengths: how long rows may be, and which of them may be computed together.
    """

    separate: bool = False
    masks: tuple[MaskKind, ...] = ("whole",)
    why_no_prefix_sharing: str | None = None
    reached: frozenset[str] = frozenset()
    resumable: bool = False
    lengths: Lengths = field(default_factory=Lengths)


class SequenceLogProbs:
    """Computes hidden states once and the head only where a response token is predicted.

    Args:
        model: a Hugging Face causal language model (adapters injected or not).
        architecture: what its classes can do.
    """

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self._model, self._masks = model, architecture.masks
        config = model.config.get_text_config()
        self._config, self._shape = config, LogitTransform.of(config)
        attention = getattr(config, "_attn_implementation", None) or "sdpa"
        self._attention, self._flex = attention, attention == FLEX
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self.lengths, self._stretch = architecture.lengths, architecture.lengths.stretch
        self._positions = PositionState(model)
        self.separate = architecture.separate and model.base_model is not model
        self._resumable = architecture.resumable and model.base_model is not model
        self.why_no_prefix_sharing = architecture.why_no_prefix_sharing
        if attention not in _MASKED:
            self.why_no_prefix_sharing = f"{attention} attention takes no block attention mask"
        elif self._flex and self._masks != ("whole",) and self.why_no_prefix_sharing is None:
            self.why_no_prefix_sharing = "flex attention is used for layers that attend to the whole past only"

    @property
    def shared(self) -> bool:
        """Whether a prompt and its answers can be one row."""
        return self.why_no_prefix_sharing is None

    def check_token(self, largest: int) -> None:
        """Raise InputError where rows hold a token, their largest, that the model has no embedding for."""
        if largest >= self._vocabulary:
            raise InputError(
                f"a row holds token {largest}, and {type(self._model).__name__} has embeddings for {self._vocabulary}: "
                "use the tokenizer that the model was trained with, or resize its embeddings"
            )

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        if "runs" in batch:
            runs = batch["runs"]
            table = {_LAYERS[kind]: runs for kind in self._masks} if len(self._masks) > 1 else runs
            return {**inputs, "attention_mask": table, "position_ids": batch["position_ids"]}
        if "attention_mask" in batch:
            return {**inputs, "attention_mask": batch["attention_mask"]}
        if self._flex and self.shared:
            return flex_inputs(batch)
        if "segments" not in batch:
            return inputs
        positions, allowed = batch["position_ids"], block_mask(batch["segments"], batch["prefixes"])
        masks = {_LAYERS[kind]: self._mask(allowed, positions, kind) for kind in self._masks}
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return {**inputs, "attention_mask": mask, "position_ids": positions}

    def _mask(self, allowed: Tensor, positions: Tensor, kind: MaskKind) -> Tensor:
        """Take from a block mask (R, 1, T, T) what layers of a kind do not see, and return it as attention takes it.

        The library's attention makes numbers of a mask in every layer, and keeps them for the backward pass: 2 GiB a
        layer for a row of 32,768 tokens in bf16. Numbers in its own dtype are taken as they are, once for all layers.
        """
        query, key = positions[:, None, :, None], positions[:, None, None, :]
        if kind == "window":
            allowed = allowed & (query - key < int(self._config.sliding_window))
        elif kind == "chunk":
            size = int(self._config.attention_chunk_size)
            allowed = allowed & (query // size == key // size)
        elif len(self._masks) > 1:
            allowed = allowed.clone()  # it is written over below
        if self._attention not in ("eager", "sdpa"):
            return allowed
        dtype, device = next(self._model.parameters()).dtype, allowed.device.type
        if self._attention == "sdpa" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        hidden = torch.finfo(dtype).min if self._attention == "eager" else float("-inf")
        return torch.zeros_like(allowed, dtype=dtype).masked_fill_(allowed.logical_not_(), hidden)

    @property
    def chunked(self) -> bool:
        """Whether logits can be computed of a few positions at a time; else all of a batch's exist at once."""
        return self.separate or self._resumable

    def states(self, batch: Batch) -> Tensor:
        """Return (K, d) of what `logits` makes the logits that predict the batch's K response tokens.

        These are hidden states, or the logits themselves where they cannot be computed apart. Where positions stretch
        with the longest row, sequences that would not agree on them are computed apart.
        """
        parts = [(batch, torch.empty(0))] if self._stretch is None else split_by_length(batch, self._stretch.kind)
        found: list[Tensor] = []
        for part, _ in parts:
            if self._stretch is not None:
                self._positions.restore()
            if self._attention == CPU_ATTENTION and self.shared:
                # Where every layer sees the whole past of every token, were it but for its length.
                longest = int(part["position_ids"].max()) if "position_ids" in part else part["input_ids"].shape[1] - 1
                if all(longest < int(getattr(self._config, _SIZES[kind])) for kind in self._masks if kind != "whole"):
                    part = _in_one_row(part)
            if self.chunked:
                computed = self._model.base_model(**self._inputs(part)).last_hidden_state
                computed = computed.to(part["input_ids"].device)  # the last layer may be on another one
            else:
                computed = self._model(**self._inputs(part)).logits
            found.append(computed.flatten(0, 1)[part["predictors"]])
        if len(found) == 1:
            return found[0]
        order = torch.cat([tokens for _, tokens in parts])
        return torch.cat(found)[order.argsort()]

    def last_states(self, batch: Batch) -> Tensor:
        """Return (S, d), as `states` does, of the last token of each sequence of a batch that shares prompts."""
        return self.states({**batch, "predictors": sequence_ends(batch)})

    def last(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return (R, d) of what `logits` makes the logits of each row's next token, for the model's own inputs."""
        if self.chunked:
            states: Tensor = self._model.base_model(**inputs).last_hidden_state.to(inputs["input_ids"].device)
        else:
            states = self._model(**inputs, logits_to_keep=1).logits
        return states[:, -1]

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (K, V) of hidden states (K, d), which may be some of those that `states` returned."""
        if self.separate:
            return self._shape.apply(self._model.get_output_embeddings()(states))
        if not self._resumable:
            return states
        # The decoder returns these states without computing anything, and the model goes on from them.
        decoder = self._model.base_model
        own = decoder.__dict__.get("forward")
        decoder.forward = lambda *_, **__: _Decoded(last_hidden_state=states[None])
        try:
            logits: Tensor = self._model(input_ids=states.new_zeros(1, len(states), dtype=torch.long)).logits
        finally:
            if own is None:
                del decoder.forward
            else:
                decoder.forward = own
        return logits[0]

    def response_logits(self, batch: Batch) -> Tensor:
        """Return the logits (K, V) that predict the batch's K response tokens; for a few of them, or tests."""
        return self.logits(self.states(batch))

    def response_log_probs(self, batch: Batch) -> Tensor:
        """Sum the response tokens' log-probabilities of each of the batch's S sequences: (S,) fp32, in nats."""
        targets, states = batch["targets"], self.states(batch)
        if self.separate:
            log_probs = token_log_probs(states, self._model.get_output_embeddings(), targets, self._shape)
        elif self._resumable:
            log_probs = token_log_probs(states, self.logits, targets, LogitTransform())
        else:
            log_probs = torch.log_softmax(states.float(), dim=-1).gather(1, targets[:, None])[:, 0]
        sums = torch.zeros(len(batch["lengths"]), device=log_probs.device)
        return sums.index_add(0, batch["sequences"], log_probs)

    @torch.no_grad()
    def response_choices(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return, of the batch's K response tokens, log-probabilities (K,) fp32 and the likeliest tokens (K,) instead.

        Without gradients, and with at most 64M logits at a time, where these can be computed apart.
        """
        log_probs, tokens = [], []
        for states, wanted in self.chunks(self.states(batch), batch["targets"], copies=_CHOICE_COPIES):
            logits = self.logits(states)
            log_probs.append(logits.log_softmax(dim=-1, dtype=torch.float32).gather(1, wanted[:, None])[:, 0])
            tokens.append(logits.argmax(dim=-1))
        return torch.cat(log_probs), torch.cat(tokens)

    def chunks(self, *tensors: Tensor, copies: int) -> Iterator[tuple[Tensor, ...]]:
        """Cut tensors (K, ...) into the same parts, of which no more than 64M logits exist at once.

        Args:
            tensors: a row for each position.
            copies: tensors of (positions, vocabulary) that exist at the same time, temporaries included.
        """
        rows = max(1, _LIVE_LOGITS // (copies * self._config.vocab_size))
        return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


class _Decoded(BaseModelOutputWithPast):  # type: ignore[misc]  # transformers carries no types
    """A decoder's result with nothing but hidden states, whatever else is asked for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _in_one_row(batch: Batch) -> Batch:
    """Put all rows of a batch into one, with little padding, and a table of runs in place of the layout."""
    tokens = batch["input_ids"]
    segments = batch.get("segments", batch.get("attention_mask", torch.ones_like(tokens)))
    positions = batch.get("position_ids", torch.arange(tokens.shape[1]).expand_as(tokens))
    kept = segments.flatten().nonzero()[:, 0]
    padding = -len(kept) % _ROW_STEP
    tokens, positions = (F.pad(t.flatten()[kept], (0, padding))[None] for t in (tokens, positions))
    return {
        "input_ids": tokens,
        "position_ids": positions,
        "predictors": torch.searchsorted(kept, batch["predictors"]),
        "runs": runs_of(segments, batch.get("prefixes", segments)),
    }


@contextmanager
def naming(model: Any) -> Iterator[None]:
    """Turn what a model raises inside of the `with` block into an error that names it; memory that ran out apart."""
    try:
        yield
    except (EveralignError, torch.OutOfMemoryError):
        raise
    except MODEL_ERRORS as error:
        said = str(error).strip().partition("\n")[0]
        raise EveralignError(f"{type(model).__name__} failed: {type(error).__name__}: {said}") from error


def block_mask(segments: Tensor, prefixes: Tensor) -> Tensor:
    """Allowed (R, 1, T, T): causal, within a segment or from it to its prefix; padding sees itself alone."""
    key = segments[:, None, :]
    allowed = key == segments[:, :, None]
    return allowed.logical_or_(key == prefixes[:, :, None]).tril_()[:, None]
