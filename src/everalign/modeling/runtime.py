"""Process settings that training profits from, and what a step keeps: activation checkpointing, lean layers."""

import ctypes
import os
import resource
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from everalign.distributed import world
from everalign.modeling.attention import PLAIN_ATTENTION_MODELS
from everalign.modeling.lora import fused_forward
from everalign.modeling.machine import compute_deterministically
from everalign.modeling.shrinking import layer_list

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_REUSED_BLOCK_BYTES = 1 << 28
_KEPT_FREE_BYTES = 1 << 30
# From which size on blocks are the system's; what glibc takes in the end where nobody says.
_process = {"threshold": 1 << 25}


def prepare_process(deterministic: bool = False) -> None:
    """Set the process up for training; safe to call more than once.

    With `deterministic` operations give the same bits each time, see `compute_deterministically`.

    Subnormal numbers are flushed to zero: the gradient of a softmax over a vocabulary is full of them, and a processor
    takes them a hundred times slower (measured: the fp32 backward pass of a small model, four times as long). Worker
    threads inherit this from the thread that starts them: call it before torch computes anything.
    """
    if deterministic:
        compute_deterministically()
    torch.set_flush_denormal(True)
    keep_freed_memory()
    allow_tf32()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def allow_tf32() -> None:
    """Let a GPU multiply fp32 matrices in TF32, which reads 10 bits of a number's mantissa and sums in fp32.

    Plain fp32 products leave a GPU's matrix units unused, and take four to eight times as long. This is the setting's
    older name: with the newer one for CUDA alone, torch.compile refuses to work (torch 2.13).
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def training_device(log: Callable[[str], None] = lambda _: None) -> torch.device:
    """Return where one process trains: the current GPU, or the CPU where there is none.

    Args:
        log: called with a line where several GPUs are visible, of which one is used.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    if (count := torch.cuda.device_count()) > 1 and world() == 1:
        use = f"one is used, {place_name(device)}"
        log(f"{count} GPUs are visible and {use}; set CUDA_VISIBLE_DEVICES to choose another")
    return device


def place_name(device: torch.device) -> str:
    """Return what a device is called in a message."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "the CPU"


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of returning it to the system after every step.

    A training step frees and takes the same large blocks again and again; given back each time, they cost over a
    million page faults a run (10 to 30 % of a small model's step on a CPU). Returns whether the allocator took it:
    False where the C library is not glibc.
    """
    glibc = _glibc()
    if glibc is None:
        return False
    _process["threshold"] = _REUSED_BLOCK_BYTES
    kept = ((_M_MMAP_THRESHOLD, _REUSED_BLOCK_BYTES), (_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES))
    return all(glibc.mallopt(*setting) for setting in kept)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if its allocator can be set; None on other systems and with other libraries."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


@contextmanager
def returning_memory() -> Iterator[None]:
    """Give freed blocks of more than a MiB back to the system inside the `with` block.

    Weights that are quantised as they are read pass through memory in full precision. What they leave, kept for reuse
    and full of holes, is more than the quantised ones take.
    """
    glibc = _glibc()
    if glibc is None:
        yield
        return
    glibc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        glibc.mallopt(_M_MMAP_THRESHOLD, _process["threshold"])
        glibc.malloc_trim(0)


def free_memory(device: torch.device) -> int:
    """Return the bytes that may still be taken on a device: of a GPU's memory, or of what RAM this process may use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # What this process has freed and glibc keeps for it (`keep_freed_memory`) is free, too.
    if (glibc := _glibc()) is not None:
        glibc.malloc_trim(0)
    # Processes that share the work share the machine's memory too.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world() > 1 else 1
    return min(int(psutil.virtual_memory().available), _free_in_container()) // processes


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: of a GPU's memory, or of RAM."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _free_in_container(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return what a container may still take; the machine's RAM says nothing of that limit (cgroup, version 2)."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        cached = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):
        return sys.maxsize
    return sys.maxsize if limit == "max" else max(0, int(limit) - used + int(cached))


def recomputable_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the language model inside of `model`, or [] where it is not known what they are.

    They are those that transformers would compute again; else the list of as many modules as the configuration names.
    """
    marked = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    inside = {id(part) for layer in marked for part in layer.modules() if part is not layer}
    if marked:
        return [layer for layer in marked if id(layer) not in inside]
    inner = language_model(model)
    return (layer_list(inner) if inner is not None else None) or []


