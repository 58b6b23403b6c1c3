"""The residual stream of a decoder: what each layer passes on, read, or shifted while something is computed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from everalign.errors import InputError


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return a causal language model's layers, the one nearest to the tokens first.

    Raises:
        InputError: the model does not hold its layers in one list.
    """
    found = layer_list(model)
    if found is None:
        config = model.config.get_text_config()
        count = config.num_hidden_layers
        raise InputError(
            f"a {config.model_type} model cannot be steered: it does not hold its {count} layers in one list"
        )
    return found


def layer_list(model: Any) -> list[nn.Module] | None:
    """Return a model's layers where it holds them in one list, the one nearest to the tokens first."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (part for part in model.base_model.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    found = next(lists, None)
    return None if found is None else list(found)


@contextmanager
def shifted(layers: Sequence[nn.Module], shifts: Mapping[int, Tensor]) -> Iterator[None]:
    """Add a vector to what layers pass on at every position, for what this thread computes meanwhile.

    Args:
        layers: of one model.
        shifts: by the layer's number, a vector (d,) of any dtype and device.
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
        for number, shift in shifts.items():
            stack.callback(layers[number].register_forward_hook(hook(shift)).remove)
        yield


@torch.no_grad()
def residuals(model: Any, layers: Sequence[nn.Module], tokens: Tensor, last: int) -> Tensor:
    """Return what each of L layers passes on at the last positions: (L, B, last, d) fp32 on the CPU.

    Args:
        model: a causal language model in evaluation mode.
        layers: all of its layers.
        tokens: (B, T) int64, without padding.
        last: positions, at most T.
    """
    found: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found.append(states[:, -last:].float().cpu())

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    return torch.stack(found)
