"""The gate's comparison of corrections that a policy writes for held-out rows: what a gateway would return with it.

How likely a policy finds people's corrections says little about what it writes by itself. So the gate compares texts:
those of the policy, those of the one before, and the answers left as they are, each with what people wrote.
"""

from collections.abc import Mapping, Sequence

from everalign.correction.edits import edit_share, words
from everalign.correction.objective import Rewritten
from everalign.data.records import Correction
from everalign.data.rows import RowSet
from everalign.evaluation.pairwise import compare_answers
from everalign.evaluation.scorers import Scorer
from everalign.learning.context import RunContext
from everalign.learning.promotion import compare_shares, compare_values
from everalign.learning.run_files import Comparison

MOST_WRITTEN = 200
"""Held-out rows of a task for which corrections are written."""


def write_corrections(context: RunContext, tests: Mapping[str, RowSet[Correction]]) -> dict[str, Rewritten]:
    """Write the policy's corrections of held-out answers, as it is switched now; nothing where it writes none."""
    found = {}
    for name, test in tests.items():
        rows = test[:: max(1, len(test) // MOST_WRITTEN)][:MOST_WRITTEN]
        found[name] = context.objective.rewrite(context.policy, rows, context.max_length)
    return {name: written for name, written in found.items() if written is not None}


def compare_written(
    before: Mapping[str, Rewritten], after: Mapping[str, Rewritten], scorer: Scorer | None
) -> dict[str, Comparison]:
    """Compare corrections by task, as a gate reads it: how near they are to people's, and what a scorer finds better.

    People's corrections are good answers: what used to be left alone and no longer is has been forgotten, too.

    Args:
        before: of the policy before the task.
        after: of the policy that has learned it.
        scorer: rates them too, if there is one.
    """
    found: dict[str, Comparison] = {}
    for name, new in after.items():
        if not new.rows:
            continue
        if len(new.kept) > 1:
            kept = (_nearness(new.rows, texts) for texts in (before[name].kept, new.kept))
            found[f"{name}: good answers kept, against those before"] = compare_values(*kept)
        answers = [row.answer for row in new.rows]
        for what, texts in (("those before", before[name].texts), ("the answers as they are", answers)):
            if len(new.rows) > 1:
                pair = _nearness(new.rows, texts), _nearness(new.rows, new.texts)
                found[f"{name}: nearness to people's corrections, against {what}"] = compare_values(*pair)
            if scorer is not None:
                verdicts = compare_answers(scorer, [row.question for row in new.rows], texts, new.texts)
                won = [(1 + verdict) / 2 for verdict in verdicts]
                found[f"{name}: share found better, against {what}"] = compare_shares([1 - one for one in won], won)
    return found


def _nearness(rows: Sequence[Correction], texts: Sequence[str]) -> list[float]:
    return [1 - edit_share(words(text), words(row.correction)) for row, text in zip(rows, texts, strict=True)]
