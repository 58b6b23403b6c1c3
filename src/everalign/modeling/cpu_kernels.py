"""CPU kernels: attention over runs of tokens, RMS norms and gated MLPs with hand-written backward passes."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from everalign.modeling.lora import (
    Matrices,
    factor_gradients,
    input_gradient,
    is_plain,
    learned_adapters,
    linears,
    matrices_of,
    products,
)

GROUPED_ATTENTION = "everalign_grouped"


def grouped_attention(model: Any) -> AbstractContextManager[None]:
    """Return what to compute a model's masked passes in: without these copies where they would be made."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) not in (None, heads)
    ours = shared and model.device.type == "cpu" and config.model_type in PLAIN_ATTENTION_MODELS
    return _switched(config) if ours and config._attn_implementation == "sdpa" else nullcontext()


@contextmanager
def _switched(config: Any) -> Iterator[None]:
    AttentionInterface.register(GROUPED_ATTENTION, _grouped_attention)
    AttentionMaskInterface.register(GROUPED_ATTENTION, sdpa_mask)
    config._attn_implementation = GROUPED_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend as transformers asks: query (R, H, Q, D), key and value (R, H', T, D), mask (R, 1, Q, T) or None."""
    if attention_mask is None or options.get("dropout") or set(options) - _KNOWN_OPTIONS:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=options.get("scaling"), enable_gqa=True
    )
    return result.transpose(1, 2).contiguous(), None


CPU_ATTENTION = "everalign_cpu"
# Models whose attention does nothing but call the registered function; others ask for "sdpa" by name in between.
PLAIN_ATTENTION_MODELS = {
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
}
_KNOWN_OPTIONS = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}
# Query rows of a block in the backward pass, and the scores that are held at once. The library prepares a product for
# each new shape (8 ms for a block's five in bf16), so that blocks are rounded up.
_BLOCK_ROWS = 128
_BLOCK_SCORES = 4_194_304
_ROUND_ROWS = 32


def use_cpu_attention(model: Any) -> None:
    """Switch a model on the CPU that would use the library's attention to this one."""
    config = model.config.get_text_config()
    plain = config.model_type in PLAIN_ATTENTION_MODELS and config._attn_implementation == "sdpa"
    if plain and next(model.parameters()).device.type == "cpu":
        AttentionInterface.register(CPU_ATTENTION, _attention)
        AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
        model.set_attn_implementation(CPU_ATTENTION)


