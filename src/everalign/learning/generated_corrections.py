"""The corrections that a policy writes for held-out questions: what a gateway would return with it in service.

How likely a policy finds the corrections of people says little of what it writes by itself. So a gate compares texts,
with what people wrote: those of the policy with those of the one before, and with answers left as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from everalign.correction.edits import edit_share, words
from everalign.correction.output_checks import Guards
from everalign.correction.tokenization import CorrectionEncoder
from everalign.data.records import Correction
from everalign.data.rows import RowSet
from everalign.errors import InputError
from everalign.evaluation.pairwise import compare_answers
from everalign.evaluation.scorers import Scorer
from everalign.learning.context import RunContext
from everalign.learning.promotion import compare_shares, compare_values
from everalign.learning.run_files import Comparison
from everalign.modeling.sampling import greedy_continuations

MOST_WRITTEN = 200
"""Held-out rows of a task for which corrections are written."""

_AT_ONCE = 16
# Beyond so many times the longer of answer and correction, and some tokens, what is written is not finished.
_TIMES, _MORE = 2, 16


@dataclass(frozen=True)
class Written:
    """What a policy made of a task's held-out rows.

    Args:
        rows: the N rows.
        texts: what a gateway would return: the corrections, and the answers instead of those that a guard refuses.
        refused: how many a guard has refused.
        kept: what it would return where people's corrections were the answers: best, they themselves.
    """

    rows: Sequence[Correction]
    texts: Sequence[str]
    refused: int
    kept: Sequence[str] = ()

    @property
    def one_line(self) -> str:
        """What was written, in words."""
        copied = sum(text == row.answer for row, text in zip(self.rows, self.texts, strict=True)) - self.refused
        n = len(self.rows)
        if not n:
            return "no held-out row is short enough for a correction to be written"
        shares = f"{copied / n:.0%} left the answer as it was, guards refused {self.refused / n:.0%}"
        return f"{n} corrections written, {shares}"


def write_corrections(setup: RunContext, tests: Mapping[str, RowSet[Correction]]) -> dict[str, Written]:
    """Write the policy's corrections of held-out answers, greedily, as it is switched now."""
    return {name: _write(setup, test) for name, test in tests.items()}


def compare_written(
    before: Mapping[str, Written], after: Mapping[str, Written], scorer: Scorer | None
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


def _write(setup: RunContext, test: RowSet[Correction]) -> Written:
    encoder = setup.encoder
    if encoder is None:
        raise InputError(f"{setup.objective.name} learns no corrections, so none can be written")
    step = max(1, len(test) // MOST_WRITTEN)
    rows = [row for row in test[::step][:MOST_WRITTEN] if _fits(setup, encoder, row)]
    texts, refused = _corrected(setup, encoder, [(row, row.answer) for row in rows])
    kept, _ = _corrected(setup, encoder, [(row, row.correction) for row in rows])
    return Written(rows, texts, refused, kept)


def _corrected(
    setup: RunContext, encoder: CorrectionEncoder, pairs: Sequence[tuple[Correction, str]]
) -> tuple[list[str], int]:
    """Return what becomes of answers to the rows' questions, and how many corrections a guard has refused."""
    texts, refused = [], 0
    for start in range(0, len(pairs), _AT_ONCE):
        batch = pairs[start : start + _AT_ONCE]
        longest = max(len(encoder.response(text)) for row, _ in batch for text in (row.answer, row.correction))
        prompts = [encoder.prompt(row.question, answer) for row, answer in batch]
        limit = min(setup.options.max_length - max(map(len, prompts)), _TIMES * longest + _MORE)
        written = greedy_continuations(setup.policy, prompts, encoder.ends, limit)
        for (_, answer), ids in zip(batch, written, strict=True):
            text, finished = encoder.decode(ids), ids[-1] in encoder.ends
            objection = text != answer and Guards().first_violation(answer, text, finished, encoder.template)
            refused += bool(objection)
            texts.append(answer if objection else text)
    return texts, refused


def _fits(setup: RunContext, encoder: CorrectionEncoder, row: Correction) -> bool:
    prompts = (encoder.prompt(row.question, answer) for answer in (row.answer, row.correction))
    return max(map(len, prompts)) < setup.options.max_length


def _nearness(rows: Sequence[Correction], texts: Sequence[str]) -> list[float]:
    return [1 - edit_share(words(text), words(row.correction)) for row, text in zip(rows, texts, strict=True)]
