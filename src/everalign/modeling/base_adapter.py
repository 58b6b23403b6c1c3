"""PEFT adapters as starting points: find one and merge it into its base model before anything else is done.

Everything after that knows one base model: the reference `base`, what task adapters sit on, and what an export holds.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from transformers.utils.peft_utils import find_adapter_config_file

from everalign.errors import InputError
from everalign.modeling.prompt_pool import refuse_prompts
from everalign.storage import read_json

CONFIG_FILE = "adapter_config.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
_FILES = (
    *("adapter_*", "tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model"),
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_PROBE_TOKENS = 32
_TOLERANCE = 1e-4
_UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, SafetensorError)


def base_and_adapter(name: str, source: str, adapter: str | None = None) -> tuple[str, str | None]:
    """Find out whether a model's name stands for a base model or for an adapter.

    Args:
        name: the model, as the user named it.
        source: where it was found.
        adapter: the adapter that is to be merged into it, if the user named one.

    Returns:
        The base model's name, and the adapter's or None.

    Raises:
        InputError: the model is an adapter that does not name its base model, or a second adapter; or its folder holds
            both a model's weights and an adapter, and it is not clear which is meant.
    """
    file = _adapter_config(source)
    if file is None:
        return name, adapter
    if any(any(file.parent.glob(pattern)) for pattern in _WEIGHTS):
        if adapter is not None and Path(adapter).resolve() == Path(source).resolve():
            return name, adapter
        raise InputError(
            f"{name} holds the weights of a model and an adapter beside them ({CONFIG_FILE}): for both, give it as the "
            f"adapter too (--base-adapter {name}); for the weights alone, move {CONFIG_FILE} away"
        )
    if adapter is not None:
        raise InputError(f"{name} is an adapter itself, and only one can be merged: name its base model as the model")
    base = _settings(file).get("base_model_name_or_path")
    if not base:
        raise InputError(
            f"{name} is an adapter that does not name its base model: give that as the model (--model BASE "
            f"--base-adapter {name})"
        )
    if Path(base).is_absolute() and not Path(base).exists():
        raise InputError(
            f"{name} is an adapter of {base}, which cannot be found: give its base model as the model (--model BASE "
            f"--base-adapter {name})"
        )
    return str(base), name


def _adapter_config(source: str) -> Path | None:
    """The adapter's configuration in a folder or a repository of the Hub."""
    if Path(source).exists():
        file = Path(source) / CONFIG_FILE
        return file if file.is_file() else None
    try:
        found = find_adapter_config_file(source)
    except (OSError, ValueError):
        return None  # loading the model says what is wrong with its name
    return None if found is None else Path(found)


def _settings(file: Path) -> dict[str, Any]:
    found = read_json(file)
    if not isinstance(found, dict):
        raise InputError(f"{file}: damaged, it holds no settings; restore the file")
    return found


@contextmanager
def without_adapter(source: str) -> Iterator[str]:
    """Yield a folder with the same model but no adapter beside it, which transformers would apply by itself."""
    file = _adapter_config(source)
    if file is None or not Path(source).is_dir():
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in Path(source).iterdir():
            if not path.name.startswith("adapter_"):
                os.symlink(path.resolve(), Path(folder) / path.name)
        yield folder


