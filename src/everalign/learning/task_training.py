"""Train all stages of one task, each against its explicit reference, resumable after every step."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everalign.data.encoding import EncodedPair, EncodedPairs
from everalign.data.groups import EncodedGroups, TargetGroup
from everalign.learning.setup import Setup
from everalign.objectives import implicit_margin
from everalign.training.finished import keep_finished, load_finished
from everalign.training.reference import group_log_probs, pair_log_probs, policy_key
from everalign.training.stage import StageOptions, run_stage
from everalign.training.teaching import Objective

_PROBE_ROWS = 16

Encoded = EncodedPairs | EncodedGroups


@dataclass(frozen=True)
class StageReport:
    """What one stage of a task did, as the manifest tells it.

    Args:
        stage: `sft` or the objective's name.
        reference: the reference policy, or None where the objective needs none.
        steps: optimiser steps.
        epochs: passes over the rows.
        seconds: wall-clock time of training, of the last uninterrupted piece where it was resumed.
        step0_margin: mean implicit margin before the first step on a probe of the rows; exactly 0 when the reference
            is the policy that the stage starts from. None without a reference, or where rows are no pairs.
        step0_log_ratio: of rows that are no pairs, the mean over the probe's responses of |log π − log π_ref|, in
            nats; 0 as above.
        rows: rows of the stage, replayed ones included.
        replayed: how many of them are replayed.
        curve: logged steps.
    """

    stage: str
    reference: str | None
    steps: int
    epochs: float
    seconds: float
    rows: int
    replayed: int
    curve: list[dict[str, Any]]
    step0_margin: float | None = None
    step0_log_ratio: float | None = None

    def facts(self) -> dict[str, Any]:
        """Return everything but the curve."""
        return {key: value for key, value in asdict(self).items() if key != "curve"}


@dataclass(frozen=True)
class _Reference:
    """Reference log-probabilities of all rows, and of the probe rows computed as the probe will be."""

    name: str
    rows: Tensor | list[Tensor]
    probe_rows: Sequence[EncodedPair | TargetGroup]
    probe: Tensor


def train_task(setup: Setup, pairs: Encoded, replayed: int, work: Path, seed: int) -> list[StageReport]:
    """Train the policy in place on a task's rows.

    Args:
        setup: what stays the same from task to task.
        pairs: the task's rows with the replayed ones behind them.
        replayed: how many are replayed.
        work: folder for checkpoints and for finished stages; what it holds of other rows is left alone.
        seed: seeds the order of the rows.
    """
    work = work / pairs.fingerprint[:16]
    compares = any(objective.needs_reference for objective, _ in setup.stages())
    policy_before = _reference(setup, pairs) if compares and setup.options.reference == "previous_task" else None
    reports = []
    for index, (objective, options) in enumerate(setup.stages()):
        folder = work / f"{index}-{objective.name}"
        earlier = load_finished(setup.policy, folder)
        if earlier is not None:
            report = StageReport(**earlier)
        else:
            reference = (policy_before or _reference(setup, pairs)) if objective.needs_reference else None
            report = _train_stage(setup, objective, options, pairs, replayed, folder, seed + index, reference)
        reports.append(report)
    return reports


def _train_stage(
    setup: Setup,
    objective: Objective,
    options: StageOptions,
    pairs: Encoded,
    replayed: int,
    folder: Path,
    seed: int,
    reference: _Reference | None,
) -> StageReport:
    start: dict[str, float] = {}
    against = ""
    if reference is not None:
        start, what = _step0(setup, reference)
        against = f", reference = {reference.name}, {what}"
    setup.announce(f"  {objective.name}: {len(pairs)} rows ({replayed} replayed){against}")
    result = run_stage(
        setup.policy,
        objective,
        pairs,
        options,
        folder / "checkpoints",
        seed=seed,
        reference=None if reference is None else reference.rows,
        penalty=setup.method.penalty,
        gradient_hook=setup.method.adjust_gradients,
        progress=lambda done, total: setup.progress(objective.name, done, total),
        announce=setup.announce,
    )
    report = StageReport(
        stage=objective.name,
        reference=None if reference is None else reference.name,
        steps=result.steps,
        epochs=result.epochs,
        seconds=round(result.seconds, 3),
        rows=len(pairs),
        replayed=replayed,
        curve=result.curve,
        **start,
    )
    keep_finished(setup.policy, asdict(report), folder, objective.name)
    return report


def _reference(setup: Setup, pairs: Encoded) -> _Reference:
    """Compute or look up the reference, which at this moment is the base model or the policy as it is."""
    preferences = [row for row in pairs if isinstance(row, EncodedPair)]
    groups = [row for row in pairs if isinstance(row, TargetGroup)]
    everything: Sequence[EncodedPair | TargetGroup] = groups or preferences
    base = setup.options.reference == "base"
    key = policy_key(setup.model_key, {} if base else setup.policy.total())
    tokens = setup.options.tokens_per_batch
    probe_rows = everything[:: max(1, len(everything) // _PROBE_ROWS)][:_PROBE_ROWS]
    rows: Tensor | list[Tensor]
    with setup.policy.as_base() if base else nullcontext():
        if groups:
            rows = setup.cache.group_log_probs(setup.policy, key, groups, tokens)
        else:
            rows = setup.cache.log_probs(setup.policy, key, preferences, tokens)
        probe = _probe_log_probs(setup, probe_rows)
    return _Reference(setup.options.reference, rows, probe_rows, probe)


def _probe_log_probs(setup: Setup, rows: Sequence[EncodedPair | TargetGroup]) -> Tensor:
    """Of pairs (P, 2); of groups one for each of their responses, in a row."""
    groups = [row for row in rows if isinstance(row, TargetGroup)]
    if groups:
        return torch.cat(group_log_probs(setup.policy, groups, setup.options.tokens_per_batch))
    pairs = [row for row in rows if isinstance(row, EncodedPair)]
    return pair_log_probs(setup.policy, pairs, setup.options.tokens_per_batch)


def _step0(setup: Setup, reference: _Reference) -> tuple[dict[str, float], str]:
    """Measure on the probe, in the batches the reference was measured in, so that equal policies give exactly 0.

    Returns:
        The report's field with its value, and how it is announced.
    """
    policy = _probe_log_probs(setup, reference.probe_rows)
    if isinstance(reference.probe_rows[0], TargetGroup):
        ratio = (policy - reference.probe).abs().mean().item()
        return {"step0_log_ratio": ratio}, f"mean |log-ratio| at step 0 = {ratio:.6g}"
    chosen, rejected = policy.unbind(1)
    reference_chosen, reference_rejected = reference.probe.unbind(1)
    margins = implicit_margin(chosen, rejected, reference_chosen, reference_rejected, setup.options.beta)
    margin = margins.mean().item()
    return {"step0_margin": margin}, f"margin at step 0 = {margin:.6g}"
