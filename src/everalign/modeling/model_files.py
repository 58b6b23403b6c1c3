"""Write a model's folder with other weights: merge an adapter in fp32, check the result, keep every other file."""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from everalign.errors import EveralignError, InputError
from everalign.modeling.base_weights import plain_weights
from everalign.modeling.loading import load_model
from everalign.storage import read_json, write_json

OutputDtype = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_INDEX = ".index.json"
# In the order in which transformers looks for them.
_WEIGHTS = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin", f"pytorch_model.bin{_INDEX}")
# Weights in whatever format: those beside the ones that transformers reads would be those of the base model.
_WEIGHT_SUFFIXES = frozenset(
    (
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data"),
        *(".ot", ".tflite", ".npz", ".pkl", ".nemo", ".distcp"),
    )
)
_LARGEST = 100 << 20
# They describe the base model alone, or are replaced for the new one.
_OF_THE_BASE = frozenset(
    ("README.md", "adapter_config.json", "corrector.json", "steering.json", "everalign_reward.json")
)


def checked_dtype(name: str) -> OutputDtype:
    """Return the name of a dtype of weights; InputError where it is none."""
    known = get_args(OutputDtype)
    if name not in known:
        raise InputError(f"dtype: must be one of {', '.join(known)}, found {name!r}")
    found: OutputDtype = name  # type: ignore[assignment]
    return found


def source_folder(name: str) -> Path:
    """Return the folder of a model, as `resolve_model` names it: that in the Hub's cache where it comes from there."""
    if Path(name).is_dir():
        return Path(name)
    weights = [f"*{suffix}" for suffix in _WEIGHT_SUFFIXES]
    return Path(snapshot_download(name, ignore_patterns=weights))


def copy_other_files(source: Path, folder: Path) -> None:
    """Copy what is no weight: tokenizer, processor, templates, generation configuration, code, licence.

    Left out are files of more than 100 MiB, hidden ones, the base model's card, and folders with weights of their own
    (other formats, checkpoints of its training).
    """
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in _OF_THE_BASE:
            continue
        if path.is_dir():
            if not any(file.suffix in _WEIGHT_SUFFIXES for file in path.rglob("*")):
                (folder / path.name).mkdir()
                copy_other_files(path, folder / path.name)
        elif path.suffix not in _WEIGHT_SUFFIXES and not path.name.endswith(_INDEX) and path.stat().st_size <= _LARGEST:
            shutil.copyfile(path, folder / path.name)


def write_checkpoint(model: Any, folder: Path, dtype: OutputDtype = "auto") -> torch.dtype:
    """Write a model as the checkpoint that it was loaded from, rounding its weights once.

    Args:
        model: in fp32; its weights become what was written of them.
        folder: an empty one.
        dtype: of the weights; each keeps its own on disk with `auto`. Those that the checkpoint itself holds in another
            precision than most, such as biases of a router in fp32, keep theirs.

    Returns:
        The dtype of most weights written.

    Raises:
        InputError: there are no weights in a format that transformers reads, or they do not fit fp16.
        EveralignError: transformers does not say how a tensor on disk is made of the model's weights.
    """
    source = source_folder(model.name_or_path)
    copy_other_files(source, folder)
    if read_json(source / "config.json").get("quantization_config") is not None:
        return _write_unquantised(model, folder, dtype)
    files, index = _weight_files(source)
    most = _most_common_dtype(files)
    wanted = most if dtype == "auto" else DTYPES[dtype]
    values = _Values(model, files)
    added: dict[str, Tensor] = {}
    size = 0
    for file in files:
        written: dict[str, Tensor] = {}
        with _opened(file) as (keys, read):
            for key in keys:
                stored = read(key)
                written[key] = values.written(key, stored, wanted if stored.dtype == most else stored.dtype)
            if file == files[-1]:
                added = values.not_on_disk(wanted)
            size += sum(tensor.nbytes for tensor in (*written.values(), *added.values()))
            save_file(_apart(written | added), folder / _as_safetensors(file.name), metadata={"format": "pt"})
    if index is not None:
        content = read_json(index)
        last = dict.fromkeys(added, files[-1].name)
        content["metadata"] = {**content.get("metadata", {}), "total_size": size}
        content["weight_map"] = {k: _as_safetensors(name) for k, name in (content["weight_map"] | last).items()}
        write_json(folder / _as_safetensors(index.name), content)
    _write_config(folder / "config.json", model, None if dtype == "auto" else wanted, untied=bool(added))
    return wanted


def _write_unquantised(model: Any, folder: Path, dtype: OutputDtype) -> torch.dtype:
    """Write a model in plain numbers whose checkpoint is quantised: its tensors on disk have no places for them."""
    named = getattr(model.config, "dtype", None)
    wanted = DTYPES[dtype] if dtype != "auto" else named if named == torch.float16 else torch.bfloat16
    # Parameters alone: buffers, such as the frequencies of positions, are computed with in fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(wanted)
    model.save_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return wanted


