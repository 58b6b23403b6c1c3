"""LoRA adapters on peft: a fused forward pass of adapted layers, adapters as low-rank updates, and their files."""

import copy
import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from everalign.modeling.base_weights import place_adapter
from everalign.storage import follow_umask

# Share of a layer's work from which on its frozen adapters are added to a copy of the weight: below it the copy's
# memory is worth more. Layers of 7B models stay below, small models do not.
_WORTH_MERGING = 0.05


# ---- the fused layer ----


def fuse(layer: LoraLayer) -> None:
    """Give an adapted `nn.Linear` the fused forward pass; quantised, offloaded and other layers keep peft's."""
    base = layer.get_base_layer()
    if type(base) is nn.Linear and base.weight.is_floating_point() and not base.weight.is_meta:
        layer.forward = partial(fused_forward, layer)


@contextmanager
def frozen_for_inference(layers: Collection[Any], merging: bool) -> Iterator[None]:
    """Treat all adapters of these layers as frozen inside the `with` block, so that they are cast only once.

    Args:
        layers: adapted ones; blocks of the same layers are not nested.
        merging: whether adapters may be added to copies of the weights, which pays where the same ones stay switched
            on, and rounds otherwise than training does.
    """
    for layer in layers:
        layer.cast_factors, layer.merging = {}, merging
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_factors, layer.merging = None, False
            if merging:
                # An optimiser may change an adapter without its version telling.
                layer.merged_weight, layer.merged_parts = None, []


def fused_forward(layer: Any, x: Tensor, gate_and_up: tuple[Tensor, ...] = ()) -> Tensor:
    """Compute W·x + Σ s·B·A·x over the active adapters.

    Args:
        layer: an adapted `nn.Linear`.
        x: (..., n).
        gate_and_up: what x = silu(gate)·up was made of, where it is kept for the backward pass anyway: x is then
            computed again instead of being kept too.
    """
    base, device = layer.base_layer, x.device.type
    if layer.disable_adapters or layer.merged:
        plain: Tensor = base(x)
        return plain
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
    weight, names = base.weight, [name for name in layer.active_adapters if name in layer.lora_A]
    if dtype == torch.float32:
        # In bf16 the sum would round away what is small beside the weight, so that adapters stay apart there.
        weight, names = _merge_frozen(layer, names)
    if not names:
        return base(x) if weight is base.weight else F.linear(x.to(dtype), weight, base.bias)
    scales = tuple(layer.scaling[name] for name in names)
    factors = [factor[name].weight for name in names for factor in (layer.lora_A, layer.lora_B)]
    cache = None if torch.is_grad_enabled() else getattr(layer, "cast_factors", None)
    key = (dtype, *names)
    if cache is None or key not in cache:
        with torch.no_grad():
            parts = [b * scale for b, scale in zip(factors[1::2], scales, strict=True)]
            joined = torch.cat(factors[::2]).to(dtype), torch.cat(parts, dim=1).to(dtype)
        if cache is not None:
            cache[key] = joined
    else:
        joined = cache[key]
    arguments = (x, weight, base.bias, dtype, *joined, scales, gate_and_up)
    result: Tensor = _AdaptedLinear.apply(*arguments, *factors)  # type: ignore[no-untyped-call]
    return result


