"""Consolidation of a 7B-shaped adapter: shared bases against exact low-rank algebra and the paper's dense SVD.

    python bench/consolidation.py [--dense]

56 matrices of 3584 x 3584 (q and v of 28 layers), r = 16, 12 tasks in the bank. The dense formulation (an SVD of the
update itself and of the bank's rows as vectors of 12.8M numbers) is timed on one matrix and multiplied: all of them
would take an hour and 154 MB for each entry of the bank and matrix.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, write_result
from everalign.memory import (
    LowRankUpdate,
    MemoryBank,
    consolidate,
    consolidate_into,
    for_each_weight,
    integrate,
)
from everalign.modeling.runtime import prepare_process

RANK_CAP = 64


def random_update(size: int, rank: int, decay: float, seed: int) -> LowRankUpdate:
    """An update whose singular values fall by about `decay` from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    scale = decay ** torch.arange(rank)
    left, right = torch.randn(size, rank, generator=generator), torch.randn(rank, size, generator=generator)
    return LowRankUpdate(left * scale / size**0.5, right / size**0.5)


class Exact:
    """The exact bank, whose entries and work grow with every task."""

    def __init__(self) -> None:
        self.bank = MemoryBank()
        self.memory: LowRankUpdate | None = None

    def learn(self, update: LowRankUpdate) -> None:
        """Consolidate and integrate one update."""
        result = consolidate(update, self.bank)
        self.memory, _ = integrate(self.memory, result.refined, RANK_CAP)


class Shared:
    """The bounded bank."""

    def __init__(self, cap: int) -> None:
        self.bank = MemoryBank(cap)
        self.memory: LowRankUpdate | None = None

    def learn(self, update: LowRankUpdate) -> None:
        """Consolidate and integrate one update."""
        _, self.memory, _ = consolidate_into(self.memory, update, self.bank, rank_cap=RANK_CAP)


def timed(work: Callable[[], Any]) -> float:
    """Seconds of wall-clock time."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def history(make: Callable[[], Any], arguments: argparse.Namespace) -> list[Any]:
    """All matrices with `tasks` tasks behind them; one is made and copied, for its content does not matter here."""
    first = make()
    for task in range(arguments.tasks):
        first.learn(random_update(arguments.size, arguments.rank, arguments.decay, task))
    copies = [first]
    for _ in range(arguments.matrices - 1):
        other = make()
        other.bank.load_state_dict({name: value.clone() for name, value in first.bank.state_dict().items()})
        other.memory = first.memory
        copies.append(other)
    return copies


def dense_updates(arguments: argparse.Namespace) -> list[torch.Tensor]:
    """The bank's updates and a new one of one matrix, as the paper keeps them."""
    return [
        random_update(arguments.size, arguments.rank, arguments.decay, task).dense()
        for task in range(arguments.tasks + 1)
    ]


def dense_task(updates: list[torch.Tensor]) -> None:
    """One matrix as the paper writes it: SVD of the update, rows of the bank as long vectors, SVD of the bank."""
    U, S, Vh = torch.linalg.svd(updates[-1], full_matrices=False)
    k = int((S.square().cumsum(0) < 0.9 * S.square().sum()).sum()) + 1
    denoised = (U[:, :k] * S[:k]) @ Vh[:k]
    rows = torch.stack([update.flatten() for update in updates[:-1]])
    _, _, basis = torch.linalg.svd(rows, full_matrices=False)
    _ = denoised - 0.5 * (basis.T @ (basis @ denoised.flatten())).view_as(denoised)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--matrices", type=int, default=56)
    parser.add_argument("--size", type=int, default=3584)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--decay", type=float, default=0.97, help="fall of the updates' singular values")
    parser.add_argument("--tasks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dense", action="store_true", help="time the paper's dense formulation too: some minutes")
    parser.add_argument("--output", default=str(OUT / "consolidation.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    makers = {"exact": Exact, "cap 128": lambda: Shared(128), "cap 64": lambda: Shared(64)}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    lost, sizes = {}, {}
    for turn in range(arguments.rounds + 1):
        for name, make in makers.items():
            matrices = history(make, arguments)
            update = random_update(arguments.size, arguments.rank, arguments.decay, arguments.tasks)
            took = timed(lambda ms=matrices, u=update: for_each_weight(lambda matrix: matrix.learn(u), ms))
            lost[name] = matrices[0].bank.lost_energy
            sizes[name] = sum(t.numel() * t.element_size() for m in matrices for t in m.bank.state_dict().values())
            if turn:
                seconds[name].append(took)
    dense = None
    if arguments.dense:
        updates = dense_updates(arguments)
        dense = timed(lambda: dense_task(updates)) * arguments.matrices
    table = Table(
        title=f"task {arguments.tasks + 1}: {arguments.matrices} matrices of {arguments.size}, r={arguments.rank}"
    )
    for column in ("bank", "seconds", "against exact", "against dense", "bank MiB", "history lost"):
        table.add_column(column, justify="left" if column == "bank" else "right")
    for name, values in seconds.items():
        ratio = statistics.median(e / v for e, v in zip(seconds["exact"], values, strict=True))
        table.add_row(
            name,
            f"{statistics.median(values):.2f}",
            f"{ratio:.1f}×",
            f"{dense / statistics.median(values):.0f}×" if dense else "",
            f"{sizes[name] / 2**20:.0f}",
            f"{lost[name]:.1%}",
        )
    Console(width=120).print(table)
    result = {"settings": vars(arguments), "seconds": seconds, "dense_seconds": dense, "lost": lost, "bytes": sizes}
    write_result(Path(arguments.output), result)


if __name__ == "__main__":
    main()
