"""Load base models and tokenizers: by folder, Hub name, GGUF file or adapter, quantised or not, in one precision."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    modeling_utils,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from everalign.data.tokenization import SHORTEST_MAX_LENGTH
from everalign.errors import InputError
from everalign.modeling.architecture import study_lengths
from everalign.modeling.base_adapter import base_and_adapter, merge_adapter, tokenizer_folder, without_adapter
from everalign.modeling.base_weights import (
    Places,
    cast,
    check_known,
    check_no_adapter,
    check_quantised,
    is_offloaded,
    keep_differentiable,
    places,
    quantize_on_loading,
)
from everalign.modeling.gguf import SMOLLM2, smollm2_path, unpacked
from everalign.modeling.positions import named_length
from everalign.modeling.runtime import returning_memory
from everalign.options import Precision, PrecisionChoice, Quantize, check_model_path
from everalign.storage import read_json


def tiny_assistant_path() -> Path:
    """The embedded assistant's folder, a Hugging Face model (built by `scripts/build_tiny_assistant.py`)."""
    return Path(__file__).resolve().parent / "tiny_assistant"


TINY = "tiny"

_SAMPLED_VALUES = 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# What transformers raises, and what the code of a model raises that was written for another version of it.
UNLOADABLE = (OSError, ValueError, RuntimeError, SafetensorError, ImportError, AttributeError, TypeError, LookupError)

_process = {"remote code": False}


def allow_remote_code(allowed: bool = True) -> None:
    """Let models and tokenizers that come with Python code of their own run it in this process.

    It is never asked for on the terminal: without this, such a model is refused.
    """
    _process["remote code"] = allowed


def resolve_precision(wanted: PrecisionChoice, device: torch.device) -> Precision:
    """Return the precision to compute in: for `auto`, bf16 on a GPU that has it, and fp32 elsewhere.

    Raises:
        InputError: bf16 is asked of a GPU that does not have it.
    """
    if device.type != "cuda":
        return "fp32" if wanted == "auto" else wanted
    able = torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and not able:
        name = torch.cuda.get_device_name(device)
        raise InputError(f"precision: {name} does not compute in bf16; take fp32 (fp16 is not offered: it overflows)")
    return wanted if wanted != "auto" else "bf16" if able else "fp32"


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
    check_model_path(name)
    return str(name)


def load_model(
    name: str,
    precision: Precision = "fp32",
    *,
    adapter: str | None = None,
    device: torch.device | None = None,
    quantize: Quantize | None = None,
    device_map: str | None = None,
) -> Any:
    """Load the frozen base model.

    Args:
        name: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` for the embedded assistant, `smollm2` for
            SmolLM2-135M-Instruct, or a PEFT adapter, which stands for its base model with the adapter merged into it.
        precision: dtype of the base weights. Adapters are fp32 whatever this says. The weights of a quantised model
            stay as they are, and this is what they are computed in.
        adapter: a PEFT adapter to be merged into it, in fp32.
        device: where it is to be; the CPU when None.
        quantize: the format that its linear modules are quantised to as they are read; None to leave them as they are.
        device_map: `auto`, `balanced` or a file that says where its modules go; all of it goes to `device` when None.

    Raises:
        InputError: nothing loadable is there, it is not a causal language model, it needs a package that is missing or
            code of its own that was not allowed (see `allow_remote_code`), the adapter is none that can be merged, or
            the model cannot be quantised.
    """
    base, adapter = base_and_adapter(name, resolve_model(name), adapter)
    source = resolve_model(base)
    dtype = DTYPES["fp32" if adapter else precision]
    config = load_config(source, "model", base)
    kind, packing = language_model_class(config), None
    place: torch.device | Places | None = None if adapter else device
    if device_map is not None:
        place = places(device_map, partial(on_meta, kind, config, dtype), quantize)
    if quantize is not None:
        check_no_adapter(adapter, quantize)
        packing = quantize_on_loading(config, base, quantize, dtype)
    if (ends := Path(source) / "generation_config.json").is_file():
        read_json(ends)  # transformers would go on without it where it is damaged, and never stop at its end tokens
    with without_adapter(source) as weights:
        model, loaded = load_weights(kind, "model", base, weights, config, dtype, place, packing)
    if missing := sorted(loaded["missing_keys"]):
        # They would be random numbers.
        raise InputError(f"the weights of {base} lack {len(missing)} of the model's parameters, such as {missing[0]}")
    model.config._name_or_path = model.name_or_path = source
    if adapter is not None:
        model = merge_adapter(model, resolve_model(adapter), base)
        cast(model, DTYPES[precision])
        model.to(device or "cpu")
    model.eval()
    model.requires_grad_(False)
    return model