class _AdaptedLinear(torch.autograd.Function):
    """W·x + B·(A·x) for the adapters' As (R, n) below one another and their scaled Bs (m, R) side by side.

    Two products for any number of adapters, and only x and A·x kept for the backward pass. x itself is kept where an
    adapter learns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        A: Tensor,
        B: Tensor,
        scales: tuple[float, ...],
        gate_and_up: tuple[Tensor, ...],
        *factors: Tensor,
    ) -> Tensor:
        rows = x.to(dtype)
        # First, because it is small and kept: behind the result it would split the block that the result leaves.
        inner = rows.reshape(-1, rows.shape[-1]) @ A.T
        if bias is None:
            y = F.linear(rows, weight.to(dtype))
        else:
            # Models write into the result, which autograd forbids of a view made in here, as F.linear makes one.
            y = rows.new_empty(*rows.shape[:-1], len(weight))
            flat = rows.reshape(-1, rows.shape[-1])
            torch.addmm(bias.to(dtype), flat, weight.to(dtype).T, out=y.view(-1, len(weight)))
        y.view(-1, len(B)).addmm_(inner, B.T)
        ctx.learned = [a or b for a, b in zip(ctx.needs_input_grad[8::2], ctx.needs_input_grad[9::2], strict=True)]
        ctx.save_for_backward(inner, A, B, *((gate_and_up or (x,)) if any(ctx.learned) else ()))
        ctx.weight, ctx.scales, ctx.dtypes = weight, scales, (x.dtype, dtype)
        ctx.factors = [(len(a), a.dtype, b.dtype) for a, b in zip(factors[::2], factors[1::2], strict=True)]
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inner, A, B, *inputs = ctx.saved_tensors
        own, dtype = ctx.dtypes
        upstream = gradient.to(dtype).reshape(-1, gradient.shape[-1])
        narrow = upstream @ B  # (T, R), the gradient of A·x
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (upstream @ ctx.weight.to(dtype)).addmm_(narrow, A).view(*gradient.shape[:-1], -1).to(own)
        if len(inputs) == 2:
            gate, up = inputs
            inputs = [F.silu(gate).mul_(up)]
        found: list[Tensor | None] = []
        start = 0
        for learned, scale, (rank, dtype_a, dtype_b) in zip(ctx.learned, ctx.scales, ctx.factors, strict=True):
            part = slice(start, start + rank)
            start += rank
            if not learned:
                found += [None, None]
                continue
            rows = inputs[0].to(dtype).reshape(-1, inputs[0].shape[-1])
            found.append((narrow[:, part].T @ rows).to(dtype_a))
            found.append((upstream.T @ inner[:, part]).to(dtype_b).mul_(scale))
        return dx, None, None, None, None, None, None, None, *found


def _merge_frozen(layer: Any, names: list[str]) -> tuple[Tensor, list[str]]:
    """Return the weight with the frozen adapters' updates added where that pays, and the adapters that remain.

    What earlier tasks taught then costs nothing in a pass, however many tasks there were. Not of a weight that comes
    and goes (`keeps_weight` is False): the copies of all of them would stay.
    """
    weight: Tensor = layer.base_layer.weight
    if not getattr(layer, "keeps_weight", True):
        return weight, names
    all_frozen = getattr(layer, "merging", False)
    frozen = [name for name in names if all_frozen or not layer.lora_B[name].weight.requires_grad]
    rank = sum(len(layer.lora_A[name].weight) for name in frozen)
    if rank * sum(weight.shape) <= _WORTH_MERGING * weight.numel():
        return weight, names
    parts = [factor[name].weight for name in frozen for factor in (layer.lora_A, layer.lora_B)]
    known = getattr(layer, "merged_parts", [])
    # The copy holds these very factors, unchanged since.
    current = len(known) == len(parts) and all(
        old is part and version == part._version for (old, version), part in zip(known, parts, strict=True)
    )
    if not current or layer.merged_weight.device != weight.device:
        with torch.no_grad():
            layer.merged_weight = weight.clone()
            for name in frozen:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                layer.merged_weight.addmm_(b, a, alpha=layer.scaling[name])
        layer.merged_parts = [(part, part._version) for part in parts]
    return layer.merged_weight, [name for name in names if name not in frozen]


# ---- adapters as low-rank updates ----

_PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

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
        name: (
            layer.lora_B[adapter].weight.detach().to(device="cpu", dtype=torch.float32, copy=True),
            layer.lora_A[adapter].weight.detach().to(device="cpu", dtype=torch.float32, copy=True),
        )
        for name, layer in layers(peft_model).items()
    }


def read(peft_model: Any, adapter: str) -> dict[str, LowRankUpdate]:
    """Return every module's update (α/r)·B·A in factored form; the scale is absorbed in the left factor."""
    adapted = layers(peft_model)
    return {
        name: LowRankUpdate(left * adapted[name].scaling[adapter], right)
        for name, (left, right) in read_factors(peft_model, adapter).items()
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
    """Return what a configuration has to name so that plain peft adapts these modules: modules and parameters.

    The modules' last names where they fit no others, else full names. Where experts were linear modules once, peft
    takes names such as `up_proj` for theirs, whatever stands before it; such modules are named by their weight.
    """
    taken = set()
    for leaf in {name.rpartition(".")[-1] for name in names}:
        trial = LoraConfig(task_type="CAUSAL_LM")
        trial.target_modules = {leaf}
        try:
            convert_peft_config_for_transformers(trial, model, None)
        except ValueError:
            taken.add(leaf)
        else:
            taken |= {leaf} - set(trial.target_modules or ())
    parameters = [f"{name}.weight" for name in names if name.rpartition(".")[-1] in taken]
    modules = [name for name in names if name.rpartition(".")[-1] not in taken]
    leaves = {name.rpartition(".")[-1] for name in modules}
    fitting = {name for name, _ in model.named_modules() if name.rpartition(".")[-1] in leaves}
    return (sorted(leaves) if fitting == set(modules) else modules) or None, parameters or None


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
    for layer in layers(peft_model).values():
        place_adapter(layer, adapter)
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
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    follow_umask(folder / WEIGHTS)
    config = peft_model.peft_config[adapter]
    was_inference, config.inference_mode = config.inference_mode, True
    config.save_pretrained(folder)
    config.inference_mode = was_inference


def load_scale(folder: Path) -> tuple[int, float]:
    """Return the rank r and α of an adapter folder.

    Raises:
        InputError: its configuration is missing or damaged.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return int(config["r"]), float(config["lora_alpha"])
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no adapter here (expected {CONFIG} and {WEIGHTS})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged, or not a LoRA adapter's ({error!r}); restore it") from error


def load_factors(peft_model: Any, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the raw factors (B, A) of an adapter folder and check that they belong to this model's modules.

    Raises:
        InputError: a file is missing or damaged, or modules or shapes differ.
    """
    path = folder / WEIGHTS
    try:
        state: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; an adapter is {CONFIG} and {WEIGHTS}") from error
    except SafetensorError as error:
        raise InputError(f"{path}: the adapter is damaged ({error}); restore it or learn the task again") from error
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
