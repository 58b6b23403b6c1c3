"""How many multiplications a preference step needs, and how many the machine can do in the best case."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from everalign.data.collate import collate
from everalign.data.tokenization import TokenizedRow
from everalign.modeling.policy import Policy


def matrix_rate(dtype: torch.dtype, size: int = 2048, rounds: int = 8) -> float:
    """Floating-point operations a second of a large matrix product, the fastest of some."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out, fastest = torch.empty_like(a), float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest


def needed_flops(policy: Policy, pairs: Sequence[TokenizedRow], rank: int) -> float:
    """Operations of the matrix products that one pass of training over these pairs cannot do without.

    Every prompt once and no padding; products with frozen weights forward and back to their inputs, adapters
    forward, back to their inputs and to their weights, the head on response tokens forward and back, attention on
    the pairs of tokens that see each other: two products forward, four back.
    """
    layers = [m for m in policy.modules() if hasattr(m, "base_layer")]
    frozen = sum(layer.base_layer.weight.numel() for layer in layers)
    adapted = sum(rank * sum(layer.base_layer.weight.shape) for layer in layers)
    config: Any = policy.peft.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * width
    total = 0.0
    for pair in pairs:
        batch = collate([pair], shared=True)
        segments, prefixes = batch["segments"], batch["prefixes"]
        seen = (segments[:, None] == segments[..., None]) | (segments[:, None] == prefixes[..., None])
        total += batch["input_ids"].numel() * (2 * 2 * frozen + 3 * 2 * adapted)
        total += len(batch["targets"]) * 2 * 2 * config.vocab_size * config.hidden_size
        total += float(seen.tril().sum()) * (2 + 4) * 2 * attention
    return total
