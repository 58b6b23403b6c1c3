"""FlexAttention on a GPU: the block attention mask as a rule, so that blocks nobody sees are skipped.

Dong et al. 2024, "Flex Attention", arXiv 2412.05496. It has no backward pass on a processor.
"""

from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from everalign.errors import InputError

FLEX = "flex_attention"


def use_flex_attention(model: Any) -> None:
    """Let a model attend through FlexAttention.

    Raises:
        InputError: the model is not on a GPU, or its architecture does not support it.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise InputError(f"attention flex needs a GPU, and the model is on {device}: use attention sdpa")
    try:
        model.set_attn_implementation(FLEX)
    except (ValueError, ImportError) as error:
        raise InputError(f"attention flex: {type(model).__name__} cannot use it ({error}): use sdpa") from error


def flex_block_mask(segments: Tensor, prefixes: Tensor) -> BlockMask:
    """Build the mask of rows whose layout is given: what `block_mask` allows, for segments and prefixes (R, T)."""

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = segments[row, key]
        return (key <= query) & ((seen == segments[row, query]) | (seen == prefixes[row, query]))

    rows, length = segments.shape
    mask: BlockMask = create_block_mask(allowed, rows, None, length, length, device=str(segments.device))
    return mask
