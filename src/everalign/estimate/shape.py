"""What the formulas read of a model: counted on torch's meta device, from its configuration alone, or on a policy."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from everalign.data.tokenization import TokenizedRow
from everalign.errors import EveralignError, InputError
from everalign.learning.options import AdapterOptions
from everalign.modeling.architecture import is_linear
from everalign.modeling.base_adapter import base_and_adapter
from everalign.modeling.base_weights import check_plain, quantisation
from everalign.modeling.loading import (
    DTYPES,
    check_vocabulary,
    language_model_class,
    load_config,
    resolve_model,
)
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import SavedBytes, prepare_process, recomputable_layers
from everalign.modeling.shrinking import MODEL_ERRORS, layer_list
from everalign.options import Quantize
from everalign.training.base_objective import Objective

_COUNTED = "everalign_counted"
# On a processor, what is kept grows with the tokens alone, so that some of them tell it.
_CPU_TOKENS = 256
_CPU_LAYERS = 2
_CPU_VOCABULARY = 512


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model with its adapters.

    Args:
        matrices: N, numbers of the matrices that a token passes through, without the output matrix; of routed experts
            those that a token is given.
        adapted: Σ (m + n) over the adapted matrices.
        rank: of a task's adapter.
        layers: decoder layers.
        hidden: width d of the hidden states.
        vocabulary: V, rows of the output matrix.
        attention: heads times their width, over all layers.
        weight_bytes: of the frozen weights.
        cache_bytes: keys and values of one token, for decoding.
        shared: whether a prompt is computed once for all its answers.
        packed: whether rows are computed without padding, as on a processor.
        chunked: whether logits exist for a few positions at a time.
        itemsize: bytes of a number that is computed.
        layer_bytes: of the frozen weights, those of decoder layers; 0 where they cannot be shared by processes.
    """

    matrices: int
    adapted: int
    rank: int
    layers: int
    hidden: int
    vocabulary: int
    attention: int
    weight_bytes: int
    cache_bytes: int
    shared: bool
    packed: bool
    chunked: bool
    itemsize: int
    layer_bytes: int = 0

    @property
    def trained(self) -> int:
        """Numbers that learn: the short-term adapter's."""
        return self.rank * self.adapted


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass keeps for its backward pass.

    Args:
        total: of the whole batch.
        layer: of one decoder layer.
        tokens: positions of the batch.
    """

    total: float
    layer: float
    tokens: int


def model_from_config(
    model: str, base_adapter: str | None, precision: str, tokenizer: Any, quantize: Quantize | None = None
) -> Any:
    """Return the model on the meta device: its classes and sizes without a single weight.

    Raises:
        InputError: its configuration cannot be read, or the tokenizer has tokens that it has no embeddings for.
    """
    name, _ = base_and_adapter(model, resolve_model(model), base_adapter)
    config = load_config(resolve_model(name), "model", name)
    if quantize is not None:
        check_plain(config, name)
        config.quantization_config = {"load_in_4bit": True}  # bitsandbytes itself need not be there
    built = _built(config, precision, "meta", name)
    if quantisation(config) is not None:
        built.config.quantization_config = config.quantization_config  # of which `shape_of` counts the bits
    check_vocabulary(built, tokenizer, name)
    return built


def _built(config: Any, precision: str, device: str, name: str) -> Any:
    config = copy.deepcopy(config)
    if quantisation(config) is not None:
        del config.quantization_config
    try:
        with torch.device(device):
            model = language_model_class(config).from_config(config, dtype=DTYPES[precision])
    except MODEL_ERRORS as error:
        first = str(error).partition("\n")[0]
        raise InputError(f"{name}: no model can be built from its configuration ({first})") from error
    model.eval()
    model.requires_grad_(False)
    return model


def meta_policy(model: Any, adapter: AdapterOptions) -> Policy:
    """Return the policy that training would make of a model on the meta device."""
    policy = Policy(model, adapter.rank, adapter.alpha, adapter.module_names())
    # In place of the library's attention, which has no kernel there and would keep every score.
    model.config.get_text_config()._attn_implementation = _COUNTED
    model.config._attn_implementation = _COUNTED
    return policy


def shape_of(policy: Policy, on_cpu: bool) -> ModelShape:
    """Count the sizes of a policy, whose model may lie on the meta device."""
    model = policy.language_model
    config = model.config.get_text_config()
    head, matrices = model.get_output_embeddings(), 0
    for name, module in model.named_modules():
        if ".lora_" in name or module is head or hasattr(module, "base_layer"):
            continue
        if is_linear(module):
            # By its features, where it has them: a quantised weight is stored in fewer numbers.
            by_features = hasattr(module, "in_features") and hasattr(module, "out_features")
            matrices += int(module.in_features * module.out_features if by_features else module.weight.numel())
        elif "expert" in f"{name} {type(module).__name__}".lower():
            # Of stacked experts a token passes through a few.
            stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3]
            chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None) or 1
            matrices += sum(p.numel() * min(int(chosen), len(p)) // len(p) for p in stacks)
    factors = list(policy.learned_factors().values())
    heads = getattr(config, "num_attention_heads", None) or 0  # some models attend to nothing
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
    itemsize = next(iter(frozen.values())).itemsize
    bits = _bits(config) or _bits(model.config)
    weights = sum(p.numel() * p.itemsize for p in frozen.values())
    if bits is not None and any(p.is_meta for p in frozen.values()):
        weights -= round(matrices * (itemsize - bits / 8))
    layers = {id(part) for layer in layer_list(model) or () for part in layer.parameters()}
    in_layers = sum(p.numel() * p.itemsize for number, p in frozen.items() if number in layers)
    return ModelShape(
        matrices=matrices,
        adapted=sum(left.shape[0] + right.shape[1] for left, right in factors),
        rank=factors[0][0].shape[1],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        attention=config.num_hidden_layers * heads * width,
        weight_bytes=weights,
        cache_bytes=2 * config.num_hidden_layers * key_heads * width * itemsize,
        shared=policy.head.shared,
        packed=on_cpu and policy.head.shared,
        chunked=policy.head.chunked,
        itemsize=itemsize,
        layer_bytes=in_layers if bits is None else 0,
    )


def _bits(config: Any) -> float | None:
    """Return how many bits a number of a quantised matrix takes; None for plain ones."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    settings = found if isinstance(found, Mapping) else vars(found)
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return 4.5  # with the scale of each block of 64
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return 8.0
    return float(settings.get("bits") or 8)


