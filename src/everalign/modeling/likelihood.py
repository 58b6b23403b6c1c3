"""Log-probabilities of response tokens, with the language-model head on those positions only."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PROBE_LENGTH = 4
_PROBE_TOLERANCE = 1e-3


class LanguageHead:
    """Computes hidden states once and the head only where a response token is predicted.

    Args:
        model: a Hugging Face causal language model (adapters injected or not).

    Whether decoder and head can be called apart (final soft-capping included) is measured on a probe; models with
    any other step in between run whole. `separate` says which.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        text = model.config.get_text_config()
        self._softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self.separate = self._matches_whole_model()

    def _matches_whole_model(self) -> bool:
        if self._model.base_model is self._model:
            return False
        device = next(self._model.parameters()).device
        ids = torch.arange(_PROBE_LENGTH, device=device)[None] % self._model.config.get_text_config().vocab_size
        with torch.no_grad():
            whole = self._model(input_ids=ids, use_cache=False).logits.float()
            apart = self._logits(self._hidden(ids, torch.ones_like(ids))).float()
        return whole.shape == apart.shape and bool((whole - apart).abs().max() <= _PROBE_TOLERANCE)

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        decoder = self._model.base_model
        output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.get_output_embeddings()(hidden)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def response_logits(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        """Return the logits (R, V) that predict the R response tokens, row after row."""
        predicts = response_mask[:, 1:]
        if self.separate:
            return self._logits(self._hidden(input_ids, attention_mask)[:, :-1][predicts])
        output = self._model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits: Tensor = output.logits
        return logits[:, :-1][predicts]

    def response_log_probs(
        self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum the response tokens' log-probabilities of every sequence: sums (S,) fp32 and lengths (S,)."""
        logits = self.response_logits(input_ids, attention_mask, response_mask)
        targets = input_ids[:, 1:][response_mask[:, 1:]]
        token_log_probs = -F.cross_entropy(logits.float(), targets, reduction="none")
        lengths = response_mask[:, 1:].sum(dim=1)
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        sums = torch.zeros(len(lengths), device=lengths.device).index_add(0, rows, token_log_probs)
        return sums, lengths
