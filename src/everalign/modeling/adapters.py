"""Read and write LoRA adapters of a peft model as low-rank updates.

peft stores an adapter of rank r as A (r, n) and B (m, r) and applies (α/r)·B·A. Where we write an adapter ourselves
α = r, so that B·A is the update.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from everalign.errors import InputError
from everalign.files import follow_umask
from everalign.memory import LowRankUpdate

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Factors = Mapping[str, tuple[Tensor, Tensor]]


def layers(peft_model: Any) -> dict[str, Any]:
    """Return the adapted layers by their module name in the base model, in the model's order."""
    return {
        name.removeprefix(_PREFIX): module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer)
    }


def check_linear(peft_model: Any, adapter: str) -> None:
    """Refuse targets whose update is no matrix B·A (embeddings, convolutions)."""
    for name, layer in layers(peft_model).items():
        if adapter not in layer.lora_A or layer.lora_A[adapter].weight.ndim != 2:
            kind = type(layer.get_base_layer()).__name__
            raise InputError(f"cannot adapt {name}, which is of type {kind}: only linear modules can be targets")


def check_untied(peft_model: Any) -> None:
    """Refuse targets whose weights another module has too: what is added to one would be added to both once merged."""
    names: dict[int, list[str]] = {}
    for name, module in peft_model.named_modules():
        for parameter in module.parameters(recurse=False):
            names.setdefault(id(parameter), []).append(name.removeprefix(_PREFIX).removesuffix(".base_layer"))
    for name, layer in layers(peft_model).items():
        others = [other for p in layer.get_base_layer().parameters() for other in names[id(p)] if other != name]
        if others:
            raise InputError(
                f"cannot adapt {name}: its weights are tied to those of {others[0]}, so that a merged model would add "
                f"to both what was learned for one; leave {name.rpartition('.')[-1]} out of the targets"
            )


def explain_targets(model: Any, error: Exception) -> str:
    """Say why peft found nothing to adapt and what there is."""
    linear = {
        name.rsplit(".", 1)[-1] for name, m in model.named_modules() if hasattr(m, "weight") and m.weight.ndim == 2
    }
    return f"{str(error).strip()} Modules of this model: {', '.join(sorted(linear))}"


def read_factors(peft_model: Any, adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return copies of the raw factors (B (m, r), A (r, n)) of every module, fp32 on the CPU."""
    return {
        name: (_copy(layer.lora_B[adapter].weight), _copy(layer.lora_A[adapter].weight))
        for name, layer in layers(peft_model).items()
    }


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to(device="cpu", dtype=torch.float32, copy=True)


def read(peft_model: Any, adapter: str) -> dict[str, LowRankUpdate]:
    """Return every module's update (α/r)·B·A in factored form; the scale is absorbed in the left factor."""
    return {
        name: LowRankUpdate(
            _copy(layer.lora_B[adapter].weight) * layer.scaling[adapter], _copy(layer.lora_A[adapter].weight)
        )
        for name, layer in layers(peft_model).items()
    }


def write_factors(peft_model: Any, adapter: str, factors: Factors) -> None:
    """Overwrite an adapter's raw factors; ranks below the adapter's are padded with zeros."""
    for name, layer in layers(peft_model).items():
        left, right = factors[name]
        weight_b, weight_a = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
        with torch.no_grad():
            weight_b.zero_()
            weight_a.zero_()
            weight_b[:, : left.shape[1]].copy_(left)
            weight_a[: right.shape[0]].copy_(right)


def replace(peft_model: Any, adapter: str, updates: Mapping[str, LowRankUpdate], targets: str | set[str]) -> None:
    """Make `adapter` hold exactly these updates, with the rank of the largest; {} or all zero removes it."""
    if adapter in peft_model.peft_config:
        peft_model.delete_adapter(adapter)
    rank = max((update.width for update in updates.values()), default=0)
    if rank == 0:
        return
    first = next(iter(peft_model.peft_config.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        # peft notes it in the first adapter alone; a saved one without it does not say which model it belongs to.
        base_model_name_or_path=first.base_model_name_or_path,
    )
    with torch.random.fork_rng():
        peft_model.add_adapter(adapter, config)
    write_factors(peft_model, adapter, {name: (u.left, u.right) for name, u in updates.items()})


def save(peft_model: Any, adapter: str, folder: Path) -> None:
    """Write one adapter in PEFT format straight into `folder` (peft itself would nest it by name)."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, (left, right) in read_factors(peft_model, adapter).items():
        state[f"{_PREFIX}{name}.lora_A.weight"] = right.contiguous()
        state[f"{_PREFIX}{name}.lora_B.weight"] = left.contiguous()
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    follow_umask(folder / _WEIGHTS)
    config = peft_model.peft_config[adapter]
    was_inference, config.inference_mode = config.inference_mode, True
    config.save_pretrained(folder)
    config.inference_mode = was_inference


def load_scale(folder: Path) -> tuple[int, float]:
    """Return the rank r and α of an adapter folder.

    Raises:
        InputError: its configuration is missing or damaged.
    """
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return int(config["r"]), float(config["lora_alpha"])
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no adapter here (expected {_CONFIG} and {_WEIGHTS})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged, or not a LoRA adapter's ({error!r}); restore it") from error


def load_factors(peft_model: Any, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the raw factors (B, A) of an adapter folder and check that they belong to this model's modules.

    Raises:
        InputError: a file is missing or damaged, or modules or shapes differ.
    """
    path = folder / _WEIGHTS
    state = _read_weights(path)
    factors = {}
    for name, layer in layers(peft_model).items():
        try:
            left, right = state[f"{_PREFIX}{name}.lora_B.weight"], state[f"{_PREFIX}{name}.lora_A.weight"]
        except KeyError as error:
            raise InputError(f"{path}: no adapter of module {name}: saved for another model?") from error
        if (left.shape[0], right.shape[1]) != (layer.out_features, layer.in_features):
            raise InputError(f"{path}: module {name} has another shape: saved for another model?")
        factors[name] = (left, right)
    return factors


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; an adapter is {_CONFIG} and {_WEIGHTS}") from error
    except SafetensorError as error:
        raise InputError(f"{path}: the adapter is damaged ({error}); restore it or learn the task again") from error
    return weights
