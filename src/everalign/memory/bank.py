"""Memory bank: the denoised updates of one weight matrix from earlier tasks, and projections on their span.

Without a cap the bank keeps every update's factors. With a cap it keeps two orthonormal bases of at most `cap`
directions and a small core matrix for each update, so that its size does not grow with the number of tasks. Both answer
the same questions in the same way: they express all updates in common orthonormal bases (`coordinates`), where the
update U_i = L C_i R^T of a weight (m, n) is its core C_i (p, p').
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from everalign.memory.low_rank import LowRankUpdate

# A direction counts as spanned if the unit-normalised entries' singular value along it is above 1e-6 of the largest (an
# eigenvalue of their Gram matrix is its square), an entry if its norm is above 1e-12 of the largest.
_EIGENVALUE_CUTOFF = 1e-12
_NORM_CUTOFF = 1e-12
# A direction is new to a basis if the residual's singular value along it is above this share of the update's norm;
# stored in fp32, a basis is orthonormal to about 1e-7.
_NEW_DIRECTION = 1e-6


@dataclass(frozen=True, eq=False)
class Projection:
    """The part of an update inside the span of a bank.

    Attributes:
        coefficients: `(t,)` fp64; the part is the sum of coefficient times entry. Where entries depend on each other,
            the choice of least norm over unit-normalised entries.
        component: the part itself, in the update's dtype.
        energy: squared norm of the part over that of the update, 0 to 1 (0 for a zero update).
    """

    coefficients: Tensor
    component: LowRankUpdate
    energy: float


@dataclass(frozen=True, eq=False)
class Coordinates:
    """An update and the entries of a bank in common orthonormal bases.

    Attributes:
        update: the update.
        left: (m, p) orthonormal, holds all left factors.
        right: (n, p') orthonormal, holds all right factors.
        core: (p, p') fp64, the update in these bases.
        cores: (t, p, p') fp64, the entries in these bases.
    """

    update: LowRankUpdate
    left: Tensor
    right: Tensor
    core: Tensor
    cores: Tensor

    def project(self) -> tuple[Tensor, Tensor, float]:
        """Projects the update on the span of the entries: coefficients (t,), the part's core, and its share of energy.

        The coefficients are the least-norm solution c of G c = <entry, update>, with G the Gram matrix of the
        unit-normalised entries, on the span that is numerically there.
        """
        entries = self.cores.flatten(1)
        norms = entries.norm(dim=1)
        coefficients = torch.zeros_like(norms)
        used = norms > _NORM_CUTOFF * norms.max() if len(norms) else norms > 0
        if not used.any():
            return coefficients, torch.zeros_like(self.core), 0.0
        unit = entries[used] / norms[used, None]
        gram = unit @ unit.T
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        kept = values > _EIGENVALUE_CUTOFF * values[-1]
        basis: Tensor = vectors[:, kept]
        along = basis.T @ (unit @ self.core.flatten())
        solution = basis @ (along / values[kept])
        coefficients[used] = solution / norms[used]
        # From positive terms alone: sqrt(c^T G c) as a difference would lose digits where entries nearly cancel.
        length = float((along / values[kept].sqrt()).norm())
        norm = float(self.core.norm())
        # Rounding may put the part a last digit above the whole.
        energy = min(1.0, (length / norm) ** 2) if norm > 0.0 else 0.0
        return coefficients, (solution @ unit).view_as(self.core), energy

    def component(self, core: Tensor) -> LowRankUpdate:
        """Returns the update of a core (p, p'), in the update's dtype; of width 0 if the core is zero."""
        if not core.any():
            return LowRankUpdate.zero(self.update.shape, self.update.dtype)
        return LowRankUpdate(self.left.double() @ core, self.right.double().T).to(self.update.dtype)


class MemoryBank:
    """The denoised updates of one weight matrix, oldest first.

    Args:
        cap: directions of each basis that are kept; entries of rank r fill them after cap / r unrelated tasks. None
            keeps every update exactly, at a size that grows with every task.
    """

    def __init__(self, cap: int | None = None) -> None:
        if cap is not None and cap < 1:
            raise ValueError(f"the cap must be at least 1 direction, not {cap}")
        self.cap = cap
        self._updates: list[LowRankUpdate] = []  # without a cap
        self._left: Tensor | None = None  # with a cap: the bases, and each update's core and energy before any cut
        self._right: Tensor | None = None
        self._cores: list[Tensor] = []
        self._energies: list[float] = []

    def __len__(self) -> int:
        return len(self._updates) if self.cap is None else len(self._cores)

    @property
    def entries(self) -> tuple[LowRankUpdate, ...]:
        """The updates, oldest first, without the energy that the cap cut off."""
        if self._left is None or self._right is None:
            return tuple(self._updates)
        return tuple(LowRankUpdate(self._left @ core, self._right.T) for core in self._cores)

    @property
    def lost_energy(self) -> float:
        """Share of the entries' energy that the cap cut off, averaged over the entries; 0 without a cap."""
        shares = [
            1.0 - float(core.double().square().sum()) / energy
            for core, energy in zip(self._cores, self._energies, strict=True)
            if energy > 0.0
        ]
        return max(0.0, sum(shares) / len(shares)) if shares else 0.0

    def coordinates(self, update: LowRankUpdate) -> Coordinates:
        """Expresses an update and all entries in common bases; the bank does not change.

        With a cap the update's factors must be balanced, as a truncation leaves them.

        Raises:
            ValueError: the update is of another shape than the entries.
        """
        held = self._updates[0].shape if self._updates else None
        if self._left is not None and self._right is not None:
            held = (len(self._left), len(self._right))
        if held not in (None, update.shape):
            raise ValueError(f"updates of different weights: the bank's is {held}, the update's {update.shape}")
        if self.cap is None:
            # U = L R = Q_L (T_L T_R^T) Q_R^T, with one QR for all left factors and one for all right ones.
            every = [*self._updates, update]
            widths = [one.width for one in every]
            left, lefts = torch.linalg.qr(torch.cat([one.left.double() for one in every], 1))
            right, rights = torch.linalg.qr(torch.cat([one.right.double().T for one in every], 1))
            blocks = zip(lefts.split(widths, 1), rights.split(widths, 1), strict=True)
            cores = torch.stack([a @ b.T for a, b in blocks])
            return Coordinates(update, left, right, cores[-1], cores[:-1])
        left, inside_left = _extended(self._left, update.left)
        right, inside_right = _extended(self._right, update.right.T)
        cores = torch.zeros(len(self), left.shape[1], right.shape[1], dtype=torch.float64)
        for index, core in enumerate(self._cores):
            cores[index, : core.shape[0], : core.shape[1]] = core
        return Coordinates(update, left, right, inside_left.double() @ inside_right.double().T, cores)

    def remember(self, update: LowRankUpdate) -> None:
        """Appends a copy of an update.

        Raises:
            ValueError: the update is of another shape than the entries.
        """
        # With factors of the same scale, so that no direction is lost beside a larger one.
        self.add(self.coordinates(update if self.cap is None else LowRankUpdate(*update.balanced_factors())))

    def add(self, coordinates: Coordinates, held: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Appends the update of `coordinates`, at its precision.

        Args:
            coordinates: from this bank, as it is now.
            held: orthonormal (p, k) and (p', k) fp64, k at most `cap`: directions of the bases that must stay, those of
                the long-term memory.

        Returns:
            The held directions themselves, (m, k) and (n, k).
        """
        nothing = [torch.zeros(size, 0, dtype=torch.float64) for size in coordinates.core.shape]
        held_left, held_right = held or nothing
        if self.cap is None:
            # A copy, because factors may be views of weights that go on training.
            factors = (coordinates.update.left, coordinates.update.right)
            copies = (factor.clone(memory_format=torch.contiguous_format) for factor in factors)
            self._updates.append(LowRankUpdate(*copies))
            return coordinates.left @ held_left, coordinates.right @ held_right
        cores = torch.cat([coordinates.cores, coordinates.core[None]])
        self._left, cores, kept_left = keep_leading(coordinates.left, cores, held_left, self.cap)
        turned = cores.transpose(1, 2)
        self._right, turned, kept_right = keep_leading(coordinates.right, turned, held_right, self.cap)
        self._cores = list(turned.transpose(1, 2).to(coordinates.left.dtype).contiguous())
        self._energies.append(float(coordinates.core.square().sum()))
        return kept_left, kept_right

    def project(self, update: LowRankUpdate) -> Projection:
        """Projects an update orthogonally (Frobenius) on the span of the entries.

        Independent of the entries' order and scale; zero and repeated entries change nothing.

        Raises:
            ValueError: the update is of another shape than the entries.
        """
        coordinates = self.coordinates(update if self.cap is None else LowRankUpdate(*update.balanced_factors()))
        coefficients, core, energy = coordinates.project()
        return Projection(coefficients, coordinates.component(core), energy)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the bank as tensors for safetensors.

        Without a cap: `left.J` and `right.J` of entry J, counted from 0. With one: `left` (m, p), `right` (n, p'),
        `cores` (t, p, p') and `energies` (t,), or nothing for an empty bank.
        """
        if self._left is None or self._right is None:
            sides = ("left", "right")
            return {f"{side}.{i}": getattr(one, side) for i, one in enumerate(self._updates) for side in sides}
        energies = torch.tensor(self._energies, dtype=torch.float64)
        return {"left": self._left, "right": self._right, "cores": torch.stack(self._cores), "energies": energies}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the entries by those of a `state_dict`; on an error the bank stays as it was.

        Raises:
            ValueError: tensors are missing or do not fit.
        """
        if self.cap is None:
            count = len(state) // 2
            expected = {f"{side}.{index}" for index in range(count) for side in ("left", "right")}
            if set(state) != expected:
                wrong = sorted(set(state) ^ expected)
                raise ValueError(f"a bank's state holds left.J and right.J for J = 0, 1, ...; see {wrong}")
            loaded = MemoryBank()
            for index in range(count):
                loaded.remember(LowRankUpdate(state[f"left.{index}"], state[f"right.{index}"]))
            self._updates = loaded._updates
            return
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


def _extended(basis: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Extends an orthonormal basis (m, p) so that it holds a factor (m, q); returns it and the factor's coordinates.

    The factor is projected twice ("twice is enough", Kahan in Parlett 1980, §6.9). The residual's own singular
    directions are added, because a QR factorisation alone would return arbitrary ones where the residual has less than
    full rank. Weak directions beside strong ones still lean into the basis, by rounding over their share, so they are
    projected once more.
    """
    basis = factor.new_zeros(len(factor), 0) if basis is None else basis.to(factor.dtype)
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


def keep_leading(basis: Tensor, cores: Tensor, held: Tensor, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps `cap` directions of a basis (m, p): those held, then those that carry most of the cores (t, p, p').

    Every core counts the same, whatever its norm. Returns the basis, the cores in it, and the held directions (m, k).
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
    kept *= torch.where(triangle.diagonal() < 0, -1.0, 1.0)  # so that the held ones come first just as they are
    leading = basis @ kept.to(basis.dtype)
    return leading, kept.T @ cores, leading[:, : held.shape[1]]
