"""Read or shift the residual stream, that is, the outputs of a decoder's layers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from everalign.errors import InputError
from everalign.modeling.shrinking import layer_list


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return a causal language model's layers, the one nearest to the tokens first.

    Raises:
        InputError: the model does not hold its layers in one list.
    """
    layers = layer_list(model)
    if layers is None:
        config = model.config.get_text_config()
        raise InputError(
            f"a {config.model_type} model cannot be steered: it does not hold its {config.num_hidden_layers} layers "
            "in one list"
        )
    return layers


@contextmanager
def shifted(layers: Sequence[nn.Module], shifts: Mapping[int, Tensor]) -> Iterator[None]:
    """Add a vector to layers' outputs, at every position, in what this thread computes inside the block.

    Args:
        layers: of one model.
        shifts: a vector (d,) of any dtype and device by the layer's index.
    """
    thread = get_ident()

    def hook(shift: Tensor) -> Any:
        def add(_layer: nn.Module, _inputs: Any, output: Any) -> Any:
            if get_ident() != thread:
                return None
            states = output[0] if isinstance(output, tuple) else output
            moved = states + shift.to(states)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return add

    with ExitStack() as stack:
        for index, shift in shifts.items():
            stack.callback(layers[index].register_forward_hook(hook(shift)).remove)
        yield


@torch.no_grad()
def residuals(model: Any, layers: Sequence[nn.Module], tokens: Tensor, last: int) -> Tensor:
    """Return the outputs of L layers at the last positions: (L, B, last, d) fp32 on the CPU.

    Args:
        model: a causal language model in evaluation mode.
        layers: all of its layers.
        tokens: (B, T) int64, without padding.
        last: number of positions, at most T.
    """
    outputs: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        outputs.append(states[:, -last:].float().cpu())

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    return torch.stack(outputs)