def adapter_folder(source: str) -> Path:
    """Return the folder of an adapter, from the Hub where it is no folder.

    Raises:
        InputError: no adapter is there.
    """
    folder = Path(source)
    if not folder.exists():
        try:
            folder = Path(snapshot_download(source, allow_patterns=list(_FILES)))
        except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"there is no folder {source}, and no adapter of that name could be loaded from the Hub: {reason}"
            ) from error
    refuse_prompts(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{source}: no adapter here (it has no {CONFIG_FILE})")
    return folder


def adapter_files(source: str) -> list[Path]:
    """Return an adapter's files and those of its tokenizer, without what its training left beside them."""
    return sorted({file for pattern in _FILES for file in adapter_folder(source).glob(pattern) if file.is_file()})


def tokenizer_folder(source: str) -> str | None:
    """Return the adapter's folder if it brings a tokenizer along, which is then the one it was trained with."""
    folder = adapter_folder(source)
    return str(folder) if any((folder / name).is_file() for name in _TOKENIZER_FILES) else None


def merge_adapter(model: Any, source: str, base: str) -> Any:
    """Merge an adapter of any kind that peft merges (LoRA with all its variants, IA3, LoHa, ...) into its base model.

    Args:
        model: a causal language model in fp32 on the CPU; changed in place.
        source: the adapter, where it was found.
        base: the model's name, for errors.

    Returns:
        The model, plain again.

    Raises:
        InputError: no adapter is there, it is damaged or none of this model, it is of a kind that is not merged into
            weights, the base is quantised, or the merged model computes something else than model and adapter.
    """
    folder = adapter_folder(source)
    kind = str(_settings(folder / CONFIG_FILE).get("peft_type"))
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError(
            f"{source} cannot be merged into {base}, whose weights are quantised: name the model that it was made of "
            f"(--model BASE --base-adapter {source})"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except _UNREADABLE as error:
        raise InputError(f"{folder / CONFIG_FILE}: damaged, or of a kind that peft does not know: {error}") from error
    if config.task_type not in (None, "CAUSAL_LM"):
        raise InputError(f"{source} is an adapter for {config.task_type}, not of a causal language model (CAUSAL_LM)")
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise InputError(f"{source} is an adapter of type {kind}, which has no weights to merge into the model's own")
    _untie(model, config)
    try:
        weights = load_peft_weights(str(folder), device="cpu")
        _resize(model, weights)
        peft_model = PeftModel.from_pretrained(model, str(folder)).eval()
        # Once more, for what it reports: peft passes over weights that have no place in the model.
        report = peft_model.load_adapter(str(folder), "default")
        # An embedding that was resized is saved twice.
        part = ".modules_to_save"
        twice = [name for name in report.unexpected_keys if part in name and name.replace(part, "", 1) in weights]
        if strange := [*(name for name in report.unexpected_keys if name not in twice), *report.missing_keys]:
            raise InputError(
                f"{source} is not an adapter of {base}: {len(strange)} weights differ, such as {strange[0]}"
            )
        probe = torch.arange(_PROBE_TOKENS)[None] % model.config.get_text_config().vocab_size
        with torch.no_grad():
            expected = peft_model(input_ids=probe).logits
            merged = peft_model.merge_and_unload(safe_merge=True)
            found = merged(input_ids=probe).logits
    except InputError:
        raise
    except _UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the adapter {source} (type {kind}) cannot be merged into {base}: {reason}") from error
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= _TOLERANCE:
        raise InputError(
            f"the adapter {source} (type {kind}) cannot be merged into {base}: the merged model's logits differ by "
            f"{difference:.2e} of their size"
        )
    # Or peft takes the plain model for one that it has adapted already.
    vars(merged).pop("peft_config", None)
    return merged


def _untie(model: Any, config: Any) -> None:
    """Give the head weights of its own where the adapter changes it or the embedding, and they were one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or head.weight is not embedding.weight:
        return
    names = [name for name, module in model.named_modules() if module in (head, embedding)]
    targets = getattr(config, "target_modules", None) or ()
    # One text is a regular expression, as in peft.
    matched = isinstance(targets, str) and any(re.fullmatch(targets, name) for name in names)
    listed = () if isinstance(targets, str) else targets
    touched = {name.rsplit(".", 1)[-1] for name in (*listed, *(getattr(config, "modules_to_save", None) or ()))}
    if matched or touched & {name.rsplit(".", 1)[-1] for name in names}:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _resize(model: Any, weights: dict[str, Any]) -> None:
    """Resize the model's embeddings to the adapter's, if it was trained with added tokens."""
    tables = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight")
    rows = {weight.shape[0] for name, weight in weights.items() if name.endswith(tables) and weight.ndim == 2}
    if len(rows) == 1 and (count := rows.pop()) != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(count, mean_resizing=False)
