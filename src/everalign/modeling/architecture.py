"""Probe what a model's classes can do, on a shrunk copy with random weights, instead of trusting its name.

Which of its linear modules a text reaches, whether hidden states and logits can be computed apart, whether prompts can
be shared by several answers under a block attention mask, and how long rows may be.
"""

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from everalign.data.collate import Batch, collate
from everalign.data.tokenization import TokenizedRow
from everalign.modeling.logprobs import Architecture, MaskKind, SequenceLogProbs
from everalign.modeling.lora_targets import is_linear, kind_of
from everalign.modeling.positions import Lengths, probe_lengths
from everalign.modeling.shrinking import FIRST_SPECIAL, MODEL_ERRORS, shrunk_copy

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


def head_is_separable(model: Any) -> bool:
    """Whether a model's logits are its output matrix (scale and soft-cap included) applied to its hidden states."""
    return study_decoding(model).separate


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
    masks, reason = _probe_sharing(model, logits, batch)
    return Architecture(separate, masks, reason, frozenset(reached), resumable, lengths)


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


def _probe_sharing(model: Any, logits: Tensor, apart: Batch) -> tuple[tuple[MaskKind, ...], str | None]:
    """Return the masks under which shared and packed rows give the logits of separate ones, and why there are none."""
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
    batch, reason = _probe_batch(model, shared=True), ""
    # Both in the order of the sequences; the sort keeps each sequence's tokens in theirs.
    expected = logits[apart["sequences"].argsort(stable=True)]
    for masks in candidates:
        try:
            found = SequenceLogProbs(model, Architecture(masks=masks)).response_logits(batch)
        except MODEL_ERRORS as error:
            reason = reason or f"the model takes no block attention mask ({type(error).__name__})"
            continue
        if _close(expected, found[batch["sequences"].argsort(stable=True)], _TOLERANCES[logits.dtype]):
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
