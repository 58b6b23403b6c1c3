"""Root-mean-square norms and gated feed-forward products with hand-written backward passes.

A transformer's element-wise steps move far more memory than they compute. Written out for autograd they keep and
re-read half a dozen tensors each; here they work on blocks of rows that stay in the processor's cache, and keep
nothing but their inputs. A module is replaced only where the fused form gives what its own does, which is measured.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

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


def _plain_norm(module: Any) -> bool:
    names = {name for name, _ in module.named_parameters()}
    return names == {"weight"} and module.weight.ndim == 1 and _epsilon(module) is not None


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _gated(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    # Quantised and packed matrices have no weights that tell in which precision they compute.
    plain = all(type(getattr(part, "base_layer", part)) is nn.Linear for part in parts)
    return plain and isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)


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
    product = _SwiGLU.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
    result: Tensor = module.down_proj(product)
    return result


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
            normed, g = block.float() * root, upstream.float()
            if ctx.needs_input_grad[1]:
                dw += (g * normed).sum(0)
            g = g * weight
            mean = (g * normed).mean(-1, keepdim=True)
            out.copy_(g.sub_(normed.mul_(mean)).mul_(root))
        return dx, dw.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


def _roots(inverse: Tensor, like: Tensor) -> list[Tensor]:
    return list(torch.split(inverse.view(-1, 1), max(1, _BLOCK // like.shape[-1])))


class _SwiGLU(torch.autograd.Function):
    """silu(a) · b (Shazeer 2020, "GLU Variants Improve Transformer"), keeping a and b alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        for a, b, out in _blocks(gate, up, y):
            torch.mul(F.silu(a), b, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        for a, b, g, da, db in _blocks(gate, up, gradient, d_gate, d_up):
            sigmoid = torch.sigmoid(a)
            silu = a * sigmoid
            torch.mul(g, silu, out=db)
            # d silu = σ + silu·(1 - σ)
            slope = sigmoid.add_(silu.mul_(1 - sigmoid))
            torch.mul(slope.mul_(g), b, out=da)
        return d_gate, d_up
