"""Which modules of a model an adapter sits on: exactly those that were asked for, by their full names."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from everalign.errors import InputError

ALL_LINEAR = "all-linear"
_PREFIX = "base_model.model."
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Targets:
    """What is adapted.

    Args:
        names: full names of the modules, in the model's order.
        notes: what stays frozen though one might think that it is adapted; a line each.
    """

    names: list[str]
    notes: list[str]


def kind_of(name: str) -> str:
    """Return a module's name without the numbers of layers and experts: what is true of one is true of all its kind."""
    return _NUMBERS.sub("#", name)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix, quantised or not."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    return "Linear" in type(module).__name__ and hasattr(module, "in_features") and hasattr(module, "out_features")


def choose_targets(model: Any, targets: str | Sequence[str], reached: frozenset[str]) -> Targets:
    """Find the modules that `targets` means.

    Args:
        model: a Hugging Face causal language model without adapters.
        targets: `all-linear`: every linear module of the language model but its output layer and the routers of
            experts. Any other string: a regular expression that matches whole names. A list: names of modules, or
            their last parts.
        reached: kinds of the linear modules through which a text passes. Others, such as vision towers, are
            adapted only where nothing else fits what was asked for.

    Raises:
        InputError: a name or the expression fits no module, or one that is not linear.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if targets == ALL_LINEAR:
        return _all_linear(model, modules, reached)
    found: set[str] = set()
    unreached: list[str] = []
    for pattern in [targets] if isinstance(targets, str) else targets:
        fitting = _fitting(modules, pattern, isinstance(targets, str))
        if not fitting:
            raise InputError(f"cannot adapt {pattern}: {_why_none_fits(model, modules, pattern)}")
        inside = [name for name in fitting if not is_linear(modules[name]) or kind_of(name) in reached]
        if inside:
            unreached += [name for name in fitting if name not in inside]
        found.update(inside or fitting)
    for name in found:
        if not is_linear(modules[name]):
            kind = type(modules[name]).__name__
            raise InputError(f"cannot adapt {name}, which is of type {kind}: only linear modules can be targets")
        if reason := _incompatible(model, name):
            raise InputError(f"cannot adapt {name}: {reason}")
    if lost := _not_found_again(model, sorted(found)):
        raise InputError(f"cannot adapt {lost[0]}: peft would not find its matrices again in a saved adapter")
    useless = [name for name in found if kind_of(name) not in reached]
    notes = [
        *_note("not adapted, since no text passes through them as through a matrix", unreached, _part),
        *_note("adapted, but no text passes through them, so they learn nothing", useless, _part),
    ]
    return Targets([name for name in modules if name in found], notes)


def _all_linear(model: Any, modules: dict[str, nn.Module], reached: frozenset[str]) -> Targets:
    """Choose the language model's linear modules, without its output layer and the routers of experts."""
    head = model.get_output_embeddings()
    linear = [name for name, module in modules.items() if is_linear(module) and module is not head]
    unreached = [name for name in linear if kind_of(name) not in reached]
    names = [
        name
        for name in linear
        if kind_of(name) in reached and not _is_router(modules, name) and _incompatible(model, name) is None
    ]
    if not names:
        raise InputError(f"cannot adapt {ALL_LINEAR}: {type(model).__name__} has no linear modules that process text")
    # What is learned for a module that shares its weights would be added to all its sharers once it is merged.
    users = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    tied = [name for name in names if any(users[id(p)] > 1 for p in modules[name].parameters(recurse=False))]
    lost = _not_found_again(model, [name for name in names if name not in tied])
    notes = [
        *_note("not adapted, since no text passes through them as through a matrix", unreached, _part),
        *_note("not adapted, since modules share their weights", tied, kind_of),
        *_note("not adapted, since peft would not find them again in a saved adapter", lost, kind_of),
    ]
    # Experts whose matrices are stacked in one parameter are no linear modules.
    stacked: Counter[tuple[str, int]] = Counter()
    for name, module in modules.items():
        stacks = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
        if stacks and "expert" in f"{name} {type(module).__name__}".lower():
            stacked[kind_of(name), len(stacks[0])] += 1
    notes += [
        f"routed experts are not adapted: {count} in each of {layers} layers ({kind}) stay frozen, since {ALL_LINEAR} "
        "means linear modules"
        for (kind, count), layers in stacked.items()
    ]
    return Targets([name for name in names if name not in {*tied, *lost}], notes)


def _is_router(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a linear module weighs the experts beside it; it is left as it is, as is usual."""
    experts = modules.get(f"{name.rpartition('.')[0]}.experts")
    if experts is None:
        return False
    sizes = [len(parameter) for parameter in experts.parameters(recurse=False) if parameter.ndim == 3]
    count = len(experts) if isinstance(experts, nn.ModuleList) else max(sizes, default=0)
    return int(getattr(modules[name], "out_features", count + 1)) <= count


def _incompatible(model: Any, name: str) -> str | None:
    """Return why peft would refuse a module: a model's fused kernels read its weights past any adapter."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[-1])
    except ValueError as error:
        return str(error)
    return None


def _fitting(modules: dict[str, nn.Module], pattern: str, is_expression: bool) -> list[str]:
    if not is_expression:
        return [name for name in modules if name == pattern or name.endswith(f".{pattern}")]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"cannot adapt {pattern}: it is not a regular expression ({error})") from error
    # An expression is meant for linear modules: `.*mlp.*` also fits what holds them.
    return [name for name, module in modules.items() if is_linear(module) and expression.fullmatch(name)]


def _why_none_fits(model: Any, modules: dict[str, nn.Module], pattern: str) -> str:
    """Say why nothing fits: an expert's matrices, or a wrong name."""
    stacked = sorted({name.rpartition(".")[-1] for name, p in model.named_parameters() if p.ndim == 3})
    leaf = pattern.rpartition(".")[-1]
    if leaf in stacked:
        return f"{leaf} holds the matrices of all routed experts in one parameter; these stay frozen"
    leaves = sorted({name.rpartition(".")[-1] for name, module in modules.items() if is_linear(module)})
    near = difflib.get_close_matches(leaf, leaves, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"no module of {type(model).__name__} has this name; {hint}Modules of this model: {', '.join(leaves)}"


def _not_found_again(model: Any, names: Sequence[str]) -> list[str]:
    """Return the modules whose matrices peft takes for others when it loads an adapter, as for a renamed checkpoint."""
    keys = {f"{_PREFIX}{name}.lora_A.weight": name for name in names}
    config = LoraConfig(target_modules=["as listed"], task_type="CAUSAL_LM")
    found = convert_peft_adapter_state_dict_for_transformers(model, config, {key: torch.empty(1, 1) for key in keys})
    return [name for key, name in keys.items() if key not in found]


def _note(what: str, names: Sequence[str], place: Callable[[str], str]) -> list[str]:
    """Return a line about linear modules, counted by where they are; none without modules."""
    counts = Counter(place(name) for name in names)
    counted = ", ".join(f"{part} ({count})" for part, count in counts.items())
    return [f"{what}: linear modules of {counted}"] if counts else []


def _part(name: str) -> str:
    """Return what comes before the first number in a module's name: `model.vision_tower.encoder.layers`."""
    return re.split(r"\.\d+(?:\.|$)", name)[0]
