"""A copy of a model shrunk to a few narrow layers with random weights: what its classes do, free of rounding.

How a model treats masks, positions and lengths is decided by its classes and its configuration, not by its weights and
not by its widths. So it is found out on a copy of the same classes that keeps every kind of layer and is computed in
fp32 on the CPU in milliseconds. Windows and lengths shrink as well, so that a few tokens reach beyond them.
"""

import copy
import itertools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers.utils import logging

VOCABULARY = 256
WINDOW = 5
# Positions that stretch with the length do so from ORIGINAL tokens on; a table of positions has LONGEST rows.
ORIGINAL, LONGEST = 32, 64
# Special tokens that would lie outside of the small vocabulary; probes keep below them.
FIRST_SPECIAL = 224

_FACTORS = (32, 16, 8, 4, 2, 1)
_EXPERTS = 8
_MOST_PARAMETERS = 80_000_000
# Weights of random numbers this large, over the root of the width, make every effect visible in the logits.
_SPREAD = 1.2

_WIDTH = re.compile(
    r"(size|dim|dims|width|rank|channels|n_embd|d_model|n_inner|d_inner|d_ff|dff|d_head|d_kv|headdim|d_ssm)$"
)
_NO_WIDTH = re.compile(
    r"vocab|state|conv|kernel|window|chunk|block|patch|image|codebook|group|step|bucket|multiple|crop|batch|num_|max_|"
    r"spatial|topk|merge|temporal|dim_per_head"
)
_EXPERT_COUNT = re.compile(r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_moe_experts)$")
_EXPERT_CHOICE = re.compile(r"^(num_experts_per_tok|moe_topk|moe_k|top_k_experts|moe_top_k|num_experts_per_token)$")
_WINDOWS = re.compile(
    r"(sliding_window|window_size|window_len|chunk_size|local_attention|index_topk|index_topk_blocks)$"
)
LENGTH_NAMES = re.compile(
    r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|max_target_positions|"
    r"context_length|model_max_length|max_context_length)$"
)
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "decoder_layers", "depth")
# What a model raises that cannot be built from, or run with, a configuration of other sizes.
MODEL_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


def shrunk_copy(model: Any) -> Any | None:
    """Return a small copy of a Hugging Face model in fp32 on the CPU, in evaluation mode; None where none can be made.

    The same configuration gives the same copy, always; the global random state is left as it is.
    """
    whole, depth = layer_list(model), None
    if whole is not None:
        # As many of the first layers as hold every kind of layer.
        kinds = [_kind(layer) for layer in whole]
        depth = max(2, max(kinds.index(kind) for kind in kinds) + 1)
    with quiet():
        # Some classes refuse to be as shallow, since their layers lean on one another; and experts that are computed
        # together want widths that are multiples of some number.
        ways = itertools.product(dict.fromkeys((depth, None)), (False, True), _FACTORS, (True, False))
        for layers, one_by_one, factor, towers in ways:
            config = _shrunk_config(model.config, factor, layers, towers)
            if config is not None and one_by_one:
                config._experts_implementation = "eager"
            small = None if config is None else _build(model, config)
            if small is not None:
                return small
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings and progress bars about shrunk configurations."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _build(model: Any, config: Any) -> Any | None:
    """Build the model's class from a configuration; None where it is too large or refused, or cannot be run."""
    make = type(model)
    try:
        with init_empty_weights():
            empty = make._from_config(copy.deepcopy(config), dtype=torch.float32)
        if sum(parameter.numel() for parameter in empty.parameters()) > _MOST_PARAMETERS:
            return None
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            small = make._from_config(config, dtype=torch.float32)
            _randomise(small)
        small.eval().requires_grad_(False)
        with torch.no_grad():
            logits = small(input_ids=torch.tensor([[3, 4, 5, 6, 7, 8]]), use_cache=False).logits
    except MODEL_ERRORS:
        return None
    return small if bool(logits.isfinite().all()) else None


def _randomise(model: nn.Module) -> None:
    """Give every parameter random values: matrices as large as keeps their input's size, others near what they were."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                noisy = parameter + 0.1 * torch.randn_like(parameter)
                parameter.copy_(noisy.nan_to_num(0.0, 0.0, 0.0))
            else:
                parameter.normal_(0, _SPREAD / parameter.shape[-1] ** 0.5)


def layer_list(model: Any) -> list[nn.Module] | None:
    """Return a model's layers where it holds them in one list, the one nearest to the tokens first."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (part for part in model.base_model.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    found = next(lists, None)
    return None if found is None else list(found)


# ---- depth ----


def _kind(layer: nn.Module) -> frozenset[tuple[str, str]]:
    """What tells layers apart: classes of their parts, and their switches, such as `is_sliding`."""
    found = set()
    for name, module in layer.named_modules():
        found.add((name, type(module).__name__))
        for key, value in vars(module).items():
            plain = isinstance(value, bool | str) or value is None or (isinstance(value, int) and "window" in key)
            if plain and not key.startswith("_") and key != "training":
                found.add((f"{name}.{key}", str(value)))
    return frozenset(found)


# ---- the configuration ----


