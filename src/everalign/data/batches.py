"""Turn a list of lengths into batches under a budget of tokens, and into the plan of a training stage."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Pairs are sorted by length within windows of this many batches: little padding, and still a random order.
_WINDOW_BATCHES = 32


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group all indices into batches of similar length, longest first (memory shows its peak at once).

    Padded to its longest row, a batch has at most `tokens_per_batch` tokens, unless a single row has more.
    """
    return _cut(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)), lengths, tokens_per_batch)


def _cut(rows: Sequence[int], lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Cut rows, longest first, into consecutive batches under the budget."""
    batches: list[list[int]] = []
    for row in rows:
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > tokens_per_batch:
            batches.append([])
        batches[-1].append(row)
    return batches


@dataclass(frozen=True)
class TrainingPlan:
    """A stage's optimiser steps in order, each as the shares of the processes.

    Args:
        shares: step after step and process after process, that process's micro-batches (row indices) of the step;
            empty where a step has fewer rows than there are processes.
        processes: how many share the work.
    """

    shares: list[list[list[int]]]
    processes: int = 1

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return len(self.shares) // self.processes


def training_plan(
    lengths: Sequence[int], batch_size: int, tokens_per_batch: int, epochs: float, seed: int, processes: int = 1
) -> TrainingPlan:
    """Plan a stage.

    Every row occurs once an epoch (in a last, partial epoch at most once); every step has `batch_size` rows but the
    last, which has what is left. The order depends on the arguments alone, and a step's rows on neither
    `tokens_per_batch` nor `processes`.

    Args:
        lengths: tokens of each row; rows of similar length share a batch.
        batch_size: rows an optimiser step sees, over all processes.
        tokens_per_batch: tokens that are computed at once at most, padding included.
        epochs: passes over the rows, fractions allowed.
        seed: seeds the order.
        processes: how many share the work.

    Raises:
        ValueError: there are no rows.
    """
    if not lengths:
        raise ValueError("a training plan needs at least one row")
    stream = _stream(lengths, batch_size, epochs, random.Random(seed))
    shares = []
    for start in range(0, len(stream), batch_size):
        # Dealt out longest first, so that the processes have about the same to compute.
        step = sorted(stream[start : start + batch_size], key=lambda i: -lengths[i])
        shares += [_cut(step[process::processes], lengths, tokens_per_batch) for process in range(processes)]
    return TrainingPlan(shares, processes)


def _stream(lengths: Sequence[int], batch_size: int, epochs: float, rng: random.Random) -> list[int]:
    total = max(1, round(epochs * len(lengths)))
    stream: list[int] = []
    while len(stream) < total:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        stream += _group_by_length(order[: total - len(stream)], lengths, batch_size, rng)
    return stream


def _group_by_length(order: list[int], lengths: Sequence[int], size: int, rng: random.Random) -> list[int]:
    window = _WINDOW_BATCHES * size
    batches = []
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lambda i: -lengths[i])
        batches += [rows[i : i + size] for i in range(0, len(rows), size)]
    rng.shuffle(batches)
    return [row for batch in batches for row in batch]