def _write_config(path: Path, model: Any, dtype: torch.dtype | None, *, untied: bool) -> None:
    """Change what differs from the base model's configuration; everything else stays as it was written there."""
    config = read_json(path)
    before = json.dumps(config)
    text = model.config.get_text_config()
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part and dtype is not None:
                part[key] = str(dtype).removeprefix("torch.")
    for part in (config, config.get("text_config")):
        if part is not None and untied:
            part["tie_word_embeddings"] = False
        if part is not None and part.get("vocab_size", text.vocab_size) != text.vocab_size:
            part["vocab_size"] = text.vocab_size
    if json.dumps(config) != before:
        write_json(path, config)


class _Values:
    """What the tensors on disk become.

    Args:
        model: holds the new values, in fp32.
        files: of its checkpoint.
    """

    def __init__(self, model: Any, files: Sequence[Path]) -> None:
        self._model = model
        self._state: dict[str, Tensor] = model.state_dict()
        self._names: dict[str, str] = {}
        self._groups: dict[str, list[str]] = {}  # keys by the first parameter that they are made into
        self._members: dict[str, list[str]] = {}  # parameters by the first of them
        self._reverted: dict[str, Tensor] = {}
        self._seen: set[int] = set()
        found: list[str] = []
        for file in files:
            with _opened(file) as (keys, _):
                found += keys
        self._find_names(found)

    def _find_names(self, keys: Sequence[str]) -> None:
        """Find out which parameter each key is loaded into, as transformers does when it loads them."""
        transforms = get_model_conversion_mapping(self._model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        prefix = self._model.base_model_prefix
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self._state)
            if name not in self._state and key in self._state:
                name, pattern = rename_source_key(key, [], [], prefix, self._state)
            if name not in self._state:
                continue  # nothing that the model has
            self._names[key] = name
            if pattern is not None:
                targets = by_pattern[pattern].target_patterns
                self._groups.setdefault(name, []).append(key)
                self._members[name] = [name.replace(targets[0], target) for target in targets]

    def written(self, key: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what is written for a tensor on disk; the model in memory takes the rounded value."""
        if key not in self._names or not stored.is_floating_point():
            return stored.to(dtype) if stored.is_floating_point() else stored
        name = self._names[key]
        if name in self._groups:
            return self._converted(name, key, stored, dtype)
        value = self._state[name]
        self._seen.add(value.data_ptr())
        found = _rounded(key, value, stored, dtype)
        value.copy_(found)
        return found

    def _converted(self, name: str, key: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """As `written`, of a tensor that is loaded into a part of a parameter, or into several."""
        if key not in self._reverted:
            members = {member: self._state[member] for member in self._members[name]}
            found = revert_weight_conversion(self._model, members)
            if missing := sorted(set(self._groups[name]) - set(found)):
                raise EveralignError(f"cannot write {missing[0]}: transformers does not say how it is made of {name}")
            # Apart from the parameters, which are rounded before all of it is written.
            self._reverted |= {each: found[each].clone() for each in self._groups[name]}
            for value in members.values():
                self._seen.add(value.data_ptr())
                value.copy_(value.to(dtype))
        return _rounded(key, self._reverted.pop(key), stored, dtype)

    def not_on_disk(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what the checkpoint has no place for: a head that was tied to the embeddings and no longer is."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            if parameter.data_ptr() not in self._seen:
                parameter.data.copy_(parameter.to(dtype))
                found |= revert_weight_conversion(self._model, {name: parameter.detach().to(dtype)})
        return found


def _rounded(key: str, value: Tensor, stored: Tensor, dtype: torch.dtype) -> Tensor:
    # Rows may have been added for new tokens.
    if value.shape[1:] != stored.shape[1:]:
        raise EveralignError(f"cannot write {key}: has shape {tuple(stored.shape)} on disk, {tuple(value.shape)} here")
    # Unchanged weights stay bit for bit as they were.
    same = value.shape == stored.shape and torch.equal(value.to(stored.dtype), stored)
    found = (stored if same else value).to(dtype)
    if dtype == torch.float16 and not torch.isfinite(found).all() and torch.isfinite(value).all():
        raise InputError(f"{key} has values beyond the range of fp16: choose --dtype bf16 or fp32")
    return found.contiguous()


def _weight_files(source: Path) -> tuple[list[Path], Path | None]:
    """Return the files that transformers reads weights from, and their index if there are several."""
    found = next((source / name for name in _WEIGHTS if (source / name).is_file()), None)
    if found is None:
        raise InputError(f"{source}: no weights that can be merged into (expected {' or '.join(_WEIGHTS)})")
    if not found.name.endswith(_INDEX):
        return [found], None
    return [source / name for name in sorted(set(read_json(found)["weight_map"].values()))], found


@contextmanager
def _opened(file: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """Yield the names of a file's tensors and what reads one of them, as far as possible without copying it."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            yield list(tensors.keys()), tensors.get_tensor
    else:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        yield list(loaded), loaded.__getitem__


def _most_common_dtype(files: Sequence[Path]) -> torch.dtype:
    """Return the dtype of most floating-point numbers."""
    counts: dict[torch.dtype, int] = {}
    for file in files:
        with _opened(file) as (keys, read):
            for tensor in map(read, keys):
                if tensor.is_floating_point():
                    counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory: a .bin file may hold one under two names."""
    seen: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        found[key] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return found


def _as_safetensors(name: str) -> str:
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


_PROBE_TOKENS = 32
_TOLERANCE = 1e-4
# What rounding the weights may change, as a share of the logits' norm. It is the median of the probe's positions, since
# a router of experts that is undecided about some of them sends these elsewhere after any change.
_ROUNDING = {torch.float32: _TOLERANCE, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# What undoing 4-bit quantisation may change, measured likewise on logits without their mean. NF4 moves those of small
# models by a tenth to a third (docs/large_models.md); those of an unrelated model differ by more than their norm.
_QUANTISATION = 0.6
_PROBE_TEXT = (
    "The capital of France is Paris, which lies on the Seine. People who visit the city for the first time often walk "
    "along the river, and ask where they can have lunch."
)


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        dtype: of most weights, such as `bf16`.
        rounding: by how much rounding to it has changed the logits, as a share of their norm (median of positions).
    """

    dtype: str
    rounding: float


def merged_into(base: Any, adapter: Path) -> Any:
    """Return base model plus adapter as a plain Hugging Face model, in fp32.

    Args:
        base: the base model in fp32; it is changed in place.
        adapter: a PEFT adapter folder of it.

    Raises:
        EveralignError: merged logits differ from the adapter's by more than 1e-4 of their largest value.
    """
    model = PeftModel.from_pretrained(plain_weights(base), str(adapter)).eval()
    expected = logits_of(model)
    merged = model.merge_and_unload()
    error = largest_difference(logits_of(merged), expected)
    if not error <= _TOLERANCE:
        raise EveralignError(f"the merged model's logits differ from the adapter's by {error:.2e} of their size")
    return merged


@torch.no_grad()
def moved_by_quantisation(quantised: Any, adapter: Path, merged: Any, name: str, tokenizer: Any) -> float:
    """Return by how much a merged model's logits differ from those of the adapter on quantised weights.

    Args:
        quantised: the base model as the adapter was learned on it; changed in place.
        adapter: a PEFT adapter folder of it.
        merged: the same adapter merged into plain weights.
        name: the model that the plain weights came from, for the error.
        tokenizer: of both; they are given a text, since quantisation moves more of what no text leads to.

    Returns:
        The share of their norm, logits taken without their mean, which means nothing; the median of the
        positions.

    Raises:
        InputError: it is more than quantisation explains.
    """
    ids = torch.tensor([tokenizer(_PROBE_TEXT)["input_ids"]])
    found = []
    for model in (PeftModel.from_pretrained(quantised, str(adapter)).eval(), merged):
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
        found.append(logits - logits.mean(dim=-1, keepdim=True))
    moved: float = ((found[1] - found[0]).norm(dim=-1).median() / found[0].norm(dim=-1).median()).item()
    if not moved <= _QUANTISATION:
        raise InputError(
            f"merged into {name}, the adapter's logits differ by {moved:.2f} of their norm from those on the quantised "
            f"weights that it was learned on ({_QUANTISATION} is allowed): name the model that was quantised, or "
            "export the adapter alone (--adapter)"
        )
    return moved


def write_checked(model: Any, folder: Path, dtype: OutputDtype = "auto") -> Written:
    """Write a model as `write_checkpoint` does, and compare what is loaded from there with the model in memory.

    Args:
        model: in fp32; it is of no use afterwards, since its weights are given up for those that are loaded.
        folder: an empty one.
        dtype: of the weights.

    Raises:
        InputError: as `write_checkpoint`.
        EveralignError: what was written is another model, or rounding has changed it by more than its dtype should.
    """
    exact = logits_of(model)
    kind = write_checkpoint(model, folder, dtype)
    kept = logits_of(model)
    model.to("meta")
    rounding = ((kept - exact).norm(dim=-1).median() / exact.norm(dim=-1).median()).item()
    name = next((name for name, known in DTYPES.items() if known == kind), str(kind))
    if not rounding <= _ROUNDING.get(kind, _TOLERANCE):
        raise EveralignError(
            f"rounding the weights to {name} moves the logits by {rounding:.2e} of their norm: choose --dtype fp32"
        )
    error = largest_difference(logits_of(load_model(str(folder), "fp32")), kept)
    if not error <= _TOLERANCE:
        raise EveralignError(f"the written model's logits differ from the merged ones by {error:.2e} of their size")
    return Written(name, rounding)


@torch.no_grad()
def logits_of(model: Any, tokens: Sequence[int] = range(_PROBE_TOKENS)) -> Tensor:
    """Return the logits (1, T, V) fp32 of a text of T tokens, taken modulo the vocabulary; of a probe if not given."""
    ids = torch.tensor([list(tokens)], device=model.device) % model.config.get_text_config().vocab_size
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of logits, as a share of the largest expected one."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
