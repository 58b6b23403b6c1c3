"""Quantised weights: what they are, quantising plain ones as they are loaded, and what cannot be done with them."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from everalign.errors import InputError
from everalign.modeling.options import Quantize


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
