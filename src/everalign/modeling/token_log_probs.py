"""Log-probabilities of given tokens from hidden states, in chunks: no more than one chunk's logits ever exist.

With a frozen head, the gradient with respect to the hidden states is the upstream gradient times a vector that the
forward pass can compute at once, (onehot - softmax)·W: so it is computed there, and the backward pass is one product
element by element instead of a second run of the head. A head that learns is recomputed in the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Logits that are held at once. With a large vocabulary the output matrix itself has to be read for every chunk, so that
# a product has no fewer rows than this. A processor takes further steps in blocks that stay near its cache.
_CHUNK_LOGITS = {"cpu": 16_777_216, "cuda": 67_108_864}
_CHUNK_ROWS = 128
_BLOCK_LOGITS = {"cpu": 262_144, "cuda": 67_108_864}
# Rows are filled up to a multiple of this: a processor's library prepares each product anew for another number.
_ROW_STEP = 32
# Where a distribution over the whole vocabulary is needed: numbers of (positions x vocabulary) held at once, all copies
# and temporaries counted.
_LIVE_LOGITS = 67_108_864

Head = Callable[[Tensor], Tensor]


def rows_at_once(vocabulary: int, copies: int) -> int:
    """Return of how many positions logits may be held, so that no more than 64M of these numbers exist at once.

    Args:
        vocabulary: size of it.
        copies: tensors of (positions, vocabulary) that exist at the same time, temporaries included.
    """
    return max(1, _LIVE_LOGITS // (copies * vocabulary))


@dataclass(frozen=True)
class HeadShape:
    """What a model does to its logits after the output matrix.

    Args:
        scale: factor of all logits (Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`).
        softcap: c of the final soft-capping c·tanh(logit / c) (Gemma 2); None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "HeadShape":
        """Read a model's configuration."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return cls(scale, softcap)

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits as the model would give them; without gradients they are written over."""
        if not torch.is_grad_enabled():
            if self.scale != 1.0:
                logits.mul_(self.scale)
            return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Carry a gradient back through `apply`, whose result was `logits`."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap).square())
        return gradient if self.scale == 1.0 else gradient * self.scale


def token_log_probs(
    hidden: Tensor, head: Head, targets: Tensor, shape: HeadShape, chunk_rows: int | None = None
) -> Tensor:
    """Return log softmax(shape(head(hidden)))[targets].

    Args:
        hidden: (K, d) hidden states; autocast decides the precision of the products.
        head: the output embeddings, `nn.Linear` or what has the same meaning (adapted, for instance).
        targets: (K,) token ids.
        shape: what follows the output matrix.
        chunk_rows: rows whose logits are held at once; chosen by the vocabulary when None.

    Returns:
        (K,) fp32, in nats. Differentiable with respect to `hidden` and to what learns in `head`.
    """
    device, vocabulary = hidden.device.type, _width(head, hidden)
    block, chunk = (sizes.get(device, sizes["cuda"]) // vocabulary for sizes in (_BLOCK_LOGITS, _CHUNK_LOGITS))
    rows = chunk_rows or max(_CHUNK_ROWS, chunk - chunk % _ROW_STEP)
    if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        sizes = (rows, max(1, block))
        result: Tensor = _FrozenHead.apply(hidden, head, targets, shape, *sizes)  # type: ignore[no-untyped-call]
        return result
    parts = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    return torch.cat([checkpoint(_log_probs, part, head, wanted, shape, use_reentrant=False) for part, wanted in parts])


def _width(head: Head, hidden: Tensor) -> int:
    """Return the size of the vocabulary, which the weights of a quantised or wrapped head need not show."""
    if isinstance(head, nn.Linear):
        return head.out_features
    with torch.no_grad():
        return head(hidden[:1]).shape[-1]


def _log_probs(hidden: Tensor, head: Head, targets: Tensor, shape: HeadShape) -> Tensor:
    logits = shape.apply(head(hidden))
    return logits.log_softmax(dim=-1, dtype=torch.float32).gather(1, targets[:, None])[:, 0]


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Linear, targets: Tensor, shape: HeadShape, rows: int, block: int
    ) -> Tensor:
        """Compute log-probabilities (K,) chunk by chunk, and their gradients (K, d) where they are wanted."""
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        filled = F.pad(hidden, (0, 0, 0, -len(hidden) % _ROW_STEP))
        for start in range(0, len(hidden), rows):
            part = slice(start, min(start + rows, len(hidden)))
            logits = shape.apply(head(filled[start : start + rows]))
            sums = torch.ones(len(logits), 1, dtype=torch.float32, device=hidden.device)
            count = part.stop - start
            pieces = (torch.split(t, block) for t in (result[part], logits[:count], targets[part], sums[:count]))
            for log_probs, piece, chosen, total in zip(*pieces, strict=True):
                _fill(log_probs, piece, chosen[:, None], total, shape, wanted)
            if gradient is not None:
                gradient[part] = ((logits @ head.weight.to(logits.dtype)) / sums)[:count]
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients, which are those of the negative log-probability."""
        (gradient,) = ctx.saved_tensors
        return gradient * -upstream[:, None].to(gradient.dtype), None, None, None, None, None


def _fill(log_probs: Tensor, logits: Tensor, chosen: Tensor, sums: Tensor, shape: HeadShape, wanted: bool) -> None:
    """Write log-probabilities (K,), Σ exp of the logits (K, V) over its largest term as `sums` (K, 1), and where
    wanted, over the logits, the slope of the negative log-probability times that sum.
    """
    largest = logits.amax(dim=-1, keepdim=True).float()
    exponentials = logits.to(torch.float32, copy=True).sub_(largest).exp_()
    torch.sum(exponentials, dim=-1, keepdim=True, out=sums)
    log_probs.copy_((logits.gather(1, chosen).float() - largest - sums.log())[:, 0])
    if wanted:
        logits.copy_(shape.backward(exponentials.scatter_add_(1, chosen, -sums), logits))
