"""Log-probabilities of response tokens: every prompt computed once, the head on response positions only."""

from typing import Any

import torch
from torch import Tensor

from everalign.data.encoding import EncodedPair
from everalign.data.layout import Batch, lay_out_pairs
from everalign.modeling.flex_attention import FLEX, flex_block_mask
from everalign.modeling.token_log_probs import HeadShape, token_log_probs

# How far logits from shared rows may differ from those of separate ones, relative to the largest: rounding differs by
# less, a wrong way by more. The head apart sees the same hidden states and has to agree to the last digits.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_HEAD_TOLERANCE = 1e-5
_CHOICE_LOGITS = 33_554_432


class LanguageHead:
    """Computes hidden states once and the head only where a response token is predicted.

    Args:
        model: a Hugging Face causal language model (adapters injected or not).

    What differs between architectures is measured on a probe:

    `separate`: decoder and head can be called apart, logit scale and final soft-capping included; else the model runs
    whole.
    `unshared_because`: why a prompt has to be computed for each answer anew; None where a block attention mask with
    restarted positions reproduces separate sequences (`shared`).
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config.get_text_config()
        self._shape = HeadShape.of(config)
        attention = getattr(config, "_attn_implementation", "sdpa")
        self._additive, self._flex = attention == "eager", attention == FLEX
        self.separate = False
        with torch.no_grad():
            probe = self._probe(shared=False)
            whole = self.response_logits(probe)
            self.separate = model.base_model is not model and _close(whole, self._apart(probe), _HEAD_TOLERANCE)
            self.unshared_because = _other_layers(config) or self._differs(whole)

    @property
    def shared(self) -> bool:
        """Whether a prompt and its answers can be one row."""
        return self.unshared_because is None

    def _probe(self, shared: bool) -> Batch:
        """Lay out two pairs of a few tokens, answers different in length and content, so that rows are packed too."""
        vocabulary = self._model.config.get_text_config().vocab_size
        tokens = [[(7 * i + 3 * k) % vocabulary for i in range(2 + k)] for k in range(4)]
        long = EncodedPair("probe", tokens[3] * 3, [1, *tokens[1]], [1, *tokens[2]], 1.0)
        short = [EncodedPair("probe", tokens[k], tokens[k + 1], tokens[k + 2], 1.0) for k in range(2)]
        device = next(self._model.parameters()).device
        return {name: value.to(device) for name, value in lay_out_pairs([long, *short], shared).items()}

    def _differs(self, whole: Tensor) -> str | None:
        """Say what goes wrong with shared rows, None if nothing does."""
        alone, together = self._probe(shared=False), self._probe(shared=True)
        try:
            found = self.response_logits(together)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            return f"the model takes no block attention mask ({type(error).__name__})"
        # Both in the order of the sequences; the sort keeps each sequence's tokens in theirs.
        orders = [batch["sequences"].argsort(stable=True) for batch in (alone, together)]
        same = _close(whole[orders[0]], found[orders[1]], _TOLERANCES[whole.dtype])
        return None if same else "the model's layers do not follow a block attention mask with restarted positions"

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        if "attention_mask" in batch:
            return {**inputs, "attention_mask": batch["attention_mask"]}
        if "segments" not in batch:
            return inputs
        layout = (batch["segments"], batch["prefixes"])
        if self._flex:
            return {**inputs, "attention_mask": flex_block_mask(*layout), "position_ids": batch["position_ids"]}
        mask = block_mask(*layout)
        if self._additive:
            dtype = next(self._model.parameters()).dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return {**inputs, "attention_mask": mask, "position_ids": batch["position_ids"]}

    def _states(self, batch: Batch) -> Tensor:
        states: Tensor = self._model.base_model(**self._inputs(batch)).last_hidden_state
        return states

    def _hidden(self, batch: Batch) -> Tensor:
        return self._states(batch).flatten(0, 1)[batch["predictors"]]

    def _apart(self, batch: Batch) -> Tensor:
        """Call the head on all positions, as the model itself does: fewer rows may be rounded another way in bf16."""
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


def _other_layers(config: Any) -> str | None:
    """Say which layers do not attend to the whole past: the model makes a mask of its own for each kind of layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        others = sorted({kind for kind in kinds if kind != "full_attention"})
        return f"the model has {', '.join(others)} layers" if others else None
    # A probe as long as a window would be slow: the names tell.
    parts = [name for name, value in config.to_dict().items() if _is_partial(name, value)]
    if not getattr(config, "use_sliding_window", True):
        parts = [name for name in parts if name != "sliding_window"]
    return f"the model attends to a part of the past only: {parts[0]} is set" if parts else None


def _is_partial(name: str, value: Any) -> bool:
    """Whether a setting makes a model attend locally: `sliding_window`, GPT-Neo's `window_size`, `attention_layers`."""
    if isinstance(value, list):
        return name == "attention_layers" and any(kind != "global" for kind in value)
    return bool(value) and (name.endswith(("window", "window_size")) or name == "index_topk")


def _close(expected: Tensor, found: Tensor, tolerance: float) -> bool:
    if expected.shape != found.shape:
        return False
    error = (expected.float() - found.float()).abs().max()
    return bool(error <= tolerance * expected.float().abs().max().clamp(min=1.0))
