"""LoRA adapters as low-rank updates, and adapted linear layers as one autograd function."""

import copy
import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from everalign.errors import InputError
from everalign.memory import LowRankUpdate
from everalign.storage import follow_umask

# Share of a layer's work from which on its frozen adapters are added to a copy of the weight: below it the copy's
# memory is worth more. Layers of 7B models stay below, small models do not.
_WORTH_FOLDING = 0.05


def is_plain(layer: Any) -> bool:
    """Whether a layer, adapted or not, is an `nn.Linear` whose weights are numbers as they are."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    return type(base) is nn.Linear and base.weight.is_floating_point()


def fuse(layer: LoraLayer) -> None:
    """Give an adapted `nn.Linear` the fused forward pass; any other kind of layer keeps peft's."""
    if is_plain(layer):
        layer.forward = partial(_forward, layer)


@contextmanager
def resting(layers: Collection[Any], folding: bool) -> Iterator[None]:
    """Take all adapters of these layers for frozen inside the `with` block: what they are cast to is kept there.

    Args:
        layers: adapted ones; blocks of the same layers are not nested.
        folding: whether adapters may be added to copies of the weights, which pays where the same ones stay switched
            on, and rounds otherwise than training does.
    """
    for layer in layers:
        layer.ready, layer.folding = {}, folding
    try:
        yield
    finally:
        for layer in layers:
            layer.ready, layer.folding = None, False
            if folding:
                # An optimiser may change an adapter without its version telling.
                layer.folded, layer.folded_parts = None, []


@dataclass(frozen=True)
class Matrices:
    """A linear layer as its products need it.

    Args:
        weight: W (m, n), frozen.
        bias: (m,) or None.
        factors: A (r, n) and B (m, r) of each adapter in use, one after the other.
        scales: what each B·A is multiplied by.
        adapters: their names.
        ready: where a layer that rests keeps what was made of its factors; None for one that does not.
    """

    weight: Tensor
    bias: Tensor | None
    factors: tuple[Tensor, ...] = ()
    scales: tuple[float, ...] = ()
    adapters: tuple[str, ...] = ()
    ready: dict[Any, tuple[Tensor, list[Tensor]]] | None = None


def matrices_of(layer: Any, x: Tensor) -> tuple[Matrices, torch.dtype]:
    """Return a plain layer's matrices for an input, and the dtype of the products."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
    if base is layer or layer.disable_adapters or layer.merged:
        return Matrices(base.weight, base.bias), dtype
    weight, names = base.weight, [name for name in layer.active_adapters if name in layer.lora_A]
    if dtype == torch.float32:
        weight, names = _fold_frozen(layer, names)
    factors = tuple(f[name].weight for name in names for f in (layer.lora_A, layer.lora_B))
    scales = tuple(layer.scaling[name] for name in names)
    ready = None if torch.is_grad_enabled() else getattr(layer, "ready", None)
    return Matrices(weight, base.bias, factors, scales, tuple(names), ready), dtype


def _forward(layer: Any, x: Tensor) -> Tensor:
    result: Tensor
    matrices, dtype = matrices_of(layer, x)
    if matrices.factors:
        (result,) = linears(x, dtype, [matrices])
    elif matrices.weight is layer.base_layer.weight:
        result = layer.base_layer(x)
    else:
        result = F.linear(x.to(dtype), matrices.weight, matrices.bias)
    return result


def _fold_frozen(layer: Any, names: list[str]) -> tuple[Tensor, list[str]]:
    """Return the weight with the frozen adapters' updates added where that pays, and the adapters that remain.

    What was learned before then costs nothing, however many tasks it were. In bf16 the sum would round away what is
    small beside the weight, so that frozen adapters stay apart there.
    """
    weight: Tensor = layer.base_layer.weight
    rests = getattr(layer, "folding", False)
    frozen = [name for name in names if rests or not layer.lora_B[name].weight.requires_grad]
    rank = sum(len(layer.lora_A[name].weight) for name in frozen)
    if rank * sum(weight.shape) <= _WORTH_FOLDING * weight.numel():
        return weight, names
    parts = [f[name].weight for name in frozen for f in (layer.lora_A, layer.lora_B)]
    if not _is_folded(layer, parts):
        with torch.no_grad():
            layer.folded = weight.clone()
            for name in frozen:
                layer.folded.addmm_(layer.lora_B[name].weight, layer.lora_A[name].weight, alpha=layer.scaling[name])
        layer.folded_parts = [(part, part._version) for part in parts]
    return layer.folded, [name for name in names if name not in frozen]


def _is_folded(layer: Any, parts: list[Tensor]) -> bool:
    """Whether the copy of the weight holds these very factors, unchanged since."""
    known = getattr(layer, "folded_parts", [])
    same = len(known) == len(parts) and all(
        old is part and version == part._version for (old, version), part in zip(known, parts, strict=True)
    )
    return same and layer.folded.device == parts[0].device


def linears(x: Tensor, dtype: torch.dtype, layers: Sequence[Matrices]) -> tuple[Tensor, ...]:
    """Return what each of some layers makes of x (..., n): (..., m), computed in this dtype."""
    factors = (factor for layer in layers for factor in layer.factors)
    result: tuple[Tensor, ...] = _Linears.apply(x, dtype, layers, *factors)  # type: ignore[no-untyped-call]
    return result


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, layers: Sequence[Matrices], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, kept = products(x.to(dtype), layers)
        learned = learned_adapters(layers, ctx.needs_input_grad[3:])
        ctx.save_for_backward(x if any(map(any, learned)) else x.new_empty(0), *kept)
        ctx.layers, ctx.learned, ctx.dtypes = layers, learned, (x.dtype, dtype)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        upstream = [g.to(ctx.dtypes[1]) for g in gradients]
        if ctx.needs_input_grad[0]:
            dx, narrow = input_gradient(upstream, ctx.layers, kept)
        else:
            dx, narrow = None, narrow_gradient(upstream, kept)
        factors = factor_gradients(x.to(ctx.dtypes[1]), upstream, ctx.layers, kept, narrow, ctx.learned)
        return (None if dx is None else dx.to(ctx.dtypes[0]), None, None, *factors)


# ---- the products of layers of one input, forward and back ----


def learned_adapters(layers: Sequence[Matrices], needed: Sequence[bool]) -> list[list[bool]]:
    """Say of each adapter of each layer whether it learns, given which factors need gradients."""
    flags = iter(needed)
    return [[next(flags) | next(flags) for _ in layer.scales] for layer in layers]


def products(x: Tensor, layers: Sequence[Matrices]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Return each layer's output (..., m) for x (..., n), and what the way back needs besides x.

    These are x·Aᵀ (T, R) of all adapters of all layers, all As (R, n), and of each layer its Bs (m, r) side by side,
    scaled; in the dtype of x. Nothing where no layer is adapted.
    """
    # Of the shape that is returned: models may write into it, which a view made in here would forbid.
    outputs = tuple(
        F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
        for layer in layers
    )
    if not any(layer.factors for layer in layers):
        return outputs, []
    A, Bs = _side_by_side(layers, x.dtype)
    inner, start = x.reshape(-1, x.shape[-1]) @ A.T, 0
    for B, y in zip(Bs, outputs, strict=True):
        width = B.shape[1]
        if width:
            y.view(-1, len(B)).addmm_(inner[:, start : start + width], B.T)
        start += width
    return outputs, [inner, A, *Bs]


