"""Attention for bf16 training on a CPU: the library's forward pass, a backward pass made of matrix products.

PyTorch's CPU attention computes its backward pass in small blocks that leave the processor's matrix units idle. Here
the probabilities are computed again, a few rows at a time, and each gradient is one batched product. The products are
of bf16 numbers, scores included: their rounding is a few times the library's. Registered with transformers under a
name of its own; whatever it does not cover goes to the library's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
# Scores held at once in the backward pass.
_BLOCK = 1_048_576


def use_cpu_attention(model: Any) -> None:
    """Switch a bf16 model on the CPU that would use the library's attention to this one."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.bfloat16:
        return
    config = model.config.get_text_config()
    if config.model_type in PLAIN_ATTENTION_MODELS and config._attn_implementation == "sdpa":
        AttentionInterface.register(CPU_ATTENTION, _attention)
        AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
        model.set_attn_implementation(CPU_ATTENTION)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend as transformers asks: query (R, H, T, D), key and value (R, H', T, D), mask (R, 1, T, T) or None."""
    known = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}
    plain = attention_mask is None or attention_mask.dtype == torch.bool
    ours = plain and torch.is_grad_enabled() and not options.get("dropout") and not set(options) - known
    ours = ours and query.device.type == "cpu" and options.get("is_causal") is not False
    if not ours or query.dtype != torch.bfloat16 or query.shape[2] != key.shape[2]:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    scale = query.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"]
    if attention_mask is None:
        length = query.shape[2]
        attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    result: Tensor = _Attention.apply(query, key, value, attention_mask, scale)  # type: ignore[no-untyped-call]
    return result.transpose(1, 2), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        group = query.shape[1] // key.shape[1]
        k, v = (tensor.repeat_interleave(group, dim=1) if group > 1 else tensor for tensor in (key, value))
        output = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale)
        ctx.save_for_backward(query, key, value, mask, output)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output = ctx.saved_tensors
        rows, heads, length, _ = query.shape
        keys = key.shape[1]
        # The heads that share a key are rows of one product, whose gradients for the key are summed by it.
        q, g, o = (tensor.reshape(rows, keys, heads // keys * length, -1) for tensor in (query, gradient, output))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(key), torch.empty_like(value)
        step = max(1, _BLOCK // (heads * length * length))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            hidden = ~(mask[part] if len(mask) == rows else mask)
            dq[part], dk[part], dv[part] = _gradients(
                q[part] * ctx.scale, key[part], value[part], o[part], g[part], hidden
            )
            dq[part] *= ctx.scale
        return dq.view_as(query), dk, dv, None, None


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, gradient: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of softmax(q·kᵀ)·v = output, for q (R, H', G·T, D) and k, v (R, H', T, D)."""
    scores = q @ k.transpose(-1, -2)
    by_head = scores.view(*scores.shape[:2], -1, k.shape[2], k.shape[2])
    by_head.masked_fill_(hidden[:, :, None], float("-inf"))
    p = scores.softmax(dim=-1)
    if bool(hidden.all(-1).any()):
        # Padding behind a window sees nothing at all; the library gives it zeros.
        p.nan_to_num_(nan=0.0)
    dv = p.transpose(-1, -2) @ gradient
    # Σ dp·p of a row is its gradient times its output (Dao et al. 2022, "FlashAttention", appendix B.2).
    inner = (gradient.float() * output.float()).sum(-1, keepdim=True).to(p.dtype)
    ds = (gradient @ v.transpose(-1, -2)).sub_(inner).mul_(p)
    # p was rounded otherwise than the output was, and what is left of each row's sum would multiply the mean key.
    ds.addcmul_(p, ds.sum(-1, keepdim=True), value=-1)
    return ds @ k, ds.transpose(-1, -2) @ q, dv
