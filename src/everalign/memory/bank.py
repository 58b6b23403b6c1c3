"""Memory banks: the history of one weight matrix, exact or bounded, and projections on what it spans."""

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


# A direction is new when the residual's singular value along it is above this share of the update's norm; stored
# in fp32, a basis is orthonormal to about 1e-7.
_NEW_DIRECTION = 1e-6


@dataclass(frozen=True, eq=False)
class Addition:
    """An update in the bank's bases, before the bank takes it in.

    Attributes:
        left: (m, p) orthonormal, the bank's basis extended by the update's; in the update's precision.
        right: (n, p') orthonormal.
        core: (p, p') fp64, the update's core in them.
        cores: (t, p, p') fp64, the entries' cores in them.
    """

    left: Tensor
    right: Tensor
    core: Tensor
    cores: Tensor


class SharedBasisBank:
    """Denoised updates of one weight matrix, oldest first, in bases of at most `cap` directions a side.

    Args:
        cap: directions of each basis that are kept; entries of rank r fill them after cap / r unrelated tasks.
    """

    def __init__(self, cap: int = 128) -> None:
        if cap < 1:
            raise ValueError(f"the cap must be at least 1 direction, not {cap}")
        self.cap = cap
        self._left: Tensor | None = None
        self._right: Tensor | None = None
        self._cores: list[Tensor] = []
        self._energies: list[float] = []

    def __len__(self) -> int:
        return len(self._cores)

    @property
    def entries(self) -> tuple[LowRankUpdate, ...]:
        """What the bank holds, oldest first; without the energy that the cap has cost."""
        if self._left is None or self._right is None:
            return ()
        return tuple(LowRankUpdate(self._left @ core, self._right.T) for core in self._cores)

    @property
    def lost_energy(self) -> float:
        """Share of the entries' energy that the cap has cost, averaged over the entries."""
        shares = [
            1.0 - float(core.double().square().sum()) / energy
            for core, energy in zip(self._cores, self._energies, strict=True)
            if energy > 0.0
        ]
        return max(0.0, sum(shares) / len(shares)) if shares else 0.0

    def extend(self, update: LowRankUpdate) -> Addition:
        """Express an update and all entries in bases that hold the update whole; the bank stays as it is.

        The update's factors have to be balanced, as a truncation leaves them.

        Raises:
            ValueError: the update is of another shape than the entries.
        """
        left, inside_left = _extended(self._basis(self._left, update.shape[0], update.dtype), update.left)
        right, inside_right = _extended(self._basis(self._right, update.shape[1], update.dtype), update.right.T)
        cores = torch.zeros(len(self), left.shape[1], right.shape[1], dtype=torch.float64)
        for index, core in enumerate(self._cores):
            cores[index, : core.shape[0], : core.shape[1]] = core
        return Addition(left, right, inside_left.double() @ inside_right.double().T, cores)

    def _basis(self, basis: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
        if basis is None:
            return torch.zeros(rows, 0, dtype=dtype)
        if len(basis) != rows:
            held = tuple(len(b) for b in (self._left, self._right) if b is not None)
            raise ValueError(f"updates of different weights: the bank's is {held}")
        return basis.to(dtype)

    def remember(self, update: LowRankUpdate) -> None:
        """Append an update; as `adopt` does with its extension.

        Raises:
            ValueError: the update is of another shape than the entries.
        """
        self.adopt(self.extend(_balanced(update)))

    def adopt(self, addition: Addition, held: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Take an update in, at its precision.

        Args:
            addition: what `extend` made of it.
            held: orthonormal (p, k) and (p', k) fp64 with k up to `cap`: directions of the bases that stay in any
                case, those of the long-term memory.

        Returns:
            The held directions themselves, (m, k) and (n, k).
        """
        cores = torch.cat([addition.cores, addition.core[None]])
        nothing = [torch.zeros(size, 0, dtype=torch.float64) for size in cores.shape[1:]]
        self._left, cores, held_left = _leading(addition.left, cores, (held or nothing)[0], self.cap)
        turned = cores.transpose(1, 2)
        self._right, turned, held_right = _leading(addition.right, turned, (held or nothing)[1], self.cap)
        self._cores = list(turned.transpose(1, 2).to(addition.left.dtype).contiguous())
        self._energies.append(float(addition.core.square().sum()))
        return held_left, held_right

    def project(self, update: LowRankUpdate) -> Projection:
        """Orthogonal projection (Frobenius) of an update on the span of the entries, as `MemoryBank.project`."""
        addition = self.extend(_balanced(update))
        coefficients, core, length = project_core(addition.core, addition.cores)
        norm = float(addition.core.norm())
        energy = min(1.0, (length / norm) ** 2) if norm > 0.0 else 0.0
        component = LowRankUpdate(addition.left.double() @ core, addition.right.T)
        return Projection(coefficients, component.to(update.dtype), energy)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors `left`, `right`, `cores` (t, p, p') and `energies` (t,); {} for an empty bank."""
        if self._left is None or self._right is None:
            return {}
        energies = torch.tensor(self._energies, dtype=torch.float64)
        return {"left": self._left, "right": self._right, "cores": torch.stack(self._cores), "energies": energies}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace what the bank holds by a `state_dict`; on an error the bank stays as it was.

        Raises:
            ValueError: tensors are missing, or they do not fit.
        """
        if not state:
            self._left = self._right = None
            self._cores, self._energies = [], []
            return
        if set(state) != {"left", "right", "cores", "energies"}:
            raise ValueError(f"a bank's state holds left, right, cores and energies; found {sorted(state)}")
        left, right, cores, energies = (state[name] for name in ("left", "right", "cores", "energies"))
        if cores.shape != (len(energies), left.shape[1], right.shape[1]):
            raise ValueError(f"a bank's cores do not fit its bases: {tuple(cores.shape)}")
        self._left, self._right = left.clone(), right.clone()
        self._cores, self._energies = [core.clone() for core in cores], energies.tolist()


def _balanced(update: LowRankUpdate) -> LowRankUpdate:
    """Return the update with factors of the same scale, so that no direction is lost beside a larger one."""
    return LowRankUpdate(*update.to(torch.float64).balanced_factors()).to(update.dtype)


def project_core(core: Tensor, cores: Tensor) -> tuple[Tensor, Tensor, float]:
    """Project a core (p, p') on the span of others (t, p, p'): coefficients (t,), the part, and its norm."""
    entries = cores.flatten(1)
    norms = entries.norm(dim=1)
    used = norms > 1e-12 * norms.max() if len(norms) else norms > 0
    unit = entries[used] / norms[used, None]
    unit_coefficients, length = solve_on_span(unit @ unit.T, unit @ core.flatten())
    coefficients = torch.zeros_like(norms)
    coefficients[used] = unit_coefficients / norms[used]
    return coefficients, (unit_coefficients @ unit).view_as(core), length


def _extended(basis: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Extend an orthonormal basis (m, p) so that it holds a factor (m, q); and the factor's coordinates in it.

    Projected twice ("twice is enough", Kahan in Parlett 1980, §6.9), then the residual's own singular directions: a
    QR factorisation alone would return arbitrary ones where the residual has less than full rank. Weak directions
    beside strong ones lean into the basis still, by rounding over their share, so they are projected once more.
    """
    inside = basis.T @ factor
    rest = factor - basis @ inside
    again = basis.T @ rest
    rest -= basis @ again
    Q, R = torch.linalg.qr(rest)
    U, values, _ = torch.linalg.svd(R, full_matrices=False)
    new = values > _NEW_DIRECTION * factor.norm()
    directions = Q @ U[:, new]
    directions -= basis @ (basis.T @ directions)
    directions = torch.linalg.qr(directions).Q
    return torch.cat([basis, directions], 1), torch.cat([inside + again, directions.T @ rest])


def _leading(basis: Tensor, cores: Tensor, held: Tensor, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep `cap` directions of a basis (m, p): those held, then those that carry most of the cores (t, p, p').

    Every core counts the same, whatever its norm. Returns the basis, the cores in it, and the directions held (m, k).
    """
    if basis.shape[1] <= cap:
        return basis, cores, basis @ held.to(basis.dtype)
    norms = cores.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    gram = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64)
    for core, norm in zip(cores, norms.tolist(), strict=True):
        unit = core / norm
        gram.addmm_(unit, unit.T)
    gram -= held @ (held.T @ gram)
    gram -= (gram @ held) @ held.T
    _, vectors = torch.linalg.eigh(gram)
    # Orthonormal again: where the cores fill fewer directions, eigenvectors of 0 may lean into those held.
    kept, triangle = torch.linalg.qr(torch.cat([held, vectors.flip(1)[:, : cap - held.shape[1]]], 1))
    kept *= torch.where(triangle.diagonal() < 0, -1.0, 1.0)  # so that those held come first just as they are
    leading = basis @ kept.to(basis.dtype)
    return leading, kept.T @ cores, leading[:, : held.shape[1]]
