"""Activation checkpointing: a layer's activations are forgotten, and computed again when the backward pass needs them.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. Only what goes into each layer is
kept, for about a third more computation; losses and gradients stay the same. transformers' own switch does nothing in
evaluation mode, in which our models stay, so that nothing drops out: here the layers' forward passes are wrapped.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from everalign.errors import InputError
from everalign.modeling.residual_stream import layer_list

Checkpointing = Literal["auto", "on", "off"]


def check_checkpointing(found: str) -> None:
    """Refuse a setting that does not exist.

    Raises:
        InputError: it is none of `auto`, `on` and `off`.
    """
    if found not in get_args(Checkpointing):
        raise InputError(f"checkpointing must be auto, on or off, found {found!r}")


def recomputable_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the language model inside of `model`, or [] where it is not known what they are.

    They are those that transformers would compute again; else the list of as many modules as the configuration names.
    """
    marked = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    inside = {id(part) for layer in marked for part in layer.modules() if part is not layer}
    if marked:
        return [layer for layer in marked if id(layer) not in inside]
    inner = language_model(model)
    return (layer_list(inner) if inner is not None else None) or []


def language_model(model: nn.Module) -> PreTrainedModel | None:
    """Return the Hugging Face model inside of `model`, or None."""
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)


@contextmanager
def recomputing(layers: list[nn.Module]) -> Iterator[None]:
    """Compute these layers again in backward passes of what is computed inside the `with` block; not under no_grad."""
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_forward, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _forward(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
        return forward(*args, **kwargs)
    # Nothing is random in there. What is given by name is kept as it is and not copied: all layers share their masks.
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)


class SavedBytes:
    """Counts what operations keep for a backward pass, without keeping any of it: there can be no backward pass.

    Args:
        model: its parameters and buffers are there anyway and do not count.

    Attributes:
        total: bytes, each storage once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        self._known = {part.untyped_storage()._cdata for part in (*model.parameters(), *model.buffers())}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self.total += storage.nbytes()
            self._known.add(storage._cdata)
            # Its address may become another one's.
            weakref.finalize(storage, self._known.discard, storage._cdata)


def _unpack(_: None) -> Tensor:
    raise RuntimeError("what was counted was not kept")
