"""A task's rows on their way to training: as a set, with rewards where they have none, prepared by the objective."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from everalign.data.records import (
    Correction,
    CorrectionSet,
    Preference,
    PreferenceSet,
    Scored,
    ScoredSet,
)
from everalign.data.rows import RowSet
from everalign.errors import InputError
from everalign.learning.context import RunContext
from everalign.learning.rollouts import check_sampling, score
from everalign.storage import exclusive
from everalign.training.base_objective import PreparedRows

Rows = Sequence[Preference] | Sequence[Scored] | Sequence[Correction]
AnySet = RowSet[Any]

_SETS: tuple[type[AnySet], ...] = (ScoredSet, CorrectionSet)


def as_set(rows: Rows) -> AnySet:
    """Return rows as a set of their kind."""
    if isinstance(rows, RowSet):
        return rows
    kind = next((kind for kind in _SETS if any(isinstance(row, kind.record) for row in rows[:1])), PreferenceSet)
    return kind.of(rows)  # type: ignore[arg-type]  # told by the first


def prepare_rows(context: RunContext, rows: AnySet) -> PreparedRows:
    """Make a task's rows ready to be learned.

    Answers without rewards get them here; prompts alone are left to be sampled when it is their turn.

    Raises:
        InputError: the objective does not learn from this kind of rows, there are no rewards or weights for them, or
            most of them are lost on the way (see `everalign.errors`).
        EveralignError: scoring failed.
    """
    if isinstance(rows, ScoredSet) and rows.prompts_alone and context.scorer is not None:
        check_sampling(context, rows)
        prepared = PreparedRows(rows, rows, to_sample=True)
    else:
        prepared = replace(prepare(context, _rewarded(context, rows)), given=rows)
    for warning in prepared.warnings:
        context.log(f"  warning: {rows.source}: {warning}")
    return replace(prepared, lines=(*context.notes(rows), *prepared.lines))


def prepare(context: RunContext, rows: AnySet, scale: float | None = None) -> PreparedRows:
    """Let the objective prepare rows that have all it needs; errors name their source."""
    try:
        return context.objective.prepare(rows, context, scale)
    except InputError as error:
        raise error.at(rows.source) from error


def _rewarded(context: RunContext, rows: AnySet) -> AnySet:
    """Return rows with the rewards that the run's scorer gives them, if it has one and they have none."""
    if context.scorer is None or any(row.has("rewards") for row in rows):
        return rows
    answers = [row if isinstance(row, Scored) else Scored.from_preference(row, rewards=None) for row in rows]
    unscored = ScoredSet(tuple(answers), rows.source).require("completions")
    key = hashlib.sha256(f"{context.scorer.fingerprint} {unscored.fingerprint}".encode()).hexdigest()
    context.log(f"scoring {rows.source}")
    path = context.folder / f"{key[:32]}.scored.jsonl"

    def waiting(holder: str) -> None:
        context.log(f"  {holder} is scoring the same answers: waiting for it")

    # Runs may share the folder: the second finds the file of the first, and asks for nothing again.
    with exclusive(path.with_suffix(".lock"), wait=waiting):
        return replace(score(context, unscored, path), source=rows.source)