def runs_of(segments: Tensor, prefixes: Tensor) -> Tensor:
    """Return the table (1, 1, S, 4) of rows whose layout is given, for segments and prefixes (R, T) without padding.

    Positions count through the non-zero segments of all rows, one row after the other.
    """
    rows = torch.arange(len(segments)).view(-1, 1).expand_as(segments)
    kept = segments > 0
    # A segment's number is its own within its row only.
    width = int(segments.max()) + 1
    own, seen = ((rows * width + part)[kept] for part in (segments, prefixes))
    numbers, lengths = torch.unique_consecutive(own, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    place: dict[int, tuple[int, int]] = {}
    table: list[list[int]] = []
    for number, prefix, start, length in torch.stack([numbers, seen[starts], starts, lengths], dim=1).tolist():
        place[number] = (start, length)
        behind, size = place[prefix] if prefix != number else (start, 0)
        if size and behind + size == start:
            table[-1][1] += length  # right behind its prefix, whose run it continues
        else:
            table.append([start, length, behind, size])
    return torch.tensor(table).view(1, 1, -1, 4)


def _mask_of(runs: list[list[int]], length: int) -> Tensor:
    """Return the mask (1, 1, T, T) that a table stands for."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for start, size, behind, prefix in runs:
        own = slice(start, start + size)
        mask[own, own] = torch.ones(size, size, dtype=torch.bool).tril_()
        mask[own, behind : behind + prefix] = True
    return mask[None, None]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend as transformers asks: query (R, H, T, D), key and value (R, H', T, D), a mask, a table of runs or None."""
    plain = not options.get("dropout") and not set(options) - _KNOWN_OPTIONS and options.get("is_causal") is not False
    if attention_mask is None or attention_mask.dtype != torch.int64:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    if not plain or len({query.dtype, key.dtype, value.dtype}) > 1:
        mask = _mask_of(attention_mask[0, 0].tolist(), query.shape[2])
        output, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        return output, None
    scale = query.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"]
    query, key, value = (tensor.transpose(1, 2)[0] for tensor in (query, key, value))
    return attend(query, key, value, attention_mask, scale)[None], None


def attend(query: Tensor, key: Tensor, value: Tensor, runs: Tensor, scale: float) -> Tensor:
    """Attend with query (T, H, D), key and value (T, H', D) over a table of runs: (T, H, D)."""
    result: Tensor = _Attention.apply(query, key, value, runs[0, 0].tolist(), scale)  # type: ignore[no-untyped-call]
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: list[list[int]], scale: float) -> Tensor:
        """Attend with query (T, H, D), key and value (T, H', D) over runs: (T, H, D)."""
        output = query.new_zeros(query.shape)
        log_sums = query.new_zeros(query.shape[:2], dtype=torch.float32)
        for run in runs:
            own = slice(run[0], run[0] + run[1])
            k, v, mask = _seen_by(run, key, value)
            found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_by_head(query[own], k, v), 0.0, mask is None, attn_mask=mask, scale=scale
            )
            output[own], log_sums[own] = found[0].transpose(0, 1), sums[0].transpose(0, 1)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.runs, ctx.scale = runs, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint computes it anew at each look
        query, key, value, output, log_sums = saved
        if query.dtype.itemsize > 2:
            return *_library_gradients(gradient, saved, ctx.runs, ctx.scale), None, None
        length, heads, _ = key.shape
        # Σ dp·p of a row is its gradient times its output (Dao et al. 2022, "FlashAttention", appendix B.2).
        inner = (gradient * output).sum(-1, dtype=torch.float32)
        q, g = (_widened(t, c, heads) for t, c in ((query, log_sums / -ctx.scale), (gradient, -inner)))
        k, v = (_widened(t, t.new_ones(t.shape[:2]), heads)[:, 0] for t in (key, value))
        # Rows of ds sum to zero; what rounding leaves of it would multiply the mean key.
        centred = k[..., :-2] - key.mean(0)[:, None]
        dq = torch.zeros_like(query)
        dk, dv = (torch.zeros(heads, k.shape[1], k.shape[2], dtype=torch.float32) for _ in range(2))
        for first, last, answers in _groups(ctx.runs):
            step = max(_ROUND_ROWS, min(_BLOCK_ROWS, _BLOCK_SCORES // (query.shape[1] * (last - first))))
            for start in range(first, last, step):
                end = min(start + step, last)
                rows = slice(start, start - (start - end) // _ROUND_ROWS * _ROUND_ROWS)
                seen = slice(first, rows.stop)
                block_q, block_g = q[:, :, rows].flatten(1, 2), g[:, :, rows].flatten(1, 2)
                p = torch.baddbmm(q.new_empty(()), block_q, k[:, seen].transpose(1, 2), beta=0, alpha=ctx.scale).exp_()
                _hide(p.view(heads, -1, rows.stop - start, p.shape[2]), start - first, end - first, answers)
                dv[:, seen] += p.transpose(1, 2) @ block_g
                ds = (block_g @ v[:, seen].transpose(1, 2)).mul_(p)
                dk[:, seen] += ds.transpose(1, 2) @ block_q
                own = (ds @ centred[:, seen]).view(heads, -1, rows.stop - start, query.shape[2])
                dq[start:end] = own[:, :, : end - start].permute(2, 0, 1, 3).flatten(1, 2)
        dk, dv = (t[:, :length, :-2].transpose(0, 1) for t in (dk.mul_(ctx.scale), dv))
        return dq.mul_(ctx.scale), dk.to(key.dtype), dv.to(value.dtype), None, None


def _by_head(*tensors: Tensor) -> list[Tensor]:
    """View (T, H, D) as the library's (1, H, T, D)."""
    return [tensor.transpose(0, 1)[None] for tensor in tensors]


def _seen_by(run: list[int], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what a run sees of keys and values, its prefix first, and the mask where that is not causal alone."""
    start, length, behind, size = run
    own = slice(start, start + length)
    if not size:
        return key[own], value[own], None
    k, v = (torch.cat([tensor[behind : behind + size], tensor[own]]) for tensor in (key, value))
    return k, v, k.new_full((length, len(k)), float("-inf")).triu_(size + 1)


def _library_gradients(
    gradient: Tensor, saved: tuple[Tensor, ...], runs: list[list[int]], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, run by run, by the library's backward pass."""
    query, key, value, output, log_sums = saved
    dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for run in runs:
        start, length, behind, size = run
        own, prefix = slice(start, start + length), slice(behind, behind + size)
        k, v, mask = _seen_by(run, key, value)
        upstream, q, k, v, found = _by_head(gradient[own], query[own], k, v, output[own])
        sums = log_sums[own].T[None]
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream, q, k, v, found, sums, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        of_query, *of_seen = (part[0].transpose(0, 1) for part in parts)
        dq[own] = of_query
        for total, part in zip((dk, dv), of_seen, strict=True):
            total[prefix] += part[:size]
            total[own] += part[size:]
    return dq, dk, dv


def _groups(runs: list[list[int]]) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    """Return each group's first position and end, and of its further answers start, end and the prefix's end.

    An answer's places count from its group's first position.
    """
    groups: list[tuple[int, int, list[tuple[int, int, int]]]] = []
    for start, length, _, size in runs:
        if size:
            first, _, answers = groups.pop()
            answers.append((start - first, start - first + length, size))
            groups.append((first, start + length, answers))
        else:
            groups.append((start, start + length, []))
    return groups


def _widened(tensor: Tensor, values: Tensor, heads: int) -> Tensor:
    """Lay (T, H, D) out as (H', H/H', T + R, D + 2); the last columns are `values` (T, H) in twice the digits.

    Blocks that are rounded up reach into the R further rows.
    """
    wide = tensor.new_zeros(heads, tensor.shape[1] // heads, len(tensor) + _ROUND_ROWS, tensor.shape[2] + 2)
    high = values.to(tensor.dtype)
    by_head = wide[:, :, : len(tensor)].flatten(0, 1).transpose(0, 1)
    by_head[..., :-2], by_head[..., -2], by_head[..., -1] = tensor, high, values - high
    return wide


def _hide(p: Tensor, start: int, end: int, answers: list[tuple[int, int, int]]) -> None:
    """Set to zero what rows from `start` on must not see, and the rows from `end` on; p (H', G, rows, keys)."""
    p[..., start:].tril_()
    p[:, :, end - start :] = 0
    for first, last, prefix in answers:
        rows = slice(max(first - start, 0), max(min(last, end) - start, 0))
        p[:, :, rows, prefix:first] = 0


# Elements of a block: a few of them, with their temporaries, fit into a core's second-level cache.
_BLOCK = 131_072
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def fuse_layers(model: nn.Module) -> None:
    """Replace the forward pass of every norm and gated feed-forward layer that a fused one reproduces.

    On a CPU; elsewhere so many small blocks would cost more than they save.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and _plain_norm(module):
            _replace(module, _norm_forward, _width(module), {torch.bfloat16, next(module.parameters()).dtype})
        elif _gated(module):
            dtype = next(module.parameters()).dtype
            _replace(module, _gated_forward, _input_width(module.gate_proj), {dtype})
        elif _attends(module) and _attention_agrees(module):
            module.forward = partial(_attention_forward, module)


def _plain_norm(module: Any) -> bool:
    names = {name for name, _ in module.named_parameters()}
    return names == {"weight"} and module.weight.ndim == 1 and _epsilon(module) is not None


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _gated(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    # Quantised and packed matrices have no weights that tell in which precision they compute.
    return all(is_plain(part) for part in parts) and isinstance(
        getattr(module, "act_fn", None), nn.SiLU | SiLUActivation
    )


def _width(norm: Any) -> int:
    return len(norm.weight)


def _input_width(module: Any) -> int:
    return int(getattr(module, "base_layer", module).in_features)


def _replace(module: Any, forward: Any, width: int, dtypes: set[torch.dtype]) -> None:
    """Give a module its fused forward pass if that agrees with its own, on small rows and on large ones."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, width, generator=generator)
    # Clamped variants differ at large inputs only, and norms by their ε at small ones.
    if all(_agrees(module, forward, (scale * rows).to(dtype)) for dtype in dtypes for scale in (1e-3, 1.0, 1e3)):
        module.forward = partial(forward, module)


def _agrees(module: Any, forward: Any, rows: Tensor) -> bool:
    with torch.no_grad():
        own, fused = module(rows), forward(module, rows)
    error = (own.float() - fused.float()).abs().max()
    return own.dtype == fused.dtype and bool(error <= _TOLERANCES[rows.dtype] * own.float().abs().max())


def _norm_forward(module: Any, x: Tensor) -> Tensor:
    result: Tensor = _Norm.apply(x, module.weight, _epsilon(module))  # type: ignore[no-untyped-call]
    return result


def _gated_forward(module: Any, x: Tensor) -> Tensor:
    (gate, dtype), (up, _), (down, _) = (
        matrices_of(m, x) for m in (module.gate_proj, module.up_proj, module.down_proj)
    )
    layers = (gate, up, down)
    factors = (factor for layer in layers for factor in layer.factors)
    result: Tensor = _Gated.apply(x, dtype, layers, *factors)  # type: ignore[no-untyped-call]
    return result


def _attends(module: Any) -> bool:
    """Whether a module has the parts of a Llama's attention."""
    parts = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    config: Any = getattr(module, "config", None)
    if not all(is_plain(part) for part in parts) or getattr(config, "model_type", None) not in PLAIN_ATTENTION_MODELS:
        return False
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    plain = all(norm is None or norm.weight.shape == (module.head_dim,) for norm in norms)
    return plain and bool(config._attn_implementation == "sdpa")


def _attention_agrees(module: Any) -> bool:
    """Whether the fused attention gives what the module's own does, for six tokens at random angles.

    Asked of a copy in fp32: rounded scores choose other tokens, which is no other attention.
    """
    exact: Any = copy.deepcopy(module).float()
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(1, 6, module.head_dim // 2, generator=generator).repeat(1, 1, 2)
    rows, positions = torch.randn(1, 6, _input_width(module.q_proj), generator=generator), (angles.cos(), angles.sin())
    with torch.no_grad():
        own = exact(hidden_states=rows, position_embeddings=positions, attention_mask=None)[0]
        fused = _attention_forward(exact, rows, positions, torch.tensor([[[[0, 6, 0, 0]]]]))[0]
    return own.shape == fused.shape and bool((own - fused).abs().max() <= 1e-4 * own.abs().max())


def _attention_forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend over runs (see `cpu_attention`); the module's own way where the mask is no table of them."""
    if past_key_values is not None or attention_mask is None or attention_mask.dtype != torch.int64:
        own: tuple[Tensor, Tensor | None] = type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **options
        )
        return own
    parts = (module.q_proj, module.k_proj, module.v_proj)
    layers, dtype = [matrices_of(part, hidden_states)[0] for part in parts], matrices_of(parts[0], hidden_states)[1]
    q, k, v = (t.view(t.shape[1], -1, module.head_dim) for t in linears(hidden_states, dtype, layers))
    if getattr(module, "q_norm", None) is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    cos, sin = position_embeddings
    q, k = _Rotary.apply(q, k, cos[0], sin[0])  # type: ignore[no-untyped-call]
    result: Tensor = module.o_proj(attend(q, k, v, attention_mask, module.scaling).flatten(1)[None])
    return result, None


class _Rotary(torch.autograd.Function):
    """x·cos + (-x₂, x₁)·sin of queries and keys (T, H, D), for angles (T, D) (Su et al. 2021, "RoFormer")."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(query, cos, sin), _rotated(key, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        back = -sin.roll(sin.shape[1] // 2, dims=1)
        return *(_rotated(gradient, cos, back) for gradient in gradients), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin, half = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype), x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def _blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors of equal shape (..., d) into the same blocks of rows."""
    width = tensors[0].shape[-1]
    rows = max(1, _BLOCK // width)
    return list(zip(*(torch.split(tensor.reshape(-1, width), rows) for tensor in tensors), strict=True))


class _Norm(torch.autograd.Function):
    """w · x / sqrt(mean(x²) + ε), the norm in fp32 and then rounded to x's type, as the models write it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
        inverse = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        for (block, out), root in zip(_blocks(x, y), _roots(inverse, x), strict=True):
            wide = block.float()
            torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(epsilon), out=root)
            torch.mul((wide * root).to(x.dtype), weight, out=out)
        ctx.save_for_backward(x, inverse, weight)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, inverse, weight = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for (block, upstream, out), root in zip(_blocks(x, gradient, dx), _roots(inverse, x), strict=True):
            wide, g = block.float(), upstream.to(torch.float32, copy=True)
            if ctx.needs_input_grad[1]:
                dw += (g * wide).mul_(root).sum(0)
            g.mul_(weight)
            # x̂ = x·r, and dx = r·(g - x̂·mean(g·x̂))
            along = (g * wide).mean(-1, keepdim=True).mul_(root.pow(3)).neg_()
            out.copy_(g.mul_(root).addcmul_(wide, along))
        return dx, dw.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


def _roots(inverse: Tensor, like: Tensor) -> list[Tensor]:
    return list(torch.split(inverse.view(-1, 1), max(1, _BLOCK // like.shape[-1])))


class _Gated(torch.autograd.Function):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020, "GLU Variants Improve Transformer"), keeping x, gate and up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, layers: Sequence[Matrices], *factors: Tensor) -> Tensor:
        (gate, up), outer = products(x.to(dtype), layers[:2])
        (y,), inner = products(F.silu(gate).mul_(up), layers[2:])
        ctx.learned = learned_adapters(layers, ctx.needs_input_grad[3:])
        ctx.save_for_backward(x if any(map(any, ctx.learned)) else x.new_empty(0), gate, up, *outer, *inner)
        ctx.layers, ctx.dtypes, ctx.outer = layers, (x.dtype, dtype), len(outer)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *kept = ctx.saved_tensors
        layers, learned, (own, dtype) = ctx.layers, ctx.learned, ctx.dtypes
        outer, inner = kept[: ctx.outer], kept[ctx.outer :]
        upstream = [gradient.to(dtype)]
        dy, narrow = input_gradient(upstream, layers[2:], inner)
        silu = F.silu(gate)
        down = factor_gradients(silu * up, upstream, layers[2:], inner, narrow, learned[2:]) if any(learned[2]) else []
        down = down or [None] * len(layers[2].factors)
        parts = [torch.ops.aten.silu_backward(dy * up, gate), silu.mul_(dy)]
        dx, narrow = input_gradient(parts, layers[:2], outer)
        factors = factor_gradients(x.to(dtype), parts, layers[:2], outer, narrow, learned[:2])
        return (dx.to(own), None, None, *factors, *down)
