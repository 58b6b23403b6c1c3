"""Turn encoded pairs into padded tensors, and a list of lengths into a plan of micro-batches."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from everalign.data.encoding import EncodedPair

# Pairs are sorted by length within windows of this many batches: little padding, and still a random order.
_WINDOW_BATCHES = 32


def pad_pairs(pairs: Sequence[EncodedPair], pad_id: int) -> dict[str, Tensor]:
    """Lay out B pairs as 2B right-padded sequences: the chosen ones first, then the rejected ones.

    Returns:
        `input_ids`, `attention_mask` (2B, T) int64, `response_mask` (2B, T) bool, `weight` (B,) fp32.
    """
    sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    return {**_pad(sequences, pad_id), "weight": torch.tensor([p.weight for p in pairs], dtype=torch.float32)}


def pad_chosen(pairs: Sequence[EncodedPair], pad_id: int) -> dict[str, Tensor]:
    """Lay out only the chosen sequences of B pairs, as `pad_pairs` does: (B, T)."""
    batch = _pad([(p.prompt, p.chosen) for p in pairs], pad_id)
    return {**batch, "weight": torch.tensor([p.weight for p in pairs], dtype=torch.float32)}


def _pad(sequences: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Tensor]:
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(sequences), longest), dtype=torch.int64)
    response_mask = torch.zeros((len(sequences), longest), dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        attention_mask[row, :end] = 1
        response_mask[row, len(prompt) : end] = True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}


def pair_length(pair: EncodedPair) -> int:
    """Return the length of the pair's longer sequence, in tokens."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group all indices into batches of similar length, longest first (memory shows its peak at once)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class TrainingPlan:
    """A stage's micro-batches in order: row indices, dealt out to the processes in turn.

    Args:
        micro_batches: rows of each; as many for each process in every step.
        accumulation: micro-batches of one process in an optimiser step.
        processes: how many share the work.
    """

    micro_batches: list[list[int]]
    accumulation: int
    processes: int = 1

    @property
    def steps(self) -> int:
        """Number of optimiser steps; the last may have fewer micro-batches."""
        return -(-len(self.micro_batches) // (self.accumulation * self.processes))


def training_plan(
    lengths: Sequence[int], batch_size: int, micro_batch_size: int, epochs: float, seed: int, processes: int = 1
) -> TrainingPlan:
    """Plan a stage.

    Every row occurs once an epoch (in a last, partial epoch at most once); every step has `batch_size` rows but the
    last, which has what is left. The order depends on the arguments alone, and a step's rows on neither
    `micro_batch_size` nor `processes`. With several processes some micro-batches are empty where a step's rows do
    not go round.

    Args:
        lengths: tokens of each row; rows of similar length share a batch.
        batch_size: rows an optimiser step sees, over all processes.
        micro_batch_size: rows that are computed at once at most.
        epochs: passes over the rows, fractions allowed.
        seed: seeds the order.
        processes: how many share the work.

    Raises:
        ValueError: there are no rows.
    """
    if not lengths:
        raise ValueError("a training plan needs at least one row")
    stream = _stream(lengths, batch_size, epochs, random.Random(seed))
    accumulation = -(-batch_size // (micro_batch_size * processes))
    micro_batches = []
    for start in range(0, len(stream), batch_size):
        step = stream[start : start + batch_size]
        rounds = min(accumulation, -(-len(step) // processes))
        micro_batches += _nearly_equal(step, rounds * processes)
    return TrainingPlan(micro_batches, accumulation, processes)


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


def _nearly_equal(rows: list[int], parts: int) -> list[list[int]]:
    bounds = [len(rows) * part // parts for part in range(parts + 1)]
    return [rows[start:end] for start, end in pairwise(bounds)]