def language_model_class(config: Any) -> Any:
    """Return the auto class that makes a language model of a configuration.

    Some models that read images too, such as Llava and Qwen2.5-VL, transformers makes by another class; given texts
    alone they are language models like others.
    """
    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_config(source: str, what: str, name: str, **changes: Any) -> Any:
    """Return the configuration of what `resolve_model` found; errors as in `load_weights`."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=_process["remote code"], **changes)
    except UNLOADABLE as error:
        raise InputError(cannot_load(what, name, error)) from error


def load_weights(
    auto: Any,
    what: str,
    name: str,
    source: str,
    config: Any,
    dtype: torch.dtype,
    device: torch.device | Places | None = None,
    packing: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Load a model of one of transformers' auto classes, without holding its weights in two precisions at once.

    Args:
        auto: the auto class.
        what: what it makes, for the error.
        name: the model, as the user named it.
        source: where `resolve_model` found it.
        config: its configuration.
        dtype: of the weights, as far as they are not quantised.
        device: where they are to be, or where each module's are; the CPU when None.
        packing: how plain weights are quantised as they are read (see `quantize_on_loading`); None to leave them.

    Returns:
        The model, and which weights were missing.

    Raises:
        InputError: it cannot be loaded.
    """
    # It would run through whatever else is shown meanwhile; nobody sees it on the way into a log.
    transformers_logging.disable_progress_bar()
    # peft asks transformers for an attribute under its former name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    method = check_known(config, name)
    # Quantised weights cannot be moved later, some of them, and others need not take the way over the CPU either.
    place: dict[str, Any] = {}
    if isinstance(device, dict):
        place["device_map"] = device
    elif device is not None and device.type != "cpu":
        place["device_map"] = {"": device}
    tidying: AbstractContextManager[None] = nullcontext()
    if packing is not None:
        place["quantization_config"], tidying = packing, returning_memory()
    try:
        with _read_one_by_one(config, None if packing is not None else dtype), tidying:
            model, loaded = auto.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=_process["remote code"],
                **place,
            )
    except UNLOADABLE as error:
        raise InputError(cannot_load(what, name, error, method)) from error
    if method is not None and getattr(model, "hf_quantizer", None) is None:
        # transformers has turned them back into plain numbers, in another precision than those that were plain.
        cast(model, dtype)
        model._weight_conversions = None
    if packing is not None:
        check_quantised(model, name)
    if method is not None or packing is not None:
        keep_differentiable(model)
    return model, loaded


def load_base(
    name: str,
    precision: Precision,
    *,
    adapter: str | None = None,
    device: torch.device | None = None,
    quantize: Quantize | None = None,
    device_map: str | None = None,
) -> tuple[Any, str]:
    """Load a run's base model; returns it and what identifies it.

    Of a model that is quantised here, that is the fingerprint of its plain weights, which an export has to find again,
    and the format; of one with weights elsewhere, that of all of them. Arguments and errors as in `load_model`.
    """
    model = load_model(name, precision, adapter=adapter, device=device, quantize=quantize, device_map=device_map)
    if quantize is None and not is_offloaded(model):
        return model, model_fingerprint(model)
    # The plain weights stay in the memory map of their files.
    source = resolve_model(name)
    config = load_config(source, "model", name)
    own = getattr(config, "dtype", None) or torch.float32
    plain, _ = load_weights(language_model_class(config), "model", name, source, config, own)
    return model, base_key(model_fingerprint(plain, DTYPES[precision]), quantize)


def base_key(fingerprint: str, quantize: str | None) -> str:
    """Return what identifies a base model of this fingerprint that is quantised to this format, or None."""
    return fingerprint if quantize is None else f"{fingerprint}-{quantize}"


