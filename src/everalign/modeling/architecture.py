"""Find out what a model's classes can do, on a shrunk copy with random weights."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from everalign.data.collate import Batch, collate_pairs
from everalign.data.tokenization import TokenizedPair
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

_known: dict[tuple[type, str], Architecture] = {}
_lengths: dict[tuple[type, str], Lengths] = {}
_classes: dict[tuple[type, str], set[type]] = {}


def study(model: Any) -> Architecture:
    """Return what a Hugging Face causal language model's classes can do, adapters injected or not.

    A model of which no shrunk copy can be made is probed itself, in its own dtype.
    """
    key = configuration_key(model)
    if key not in _known:
        small = shrunk_copy(model)
        lengths = Lengths() if small is None else probe_lengths(small, model.config)
        _known[key] = _probe(model if small is None else small, lengths)
        if small is not None:
            # It is asked for again where a whole path is tried on the copy.
            _known[configuration_key(small)] = _known[key]
            _classes[key] = {type(part) for part in small.modules()}
    if key in _classes and any(not _is_linear(part) for part in model.modules() if type(part) not in _classes[key]):
        # Somebody has put parts of his own into the model, of which its configuration knows nothing.
        return _probe(model, _known[key].lengths)
    return _known[key]


def study_lengths(model: Any) -> Lengths:
    """Return how long rows of a Hugging Face model may be, whatever its head."""
    key = configuration_key(model)
    if key in _known:
        return _known[key].lengths
    if key not in _lengths:
        small = shrunk_copy(model)
        _lengths[key] = Lengths() if small is None else probe_lengths(small, model.config)
    return _lengths[key]


def _is_linear(part: nn.Module) -> bool:
    """Whether a module is a matrix in some form: quantised, packed or adapted ones stand in for plain ones."""
    return hasattr(part, "in_features") or type(part).__module__.startswith(("peft.", "torch.nn."))


def configuration_key(model: Any) -> tuple[type, str]:
    """Return what models have in common whose classes do the same: class and configuration."""
    config = model.config
    settings = {**config.to_dict(), "attention": getattr(config, "_attn_implementation", None)}
    for name in ("_name_or_path", "name_or_path", "dtype", "torch_dtype", "quantization_config"):
        settings.pop(name, None)
    return type(model), json.dumps(settings, sort_keys=True, default=str)


def _probe(model: Any, lengths: Lengths) -> Architecture:
    with torch.no_grad():
        batch = _rows(model, shared=False)
        with _noting_linear_modules(model) as reached:
            whole = SequenceLogProbs(model, Architecture()).response_logits(batch)
        separate = _is_apart(model, batch, whole)
        resumable = not separate and _is_resumable(model, batch, whole)
        masks, reason = _sharing(model, whole)
    return Architecture(separate, masks, reason, frozenset(reached), resumable, lengths)


@contextmanager
def _noting_linear_modules(model: Any) -> Iterator[set[str]]:
    """Note the kinds of linear modules that are called inside of the `with` block, and do what a matrix does.

    Some classes derive from `nn.Linear` and compute something else, such as one product for each group of heads.
    """
    found: set[str] = set()

    def note(kind: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if type(module) is nn.Linear or not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
            found.add(kind)
            return
        plain = nn.functional.linear(inputs[0], module.weight, module.bias)
        if _close(output, plain, _TOLERANCES[output.dtype]):
            found.add(kind)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if is_linear(module):
                stack.callback(module.register_forward_hook(partial(note, kind_of(name))).remove)
        yield found


def _is_apart(model: Any, batch: Batch, whole: Tensor) -> bool:
    """Whether decoder and head give the logits of the whole model, called one after the other."""
    head = SequenceLogProbs(model, Architecture(separate=True))
    try:
        return head.separate and _close(whole, head.all_logits(batch), _HEAD_TOLERANCE)
    except MODEL_ERRORS:
        return False


def _is_resumable(model: Any, batch: Batch, whole: Tensor) -> bool:
    """Whether the model itself gives its logits when it is handed its decoder's hidden states, a few positions at once.

    Each half of them is computed apart, so that nothing may look at other positions.
    """
    head = SequenceLogProbs(model, Architecture(resumable=True))
    try:
        halves = head.states(batch).chunk(2)
        return head.chunked and _close(whole, torch.cat([head.logits(half) for half in halves]), _HEAD_TOLERANCE)
    except MODEL_ERRORS:
        return False


def _sharing(model: Any, whole: Tensor) -> tuple[tuple[MaskKind, ...], str | None]:
    """Return the masks under which shared and packed rows give the logits of separate ones, and why there are none."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := sorted(kinds - set(_KINDS_OF_LAYERS)):
        return (), f"the model has {', '.join(others)} layers"
    batch, reason = _rows(model, shared=True), ""
    order = _rows(model, shared=False)["sequences"].argsort(stable=True)
    for masks in _candidates(config, kinds):
        head = SequenceLogProbs(model, Architecture(masks=masks))
        try:
            found = head.response_logits(batch)
        except MODEL_ERRORS as error:
            reason = reason or f"the model takes no block attention mask ({type(error).__name__})"
            continue
        # Both in the order of the sequences; the sort keeps each sequence's tokens in theirs.
        if _close(whole[order], found[batch["sequences"].argsort(stable=True)], _TOLERANCES[whole.dtype]):
            return masks, None
        reason = "the model's layers do not follow a block attention mask with restarted positions"
    return (), reason


def _candidates(config: Any, kinds: set[str]) -> list[tuple[MaskKind, ...]]:
    """Return what to try: one mask for all layers, or one for each kind of layer."""
    if len(kinds) > 1:
        return [tuple(sorted(_KINDS_OF_LAYERS[kind] for kind in kinds))]
    found: list[tuple[MaskKind, ...]] = [("whole",)]
    if getattr(config, "sliding_window", None):
        found.append(("window",))
    if getattr(config, "attention_chunk_size", None):
        found.append(("chunk",))
    return found


def _rows(model: Any, shared: bool) -> Batch:
    """Lay out three pairs of a few tokens, answers different in length and content, so that rows are packed too.

    The longest prompt reaches beyond the windows of a shrunk copy.
    """
    most = min(model.config.get_text_config().vocab_size, FIRST_SPECIAL)
    tokens = [[3 + (7 * i + 3 * k) % (most - 3) for i in range(2 + k)] for k in range(4)]
    long = TokenizedPair("probe", tokens[3] * 3, [most - 1, *tokens[1]], [most - 1, *tokens[2]], 1.0)
    short = [TokenizedPair("probe", tokens[k], tokens[k + 1], tokens[k + 2], 1.0) for k in range(2)]
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in collate_pairs([long, *short], shared).items()}


def _close(expected: Tensor, found: Tensor, tolerance: float) -> bool:
    if expected.shape != found.shape:
        return False
    error = (expected.float() - found.float()).abs().max()
    return bool(error <= tolerance * expected.float().abs().max().clamp(min=1.0))