def language_model(model: nn.Module) -> PreTrainedModel | None:
    """Return the Hugging Face model inside of `model`, or None."""
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)


@contextmanager
def recomputing(layers: list[nn.Module]) -> Iterator[None]:
    """Compute these layers again in backward passes of what is computed inside the `with` block; not under no_grad."""
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_forward, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _forward(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
        return forward(*args, **kwargs)
    # Nothing is random in there. What is given by name is kept as it is and not copied: all layers share their masks.
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)


class SavedBytes:
    """Counts what operations keep for a backward pass, without keeping any of it: there can be no backward pass.

    Args:
        model: its parameters and buffers are there anyway and do not count.

    Attributes:
        total: bytes, each storage once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        self._known = {part.untyped_storage()._cdata for part in (*model.parameters(), *model.buffers())}
        for module in (part for part in model.modules() if isinstance(part, FSDPModule)):
            # Gathered weights come and go in the same storages, which are empty in between.
            module.unshard()
            self._known |= {part.untyped_storage()._cdata for part in module.parameters()}
            module.reshard()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self.total += storage.nbytes()
            self._known.add(storage._cdata)
            # Its address may become another one's.
            weakref.finalize(storage, self._known.discard, storage._cdata)


def _unpack(_: None) -> Tensor:
    raise RuntimeError("what was counted was not kept")


# ---- layers that keep less for the backward pass ----

# Elements of a block: a few of them, with their temporaries, fit into a core's second-level cache.
_BLOCK = 131_072
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def use_lean_layers(model: nn.Module) -> None:
    """Let RMS norms, gated feed-forward layers and rotary embeddings of a model on the CPU take less memory.

    The usual forward passes of norms and gated layers keep every intermediate result, norms in fp32 besides: a quarter
    to a third of what a step keeps (`bench/results/speed.md`). Here they keep their inputs, and rotary embeddings make
    no copies. A layer is changed where it computes the same on small and on large inputs.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    for module in model.modules():
        parameters = dict(module.named_parameters())
        if type(module).__name__.endswith("RMSNorm") and parameters.keys() == {"weight"}:
            weight, epsilon = parameters["weight"], getattr(module, "variance_epsilon", getattr(module, "eps", None))
            if weight.ndim == 1 and epsilon is not None:
                _replace_forward(module, partial(_norm, module, epsilon), len(weight), {torch.bfloat16, weight.dtype})
        elif isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation):
            parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
            linear: list[Any] = [getattr(part, "base_layer", part) for part in parts]
            if all(type(part) is nn.Linear and part.weight.is_floating_point() for part in linear):
                width, dtype = linear[0].in_features, linear[0].weight.dtype
                _replace_forward(module, partial(_gated, module), width, {dtype})
    if isinstance(model, PreTrainedModel) and model.config.get_text_config().model_type in PLAIN_ATTENTION_MODELS:
        for name in {type(module).__module__ for module in model.modules()}:
            _rotate_in_place(sys.modules[name])


def _rotate_in_place(library: Any) -> None:
    """Let a module of transformers rotate queries and keys in place, if its rotary embedding is the usual one.

    Its own function makes five blocks of a query's size and keeps one, between tensors that stay until the backward
    pass: what the heap cannot use again of the others was a third of what a step of SmolLM2 took.
    """
    own = getattr(library, "apply_rotary_pos_emb", None)
    if own is None or hasattr(own, "in_place"):
        return
    generator = torch.Generator().manual_seed(0)
    query, key, angles = (torch.randn(shape, generator=generator) for shape in ((1, 4, 6, 8), (1, 2, 6, 8), (1, 6, 4)))
    cos, sin = (turn(angles).repeat(1, 1, 2) for turn in (torch.cos, torch.sin))
    try:
        expected = own(query, key, cos, sin)
    except (TypeError, RuntimeError):
        return

    @wraps(own)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        usual = unsqueeze_dim == 1 and q.shape[-1] == cos.shape[-1] and q.dtype == k.dtype == cos.dtype
        # Leaves, and what several rows share, must not be written to.
        shared = any(0 in x.stride() or (x.is_leaf and x.requires_grad) for x in (q, k))
        if not usual or shared or q.device.type != "cpu":
            result: tuple[Tensor, Tensor] = own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return result
        cos, sin = cos[:, None], sin[:, None]
        return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)  # type: ignore[no-untyped-call]

    found = rotate(query.clone(), key.clone(), cos, sin)
    if not all(torch.allclose(one, other, atol=1e-6) for one, other in zip(expected, found, strict=True)):
        return
    rotate.in_place = True  # type: ignore[attr-defined]
    library.apply_rotary_pos_emb = rotate


