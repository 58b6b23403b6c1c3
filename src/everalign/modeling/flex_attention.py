"""FlexAttention on a GPU: the block attention mask as a rule, so that blocks hidden from all tokens are skipped.

Dong et al. 2024, "Flex Attention", arXiv 2412.05496. It has no backward pass on a processor.

Its kernel is compiled anew for every shape, and torch soon gives up. So the rows of a batch become one row,
whose blocks between different rows are skipped, its length is one of few, and varying sizes are marked as dynamic.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.flex_attention import WrappedFlexAttention

from everalign.data.collate import Batch
from everalign.errors import InputError

FLEX = "flex_attention"

# Tokens of a block, as the kernel has them.
_BLOCK = 128
# Lengths between one and twice a number: no more than an eighth of a row is padding.
_LENGTHS_PER_OCTAVE = 8
# Entries of the mask that are looked at together.
_ENTRIES_AT_ONCE = 16_777_216


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
    compile_once()


def compile_once(backend: str | Any = "inductor") -> None:
    """Let transformers' FlexAttention be compiled for lengths that vary, and not for each of the first ones anew."""
    wrapped = WrappedFlexAttention(False)
    wrapped._compiled_flex_attention = torch.compile(flex_attention, dynamic=True, backend=backend)


def flex_inputs(batch: Batch) -> dict[str, Any]:
    """Return a model's inputs for a batch of R rows of T positions without `attention_mask` (see `data.layout`).

    They are one row of R·T positions and some padding, so that `predictors` still name the same ones.
    """
    ids = batch["input_ids"]
    rows, width = ids.shape
    if "segments" in batch:
        positions, segments, prefixes = batch["position_ids"], batch["segments"], batch["prefixes"]
    else:
        positions = torch.arange(width, device=ids.device).expand(rows, width)
        segments = prefixes = torch.ones_like(ids)
    # A row has fewer segments than tokens, padding's included. What is appended is in a segment that no row has.
    apart = (width + 1) * torch.arange(rows, device=ids.device)[:, None]
    more = bucket(rows * width) - rows * width
    segments, prefixes = (F.pad((part + apart).view(1, -1), (0, more), value=-1) for part in (segments, prefixes))
    return {
        "input_ids": F.pad(ids.reshape(1, -1), (0, more)),
        "position_ids": F.pad(positions.reshape(1, -1), (0, more)),
        "attention_mask": flex_block_mask(segments, prefixes),
        "use_cache": False,
    }


def bucket(length: int) -> int:
    """Return the length that a row is padded to: whole blocks, at least two, and one of eight lengths an octave.

    A row of one block would be compiled for by itself: torch takes a size of 1 for a constant.
    """
    length = max(length, 2 * _BLOCK)
    step = max(_BLOCK, (1 << (length - 1).bit_length()) // 2 // _LENGTHS_PER_OCTAVE)
    return -(-length // step) * step


def flex_block_mask(segments: Tensor, prefixes: Tensor) -> BlockMask:
    """Build the mask of a row whose layout is given: what `block_mask` allows, for segments and prefixes (1, T).

    T is a multiple of a block. torch's own way would hold the whole mask ten times over, or be compiled for it; here
    some rows of blocks are looked at together.
    """

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = segments[row, key]
        return (key <= query) & ((seen == segments[row, query]) | (seen == prefixes[row, query]))

    length = segments.shape[1]
    some, every = _blocks(segments[0], prefixes[0])
    lists = (_numbers(some & ~every), _numbers(every))
    mask: BlockMask = BlockMask.from_kv_blocks(*lists[0], *lists[1], _BLOCK, allowed, (length, length))
    for part in ("kv", "q", "full_kv", "full_q"):
        for numbers in (getattr(mask, f"{part}_num_blocks"), getattr(mask, f"{part}_indices")):
            torch._dynamo.maybe_mark_dynamic(numbers, list(range(2, numbers.ndim)))
    return mask


def _blocks(segments: Tensor, prefixes: Tensor) -> tuple[Tensor, Tensor]:
    """Return in which blocks (T / block, T / block) some entry is allowed, and in which every one is."""
    count = len(segments) // _BLOCK
    some, every = (torch.zeros(count, count, dtype=torch.bool, device=segments.device) for _ in range(2))
    position = torch.arange(len(segments), device=segments.device)
    step = max(1, _ENTRIES_AT_ONCE // (_BLOCK * len(segments)))
    for start in range(0, count, step):
        end = min(start + step, count)
        own, before = slice(start * _BLOCK, end * _BLOCK), slice(0, end * _BLOCK)
        key = segments[before]
        allowed = key == segments[own, None]
        allowed.logical_or_(key == prefixes[own, None]).logical_and_(position[before] <= position[own, None])
        tiles = allowed.view(end - start, _BLOCK, end, _BLOCK)
        some[start:end, :end], every[start:end, :end] = tiles.any(3).any(1), tiles.all(3).all(1)
    return some, every


def _numbers(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each query block has, and their numbers first: (1, 1, Q) and (1, 1, Q, K) int32."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[None, None], order.int()[None, None]
