"""Reference log-probabilities: computed once per row and policy, kept on disk, checked before they are used.

A cache file belongs to one policy (base model, adapter, precision) and one kind of row; inside, a pair is found by its
tokens, and a response of a group by its prompt's and its own. So epochs, stages, methods and replay share it, and
nothing stale can be taken for a hit.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from everalign.data.collate import batches_by_length, collate_pairs, collate_targets, row_tokens
from everalign.data.tokenization import TargetGroup, TokenizedPair
from everalign.memory import LowRankUpdate
from everalign.modeling.policy import Policy
from everalign.storage import Journal

Progress = Callable[[int], None]
AnyRow = TypeVar("AnyRow", TokenizedPair, TargetGroup)


def pair_log_probs(
    policy: Policy,
    pairs: Sequence[TokenizedPair],
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

    def of_a_batch(batch: Sequence[TokenizedPair], shared: bool) -> Tensor:
        return torch.stack(policy(policy.on_device(collate_pairs(batch, shared))).chunk(2), dim=1).flatten()

    found = _log_probs(policy, pairs, of_a_batch, [2] * len(pairs), tokens_per_batch, progress)
    return torch.stack(found) if found else torch.empty(0, 2)


def group_log_probs(policy: Policy, groups: Sequence[TargetGroup], tokens_per_batch: int) -> list[Tensor]:
    """Compute summed log-probabilities of every group's responses, as `pair_log_probs` does.

    Returns:
        For each group, fp32 on the CPU, one for each of its responses, in nats.
    """

    def of_a_batch(batch: Sequence[TargetGroup], shared: bool) -> Tensor:
        return cast(Tensor, policy(policy.on_device(collate_targets(batch, shared))))

    return _log_probs(policy, groups, of_a_batch, [len(group.responses) for group in groups], tokens_per_batch, None)


def _log_probs(
    policy: Policy,
    rows: Sequence[AnyRow],
    of_a_batch: Callable[[Sequence[AnyRow], bool], Tensor],
    counts: Sequence[int],
    tokens_per_batch: int,
    progress: Progress | None,
) -> list[Tensor]:
    """Compute batches of similar length; `of_a_batch` gives `counts` values for each row, row after row."""
    order: list[int] = []
    parts: list[Tensor] = []
    shared = policy.head.shared
    with policy.evaluating():
        for numbers in batches_by_length([row_tokens(row, shared) for row in rows], tokens_per_batch):
            parts.append(of_a_batch([rows[number] for number in numbers], shared))
            order += numbers
            if progress is not None:
                progress(len(numbers))
    if not parts:
        return []
    values = torch.cat(parts).cpu()  # the device is waited for once
    found = dict(zip(order, torch.split(values, [counts[number] for number in order]), strict=True))
    return [found[number] for number in range(len(rows))]


def policy_key(fingerprint: str, updates: Mapping[str, LowRankUpdate]) -> str:
    """Name a policy: the base model's fingerprint and precision together with every value of its update."""
    digest = hashlib.sha256(fingerprint.encode())
    for name, update in sorted(updates.items()):
        if update.norm() > 0:
            digest.update(name.encode())
            digest.update(update.left.contiguous().numpy().tobytes())
            digest.update(update.right.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _key_of(*tokens: list[int]) -> str:
    return hashlib.sha256(repr(tokens).encode()).hexdigest()[:32]


class ReferenceCache:
    """Summed log-probabilities of pairs (chosen, rejected) and of groups under reference policies, in a folder.

    Args:
        folder: created when first written to; may be shared by runs with the same base model or others, also by such
            as go on at the same time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def log_probs(self, policy: Policy, key: str, pairs: Sequence[TokenizedPair], tokens_per_batch: int) -> Tensor:
        """Return (N, 2) log-probabilities under `policy` as it is switched now, computing only what is missing.

        Args:
            policy: the reference, already switched.
            key: its `policy_key`.
            pairs: N encoded pairs.
            tokens_per_batch: tokens computed at once, padding included.

        Raises:
            InputError: the cache file is damaged; the message says to delete it.
        """
        journal = self._journal(key)
        keys = [_key_of(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
        known: dict[str, list[float]] = journal.read(keys)
        missing = {k: pair for k, pair in zip(keys, pairs, strict=True) if k not in known}
        if missing:
            values = pair_log_probs(policy, list(missing.values()), tokens_per_batch).tolist()
            fresh = dict(zip(missing, values, strict=True))
            journal.put({k: pair for k, pair in fresh.items() if all(map(math.isfinite, pair))})
            known |= fresh
        return torch.tensor([known[k] for k in keys])

    def group_log_probs(
        self, policy: Policy, key: str, groups: Sequence[TargetGroup], tokens_per_batch: int
    ) -> list[Tensor]:
        """Return each group's log-probabilities, one a response, computing only groups with a response that is missing.

        Arguments and errors as in `log_probs`.
        """
        journal = self._journal(f"{key}-responses")
        keys = [[_key_of(group.prompt, response) for response in group.responses] for group in groups]
        known: dict[str, float] = journal.read(k for names in keys for k in names)
        # By their content, because a replayed row may stand there twice.
        missing = {
            tuple(names): group
            for names, group in zip(keys, groups, strict=True)
            if any(name not in known for name in names)
        }
        if missing:
            fresh: dict[str, float] = {}
            for names, values in zip(
                missing, group_log_probs(policy, list(missing.values()), tokens_per_batch), strict=True
            ):
                for response, value in zip(names, values.tolist(), strict=True):
                    if response not in known:
                        fresh.setdefault(response, value)
            journal.put({k: value for k, value in fresh.items() if math.isfinite(value)})
            known |= fresh
        return [torch.tensor([known[k] for k in names]) for names in keys]

    def _journal(self, key: str) -> Journal:
        return Journal(self._folder / f"reference-{key}.sqlite")
