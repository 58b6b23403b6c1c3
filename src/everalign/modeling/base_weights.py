"""A base model's weights: quantised or plain, and on which devices.

accelerate spreads layers over several devices, or leaves some of them on the CPU or on disk. What is no layer
(embeddings, last norm, head) stays together on the first device, where batches are and log-probs are computed. Layers
on the CPU or on disk are brought to that device for each pass, and again for the backward pass where activations are
computed again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import CustomDtype, get_balanced_memory, infer_auto_device_map
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from everalign.distributed import world
from everalign.errors import InputError
from everalign.modeling.shrinking import layer_list
from everalign.options import Quantize
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
    found_layers = layer_list(model)
    if found_layers is None:
        raise InputError(f"device_map: the layers of this {type(model).__name__} are not known", field="device_map")
    ids = {id(layer) for layer in found_layers}
    layers = [name for name, module in model.named_modules() if id(module) in ids]
    if text in WAYS:
        size = CustomDtype.INT4 if quantize is not None else None
        kinds = sorted({type(model.get_submodule(name)).__name__ for name in layers})
        memory = get_balanced_memory(model, dtype=size, no_split_module_classes=kinds)
        found: Places = infer_auto_device_map(model, memory, no_split_module_classes=kinds, dtype=size)
    else:
        found = _read(Path(text))
    return _together(found, model, layers, text)


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


def quantisation(config: Any) -> str | None:
    """Return how the weights of a model are quantised, such as `bitsandbytes`; None where they are plain numbers."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    if not found:
        return None
    settings = found if isinstance(found, dict) else vars(found)
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # as it was written before there were others
    return str(getattr(method, "value", method or "a method that it does not name"))


def check_known(config: Any, name: str) -> str | None:
    """Return how a model is quantised; InputError where transformers would take such weights for plain numbers."""
    method = quantisation(config)
    if method is not None and method not in {*QuantizationMethod, *AUTO_QUANTIZATION_CONFIG_MAPPING}:
        raise InputError(f"{name} is quantised with {method}, which transformers does not know: take the plain model")
    return method


def check_library(quantize: Quantize | None) -> None:
    """Refuse to quantise where the library for it is missing."""
    if quantize is not None and find_spec("bitsandbytes") is None:
        raise InputError(f"quantize {quantize} needs bitsandbytes: pip install 'everalign[quantize]'", field="quantize")


def check_plain(config: Any, name: str) -> None:
    """Refuse to quantise what is quantised already."""
    if (method := quantisation(config)) is not None:
        raise InputError(
            f"{name} is quantised already, with {method}: leave quantize out, or name the plain model", field="quantize"
        )


def check_no_adapter(adapter: str | None, quantize: Quantize | None) -> None:
    """Refuse to quantise what an adapter has to be merged into."""
    if quantize is not None and adapter is not None:
        raise InputError(
            f"quantize {quantize}: an adapter is merged into plain weights; write the merged model first "
            "(everalign export, or peft's merge_and_unload), and name that as the model",
            field="quantize",
        )


def quantize_on_loading(
    config: Any, name: str, quantize: Quantize, dtype: torch.dtype, plain: Sequence[str] | None = None
) -> Any:
    """Return what lets transformers quantise a model's linear modules, but for its head, while it reads their weights.

    NF4 with quantised scales is QLoRA's format (Dettmers et al. 2023, section 3): 4.127 bits a weight.

    Args:
        config: the model's.
        name: the model, as the user named it.
        quantize: the format.
        dtype: that products are computed in.
        plain: modules to leave as they are; the head of a language model when None.

    Raises:
        InputError: it is quantised already, or bitsandbytes is missing.
    """
    check_plain(config, name)
    check_library(quantize)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=None if plain is None else list(plain),  # in 4 bits too, whatever its name says
    )


def check_quantised(model: nn.Module, name: str) -> None:
    """Refuse a model of which nothing was quantised as it was loaded."""
    if all(parameter.is_floating_point() for parameter in model.parameters()):
        raise InputError(
            f"{name} has no linear modules below its head that could be quantised: leave quantize out", field="quantize"
        )


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights for inference on a CPU, a way that has no backward pass.

    It packs them for good in the first forward pass without gradients in evaluation mode, in which our models always
    are. The gradient then skips every such layer without an error: on a processor with AVX512-BF16 gradients of
    adapters were off by 70 to 90 % of their norm (bitsandbytes 0.50).
    """
    part: Any
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False


def check_trainable(model: Any, name: str, merged: bool = False) -> None:
    """Refuse a model that is quantised in a way through which no adapter can be trained.

    Args:
        model: as it was loaded.
        name: as the user named it.
        merged: whether the adapter is to be merged into it in the end, which not all such weights allow.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        raise InputError(
            f"{name} is quantised with {quantisation(model.config)}, on which transformers cannot train adapters: "
            "take the unquantised model, or one that is quantised with bitsandbytes"
        )
    if merged and quantizer is not None and type(quantizer)._dequantize is HfQuantizer._dequantize:
        raise InputError(
            f"{name} is quantised with {quantisation(model.config)}, which transformers cannot dequantise, so no "
            "adapter can be merged into it: take the unquantised model"
        )


def plain_weights(model: Any) -> Any:
    """Return a model in fp32 whose weights are plain numbers, as a merge needs them; other models as they are.

    Raises:
        InputError: transformers cannot dequantise weights of this kind.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return model
    method = quantisation(model.config)
    try:
        model = model.dequantize()
    except (NotImplementedError, ValueError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        raise InputError(
            f"the base model is quantised with {method}, which transformers cannot dequantise "
            f"({str(error).splitlines()[0]}), so nothing can be merged into it: use the adapter as it is"
        ) from error
    # How packed weights were read says nothing of how plain ones are written.
    model._weight_conversions = None
    cast(model, torch.float32)
    return model


def check_all_weights(model: Any, name: str) -> None:
    """Refuse to train all weights of a model that is quantised: they are no numbers that a step could change."""
    if (method := quantisation(model.config)) is not None:
        raise InputError(f"{name} is quantised with {method}, so its own weights cannot be trained: give --lora-rank")


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters, one after the other; buffers, such as the frequencies of positions, stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