def saved_bytes(policy: Policy, objective: Objective, rows: Sequence[TokenizedRow]) -> Saved:
    """Count what one micro-batch of these rows keeps for its backward pass; on the meta device nothing is computed.

    Raises:
        InputError: the model cannot be run there.
    """
    batch = objective.collate(rows, policy.head.shared)
    device = next(policy.parameters()).device
    layers, seen = recomputable_layers(policy), dict[str, int]()
    with SavedBytes(policy) as saved, _without_autocast(device):
        if layers:
            before = layers[-1].register_forward_pre_hook(lambda *_: seen.update(before=saved.total))
            after = layers[-1].register_forward_hook(lambda *_: seen.update(after=saved.total))
        given = {name: value.to(device) for name, value in batch.items()}
        given["reference"] = torch.zeros(len(batch["lengths"]), device=device)
        try:
            objective.loss(policy, given, batch["count"])
        except (EveralignError, *MODEL_ERRORS) as error:
            kind, first = type(policy.language_model).__name__, str(error).partition("\n")[0]
            raise InputError(f"what {kind} keeps in memory cannot be counted ({first})") from error
        finally:
            for handle in (before, after) if layers else ():
                handle.remove()
    tokens = int((batch["attention_mask"] if "attention_mask" in batch else batch["input_ids"]).numel())
    return Saved(float(saved.total), float(seen.get("after", 0) - seen.get("before", 0)), tokens)


def saved_bytes_on_cpu(
    config: Any, precision: str, adapter: AdapterOptions, objective: Objective, layers: int
) -> Saved:
    """Count it on two layers of the model in full width with random weights, and few tokens: for a processor.

    There layers and attention are other ones than on a GPU, and none of them can be called on the meta device.
    """
    prepare_process()
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = min(_CPU_LAYERS, layers)
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[: text.num_hidden_layers]
    text.vocab_size = min(text.vocab_size, _CPU_VOCABULARY)
    for part in (small, text):
        part.pad_token_id = None
    model = _built(small, precision, "cpu", "the model")
    policy = Policy(model, adapter.rank, adapter.alpha, adapter.module_names())
    half = _CPU_TOKENS // 2
    row = TokenizedRow.pair("counted", [3] * half, [4] * (half // 2), [5] * (half // 2))
    found = saved_bytes(policy, objective, [row])
    rest = found.total - text.num_hidden_layers * found.layer
    return Saved(rest + layers * found.layer, found.layer, found.tokens)


# ---- the meta device ----


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Leave autocast out on the meta device, which does not know it; weights there have what it would compute in."""
    if device.type != "meta":
        yield
        return
    kept = torch.autocast, torch.is_autocast_enabled
    torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[assignment,misc]
    torch.is_autocast_enabled = lambda *_: False
    try:
        yield
    finally:
        torch.autocast, torch.is_autocast_enabled = kept  # type: ignore[misc]


class _Kept(torch.autograd.Function):
    """Keeps what fused attention keeps (Dao et al. 2022, "FlashAttention"): its inputs, its result and log-sums."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums, *([] if mask is None else [mask]))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if attention_mask is not None and key.shape[1] != query.shape[1]:
        # With a mask the library's attention wants keys and values of every head.
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    output: Tensor = _Kept.apply(query, key, value, attention_mask)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


# Without a mask of its own: how the library makes one depends on values, which are not there.
AttentionInterface.register(_COUNTED, _attention)
