"""Attention of a few new tokens to a cache on a CPU, where several query heads share a key head.

Under a mask transformers copies every key and value once for each query head that shares it, the whole cache in every
layer of every pass, since a GPU's fused kernels need that. PyTorch's CPU kernel does not, and gives the same numbers.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from everalign.modeling.cpu_attention import PLAIN_ATTENTION_MODELS

GROUPED_ATTENTION = "everalign_grouped"
_KNOWN_OPTIONS = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}


def grouped_attention(model: Any) -> AbstractContextManager[None]:
    """Return what to compute a model's masked passes in: without these copies where they would be made."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) not in (None, heads)
    ours = shared and model.device.type == "cpu" and config.model_type in PLAIN_ATTENTION_MODELS
    return _switched(config) if ours and config._attn_implementation == "sdpa" else nullcontext()


@contextmanager
def _switched(config: Any) -> Iterator[None]:
    AttentionInterface.register(GROUPED_ATTENTION, _attention)
    AttentionMaskInterface.register(GROUPED_ATTENTION, sdpa_mask)
    config._attn_implementation = GROUPED_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _attention(
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
