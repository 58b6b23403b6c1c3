"""What a model's classes can do, found out on a shrunk copy with random weights, and which of its modules are adapted.

Probed instead of trusting its name: which of its linear modules a text reaches, whether hidden states and logits can be
computed apart, whether prompts can be shared by several answers under a block attention mask, and how long rows may be.
An adapter sits on exactly those modules that were asked for, by their full names.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from everalign.data.collate import Batch, collate
from everalign.data.tokenization import TokenizedRow
from everalign.errors import InputError
from everalign.modeling.logprobs import Architecture, MaskKind, SequenceLogProbs
from everalign.modeling.positions import Lengths, probe_lengths
from everalign.modeling.shrinking import FIRST_SPECIAL, MODEL_ERRORS, shrunk_copy

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


# How far logits that should be the same may differ, relative to the largest, in the dtype of what is probed.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_HEAD_TOLERANCE = 1e-5
_KINDS_OF_LAYERS: dict[str, MaskKind] = {
    "full_attention": "whole",
    "sliding_attention": "window",
    "chunked_attention": "chunk",
}

Key = tuple[type, str]
# What was found, by class and configuration: everything, what decoding needs, the lengths alone; the classes of parts.
_studied: dict[Key, Architecture] = {}
_decoding: dict[Key, Architecture] = {}
_lengths: dict[Key, Lengths] = {}
_classifiers: dict[tuple[Key, str], Architecture] = {}
_classes: dict[Key, set[type]] = {}


def study(model: Any) -> Architecture:
    """Return what a Hugging Face causal language model's classes can do, adapters injected or not.

    A model that cannot be shrunk is probed itself, in its own dtype.
    """
    key = configuration_key(model)
    if key not in _studied:
        small = shrunk_copy(model)
        found = _probe(model if small is None else small, _lengths_on(small, model))
        _studied[key] = found
        if small is not None:
            # It is asked for again where a whole path is tried on the copy.
            _studied[configuration_key(small)] = found
            _classes[key] = {type(part) for part in small.modules()}
    found = _studied[key]
    return _probe(model, found.lengths) if _has_other_parts(model, key) else found


def study_decoding(model: Any) -> Architecture:
    """Return what decoding has to know of a model's classes: its head and its lengths, nothing of prefix sharing."""
    key = configuration_key(model)
    if key in _studied:
        return study(model)
    if key not in _decoding:
        small = shrunk_copy(model)
        separate, resumable = _probe_head(model if small is None else small)
        _decoding[key] = Architecture(separate, resumable=resumable, lengths=_lengths_on(small, model))
        if small is not None:
            _classes[key] = {type(part) for part in small.modules()}
    found = _decoding[key]
    if _has_other_parts(model, key):
        separate, resumable = _probe_head(model)
        return replace(found, separate=separate, resumable=resumable)
    return found


def study_classifier(model: Any, head: str) -> Architecture:
    """Return under which masks a sequence classifier can read a prompt once for all its answers, or why it cannot.

    Args:
        model: a Hugging Face sequence classifier with one label, adapters injected or not.
        head: name of the part that makes a logit of the last token's hidden state.
    """
    key = (configuration_key(model), head)
    if key not in _classifiers:
        small = shrunk_copy(model)
        if small is None:
            found = Architecture(why_no_prefix_sharing="the model cannot be tried on a shrunk copy")
        elif (lengths := _lengths_on(small, model)).stretch is not None:
            found = Architecture(why_no_prefix_sharing="its positions stretch with the longest row", lengths=lengths)
        else:
            found = _probe_classifier(small, head, lengths)
        _classifiers[key] = found
    return _classifiers[key]


def study_lengths(model: Any) -> Lengths:
    """Return how long rows of a Hugging Face model may be, whatever its head."""
    key = configuration_key(model)
    for known in (_studied, _decoding):
        if key in known:
            return known[key].lengths
    return _lengths[key] if key in _lengths else _lengths_on(shrunk_copy(model), model)


def _has_other_parts(model: Any, key: Key) -> bool:
    """Whether a model has parts that its configuration, and so its shrunk copy, does not describe.

    Quantised, packed and adapted matrices stand in for plain ones.
    """
    return key in _classes and any(
        type(part) not in _classes[key]
        and not hasattr(part, "in_features")
        and not type(part).__module__.startswith(("peft.", "torch.nn."))
        for part in model.modules()
    )


def configuration_key(model: Any) -> Key:
    """Return what models have in common whose classes do the same: class and configuration."""
    config = model.config
    settings = {**config.to_dict(), "attention": getattr(config, "_attn_implementation", None)}
    for name in ("_name_or_path", "name_or_path", "dtype", "torch_dtype", "quantization_config"):
        settings.pop(name, None)
    return type(model), json.dumps(settings, sort_keys=True, default=str)


def _lengths_on(small: Any | None, model: Any) -> Lengths:
    key = configuration_key(model)
    if key not in _lengths:
        _lengths[key] = Lengths() if small is None else probe_lengths(small, model.config)
    return _lengths[key]


