"""Load a causal language model and its tokenizer, and recognise the same model again."""

import hashlib
import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from everalign.errors import InputError
from everalign.modeling.gguf import SMOLLM2, smollm2_path, unpacked
from everalign.modeling.tiny import tiny_assistant_path

Precision = Literal["fp32", "bf16"]
TINY = "tiny"

_SAMPLED_VALUES = 4096


def resolve_model(name: str) -> str:
    """Turn `tiny` and `smollm2` and GGUF files into folders; leave folders and Hub names as they are.

    Raises:
        InputError: the name can only be a path, and nothing is there (the Hub would be asked for minutes); a GGUF file
            cannot be read; or the package that holds SmolLM2 is missing.
    """
    if name == TINY:
        return str(tiny_assistant_path())
    if name == SMOLLM2:
        return str(unpacked(smollm2_path()))
    if Path(name).suffix.lower() == ".gguf" and Path(name).is_file():
        return str(unpacked(Path(name).resolve()))
    only_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix.lower() == ".gguf"
    if only_path and not Path(name).exists():
        kind = "file" if Path(name).suffix.lower() == ".gguf" else "folder"
        raise InputError(f"there is no model {kind} {name}")
    return str(name)


def load_model(name: str, precision: Precision = "fp32") -> Any:
    """Load the frozen base model.

    Args:
        name: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` for the embedded assistant, or
            `smollm2` for SmolLM2-135M-Instruct.
        precision: dtype of the base weights. Adapters are fp32 whatever this says.

    Raises:
        InputError: nothing loadable is there, or it is not a causal language model.
    """
    source = resolve_model(name)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    try:
        config = AutoConfig.from_pretrained(source)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(cannot_load("model", name, error)) from error
    if missing := sorted(loaded["missing_keys"]):
        # They would be random numbers.
        raise InputError(f"the weights of {name} lack {len(missing)} of the model's parameters, such as {missing[0]}")
    model.eval()
    model.requires_grad_(False)
    return model


def load_tokenizer(name: str) -> Any:
    """Load the model's tokenizer; raises InputError where there is none or it has no end-of-text token."""
    source = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(cannot_load("tokenizer", name, error)) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no end-of-text token: set `eos_token` in its config")
    return tokenizer


def cannot_load(what: str, name: str, error: Exception) -> str:
    """Say why there is no model or tokenizer of that name."""
    reason = str(error).strip().splitlines()[0]
    if Path(name).exists():
        return f"cannot load a {what} from the folder {name}: {reason}"
    return f"there is no folder {name}, and no {what} of that name could be had from the Hub: {reason}"


def sequence_limit(wanted: int | None, default: int, model: Any, tokenizer: Any, name: str) -> int:
    """Return how many tokens a sequence may have.

    Args:
        wanted: the user's limit; None for the default, or for what the model can take if it is less.
        default: that default.
        model: a loaded model.
        tokenizer: its tokenizer.
        name: the model's, as the user named it.

    Raises:
        InputError: more is wanted than the model can take.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if wanted is None:
        # Some families keep positions for themselves; their tokenizer's limit says what is left.
        return int(min(default, limit, tokenizer.model_max_length))
    if wanted > limit:
        raise InputError(f"max_length: {name} takes at most {limit} tokens, found {wanted}")
    return wanted


def model_fingerprint(model: Any, dtype: torch.dtype | None = None) -> str:
    """Identify base weights in well under a second for billions of parameters.

    Args:
        model: a loaded model.
        dtype: returns the fingerprint that it has once it is loaded in this precision; its own when None.

    sha256 over the model's class and the names, shapes, dtypes and up to 4,096 evenly spaced values of every
    parameter. It tells models and fine-tunes apart; it is no defence against somebody who forges weights.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = -(-flat.numel() // _SAMPLED_VALUES)
        kind = parameter.dtype if dtype is None else dtype
        digest.update(f"{name}{tuple(parameter.shape)}{kind}".encode())
        digest.update(flat[::step].to(kind).float().cpu().numpy().tobytes())
    return digest.hexdigest()
