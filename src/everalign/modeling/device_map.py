"""Spread a base model's layers over several devices, or leave some of them on the CPU or on disk, by accelerate.

What is no layer (embeddings, last norm, head) stays together on the first device, where batches are and log-probs are
computed. Layers on the CPU or on disk are brought to that device for each pass, and again for the backward pass where
activations are computed again.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import CustomDtype, get_balanced_memory, infer_auto_device_map
from torch import nn

from everalign.distributed import world
from everalign.errors import InputError
from everalign.modeling.options import Quantize
from everalign.modeling.shrinking import layer_list
from everalign.storage import read_json

Places = dict[str, Any]
"""A device, `cpu` or `disk` by the name of a module, as accelerate and transformers take it."""

WAYS = ("auto", "balanced")
_ELSEWHERE = ("cpu", "disk")


def check_device_map(text: str | None, attention: str, adapter: str | None) -> None:
    """Refuse a device map where it cannot be used, before anything is loaded.

    Args:
        text: `auto`, `balanced`, a file, or None for no map.
        attention: of the run.
        adapter: the adapter that is to be merged into the model; None for none.
    """
    if text is None:
        return
    why = None
    if world() > 1:
        why = (
            f"one process spreads a model over its devices, found {world()} processes, each of which holds all of it: "
            "leave device_map or the processes out"
        )
    elif attention == "flex":
        why = "flex attention keeps its mask on one device: use attention sdpa"
    elif adapter is not None:
        why = f"{adapter} is merged on the CPU: write the merged model first, and name that as the model"
    if why is not None:
        raise InputError(f"device_map: {why}", field="device_map")
    if text not in WAYS:
        _read(Path(text))


def _read(path: Path) -> Places:
    """Read a map from a JSON file: {"model.embed_tokens": 0, "model.layers.0": "cpu", ...}."""
    if not path.is_file():
        raise InputError(f"device_map: {path}: no such file; give auto, balanced or a file", field="device_map")
    found = read_json(path)
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path}: must hold devices by the names of modules")
    gpus = torch.cuda.device_count()
    for name, place in found.items():
        try:
            device = torch.device("cuda", place) if type(place) is int else torch.device(place.replace("disk", "cpu"))
        except (RuntimeError, AttributeError):
            device = None
        if device is None:
            raise InputError(f"{path}: {name}: must be a device such as 0, cpu or disk, found {place!r}", field=name)
        if device.type != "cpu" and (device.index or 0) >= gpus:
            raise InputError(f"{path}: {name}: there is no GPU {place}, {gpus} are visible", field=name)
    return found


def places(text: str, make: Callable[[], Any], quantize: Quantize | None) -> Places:
    """Return where a model's modules go.

    Args:
        text: `auto` or `balanced` (the same to accelerate: GPUs evenly, then the CPU, then disk), or a file.
        make: builds the model on the meta device.
        quantize: the format that its linear modules are quantised to.

    Raises:
        InputError: the file is none, or splits what has to stay together.
    """
    model = make()
    layers = _layer_names(model)
    if text in WAYS:
        size = CustomDtype.INT4 if quantize is not None else None
        kinds = sorted({type(model.get_submodule(name)).__name__ for name in layers})
        memory = get_balanced_memory(model, dtype=size, no_split_module_classes=kinds)
        found: Places = infer_auto_device_map(model, memory, no_split_module_classes=kinds, dtype=size)
    else:
        found = _read(Path(text))
    return _together(found, model, layers, text)


def _layer_names(model: Any) -> list[str]:
    layers = layer_list(model)
    if layers is None:
        raise InputError(f"device_map: the layers of this {type(model).__name__} are not known", field="device_map")
    ids = {id(layer) for layer in layers}
    return [name for name, module in model.named_modules() if id(module) in ids]


def _place_of(name: str, found: Mapping[str, Any]) -> Any:
    """Return the place of a module: its own, or that of the module around it."""
    parts = name.split(".")
    around = (".".join(parts[:count]) for count in range(len(parts), -1, -1))
    return next((found[each] for each in around if each in found), None)


def _together(given: Places, model: Any, layers: list[str], text: str) -> Places:
    """Return the map layer by layer, with all that is no layer on one device."""
    others = list(_beside(model, "", layers))
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    first = _place_of(embedding, given)
    found = {name: _place_of(name, given) for name in layers}
    if missing := [name for name, place in (*found.items(), (embedding, first)) if place is None]:
        raise InputError(f"{text}: no place for {missing[0]}: name it, or the module around it", field=missing[0])
    if first == "disk" or (first == "cpu" and any(place not in _ELSEWHERE for place in found.values())):
        raise InputError(
            f"device_map: {embedding} would be on {first}; embeddings, last norm and head have to be on a device that "
            "computes: give the first one more room, or a file with a map",
            field="device_map",
        )
    if text not in WAYS:
        for name in others:
            if (own := _place_of(name, given)) not in (None, first):
                raise InputError(f"{text}: {name} is on {own}: all that is no layer has to be on {first}", field=name)
    whole = {**dict.fromkeys(others, first), **found}
    return {"": first} if set(whole.values()) == {first} else whole


def _beside(module: nn.Module, prefix: str, layers: list[str]) -> Iterator[str]:
    """Yield the names of the largest modules that hold no layer and are none."""
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if any(layer.startswith(f"{full}.") for layer in layers):
            yield from _beside(child, f"{full}.", layers)
        elif full not in layers:
            yield full


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of a module are elsewhere, and brought to its device for each pass."""
    return any(parameter.is_meta for parameter in module.parameters())


def place_adapter(layer: Any, adapter: str) -> None:
    """Put an adapter's factors where its layer computes; peft puts them where the layer's weight is, which is nowhere.

    Their values are to be written afterwards.
    """
    hook = getattr(layer.get_base_layer(), "_hf_hook", None)
    if hook is None:
        return
    for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
        if part.weight.is_meta:
            part.to_empty(device=hook.execution_device)