@torch.no_grad()
def _probe(model: Any, lengths: Lengths) -> Architecture:
    batch = _probe_batch(model, shared=False)
    reached: set[str] = set()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if is_linear(module):
                hook = partial(_note_linear, reached, kind_of(name))
                stack.callback(module.register_forward_hook(hook).remove)
        logits = SequenceLogProbs(model, Architecture()).response_logits(batch)
    separate, resumable = _probe_head(model)
    together = _probe_batch(model, shared=True)

    def read(masks: tuple[MaskKind, ...]) -> Tensor:
        found = SequenceLogProbs(model, Architecture(masks=masks)).response_logits(together)
        return found[together["sequences"].argsort(stable=True)]

    # Both in the order of the sequences; the sort keeps each sequence's tokens in theirs.
    masks, reason = _probe_sharing(model, logits[batch["sequences"].argsort(stable=True)], read)
    return Architecture(separate, masks, reason, frozenset(reached), resumable, lengths)


@torch.no_grad()
def _probe_classifier(small: Any, head: str, lengths: Lengths) -> Architecture:
    small.config.get_text_config().pad_token_id = 0  # which pads the probe, and ends none of its sequences
    apart, together = (_probe_batch(small, shared) for shared in (False, True))
    alone = small(**{name: apart[name] for name in ("input_ids", "attention_mask")}).logits

    def read(masks: tuple[MaskKind, ...]) -> Tensor:
        network = SequenceLogProbs(small, Architecture(separate=True, masks=masks))
        logits: Tensor = getattr(small, head)(network.last_states(together))
        return logits

    masks, reason = _probe_sharing(small, alone, read)
    return Architecture(separate=True, masks=masks, why_no_prefix_sharing=reason, lengths=lengths)


def _note_linear(found: set[str], kind: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Note the kind of a linear module that was called and did what a matrix does.

    Some classes derive from `nn.Linear` and compute something else, such as one product for each group of heads.
    """
    if not isinstance(output, Tensor):
        return
    if type(module) is not nn.Linear and isinstance(module, nn.Linear) and module.weight.is_floating_point():
        expected = nn.functional.linear(inputs[0], module.weight, module.bias)
        if not _close(output, expected, _TOLERANCES[output.dtype]):
            return
    found.add(kind)


@torch.no_grad()
def _probe_head(model: Any) -> tuple[bool, bool]:
    """Return whether the logits are separable from the hidden states, or else can be resumed from them.

    Resumed means that the model itself gives its logits when its decoder is made to return given hidden states. Each
    half of them is tried apart, so that nothing may look at other positions.
    """
    if model.base_model is model:
        return False, False
    tokens = min(model.config.get_text_config().vocab_size, FIRST_SPECIAL) - 3
    ids = torch.tensor([[3 + 5 * i % tokens for i in range(12)]], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    found = []
    for kind in (Architecture(separate=True), Architecture(resumable=True)):
        head = SequenceLogProbs(model, kind)
        try:
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            # The separated head on all positions at once, as the model calls it: fewer may be rounded another way.
            parts = (states,) if kind.separate else states.chunk(2)
            found.append(_close(logits, torch.cat([head.logits(part) for part in parts]), _HEAD_TOLERANCE))
        except MODEL_ERRORS:
            found.append(False)
        if found[0]:
            return True, False
    return False, found[1]


def _probe_sharing(
    model: Any, expected: Tensor, read: Callable[[tuple[MaskKind, ...]], Tensor]
) -> tuple[tuple[MaskKind, ...], str | None]:
    """Return the masks under which shared and packed rows give the logits of separate ones, and why there are none.

    Args:
        model: which.
        expected: logits of separate rows.
        read: gives those of shared ones under these masks.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := sorted(kinds - set(_KINDS_OF_LAYERS)):
        return (), f"the model has {', '.join(others)} layers"
    # One mask for all layers, or one for each kind of layer.
    candidates: list[tuple[MaskKind, ...]] = [("whole",)]
    if len(kinds) > 1:
        candidates = [tuple(sorted(_KINDS_OF_LAYERS[kind] for kind in kinds))]
    else:
        candidates += [("window",)] if getattr(config, "sliding_window", None) else []
        candidates += [("chunk",)] if getattr(config, "attention_chunk_size", None) else []
    reason = ""
    for masks in candidates:
        try:
            found = read(masks)
        except MODEL_ERRORS as error:
            reason = reason or f"the model takes no block attention mask ({type(error).__name__})"
            continue
        if _close(expected, found, _TOLERANCES[expected.dtype]):
            return masks, None
        reason = "the model's layers do not follow a block attention mask with restarted positions"
    return (), reason


def _probe_batch(model: Any, shared: bool) -> Batch:
    """Collate three pairs of a few tokens, answers different in length and content, so that rows are packed too.

    The longest prompt reaches beyond the windows of a shrunk copy.
    """
    most = min(model.config.get_text_config().vocab_size, FIRST_SPECIAL)
    tokens = [[3 + (7 * i + 3 * k) % (most - 3) for i in range(2 + k)] for k in range(4)]
    long = TokenizedRow.pair("probe", tokens[3] * 3, [most - 1, *tokens[1]], [most - 1, *tokens[2]])
    short = [TokenizedRow.pair("probe", tokens[k], tokens[k + 1], tokens[k + 2]) for k in range(2)]
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in collate([long, *short], shared).items()}


def _close(expected: Tensor, found: Tensor, tolerance: float) -> bool:
    if expected.shape != found.shape:
        return False
    error = (expected.float() - found.float()).abs().max()
    return bool(error <= tolerance * expected.float().abs().max().clamp(min=1.0))
