"""The objective `correction`: a policy learns to write corrections behind a corrector's template, task after task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everalign.correction.checks import Guards
from everalign.correction.corrector_files import chosen_template
from everalign.correction.tokenization import (
    CorrectionEncoder,
    prepare_corrections,
    tokenize_corrections,
    tokenize_held_out,
)
from everalign.data.messages import ChatPrompt
from everalign.data.readers import load_corrections
from everalign.data.records import Correction, CorrectionSet
from everalign.data.tokenization import TokenizedRows
from everalign.distributed import share
from everalign.errors import InputError
from everalign.modeling.policy import Policy
from everalign.modeling.sampling import greedy_continuations
from everalign.training.base_objective import AnyRows, LikelihoodObjective, PreparedRows, TaskContext
from everalign.training.reference import counted

_AT_ONCE = 16
# A correction longer than this multiple of the longer of answer and correction, plus some tokens, is not finished.
_TIMES, _MORE = 2, 16


@dataclass(frozen=True)
class Rewritten:
    """What a policy made of held-out rows.

    Args:
        rows: the N rows.
        texts: what a gateway would return: the corrections, or the answers where a guard refuses the correction.
        refused: how many a guard has refused.
        kept: what it would return if people's corrections were the answers; at best, the corrections themselves.
    """

    rows: Sequence[Correction]
    texts: Sequence[str]
    refused: int
    kept: Sequence[str] = ()

    @property
    def one_line(self) -> str:
        """One line of text for a log."""
        copied = sum(text == row.answer for row, text in zip(self.rows, self.texts, strict=True)) - self.refused
        n = len(self.rows)
        if not n:
            return "no held-out row is short enough for a correction to be written"
        shares = f"{copied / n:.0%} left the answer as it was, guards refused {self.refused / n:.0%}"
        return f"{n} corrections written, {shares}"


class CorrectionObjective(LikelihoodObjective):
    """Token cross-entropy of corrections behind the template's prompt, judged against the answers as they are."""

    encoder: CorrectionEncoder

    def bind(self, model: str, tokenizer: Any) -> None:
        """Choose the template: the one asked for, or that of the corrector which the model is."""
        options = self.options.correction
        self.encoder = CorrectionEncoder(tokenizer, *chosen_template(model, options.template, options.words))

    def settings(self) -> dict[str, Any]:
        """Return what a corrector reads, whether it was named or not."""
        return {
            "template": self.encoder.template.id,
            "objectives": ",".join(self.encoder.objectives),
            "encoding": self.encoder.fingerprint,
            "identity": self.options.correction.identity,
        }

    def prepare(self, rows: AnyRows, context: TaskContext, scale: float | None = None) -> PreparedRows:
        """Leave out rows that do not fit, and add the share of answers that stay as they are."""
        if not isinstance(rows, CorrectionSet):
            raise InputError(f"the objective {self.name} learns from corrections (question, answer, correction)")
        learned, lines, warnings = prepare_corrections(
            rows, self.encoder, context.max_length, self.options.correction.identity, context.seed
        )
        return PreparedRows(learned, rows, lines=lines, warnings=warnings)

    def tokenize(self, rows: Sequence[Any], replayed: Sequence[Any], context: TaskContext) -> TokenizedRows:
        """Return corrections as tokens, each the one text that is to follow its prompt."""
        return tokenize_corrections([*rows, *replayed], self.encoder, context.max_length).rows

    def notes(self, rows: AnyRows, context: TaskContext) -> tuple[str, ...]:
        """Return what the template cannot express of the questions."""
        if any(isinstance(row.question, ChatPrompt) for row in rows):
            return ("a corrector reads the text of a question: tools and template variables are not learned",)
        return ()

    # ---- held-out rows and samples ----

    def held_out(self, rows: AnyRows, log: Callable[[str], None]) -> AnyRows:
        """Return the held-out corrections that change anything."""
        if not isinstance(rows, CorrectionSet):
            raise InputError(f"{rows.source}: held-out rows of a corrector must be corrections (question, answer, ...)")
        rows.require("correction")
        kept = tuple(row for row in rows if row.preference() is not None)
        if len(kept) < len(rows):
            left = len(rows) - len(kept)
            log(f"  {rows.source}: {left} of {len(rows)} held-out rows change nothing and are left out")
        return CorrectionSet(kept, rows.source, rows.skipped)

    def tokenize_held_out(self, rows: Sequence[Any], context: TaskContext) -> TokenizedRows:
        """Return held-out rows as tokens: the correction over the answer as it is."""
        return tokenize_held_out(rows, self.encoder, context.max_length, context.log)

    def load_held_out(self, path: Path) -> AnyRows:
        """Read held-out corrections."""
        return load_corrections(path)

    def prompt(self, row: Any, tokenizer: Any) -> list[int]:
        """Return the tokens of the template with question and answer."""
        return self.encoder.prompt(row.question, row.answer)

    def answers(
        self, policy: Policy, tokenizer: Any, rows: Sequence[Any], longest: int, longest_prompt: int
    ) -> list[tuple[str, bool]]:
        """Write corrections of held-out rows, greedily."""
        prompts = [self.prompt(row, tokenizer) for row in rows]
        written = greedy_continuations(policy, prompts, self.encoder.ends, longest)
        return [(self.encoder.decode(ids), ids[-1] in self.encoder.ends) for ids in written]

    def rewrite(
        self,
        policy: Policy,
        rows: Sequence[Correction],
        max_length: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Rewritten:
        """Write corrections, greedily: of the rows' answers, and of people's corrections as if these were answers."""
        fit = [
            row
            for row in rows
            if all(
                len(self.encoder.prompt(row.question, answer)) < max_length for answer in (row.answer, row.correction)
            )
        ]
        count = counted(progress, 2 * len(fit))
        texts, refused = self._corrected(policy, [(row, row.answer) for row in fit], max_length, count)
        kept, _ = self._corrected(policy, [(row, row.correction) for row in fit], max_length, count)
        return Rewritten(fit, texts, refused, kept)

    def _corrected(
        self,
        policy: Policy,
        pairs: Sequence[tuple[Correction, str]],
        max_length: int,
        count: Callable[[int], None],
    ) -> tuple[list[str], int]:
        """Return what becomes of answers to the rows' questions, and how many corrections a guard has refused."""
        encoder = self.encoder

        def correct(own: Sequence[Sequence[tuple[Correction, str]]]) -> list[tuple[list[str], int]]:
            done = []
            for batch in own:
                texts, refused = list[str](), 0
                longest = max(len(encoder.response(text)) for row, _ in batch for text in (row.answer, row.correction))
                prompts = [encoder.prompt(row.question, answer) for row, answer in batch]
                limit = min(max_length - max(map(len, prompts)), _TIMES * longest + _MORE)
                written = greedy_continuations(policy, prompts, encoder.ends, limit)
                for (row, answer), ids in zip(batch, written, strict=True):
                    text, finished = encoder.decode(ids), ids[-1] in encoder.ends
                    objection = text != answer and Guards().first_violation(
                        answer, text, finished, encoder.template, row.question
                    )
                    refused += bool(objection)
                    texts.append(answer if objection else text)
                done.append((texts, refused))
                count(len(batch))
            return done

        found = share(correct, [pairs[start : start + _AT_ONCE] for start in range(0, len(pairs), _AT_ONCE)])
        return [text for texts, _ in found for text in texts], sum(refused for _, refused in found)
