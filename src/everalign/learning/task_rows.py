"""A task's rows on their way to training: the right kind for the objective, weighed, and as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from everalign.data.encoding import EncodedPairs, encode_pairs
from everalign.data.groups import EncodedGroups, encode_groups, fitting
from everalign.data.row_set import RowSet
from everalign.data.scored import Scored
from everalign.errors import InputError
from everalign.learning.setup import Setup
from everalign.training.teaching import SCORED_OBJECTIVES
from everalign.training.weighing import check_completions, weigh


@dataclass(frozen=True)
class TaskRows:
    """A task's rows as they were given and as they will be learned.

    Attributes:
        given: as the user gave them.
        rows: those that are learned, with the weights of their completions if they are scored.
        facts: what was done to get them, for the manifest; None where nothing was.
        lines: what is to be announced of it.
    """

    given: RowSet[Any]
    rows: RowSet[Any]
    facts: dict[str, Any] | None = None
    lines: tuple[str, ...] = ()


def prepare_rows(setup: Setup, rows: RowSet[Any]) -> TaskRows:
    """Make a task's rows ready; nothing is done to preferences.

    Raises:
        InputError: the objective does not learn from this kind of rows, or there are no weights for them.
    """
    scored = setup.objective.name in SCORED_OBJECTIVES
    if scored != (rows.record is Scored):
        wanted = "scored rows (prompt, completions, rewards)" if scored else "preferences (prompt, chosen, rejected)"
        raise InputError(f"{rows.source}: the objective {setup.objective.name} learns from {wanted}")
    try:
        return _weigh(setup, rows) if scored else TaskRows(rows, rows)
    except InputError as error:
        raise InputError(f"{rows.source}: {error}") from error


def encode_rows(setup: Setup, rows: Sequence[Any], replayed: Sequence[Any]) -> EncodedPairs | EncodedGroups:
    """Return a task's prepared rows and the replayed ones behind them as tokens, cut to the options' length."""
    if setup.objective.name in SCORED_OBJECTIVES:
        return encode_groups([*rows, *replayed], setup.tokenizer, setup.options.max_length)
    # Apart, because the task's rows may be in the cache, where each mixture would be another entry.
    pairs = setup.encode(rows)
    old = encode_pairs(replayed, setup.tokenizer, setup.options.max_length, allow_identical=True)
    return pairs.followed_by(old)


def _weigh(setup: Setup, rows: RowSet[Scored]) -> TaskRows:
    check_completions(rows, setup.weighting)
    given = any(row.weights is not None for row in rows)
    fewest = 1 if given or setup.weighting.estimator == "in_batch" else 2
    fit = fitting(rows, setup.tokenizer, setup.options.max_length, fewest)
    if not fit.rows:
        raise InputError(f"no row has completions that fit max_length {setup.options.max_length}: raise it")
    weighed = weigh(fit.rows, fit.lengths, setup.weighting)
    lines = []
    if fit.dropped_completions:
        total = sum(len(row.completions) for row in rows)
        lines.append(
            f"  {fit.dropped_completions} of {total} completions are longer than max_length allows and left out, and "
            f"{fit.dropped_rows} of {len(rows)} rows with them"
        )
    lines.append(f"  weights: {weighed.summary()}")
    lines += [f"  warning: {warning}" for warning in weighed.statistics.warnings()]
    dropped = {"dropped_completions": fit.dropped_completions, "dropped_rows": fit.dropped_rows}
    return TaskRows(rows, replace(rows, items=weighed.rows), {**dropped, **weighed.facts()}, tuple(lines))