def _side_by_side(layers: Sequence[Matrices], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return all As (R, n) below one another, and of each layer its Bs (m, r) side by side, scaled; once while at rest.

    Casting and joining them anew takes longer than the products of a few rows.
    """
    ready = next(layer.ready for layer in layers if layer.factors)
    key = dtype, tuple(layer.adapters for layer in layers)
    if ready is not None and key in ready:
        return ready[key]
    A, Bs = torch.cat([a for layer in layers for a in layer.factors[::2]]).to(dtype), []
    for layer in layers:
        parts = [b * scale for b, scale in zip(layer.factors[1::2], layer.scales, strict=True)]
        Bs.append(torch.cat(parts, dim=1).to(dtype) if parts else A.new_empty(len(layer.weight), 0))
    if ready is not None:
        ready[key] = A, Bs
    return A, Bs


def narrow_gradient(gradients: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor | None:
    """Return the gradient of x·Aᵀ (T, R) for those (..., m) of the layers' outputs; None without adapters."""
    if not kept:
        return None
    return torch.cat([g.reshape(-1, g.shape[-1]) @ B for g, B in zip(gradients, kept[2:], strict=True)], dim=1)


def input_gradient(
    gradients: Sequence[Tensor], layers: Sequence[Matrices], kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient (..., n) of x, and what `narrow_gradient` does."""
    flat, narrow = [g.reshape(-1, g.shape[-1]) for g in gradients], narrow_gradient(gradients, kept)
    dx = flat[0] @ layers[0].weight.to(flat[0].dtype)
    for g, layer in zip(flat[1:], layers[1:], strict=True):
        dx.addmm_(g, layer.weight.to(g.dtype))
    if narrow is not None:
        dx.addmm_(narrow, kept[1])
    return dx.view(*gradients[0].shape[:-1], -1), narrow


def factor_gradients(
    x: Tensor,
    gradients: Sequence[Tensor],
    layers: Sequence[Matrices],
    kept: Sequence[Tensor],
    narrow: Tensor | None,
    learned: Sequence[Sequence[bool]],
) -> list[Tensor | None]:
    """Return the gradients of all layers' factors, in their order; None for those of adapters that do not learn."""
    result: list[Tensor | None] = []
    if narrow is None:
        return result
    ranks = [len(a) for layer in layers for a in layer.factors[::2]]
    flags = [flag for flags in learned for flag in flags]
    columns = [part.tolist() for part in torch.split(torch.arange(sum(ranks)), ranks)]
    used = [column for flag, part in zip(flags, columns, strict=True) for column in part if flag]
    if not used:
        return [None] * (2 * len(ranks))
    inner, part = kept[0], narrow
    if len(used) < sum(ranks):
        inner, part = inner[:, used], narrow[:, used]
    dA, start = part.T @ x.reshape(-1, x.shape[-1]), 0
    for layer, g, own in zip(layers, gradients, learned, strict=True):
        widths = [len(a) if flag else 0 for a, flag in zip(layer.factors[::2], own, strict=True)]
        dB = g.reshape(-1, g.shape[-1]).T @ inner[:, start : start + sum(widths)]
        for a, b, scale, width, db in zip(
            layer.factors[::2], layer.factors[1::2], layer.scales, widths, torch.split(dB, widths, dim=1), strict=True
        ):
            result += [dA[start : start + width].to(a.dtype), db.to(b.dtype).mul_(scale)] if width else [None, None]
            start += width
    return result


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


def attach(model: Any, adapter: str, rank: int, alpha: float, names: Sequence[str]) -> Any:
    """Return a model as peft's, with an adapter on exactly these modules.

    Args:
        model: a Hugging Face causal language model; adapters are put into it.
        adapter: name of the adapter.
        rank: r.
        alpha: α.
        names: full names of linear modules.
    """
    modules, parameters = _as_peft_finds_them(model, names)
    empty = LoraConfig(target_modules=DUMMY_TARGET_MODULES, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, empty, adapter_name=adapter)
    config = peft_model.peft_config[adapter]
    config.target_modules, config.target_parameters = modules, parameters
    _inject(peft_model, adapter, rank, alpha, names)
    return peft_model


def _as_peft_finds_them(model: Any, names: Sequence[str]) -> tuple[list[str] | None, list[str] | None]:
    """Return what a configuration says so that plain peft adapts these modules: target modules and parameters.

    The modules' last names where they fit no others, else full names. Where experts were linear modules once, peft
    takes names such as `up_proj` for theirs, whatever stands before it; such modules are named by their weight.
    """
    config = LoraConfig(task_type="CAUSAL_LM")
    taken = {leaf for leaf in {name.rpartition(".")[-1] for name in names} if _is_taken(model, config, leaf)}
    parameters = [f"{name}.weight" for name in names if name.rpartition(".")[-1] in taken]
    modules = [name for name in names if name.rpartition(".")[-1] not in taken]
    leaves = {name.rpartition(".")[-1] for name in modules}
    fitting = {name for name, _ in model.named_modules() if name.rpartition(".")[-1] in leaves}
    return (sorted(leaves) if fitting == set(modules) else modules) or None, parameters or None


def _is_taken(model: Any, config: LoraConfig, leaf: str) -> bool:
    """Whether peft takes a target of this name for something else."""
    trial = copy.copy(config)
    trial.target_modules = {leaf}
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError:
        return True
    return leaf not in (trial.target_modules or ())


def _inject(peft_model: Any, adapter: str, rank: int, alpha: float, names: Sequence[str]) -> None:
    """Put a fresh adapter on exactly these modules, whatever its configuration's names would fit."""
    config = peft_model.peft_config[adapter]
    config.r, config.lora_alpha, config.lora_dropout = rank, alpha, 0.0
    config.base_model_name_or_path = peft_model.peft_config[next(iter(peft_model.peft_config))].base_model_name_or_path
    said = config.target_modules, config.target_parameters
    config.target_modules, config.target_parameters = ["as listed"], None
    with warnings.catch_warnings():
        # peft warns that the configuration would have fitted other modules.
        warnings.simplefilter("ignore", RuntimeWarning)
        listed = dict.fromkeys(f"{name}.lora_A.weight" for name in names)
        peft_model.base_model.inject_adapter(peft_model.base_model.model, adapter, state_dict=listed)
    peft_model.base_model._cast_adapter_dtype(adapter)
    config.target_modules, config.target_parameters = said
    sits = [name for name, layer in layers(peft_model).items() if adapter in layer.lora_A]
    if sits != list(names):
        missing = sorted(set(names) ^ set(sits))[:3]
        raise RuntimeError(f"adapter {adapter} does not sit on the modules it was meant for: {missing} differ")


def replace(peft_model: Any, adapter: str, updates: Mapping[str, LowRankUpdate]) -> None:
    """Make `adapter` hold exactly these updates, with the rank of the largest; {} or all zero removes it."""
    if adapter in peft_model.peft_config:
        peft_model.delete_adapter(adapter)
    rank = max((update.width for update in updates.values()), default=0)
    if rank == 0:
        return
    first = next(iter(peft_model.peft_config.values()))
    peft_model.peft_config[adapter] = copy.copy(first)
    with torch.random.fork_rng():
        _inject(peft_model, adapter, rank, rank, list(layers(peft_model)))
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
