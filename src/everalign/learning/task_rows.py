"""A task's rows on their way to training: the right kind for the objective, weighed, and as tokens."""

from collections.abc import Sequence
from typing import Any

from everalign.data.encoding import EncodedPairs
from everalign.data.groups import EncodedGroups, encode_groups, fitting
from everalign.data.row_set import RowSet
from everalign.data.scored import Scored
from everalign.errors import InputError
from everalign.learning.setup import Setup
from everalign.training.teaching import SCORED_OBJECTIVES
from everalign.training.weighing import weigh


def prepare_rows(setup: Setup, rows: RowSet[Any]) -> tuple[Sequence[Any], dict[str, Any] | None]:
    """Return a task's rows as they will be learned, and facts for the manifest if anything was done to them.

    Scored rows get the weights of their completions.

    Raises:
        InputError: the objective does not learn from this kind of rows, or there are no weights for them.
    """
    scored = setup.objective.name in SCORED_OBJECTIVES
    if scored != (rows.record is Scored):
        wanted = "scored rows (prompt, completions, rewards)" if scored else "preferences (prompt, chosen, rejected)"
        raise InputError(f"{rows.source}: the objective {setup.objective.name} learns from {wanted}")
    return _weigh(setup, rows) if scored else (rows, None)


def encode_rows(setup: Setup, rows: Sequence[Any]) -> EncodedPairs | EncodedGroups:
    """Return prepared rows as tokens, cut to the options' length."""
    if setup.objective.name in SCORED_OBJECTIVES:
        return encode_groups(rows, setup.tokenizer, setup.options.max_length)
    return setup.encode(rows)


def _weigh(setup: Setup, rows: RowSet[Scored]) -> tuple[Sequence[Scored], dict[str, Any]]:
    fit, lengths, dropped = fitting(rows, setup.tokenizer, setup.options.max_length)
    if dropped:
        total = sum(len(row.completions) for row in rows)
        setup.announce(f"  {dropped} of {total} completions are longer than max_length allows and left out")
    if not fit:
        raise InputError(f"{rows.source}: no completion fits max_length {setup.options.max_length}: raise it")
    try:
        weighed = weigh(fit, lengths, setup.weighting)
    except InputError as error:
        raise InputError(f"{rows.source}: {error}") from error
    setup.announce(f"  weights: {weighed.summary()}")
    for warning in weighed.statistics.warnings():
        setup.announce(f"  warning: {warning}")
    return weighed.rows, {"dropped": dropped, **weighed.facts()}
