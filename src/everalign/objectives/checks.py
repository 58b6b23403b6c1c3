"""Guards that every objective shares: full precision, finite values, one value a row."""

import math

import torch
from torch import Tensor

_ROWS_NAMED = 5


def full_precision(values: Tensor) -> Tensor:
    """`values` in fp32, or unchanged in fp64: half-precision inputs never reach a logarithm."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def finite_rows(values: Tensor, name: str) -> Tensor:
    """`values` unchanged; a `ValueError` names the rows that are NaN or infinite."""
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return values
    bad = (~finite).flatten().nonzero().flatten().tolist()
    named = ", ".join(f"row {row} is {values.flatten()[row].item()}" for row in bad[:_ROWS_NAMED])
    more = f" and {len(bad) - _ROWS_NAMED} more" if len(bad) > _ROWS_NAMED else ""
    raise ValueError(f"every {name} must be finite: {named}{more}")


def same_shapes(**tensors: Tensor) -> None:
    """Refuse to broadcast: a `(B, 1)` beside a `(B,)` would silently become `(B, B)`."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"these must all have the same shape: {found}")


def positive(value: float, name: str) -> None:
    """A `ValueError` unless `value` is a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, not {value}")


def finite_or_minus_inf(values: Tensor, name: str) -> Tensor:
    """`values` unchanged; a `ValueError` names the rows that are NaN or +inf. -inf stands for "never"."""
    finite_rows(values.masked_fill(values.isneginf(), 0.0), f"{name} other than -inf")
    return values
