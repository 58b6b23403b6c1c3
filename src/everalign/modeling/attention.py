"""Attention kernels: FlexAttention on a GPU, and runs of tokens without padding or mask on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import WrappedFlexAttention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from everalign.data.collate import Batch
from everalign.errors import InputError

FLEX = "flex_attention"

# Tokens of a block, as the kernel has them.
_BLOCK = 128
# Lengths between one and twice a number: no more than an eighth of a row is padding.
_LENGTHS_PER_OCTAVE = 8
# Entries of the mask that are looked at together.
_ENTRIES_AT_ONCE = 16_777_216


def use_flex_attention(model: Any, device: torch.device | None = None) -> None:
    """Let a model attend through FlexAttention.

    Args:
        model: a Hugging Face model.
        device: where it is going to compute; where it is when None.

    Raises:
        InputError: that is not a GPU, or the model's architecture does not support it.
    """
    device = next(model.parameters()).device if device is None else device
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

    A row of one block would be compiled separately: torch treats a size of 1 as a constant.
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
# Query rows of a block, and the scores, or entries of a mask, that are held at once. The library prepares a product for
# each new shape (8 ms for a block's five in bf16), so that blocks are rounded up.
_BLOCK_ROWS = 128
_BLOCK_SCORES = 4_194_304
_ROUND_ROWS = 32


def use_cpu_attention(model: Any) -> None:
    """Switch a model on the CPU that would use the library's attention to this one."""
    if _replaceable(model):
        model.set_attn_implementation(CPU_ATTENTION)


@contextmanager
def cpu_attention(model: Any) -> Iterator[None]:
    """Use this attention inside the `with` block where it serves.

    That is if heads share keys, which the library's would copy for each head, or in bf16, for single tokens.
    """
    config = model.config.get_text_config()
    shared = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
    if not (shared or model.dtype == torch.bfloat16) or not _replaceable(model):
        yield
        return
    # The configuration alone, since this happens in every pass.
    config._attn_implementation = CPU_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _replaceable(model: Any) -> bool:
    config = model.config.get_text_config()
    plain = config.model_type in PLAIN_ATTENTION_MODELS and config._attn_implementation == "sdpa"
    return plain and next(model.parameters()).device.type == "cpu"


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
    plain = plain and len({query.dtype, key.dtype, value.dtype}) == 1
    scale = query.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"]
    for_all_heads = attention_mask is None or (attention_mask.dtype != torch.int64 and attention_mask.shape[1] == 1)
    if plain and query.shape[2] == 1 and for_all_heads:
        return _of_one_token(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None
    if attention_mask is None or not plain:
        if attention_mask is not None and attention_mask.dtype == torch.int64:
            attention_mask = _mask_of(attention_mask[0, 0].tolist(), query.shape[2])
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    if attention_mask.dtype != torch.int64:
        grouped = key.shape[1] != query.shape[1]
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scale, enable_gqa=grouped
        )
        return output.transpose(1, 2).contiguous(), None
    states = (tensor.transpose(1, 2)[0] for tensor in (query, key, value))
    result: Tensor = _Attention.apply(*states, attention_mask[0, 0].tolist(), scale)  # type: ignore[no-untyped-call]
    return result[None], None


def _of_one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend with one query a row (R, H, 1, D) over keys and values (R, H', S, D); the mask is (R or 1, 1, 1, S).

    torch's kernel in bf16 takes up to ten times as long for one query as for several, which was half of the time of
    sampling. Heads that share a key are therefore the queries of one head, and a head with a key of its own asks twice.
    """
    groups = query.shape[1] // key.shape[1]
    queries = query.reshape(len(query), -1, groups, query.shape[3])
    if groups == 1 and query.dtype == torch.bfloat16:
        queries = queries.expand(-1, -1, 2, -1)
    if mask is not None:
        mask = mask.expand(-1, -1, queries.shape[2], -1)
    output = F.scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scale)
    return output[:, :, :groups].reshape(query.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: list[list[int]], scale: float) -> Tensor:
        """Attend with query (T, H, D), key and value (T, H', D) over runs: (T, H, D)."""
        output = query.new_zeros(query.shape)
        log_sums = query.new_zeros(query.shape[:2], dtype=torch.float32)
        for run in runs:
            for rows, k, v, mask in _seen_by(run, key, value):
                # The library has heads before positions, (1, H, T, D).
                found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *(t.transpose(0, 1)[None] for t in (query[rows], k, v)),
                    0.0,
                    mask is None,
                    attn_mask=mask,
                    scale=scale,
                )
                output[rows], log_sums[rows] = found[0].transpose(0, 1), sums[0].transpose(0, 1)
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
                # Nothing of what a row must not see, nor of the rows that only fill up the block.
                shown = p.view(heads, -1, rows.stop - start, p.shape[2])
                shown[..., start - first :].tril_()
                shown[:, :, end - start :] = 0
                for begins, ends, prefix in answers:
                    own_rows = slice(max(begins + first - start, 0), max(min(ends + first, end) - start, 0))
                    shown[:, :, own_rows, prefix:begins] = 0
                dv[:, seen] += p.transpose(1, 2) @ block_g
                ds = (block_g @ v[:, seen].transpose(1, 2)).mul_(p)
                dk[:, seen] += ds.transpose(1, 2) @ block_q
                own = (ds @ centred[:, seen]).view(heads, -1, rows.stop - start, query.shape[2])
                dq[start:end] = own[:, :, : end - start].permute(2, 0, 1, 3).flatten(1, 2)
        dk, dv = (t[:, :length, :-2].transpose(0, 1) for t in (dk.mul_(ctx.scale), dv))
        return dq.mul_(ctx.scale), dk.to(key.dtype), dv.to(value.dtype), None, None


def _seen_by(run: list[int], key: Tensor, value: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Yield a run's rows, what they see of keys and values, its prefix first, and the mask where not causal alone.

    Rows of a long answer come in parts, so that their mask grows with its length and not with the square of it.
    """
    start, length, behind, size = run
    if not size:
        own = slice(start, start + length)
        yield own, key[own], value[own], None
        return
    step = max(_BLOCK_ROWS, _BLOCK_SCORES // (size + length))
    for first in range(0, length, step):
        last = min(first + step, length)
        k, v = (torch.cat([t[behind : behind + size], t[start : start + last]]) for t in (key, value))
        mask = k.new_full((last - first, len(k)), float("-inf")).triu_(size + first + 1)
        yield slice(start + first, start + last), k, v, mask


def _library_gradients(
    gradient: Tensor, saved: tuple[Tensor, ...], runs: list[list[int]], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, run by run, by the library's backward pass."""
    query, key, value, output, log_sums = saved
    dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for run in runs:
        start, _, behind, size = run
        prefix = slice(behind, behind + size)
        for rows, k, v, mask in _seen_by(run, key, value):
            seen = slice(start, start + len(k) - size)
            own = (gradient[rows], query[rows], k, v, output[rows])
            upstream, q, k, v, found = (tensor.transpose(0, 1)[None] for tensor in own)
            sums = log_sums[rows].T[None]
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                upstream, q, k, v, found, sums, 0.0, mask is None, attn_mask=mask, scale=scale
            )
            of_query, *of_seen = (part[0].transpose(0, 1) for part in parts)
            dq[rows] = of_query
            for total, part in zip((dk, dv), of_seen, strict=True):
                total[prefix] += part[:size]
                total[seen] += part[size:]
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


AttentionInterface.register(CPU_ATTENTION, _attention)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
