"""A language model that learns with all of its weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from everalign.data.collate import Batch
from everalign.errors import InputError
from everalign.modeling.architecture import study
from everalign.modeling.logprobs import SequenceLogProbs, naming
from everalign.modeling.options import Precision


class FullModel(nn.Module):
    """What a `Policy` computes, of a model without adapters.

    Args:
        model: a Hugging Face causal language model in fp32; all of its parameters are made trainable.
        precision: `bf16` computes under bf16 autocast. Weights, log-probabilities and the optimiser are fp32 anyway:
            bf16 weights would lose most updates of a small learning rate.
    """

    def __init__(self, model: Any, precision: Precision = "fp32") -> None:
        super().__init__()
        self.model = model.requires_grad_(True)
        self._mixed = precision == "bf16"
        self.head = SequenceLogProbs(model, study(model))

    def forward(self, batch: Batch) -> Tensor:
        """Sum the log-probabilities of each sequence's response tokens: (S,) fp32, in nats."""
        with self._computing(batch["input_ids"]):
            return self.head.response_log_probs(batch)

    def response_choices(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return, of the batch's K response tokens, log-probabilities (K,) fp32 and the likeliest tokens (K,)."""
        with self._computing(batch["input_ids"]):
            return self.head.response_choices(batch)

    def on_device(self, batch: Batch) -> Batch:
        """Return the batch on the model's device."""
        device = next(self.parameters()).device
        return {name: value.to(device) for name, value in batch.items()}

    def train(self, mode: bool = True) -> "FullModel":
        """Note whether it is being trained; it never drops out, so that batches may be cut anywhere."""
        super().train(mode)
        self.model.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return every parameter once, also where output and input embeddings are one."""
        state = super().state_dict(*args, **kwargs)
        names = {kwargs.get("prefix", "") + name for name, _ in self.named_parameters()}
        for key in [key for key in state if key not in names]:
            del state[key]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned."""
        differing = set(self.state_dict()) ^ set(state_dict)
        if differing:
            raise InputError(f"the checkpoint does not fit this model: {sorted(differing)[:3]} differ")
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    @contextmanager
    def _computing(self, like: Tensor) -> Iterator[None]:
        autocast = torch.autocast(like.device.type, dtype=torch.bfloat16, enabled=self._mixed)
        with naming(self.model), autocast:
            yield