def _shrunk_config(config: Any, factor: int, depth: int | None, towers: bool) -> Any | None:
    """Return a copy with widths divided by `factor`; None where one of them does not divide."""
    small = copy.deepcopy(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    if getattr(small, "_attn_implementation", None) not in (None, "sdpa", "eager"):
        # Others need a GPU, or are ours for another precision.
        small._attn_implementation = "sdpa"
    text = small.get_text_config()
    parts = list(_parts(small))
    # Of the language model: the text configuration, what holds it, and what lies inside of it.
    of_text = [part for part in parts if part is small or any(part is inner for inner in _parts(text))]
    widths = [value for part in of_text for _, value in _widths(vars(part))]
    if any(value % factor or value // factor < 2 for value in widths):
        return None
    layers, hidden = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    # A head keeps four numbers, so that its positions can turn at two speeds. Without heads the width keeps eight: of
    # two numbers a layer norm leaves no more than their order, so that whatever changes them may change nothing.
    heads = getattr(text, "num_attention_heads", None)
    if factor != 1 and isinstance(hidden, int) and hidden // factor < (4 * heads if isinstance(heads, int) else 8):
        return None
    for part in parts:
        if any(part is other for other in of_text):
            _shrink_text(part, factor, layers, depth)
        else:
            _shrink_tower(part, hidden, factor, towers)
    return small


def _parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and those inside of it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value)


def _widths(settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the settings that are widths: a list's values one by one."""
    for name, value in settings.items():
        if isinstance(value, dict) and name.startswith("rope"):
            yield from ((f"{name}.{inner}", v) for inner, v in _rope_widths(value))
        elif _WIDTH.search(name) and not _NO_WIDTH.search(name):
            values = value if isinstance(value, list) else [value]
            yield from ((name, v) for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 1)


def _rope_widths(rope: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in rope.items():
        if isinstance(value, dict):
            yield from _rope_widths(value)
        elif name == "mrope_section":
            yield from ((name, v) for v in value)
        elif name in ("short_factor", "long_factor"):
            yield name, len(value)


def _shrink_text(part: Any, factor: int, layers: int | None, depth: int | None) -> None:
    widths = {name for name, _ in _widths(vars(part))}
    # So many experts are left: more than a token is given, and as many in each group.
    settings = vars(part)
    choice = max([v for k, v in settings.items() if _EXPERT_CHOICE.search(k) and isinstance(v, int)], default=1)
    groups = settings.get("n_group") or settings.get("num_expert_group") or 1
    experts = int(-(-max(_EXPERTS, 2 * choice, 2 * groups) // groups) * groups)
    for name, value in list(vars(part).items()):
        if name.startswith("_"):
            continue
        new = _shrunk_value(name, value, factor, name in widths, experts)
        new = _cut(name, new, layers, depth)
        if new is not value:
            setattr(part, name, new)


def _shrunk_value(name: str, value: Any, factor: int, is_width: bool, experts: int) -> Any:
    if isinstance(value, dict):
        return _shrunk_rope(value, factor) if name.startswith("rope") else value
    if "token_i" in name:
        return _shrunk_tokens(value)
    if is_width and isinstance(value, list):
        return [v // factor if isinstance(v, int) and v > 1 else v for v in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if is_width:
        return value // factor if value > 1 else value
    if "vocab_size" in name:
        return min(value, VOCABULARY)
    if _EXPERT_COUNT.search(name):
        return min(value, experts)
    if _WINDOWS.search(name):
        return min(value, WINDOW) if value > 0 else value
    if name == "original_max_position_embeddings":
        return min(value, ORIGINAL)
    return min(value, LONGEST) if LENGTH_NAMES.search(name) else value


def _shrunk_tokens(value: Any) -> Any:
    if isinstance(value, list):
        return [_shrunk_tokens(v) for v in value]
    too_large = isinstance(value, int) and value >= FIRST_SPECIAL
    return FIRST_SPECIAL + value % (VOCABULARY - FIRST_SPECIAL) if too_large else value


def _shrunk_rope(rope: dict[str, Any], factor: int) -> dict[str, Any]:
    new = dict(rope)
    for name, value in rope.items():
        if isinstance(value, dict):
            new[name] = _shrunk_rope(value, factor)
        elif name == "mrope_section":
            new[name] = [v // factor for v in value]
        elif name in ("short_factor", "long_factor"):
            new[name] = value[::factor]
        elif name == "original_max_position_embeddings" and value is not None:
            new[name] = min(value, ORIGINAL)
    return new


def _cut(name: str, value: Any, layers: int | None, depth: int | None) -> Any:
    """Cut what has one entry for each layer, and leave out the numbers of layers that are gone."""
    if layers is None or depth is None or depth >= layers:
        return value
    if name in _DEPTHS and value == layers:
        return depth
    if not isinstance(value, list | tuple):
        return value
    if len(value) == layers:
        return value[:depth]
    numbers = name.endswith(("_layers", "_idxs", "_ids", "_indices")) and "token" not in name
    if numbers and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return type(value)(v for v in value if v < depth)
    return value


def _shrink_tower(part: Any, hidden: int | None, factor: int, depth: bool) -> None:
    """Shrink what reads images or sounds, which no probe does: one layer, and the language model's width to its own."""
    for name, value in list(vars(part).items()):
        if isinstance(value, bool) or not isinstance(value, int) or name.startswith("_"):
            continue
        if depth and (name in _DEPTHS or name.endswith("num_hidden_layers")):
            setattr(part, name, 1)
        elif "vocab_size" in name:
            setattr(part, name, min(value, VOCABULARY))
        elif value == hidden and name not in ("hidden_size", "intermediate_size"):
            setattr(part, name, value // factor)
