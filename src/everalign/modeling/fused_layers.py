"""Root-mean-square norms and gated feed-forward products with hand-written backward passes.

A transformer's element-wise steps move far more memory than they compute. Written out for autograd they keep and
re-read half a dozen tensors each; here they work on blocks of rows that stay in the processor's cache, and keep
nothing but their inputs. A module is replaced only where the fused form gives what its own does, which is measured.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from everalign.modeling.cpu_attention import PLAIN_ATTENTION_MODELS, attend
from everalign.modeling.fused_lora import (
    Matrices,
    factor_gradients,
    input_gradient,
    is_plain,
    learned_adapters,
    linears,
    matrices_of,
    products,
)

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