def on_meta(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return a model of an auto class without a single weight."""
    with torch.device("meta"):
        return kind.from_config(config, dtype=dtype, trust_remote_code=_process["remote code"])


@contextmanager
def _read_one_by_one(config: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Read weights that are to be cast, or quantised (`dtype` None), tensor by tensor, not through a memory map.

    The pages of a map that were read count until the whole file is closed: an fp32 copy of a bf16 file would take the
    file's size in addition to its own. Weights that are not cast stay in the map.
    """
    if getattr(config, "dtype", None) == dtype:
        yield
        return

    def opened(file: Any, framework: str, device: Any = "cpu", backend: str = "pread") -> Any:
        return safe_open(file, framework=framework, device=device, backend="pread")

    modeling_utils.safe_open = opened
    try:
        yield
    finally:
        modeling_utils.safe_open = safe_open


def load_tokenizer(name: str, *, adapter: str | None = None) -> Any:
    """Load the model's tokenizer, or the one that comes with the adapter.

    One that names no end-of-text token has the one that its model's configuration names.

    Raises:
        InputError: there is none, it has no end-of-text token, or it needs code of its own that was not allowed.
    """
    base, adapter = base_and_adapter(name, resolve_model(name), adapter)
    source = tokenizer_folder(resolve_model(adapter)) if adapter is not None else None
    try:
        # mistral-common's own tokenizers, which transformers prefers for folders with a tekken.json, know nothing of
        # templates and places in a text; transformers reads the same file into one of its own.
        tokenizer = AutoTokenizer.from_pretrained(
            source or resolve_model(base), trust_remote_code=_process["remote code"], mistral_format=False
        )
    except UNLOADABLE as error:
        raise InputError(cannot_load("tokenizer", name, error)) from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(source or resolve_model(base))
    if tokenizer.eos_token_id is None:
        with suppress(InputError):  # a folder with a tokenizer alone
            ids = load_config(resolve_model(base), "model", name).get_text_config().eos_token_id
            first = ids[0] if isinstance(ids, list) else ids
            if first is not None and first < len(tokenizer):
                tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no end-of-text token: set `eos_token` in its config")
    return tokenizer


def _processor_template(source: str) -> Any:
    """Return the template that older models which read images keep for their processor alone; None without one."""
    file = cached_file(
        source, "chat_template.json",
        _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if file is None:
        return None
    found = read_json(Path(file))
    if not isinstance(found, dict) or not isinstance(found.get("chat_template"), str | dict):
        raise InputError(f"{file}: holds no 'chat_template'; restore the file")
    return found["chat_template"]


def cannot_load(what: str, name: str, error: Exception, quantised: str | None = None) -> str:
    """Return one line on why a model or tokenizer could not be loaded, and what helps."""
    if "trust_remote_code" in str(error):
        return (
            f"the {what} {name} comes with Python code of its own, which is not run unasked: read it, and if you trust "
            "it, give --trust-remote-code"
        )
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = lines[0].strip() if lines else type(error).__name__
    if quantised is not None:
        return f"{name} is quantised with {quantised}, and cannot be loaded here: {reason}"
    if Path(name).exists():
        return f"cannot load a {what} from the folder {name}: {reason}"
    return f"there is no folder {name}, and no {what} of that name could be loaded from the Hub: {reason}"


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
    lengths, named = study_lengths(model), named_length(model.config) or math.inf
    stretched = math.inf if lengths.stretch is None else lengths.stretch.limits[0]
    limit = min(named, lengths.longest or math.inf)
    if wanted is None:
        # Some families keep positions for themselves; their tokenizer's limit says what is left.
        return int(min(default, limit, stretched, tokenizer.model_max_length))
    if wanted > limit:
        raise InputError(f"max_length: {name} takes at most {limit} tokens, found {wanted}")
    if wanted > stretched:
        what = "its output for a row depends on the longest row beside it"
        raise InputError(f"max_length: {name} stretches its positions beyond {stretched} tokens, where {what}")
    return wanted


def readable_length(wanted: int, model: Any, name: str, log: Callable[[str], None], prefix: int = 0) -> int:
    """Return how many tokens of a row a language model learns from: what is wanted, or what it can read.

    Args:
        wanted: tokens of prompt and answer together.
        model: a loaded model.
        name: the model's, as the user named it.
        log: called with a line where rows are cut, or longer than what the model was made for.
        prefix: tokens that will stand in front of every prompt besides.

    Raises:
        InputError: they leave no room for a row.
    """
    longest, named = study_lengths(model).longest, named_length(model.config)
    beside = f", with {prefix} in front of every prompt" if prefix else ""
    if longest is not None and longest - prefix < wanted:
        if longest - prefix < SHORTEST_MAX_LENGTH and prefix:
            raise InputError(f"{name} can read {longest} tokens{beside}: that leaves no room for prompts and answers")
        log(f"max_length is {longest - prefix} instead of {wanted}, the most tokens that {name} can read{beside}")
        return longest - prefix
    if longest is None and named is not None and named < wanted + prefix:
        log(f"max_length is {wanted}{beside}, while {name} was made for rows of up to {named} tokens")
    return wanted


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer with tokens that a model has no embeddings for, where its texts would hold them.

    Tokens that no text holds, such as those for images or padding, may lie beyond the embeddings.

    Raises:
        InputError: names the numbers of both.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    used = [
        token
        for token in beyond
        if token in (tokenizer.bos_token, tokenizer.eos_token) or token in (tokenizer.chat_template or "")
    ]
    plain = [token for token, number in beyond.items() if number < tokenizer.vocab_size]
    if used or plain:
        token = (used or plain)[0]
        raise InputError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens and the model embeddings for {rows}: {token!r} is "
            f"number {beyond[token]}; use the tokenizer that the model was trained with, or resize its embeddings"
        )


def model_fingerprint(model: Any, dtype: torch.dtype | None = None) -> str:
    """Identify base weights in well under a second for billions of parameters.

    Args:
        model: a loaded model.
        dtype: returns the fingerprint that it has once it is loaded in this precision; its own when None.

    sha256 over the model's class and the names, shapes, dtypes and up to 4,096 evenly spaced values of every
    parameter. It tells models and fine-tunes apart; it is no defence against forged weights.
    """
    digest = hashlib.sha256(getattr(model, "fingerprinted_as", type(model).__name__).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = -(-flat.numel() // _SAMPLED_VALUES)
        kind = parameter.dtype if dtype is None or not parameter.is_floating_point() else dtype
        digest.update(f"{name}{tuple(parameter.shape)}{kind}".encode())
        digest.update(flat[::step].to(kind).float().cpu().numpy().tobytes())
    return digest.hexdigest()