class _Rotary(torch.autograd.Function):
    """x·cos + (-x₂, x₁)·sin for x (R, H, T, D), in place, and angles (R, 1, T, D) (Su et al. 2021, "RoFormer")."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(x)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The inverse of the turn, of which each half has angles of its own.
        return _turn(gradient.clone(), cos, -sin.roll(sin.shape[-1] // 2, dims=-1)), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    (cos_a, cos_b), (sin_a, sin_b) = ((part[:, 0, :, :half], part[:, 0, :, half:]) for part in (cos, sin))
    for head in x.unbind(1):  # so that what comes and goes is small
        a, b = head[..., :half], head[..., half:]
        turned = a * sin_b
        a.mul_(cos_a).addcmul_(b, sin_a, value=-1)
        b.mul_(cos_b).add_(turned)
    return x


def _replace_forward(module: nn.Module, lean: Callable[[Tensor], Tensor], width: int, dtypes: set[torch.dtype]) -> None:
    """Give a module another forward pass if that agrees with its own."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, width, generator=generator)
    for dtype in dtypes:
        # Clamped variants differ at large inputs only, and norms by their ε at small ones.
        for scale in (1e-3, 1.0, 1e3):
            x = (scale * rows).to(dtype)
            with torch.no_grad():
                own, found = module(x), lean(x)
            error = (own.float() - found.float()).abs().max()
            if own.dtype != found.dtype or error > _TOLERANCES[dtype] * own.float().abs().max():
                return
    module.forward = lean


def _norm(module: Any, epsilon: float, x: Tensor) -> Tensor:
    result: Tensor = _RMSNorm.apply(x, module.weight, epsilon)  # type: ignore[no-untyped-call]
    return result


def _gated(module: Any, x: Tensor) -> Tensor:
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
    product: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    lean = getattr(down.forward, "func", None) is fused_forward
    result: Tensor = fused_forward(down, product, (gate.detach(), up.detach())) if lean else down(product)
    return result


class _RMSNorm(torch.autograd.Function):
    """w · x / sqrt(mean(x²) + ε), the norm in fp32 and then rounded to x's type, as the models write it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
        inverse = torch.empty(*x.shape[:-1], 1, dtype=torch.float32)
        for block, out, root in _blocks(x, y, inverse):
            wide = block.float()
            torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(epsilon), out=root)
            torch.mul((wide * root).to(x.dtype), weight, out=out)
        ctx.save_for_backward(x, inverse, weight)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, inverse, weight = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for block, upstream, out, root in _blocks(x, gradient, dx, inverse):
            wide, g = block.float(), upstream.to(torch.float32, copy=True)
            if ctx.needs_input_grad[1]:
                dw += (g * wide).mul_(root).sum(0)
            g.mul_(weight)
            # x̂ = x·r, and dx = r·(g - x̂·mean(g·x̂))
            along = (g * wide).mean(-1, keepdim=True).mul_(root.pow(3)).neg_()
            out.copy_(g.mul_(root).addcmul_(wide, along))
        return dx, dw.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


def _blocks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of tensors (..., d)."""
    rows = max(1, _BLOCK // x.shape[-1])
    return zip(*(torch.split(each.reshape(-1, each.shape[-1]), rows) for each in (x, *others)), strict=True)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up (Shazeer 2020, "GLU Variants Improve Transformer"); keeps the two, not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)
