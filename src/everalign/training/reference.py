"""Reference log-probabilities: computed once per pair and policy, kept on disk, checked before they are used.

A cache file belongs to one policy (base model, adapter, precision); inside, a row is found by its tokens. So epochs,
stages, methods and replay share it, and nothing stale can be taken for a hit.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from everalign.data.batches import batches_by_length
from everalign.data.encoding import EncodedPair
from everalign.data.layout import lay_out_pairs, row_tokens
from everalign.memory import LowRankUpdate
from everalign.modeling.policy import Policy
from everalign.tensor_files import read_tensors, write_tensors

Progress = Callable[[int], None]


def pair_log_probs(
    policy: Policy,
    pairs: Sequence[EncodedPair],
    tokens_per_batch: int,
    progress: Progress | None = None,
) -> Tensor:
    """Compute summed response log-probabilities of every pair under the policy as it is switched now.

    Args:
        policy: in evaluation mode or not; it is put there for the while and gradients are off.
        pairs: N encoded pairs.
        tokens_per_batch: tokens computed at once, padding included.
        progress: called with the number of pairs done after each batch.

    Returns:
        (N, 2) fp32 on the CPU: chosen, rejected, in nats.
    """
    order: list[int] = []
    parts: list[Tensor] = []
    was_training, shared = policy.training, policy.head.shared
    policy.eval()
    for rows in batches_by_length([row_tokens(pair, shared) for pair in pairs], tokens_per_batch):
        batch = policy.on_device(lay_out_pairs([pairs[row] for row in rows], shared))
        with torch.no_grad():
            sums = policy(batch)
        order += rows
        parts.append(torch.stack(sums.chunk(2), dim=1))
        if progress is not None:
            progress(len(rows))
    policy.train(was_training)
    result = torch.empty(len(pairs), 2)
    if parts:
        result[order] = torch.cat(parts).cpu()  # the device is waited for once
    return result


def policy_key(fingerprint: str, updates: Mapping[str, LowRankUpdate]) -> str:
    """Name a policy: the base model's fingerprint and precision together with every value of its update."""
    digest = hashlib.sha256(fingerprint.encode())
    for name, update in sorted(updates.items()):
        if update.norm() > 0:
            digest.update(name.encode())
            digest.update(update.left.contiguous().numpy().tobytes())
            digest.update(update.right.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _row_key(pair: EncodedPair) -> str:
    return hashlib.sha256(repr((pair.prompt, pair.chosen, pair.rejected)).encode()).hexdigest()[:32]


class ReferenceCache:
    """Summed log-probabilities (chosen, rejected) of pairs under reference policies, in a folder.

    Args:
        folder: created when first written to; may be shared by runs with the same base model or others.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def log_probs(self, policy: Policy, key: str, pairs: Sequence[EncodedPair], tokens_per_batch: int) -> Tensor:
        """Return (N, 2) log-probabilities under `policy` as it is switched now, computing only what is missing.

        Args:
            policy: the reference, already switched.
            key: its `policy_key`.
            pairs: N encoded pairs.
            tokens_per_batch: tokens computed at once, padding included.

        Raises:
            InputError: the cache file is damaged; the message says to delete it.
        """
        known = self._read(key)
        keys = [_row_key(pair) for pair in pairs]
        missing = {k: pair for k, pair in zip(keys, pairs, strict=True) if k not in known}
        if missing:
            fresh = pair_log_probs(policy, list(missing.values()), tokens_per_batch)
            known |= dict(zip(missing, fresh, strict=True))
            self._write(key, known)
        return torch.stack([known[k] for k in keys])

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _read(self, key: str) -> dict[str, Tensor]:
        stored = read_tensors(self._path(key), ("keys", "log_probs"), "reference cache")
        if stored is None:
            return {}
        return dict(zip(bytes(stored["keys"].numpy()).decode().split(), stored["log_probs"], strict=True))

    def _write(self, key: str, rows: Mapping[str, Tensor]) -> None:
        names = torch.frombuffer(bytearray(" ".join(rows), "ascii"), dtype=torch.uint8)
        write_tensors(self._path(key), {"keys": names, "log_probs": torch.stack(list(rows.values()))})
