"""The history of one weight matrix, and the projection of a new update on what it spans.

The bank keeps denoised updates SM'_j rather than the refined ones that entered long-term memory. Both span
the same space (refining subtracts an element of the span of the entries before), while the width of a refined
update would grow with every task. The span therefore does not depend on the keep-fraction either.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from everalign.memory.low_rank import LowRankUpdate

# Both are relative to the largest: a direction counts as spanned when the unit-normalised entries' singular
# value along it is above 1e-6 (the Gram eigenvalue is its square), an entry when its norm is above 1e-12.
_EIGENVALUE_CUTOFF = 1e-12
_NORM_CUTOFF = 1e-12

# Terms this much larger than their sum are summed in fp64 before they are rounded to the stored precision.
_CANCELLATION_LIMIT = 100.0


@dataclass(frozen=True, eq=False)
class Projection:
    """An update's part inside the span of a bank.

    Attributes:
        coefficients: `(t,)` fp64; the part is the sum of coefficient times entry. The least-norm choice over
            unit-normalised entries, where entries depend on each other.
        component: the part itself, in the projected update's type.
        energy: squared norm of the part over that of the update, 0 to 1 (0 for a zero update).
    """

    coefficients: Tensor
    component: LowRankUpdate
    energy: float


class MemoryBank:
    """Denoised updates of one weight matrix, oldest first."""

    def __init__(self) -> None:
        self._entries: list[LowRankUpdate] = []
        self._gram = torch.zeros(0, 0, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def lost_energy(self) -> float:
        """Share of the entries' energy that the bank does not hold: none."""
        return 0.0

    @property
    def entries(self) -> tuple[LowRankUpdate, ...]:
        """What the bank holds, oldest first."""
        return tuple(self._entries)

    def remember(self, update: LowRankUpdate) -> None:
        """Append a copy of the update.

        Raises:
            ValueError: the update is of another shape than the entries.
        """
        products = self._inner_products(update)
        gram = torch.empty(len(self) + 1, len(self) + 1, dtype=torch.float64)
        gram[:-1, :-1] = self._gram
        gram[-1, :-1] = gram[:-1, -1] = products
        gram[-1, -1] = update.norm() ** 2
        # A copy, because factors may be views of weights that go on training.
        self._entries.append(LowRankUpdate(_copied(update.left), _copied(update.right)))
        self._gram = gram

    def project(self, update: LowRankUpdate) -> Projection:
        """Orthogonal projection (Frobenius) of an update on the span of the entries.

        Independent of the entries' order and scale; zero and repeated entries change nothing.

        Raises:
            ValueError: the update is of another shape than the entries.
        """
        products = self._inner_products(update)
        norms = self._gram.diagonal().sqrt()
        used = norms > _NORM_CUTOFF * norms.max() if len(self) else norms > 0
        unit_gram = self._gram[used][:, used] / torch.outer(norms[used], norms[used])
        unit_coefficients, length = solve_on_span(unit_gram, products[used] / norms[used])
        coefficients = torch.zeros_like(norms)
        coefficients[used] = unit_coefficients / norms[used]
        component = self._combine(coefficients, update.shape)
        if float(unit_coefficients.abs().sum()) > _CANCELLATION_LIMIT * length:
            component = LowRankUpdate(*component.balanced_factors())
        norm = update.norm()
        # Rounding may put the part a last digit above the whole.
        energy = min(1.0, (length / norm) ** 2) if norm > 0.0 else 0.0
        return Projection(coefficients, component.to(update.dtype), energy)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors `left.J` and `right.J` of entry J, counted from 0; safetensors can hold them."""
        state = {}
        for index, entry in enumerate(self._entries):
            state[f"left.{index}"] = entry.left
            state[f"right.{index}"] = entry.right
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the entries by those of a `state_dict`; on an error the bank stays as it was.

        Raises:
            ValueError: the names are not those of whole entries counted from 0, or the tensors do not fit.
        """
        count = len(state) // 2
        expected = {f"{side}.{index}" for index in range(count) for side in ("left", "right")}
        if set(state) != expected:
            wrong = sorted(set(state) ^ expected)
            raise ValueError(f"a bank's state holds left.J and right.J for J = 0, 1, ...; see {wrong}")
        loaded = MemoryBank()
        for index in range(count):
            loaded.remember(LowRankUpdate(state[f"left.{index}"], state[f"right.{index}"]))
        self._entries, self._gram = loaded._entries, loaded._gram

    def _inner_products(self, update: LowRankUpdate) -> Tensor:
        return torch.tensor([entry.inner(update) for entry in self._entries], dtype=torch.float64)

    def _combine(self, coefficients: Tensor, shape: tuple[int, int]) -> LowRankUpdate:
        """Sum of coefficient times entry, in fp64."""
        nothing = LowRankUpdate.zero(shape, torch.float64)
        terms = [
            (coefficient * entry.left.double(), entry.right.double())
            for coefficient, entry in zip(coefficients.tolist(), self._entries, strict=True)
            if coefficient != 0.0
        ]
        left = torch.cat([nothing.left, *(left for left, _ in terms)], 1)
        right = torch.cat([nothing.right, *(right for _, right in terms)], 0)
        return LowRankUpdate(left, right)


def solve_on_span(gram: Tensor, products: Tensor) -> tuple[Tensor, float]:
    """Least-norm `c`, `(t,)`, with `gram @ c = products` on the span that is numerically there.

    And the norm of the vector that `c` describes, sqrt(c^T gram c), from positive terms alone.
    """
    if gram.numel() == 0:
        return torch.zeros_like(products), 0.0
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    kept = values > _EIGENVALUE_CUTOFF * values[-1]
    basis: Tensor = vectors[:, kept]
    along = basis.T @ products
    return basis @ (along / values[kept]), float((along / values[kept].sqrt()).norm())


def _copied(factor: Tensor) -> Tensor:
    return factor.clone(memory_format=torch.contiguous_format)
