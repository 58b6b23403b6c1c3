"""Adapted linear layers in one step of the autograd graph: the update is added where the product is written.

peft computes base(x) + B(A(x))·s as five operations with four results of the output's size, and as many again in the
backward pass. Here y = x·Wᵀ + Σ s·(x·Aᵀ)·Bᵀ and dx = g·W + Σ s·(g·B)·A accumulate in place, W being frozen.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

# Share of a layer's work from which on its frozen adapters are added to a copy of the weight: below it the copy's
# memory is worth more. Layers of 7B models stay below, small models do not.
_WORTH_FOLDING = 0.05


def fuse(layer: LoraLayer) -> None:
    """Give an adapted `nn.Linear` the fused forward pass; any other kind of layer keeps peft's."""
    base = layer.get_base_layer()
    if type(base) is nn.Linear and base.weight.is_floating_point():
        layer.forward = partial(_forward, layer)


@contextmanager
def resting(layers: Collection[Any]) -> Iterator[None]:
    """Take all adapters of these layers for frozen inside the `with` block: nothing is trained there."""
    for layer in layers:
        layer.resting = True
    try:
        yield
    finally:
        for layer in layers:
            layer.resting = False
            # An optimiser may change an adapter without its version telling.
            layer.folded, layer.folded_parts = None, []


def _forward(layer: Any, x: Tensor) -> Tensor:
    result: Tensor
    base = layer.base_layer
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        result = base(x)
        return result
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else base.weight.dtype
    weight, names = _fold_frozen(layer, names) if dtype == torch.float32 else (base.weight, names)
    if not names:
        return nn.functional.linear(x.to(dtype), weight, base.bias)
    factors = [f[name].weight for name in names for f in (layer.lora_A, layer.lora_B)]
    scales = tuple(layer.scaling[name] for name in names)
    result = _Fused.apply(x, weight, base.bias, dtype, scales, *factors)  # type: ignore[no-untyped-call]
    return result


def _fold_frozen(layer: Any, names: list[str]) -> tuple[Tensor, list[str]]:
    """Return the weight with the frozen adapters' updates added where that pays, and the adapters that remain.

    What was learned before then costs nothing, however many tasks it were. In bf16 the sum would round away what is
    small beside the weight, so that frozen adapters stay apart there.
    """
    weight: Tensor = layer.base_layer.weight
    rests = getattr(layer, "resting", False)
    frozen = [name for name in names if rests or not layer.lora_B[name].weight.requires_grad]
    rank = sum(len(layer.lora_A[name].weight) for name in frozen)
    if rank * sum(weight.shape) <= _WORTH_FOLDING * weight.numel():
        return weight, names
    parts = [f[name].weight for name in frozen for f in (layer.lora_A, layer.lora_B)]
    if not _is_folded(layer, parts):
        with torch.no_grad():
            layer.folded = weight.clone()
            for name in frozen:
                layer.folded.addmm_(layer.lora_B[name].weight, layer.lora_A[name].weight, alpha=layer.scaling[name])
        layer.folded_parts = [(part, part._version) for part in parts]
    return layer.folded, [name for name in names if name not in frozen]


def _is_folded(layer: Any, parts: list[Tensor]) -> bool:
    """Whether the copy of the weight holds these very factors, unchanged since."""
    known = getattr(layer, "folded_parts", [])
    same = len(known) == len(parts) and all(
        old is part and version == part._version for (old, version), part in zip(known, parts, strict=True)
    )
    return same and layer.folded.device == parts[0].device


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        scales: tuple[float, ...],
        *factors: Tensor,
    ) -> Tensor:
        """Compute y (..., m) from x (..., n), W (m, n) and the adapters' A (r, n), B (m, r), one after the other.

        All adapters are two products: their As below one another, their Bs side by side.
        """
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        A = torch.cat([a.to(dtype) for a in factors[::2]])
        B = torch.cat([(b * scale).to(dtype) for b, scale in zip(factors[1::2], scales, strict=True)], dim=1)
        # Of the shape that is returned: models may write into it, which a view made in here would forbid.
        y = nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        inner = rows @ A.T
        y.view(-1, len(weight)).addmm_(inner, B.T)
        widths = [len(a) for a in factors[::2]]
        learned = [i for i in range(len(scales)) if any(ctx.needs_input_grad[5 + 2 * i : 7 + 2 * i])]
        parts = torch.split(inner, widths, dim=1)
        ctx.save_for_backward(weight, A, B, *((rows, *(parts[i].contiguous() for i in learned)) if learned else ()))
        ctx.scales, ctx.widths, ctx.learned = scales, widths, learned
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, [factor.dtype for factor in factors])
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the factors that learn."""
        weight, A, B, *saved = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1]).to(A.dtype)
        narrow = g @ B
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ weight.to(g.dtype)).addmm_(narrow, A).view(ctx.shape).to(ctx.dtypes[0])
        factors: list[Tensor | None] = [None] * (2 * len(ctx.scales))
        parts = torch.split(narrow, ctx.widths, dim=1)
        for i, inner in zip(ctx.learned, saved[1:], strict=True):
            factors[2 * i] = (parts[i].T @ saved[0]).to(ctx.dtypes[1][2 * i])
            factors[2 * i + 1] = (g.T @ inner).mul_(ctx.scales[i]).to(ctx.dtypes[1][2 * i + 1])
        return (dx, None, None, None, None, *factors)
