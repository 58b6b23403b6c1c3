"""Reference log-probabilities: computed once per row and policy, kept on disk, checked before they are used.

A cache file belongs to one policy (base model, adapter, precision); inside, a response is found by its prompt's tokens
and its own. So epochs, stages, methods, replay and kinds of rows share it, and a stale value is never found.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from everalign.data.collate import batches_by_length, collate, row_tokens
from everalign.data.tokenization import TokenizedRow
from everalign.distributed import share, world
from everalign.memory import LowRankUpdate
from everalign.modeling.policy import Policy
from everalign.storage import Journal


def sequence_logprobs(
    policy: Policy,
    rows: Sequence[TokenizedRow],
    tokens_per_batch: int,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Compute summed log-probabilities of every row's responses under the policy as it is switched now.

    Args:
        policy: is put into evaluation mode meanwhile, without gradients.
        rows: N tokenised rows.
        tokens_per_batch: tokens computed at once, padding included.
        progress: called with the number of rows done after each of this process's batches.

    Returns:
        For each row (K,) fp32 on the CPU, one for each of its K responses, in nats.
    """
    shared = policy.head.shared
    lengths = [row_tokens(row, shared, policy.prefix_length) for row in rows]

    def compute(batches: Sequence[list[int]]) -> list[Tensor]:
        parts = []
        for numbers in batches:
            parts.append(policy(policy.on_device(collate([rows[number] for number in numbers], shared))))
            if progress is not None:
                progress(len(numbers))
        if not parts:
            return []
        whole = torch.cat(parts).cpu()  # the device is waited for once
        return [part.clone() for part in torch.split(whole, [len(part) for part in parts])]

    batches = batches_by_length(lengths, tokens_per_batch)
    with policy.evaluating():
        # Whole batches, so that every one is computed, and rounded, as by one process.
        parts = share(compute, batches)
    if not parts:
        return []
    order, values = [number for numbers in batches for number in numbers], torch.cat(parts)
    found = dict(zip(order, torch.split(values, [len(rows[number].responses) for number in order]), strict=True))
    return [found[number] for number in range(len(rows))]


def counted(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """Return what counts this process's rows for `sequence_logprobs` and reports (rows done by all, rows in all)."""
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        progress(min(done * world(), total), total)

    return count


def policy_key(fingerprint: str, updates: Mapping[str, LowRankUpdate]) -> str:
    """Name a policy: the base model's fingerprint and precision together with every value of its update."""
    digest = hashlib.sha256(fingerprint.encode())
    for name, update in sorted(updates.items()):
        if update.norm() > 0:
            digest.update(name.encode())
            digest.update(update.left.contiguous().numpy().tobytes())
            digest.update(update.right.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class ReferenceCache:
    """Summed log-probabilities of responses under reference policies, in a folder.

    Args:
        folder: created when first written to; runs may share it, also at the same time and with other base models.
    """

    folder: Path

    def logprobs(
        self,
        policy: Policy,
        key: str,
        rows: Sequence[TokenizedRow],
        tokens_per_batch: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Tensor]:
        """Return what `sequence_logprobs` does, computing only the rows with a response that is missing.

        Args:
            policy: the reference, already switched.
            key: its `policy_key`.
            rows: N tokenised rows.
            tokens_per_batch: tokens computed at once, padding included.
            progress: called with (rows done, rows to compute).

        Raises:
            InputError: the cache file is damaged; the message says to delete it.
        """
        journal = Journal(self.folder / f"reference-{key}.sqlite")
        keys = [
            tuple(hashlib.sha256(repr((row.prompt, one)).encode()).hexdigest()[:32] for one in row.responses)
            for row in rows
        ]
        known: dict[str, float] = journal.read(k for names in keys for k in names)
        # By their content, because a replayed row may occur twice.
        missing = {names: row for names, row in zip(keys, rows, strict=True) if any(k not in known for k in names)}
        if missing:
            fresh: dict[str, float] = {}
            computed = sequence_logprobs(
                policy, list(missing.values()), tokens_per_batch, counted(progress, len(missing))
            )
            for names, values in zip(missing, computed, strict=True):
                for name, value in zip(names, values.tolist(), strict=True):
                    if name not in known:
                        fresh.setdefault(name, value)
            journal.put({name: value for name, value in fresh.items() if math.isfinite(value)})
            known |= fresh
        return [torch.tensor([known[name] for name in names]) for names in keys]


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of a stage's rows under its reference policy, computed before the stage starts.

    Args:
        name: which policy: `base`, `stage_start` or `previous_task`.
        logprobs: for each row (K,), summed log-probabilities of its responses, in nats.
        probe: a few of the rows, on which the policy is compared with the reference before the first step.
        probe_logprobs: those of the probe, from the same batches as the policy's will be, so that equal policies
            differ by exactly 0.
    """

    name: str
    logprobs: Sequence[Tensor]
    probe: Sequence[TokenizedRow] = ()
    probe_logprobs: Sequence[Tensor] = ()
