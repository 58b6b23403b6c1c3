"""Low-rank update of one weight matrix, in factored form, with algebra that never builds the matrix itself.

An update X (m, n) is kept as L (m, q) times R (q, n) with q far below m and n. Thin QRs of both factors reduce any
question about X's singular values to a q x q matrix:

    L = Q_L T_L,  R^T = Q_R T_R,  X = Q_L (T_L T_R^T) Q_R^T

so truncation is as exact as a dense SVD (Eckart-Young) at O((m + n) q^2) instead of O(m n min(m, n)). Everything is
computed in fp64 on the CPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Energy is compared up to rounding, so that asking for all of it does not keep directions that are noise.
_ENERGY_SLACK = 1e-12


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """The update `left @ right` of one weight matrix.

    The factors are kept detached, on the CPU, in fp32, or in fp64 if one of them is fp64; results of the algebra have
    the same dtype. A width q of 0 is the zero update.

    Args:
        left: `(m, q)`.
        right: `(q, n)`.

    Raises:
        ValueError: shapes do not fit, or a factor holds a NaN, an infinity or no real floating-point numbers.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        shapes = f"left {tuple(left.shape)}, right {tuple(right.shape)}"
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise ValueError(f"factors must be (m, q) and (q, n): {shapes}")
        if left.shape[0] == 0 or right.shape[1] == 0:
            raise ValueError(f"the weight matrix must have rows and columns: {shapes}")
        for name, factor in (("left", left.detach()), ("right", right.detach())):
            if not factor.is_floating_point():
                raise ValueError(f"the {name} factor must hold real floating-point numbers, not {factor.dtype}")
            # A finite sum proves it at a tenth of the cost; a sum that overflows proves nothing.
            if not math.isfinite(float(factor.sum())) and not bool(torch.isfinite(factor).all()):
                raise ValueError(f"the {name} factor of the update holds a NaN or infinite value")
        wide = torch.float64 in (self.left.dtype, self.right.dtype)
        dtype = torch.float64 if wide else torch.float32
        for side in ("left", "right"):
            object.__setattr__(self, side, getattr(self, side).detach().to("cpu", dtype))

    @classmethod
    def zero(cls, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> "LowRankUpdate":
        """Returns the update of width 0 of a weight of this shape."""
        return cls(torch.zeros(shape[0], 0, dtype=dtype), torch.zeros(0, shape[1], dtype=dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight matrix, `(m, n)`."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def width(self) -> int:
        """Columns of the left factor, q: an upper bound of the rank, and equal to it after a truncation."""
        return self.left.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of both factors: fp32 or fp64."""
        return self.left.dtype

    def dense(self) -> Tensor:
        """Returns the `(m, n)` matrix itself: for tests and small sizes."""
        return (self.left.double() @ self.right.double()).to(self.dtype)

    def to(self, dtype: torch.dtype) -> "LowRankUpdate":
        """Returns the same update with factors in `dtype`, fp32 or fp64."""
        return LowRankUpdate(self.left.to(dtype), self.right.to(dtype))

    def scaled(self, factor: float) -> "LowRankUpdate":
        """Returns `factor` times the update; of width 0 if `factor` is 0."""
        if factor == 0.0:
            return LowRankUpdate.zero(self.shape, self.dtype)
        return LowRankUpdate(self.left * factor, self.right)

    def __add__(self, other: "LowRankUpdate") -> "LowRankUpdate":
        """Returns the exact sum: factors side by side, widths added."""
        self._check_same_shape(other)
        return LowRankUpdate(torch.cat([self.left, other.left], 1), torch.cat([self.right, other.right], 0))

    def inner(self, other: "LowRankUpdate") -> float:
        """Frobenius inner product `<X, Y>` from two small products: sum((L_x^T L_y) * (R_x R_y^T))."""
        self._check_same_shape(other)
        lefts = self.left.double().T @ other.left.double()
        rights = self.right.double() @ other.right.double().T
        return float((lefts * rights).sum())

    def norm(self) -> float:
        """Frobenius norm, from the core: terms that cancel cost no accuracy there, unlike in `inner`."""
        return float(torch.linalg.matrix_norm(self._core()))

    def singular_values(self) -> Tensor:
        """The singular values that can differ from zero, `(min(q, m, n),)` fp64, descending."""
        values: Tensor = torch.linalg.svdvals(self._core())
        return values

    def truncate(self, energy: float) -> "LowRankUpdate":
        """Returns the truncation of least rank that keeps a share `energy` of the squared singular values.

        At 1 only numerically zero directions are dropped, at 0 the leading one is kept; a zero update has rank 0. The
        error is at most sqrt(1 - energy) of the norm. Factors are balanced, see `balanced_factors`.

        Raises:
            ValueError: `energy` is not within 0 and 1.
        """
        return self.denoise(energy)[0]

    def denoise(self, energy: float) -> tuple["LowRankUpdate", float]:
        """Returns `truncate` and the share of the energy that is left (1 for a zero update)."""
        check_share("energy", energy)

        def fewest(values: Tensor) -> int:
            if _is_zero(values):
                return 0
            cumulated = _relative_energies(values).cumsum(0)
            return int((cumulated < energy * cumulated[-1] * (1.0 - _ENERGY_SLACK)).sum()) + 1

        nearest, values = self._leading(fewest)
        return nearest, energy_share(values, nearest.width)

    def truncate_rank(self, cap: int) -> tuple["LowRankUpdate", float]:
        """Returns the nearest update of rank at most `cap`, and the share of the energy that it discards.

        Factors are balanced, see `balanced_factors`.

        Raises:
            ValueError: `cap` is below 1.
        """
        if cap < 1:
            raise ValueError(f"the rank cap must be at least 1, not {cap}")
        nearest, values = self._leading(lambda values: min(cap, numerical_rank(values, self.shape)))
        return nearest, 1.0 - energy_share(values, nearest.width)

    def balanced_factors(self) -> tuple[Tensor, Tensor]:
        """Returns `B = U sqrt(S)`, `(m, q')`, and `A = sqrt(S) V^T`, `(q', n)`, with q' = min(q, m, n).

        B A is the whole update and B^T B = A A^T = S: both factors have the same scale, so that neither nears the end
        of fp32's range before the other.
        """
        balanced, _ = self._leading(len)
        return balanced.left, balanced.right

    def _check_same_shape(self, other: "LowRankUpdate") -> None:
        if self.shape != other.shape:
            raise ValueError(f"updates of different weights: {self.shape} and {other.shape}")

    def _core(self) -> Tensor:
        """T_L T_R^T, a matrix of at most q x q with X's singular values."""
        left: Tensor = torch.linalg.qr(self.left.double(), mode="r").R
        right: Tensor = torch.linalg.qr(self.right.double().T, mode="r").R
        return left @ right.T

    def _leading(self, choose: Callable[[Tensor], int]) -> tuple["LowRankUpdate", Tensor]:
        """Returns the balanced leading part, of a rank chosen from the singular values, and all singular values."""
        left_basis, left_core = torch.linalg.qr(self.left.double())
        right_basis, right_core = torch.linalg.qr(self.right.double().T)
        U, values, Vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
        k = choose(values)
        root = values[:k].sqrt()
        left = left_basis @ (U[:, :k] * root)
        right = (root[:, None] * Vh[:k]) @ right_basis.T
        return LowRankUpdate(left.to(self.dtype), right.to(self.dtype)), values


def energy_share(singular_values: Tensor, rank: int) -> float:
    """Share of the energy (squared, descending singular values) in the first `rank`; 1 if there is none."""
    if _is_zero(singular_values):
        return 1.0
    energies = _relative_energies(singular_values)
    # Through the tail, so that a tiny loss is not the difference of two nearly equal numbers.
    return 1.0 - float(energies[rank:].sum() / energies.sum())


def check_share(name: str, value: float) -> None:
    """Raises a ValueError unless `value` lies within 0 and 1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, not {value}")


def numerical_rank(singular_values: Tensor, shape: tuple[int, int]) -> int:
    """Counts the singular values of a matrix of this shape that are above rounding."""
    if _is_zero(singular_values):
        return 0
    cutoff = max(shape) * torch.finfo(torch.float64).eps * singular_values[0]
    return int((singular_values > cutoff).sum())


def _relative_energies(singular_values: Tensor) -> Tensor:
    # Relative to the largest, because the square of a small one may underflow.
    return (singular_values / singular_values[0]).square()


def _is_zero(singular_values: Tensor) -> bool:
    return singular_values.numel() == 0 or float(singular_values[0]) == 0.0
