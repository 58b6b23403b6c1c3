"""What a trainer can train: a causal language model that gives collated batches their log-probabilities."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from everalign.data.collate import Batch
from everalign.errors import InputError
from everalign.modeling.architecture import study
from everalign.modeling.logprobs import SequenceLogProbs, naming
from everalign.options import Precision

_Model = TypeVar("_Model", bound="TrainableLM")


class LearnedState(nn.Module):
    """A module whose state is what it learns, without the parameters that are frozen."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what is being learned, each parameter once: a checkpoint is no larger than that."""
        state = super().state_dict(*args, **kwargs)
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        prefix = kwargs.get("prefix", "")
        for key in [key for key in state if key.removeprefix(prefix) not in trainable]:
            del state[key]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned; frozen parameters are not expected."""
        differing = set(self.state_dict()) ^ set(state_dict)
        if differing:
            raise InputError(f"the checkpoint does not fit this model or adapter: {sorted(differing)[:3]} differ")
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return torch.nn.modules.module._IncompatibleKeys([], [])


@contextmanager
def computing_on(model: Any, device: torch.device, precision: Precision) -> Iterator[None]:
    """Let a model in fp32 compute on a device inside the `with` block, under bf16 autocast in about half the memory.

    The weights of its linear modules, but for a language model's head, go there in the precision that they are computed
    in. That is what autocast would round them to for each product: the results are the same bits.

    Args:
        model: a Hugging Face model in fp32 on the CPU, where it is again afterwards.
        device: where it computes.
        precision: what it computes in, by the caller's autocast.
    """
    head = model.get_output_embeddings()
    own = set() if head is None else set(head.parameters())
    linear = {p for part in model.modules() if type(part) is nn.Linear for p in part.parameters()} - own
    kept = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(part, name, values) for part in model.modules() for name, values in part.named_buffers(recurse=False)]
    try:
        for parameter, values in kept:
            rounded = precision == "bf16" and parameter in linear
            parameter.data = values.to(device, torch.bfloat16 if rounded else torch.float32)
        model.to(device)  # its buffers
        yield
    finally:
        for parameter, values in kept:
            parameter.data = values
        for part, name, values in buffers:
            setattr(part, name, values)


class TrainableLM(LearnedState):
    """A causal language model that a trainer can train: response log-probabilities of collated batches.

    Dropout is always off, so that batches may be cut anywhere and every reference policy compares.

    Args:
        mixed: whether to compute under bf16 autocast. What learns and the log-probabilities stay fp32.

    Attributes:
        head: computes log-probabilities.
        sharded: whether processes hold parts of its frozen weights each (see `everalign.modeling.sharding`).
    """

    head: SequenceLogProbs
    sharded = False

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self._mixed = mixed

    @property
    def language_model(self) -> Any:
        """The Hugging Face model, adapters injected or not."""
        raise NotImplementedError

    @property
    def prefix_length(self) -> int:
        """Tokens that are put in front of every prompt."""
        return 0

    def forward(self, batch: Batch) -> Tensor:
        """Sum the log-probabilities of each sequence's response tokens.

        Args:
            batch: what `everalign.data.collate` made of tokenized rows: S sequences with K response tokens in all.

        Returns:
            (S,) fp32, in nats.
        """
        with self._reading(batch) as read:
            return self.head.response_log_probs(read)

    def response_choices(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return, of the batch's K response tokens, log-probabilities (K,) fp32 and the likeliest tokens (K,)."""
        with self._reading(batch) as read:
            return self.head.response_choices(read)

    def on_device(self, batch: Batch) -> Batch:
        """Return the batch on the model's device; refuses tokens that the model has no embeddings for."""
        self.head.check_token(int(batch["input_ids"].max()))
        device = next(self.parameters()).device
        return {name: value.to(device) for name, value in batch.items()}

    @contextmanager
    def _reading(self, batch: Batch) -> Iterator[Batch]:
        """Compute inside the `with` block what a collated batch holds; yields the batch as the model is given it."""
        with self._computing(batch["input_ids"]):
            yield batch

    @contextmanager
    def _computing(self, like: Tensor) -> Iterator[None]:
        autocast = torch.autocast(like.device.type, dtype=torch.bfloat16, enabled=self._mixed)
        with naming(self.language_model), autocast:
            yield

    def train(self: _Model, mode: bool = True) -> _Model:
        """Note whether it is being trained; the model's own modules stay in evaluation mode."""
        self.training = mode
        for part in self.children():
            part.eval()
        return self


class FullModel(TrainableLM):
    """A language model that learns with all of its weights.

    Args:
        model: a Hugging Face causal language model in fp32; all of its parameters are made trainable.
        precision: `bf16` computes under bf16 autocast. Weights and the optimiser stay fp32: bf16 weights would lose
            most updates of a small learning rate.
    """

    def __init__(self, model: Any, precision: Precision = "fp32") -> None:
        super().__init__(precision == "bf16")
        self.model = model.requires_grad_(True)
        self.head = SequenceLogProbs(model, study(model))

    @property
    def language_model(self) -> Any:
        """The Hugging Face model."""
        return self.model
