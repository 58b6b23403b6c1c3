"""Base class of objectives: how rows become tokens, a batch and a loss, and how they are judged.

An objective joins a pure function of `everalign.objectives` to the Trainer. A loss is a sum over the micro-batch
divided by the count of the whole optimiser step, so that accumulated micro-batches equal the big batch. No loss looks
at a value: the Trainer does, once per logging step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everalign.data.chat_template import template_notes
from everalign.data.chat_tokens import encode_prompt
from everalign.data.collate import Batch, collate, row_tokens
from everalign.data.readers import load_preferences
from everalign.data.records import CorrectionSet, Preference, PreferenceSet
from everalign.data.rows import RowSet
from everalign.data.tokenization import TokenizedRow, TokenizedRows, tokenize_preferences
from everalign.errors import InputError
from everalign.modeling.policy import Policy
from everalign.modeling.sampling import greedy_answers
from everalign.objectives import weighted_nll
from everalign.options import SamplingOptions
from everalign.training.options import ObjectiveOptions
from everalign.training.reference import ReferenceCache

Metrics = dict[str, Tensor]
AnyRows = RowSet[Any]


@dataclass(frozen=True)
class TaskContext:
    """What an objective needs of a learner.

    Args:
        model_key: fingerprint of the base model's weights.
        tokenizer: the model's.
        policy: what learns.
        cache: reference log-probabilities.
        max_length: longest prompt plus response, in tokens.
        tokens_per_batch: tokens computed at once, padding included.
        seed: seeds everything random.
        log: called with one line for each thing that happens.
    """

    model_key: str
    tokenizer: Any
    policy: Policy
    cache: ReferenceCache
    max_length: int
    tokens_per_batch: int
    seed: int
    log: Callable[[str], None]


@dataclass(frozen=True)
class PreparedRows:
    """A task's rows as they will be learned.

    Attributes:
        rows: those that are learned, with the weights of their completions if they are scored.
        given: as the user gave them.
        facts: what was done to get them, for the manifest; None where nothing was.
        lines: for the log.
        warnings: large losses on the way.
        to_sample: whether the rows are prompts alone, whose answers are sampled when it is their turn.
    """

    rows: AnyRows
    given: AnyRows
    facts: dict[str, Any] | None = None
    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    to_sample: bool = False


class Objective:
    """What one batch teaches. Rows are preferences unless a subclass says otherwise.

    Args:
        name: as in the table of objectives.
        options: those that objectives read.

    Attributes:
        needs_reference: whether the loss reads `batch["reference"]`, log-probabilities (S,) under the reference.
        fewest_answers: answers that a sampled prompt needs to be learned from.
        first_is_best: whether a row's first response is the better one; False where their weights rank them.
    """

    needs_reference = False
    first_is_best = True
    fewest_answers = 2

    def __init__(self, name: str, options: ObjectiveOptions) -> None:
        self.name, self.options = name, options

    def bind(self, model: str, tokenizer: Any) -> None:
        """Get ready for a model, by its name, and its tokenizer; called before the model is loaded."""

    def settings(self) -> dict[str, Any]:
        """Return the objective's own options, for run.json."""
        return {}

    # ---- rows ----

    def prepare(self, rows: AnyRows, context: TaskContext, scale: float | None = None) -> PreparedRows:
        """Check a task's rows and do what has to be done once, before anything is trained.

        Args:
            rows: the task's.
            context: the learner's parts.
            scale: what rewards are divided by; their own standard deviation when None.

        Raises:
            InputError: the objective does not learn from such rows, or most of them are lost.
        """
        if rows.record is not Preference:
            raise InputError(f"the objective {self.name} learns from preferences (prompt, chosen, rejected)")
        return PreparedRows(rows, rows, warnings=self.tokenize(rows, (), context).warnings())

    def tokenize(self, rows: Sequence[Any], replayed: Sequence[Any], context: TaskContext) -> TokenizedRows:
        """Return a task's prepared rows and the replayed ones behind them as tokens."""
        # Apart: that all of a task's pairs are alike is an error, and that all replayed ones are is not.
        own = tokenize_preferences(rows, context.tokenizer, context.max_length)
        old = tokenize_preferences(replayed, context.tokenizer, context.max_length, allow_identical=True)
        return TokenizedRows(
            own.items + old.items,
            context.max_length,
            own.truncated_prompts + old.truncated_prompts,
            own.truncated_responses + old.truncated_responses,
        )

    def notes(self, rows: AnyRows, context: TaskContext) -> tuple[str, ...]:
        """Return what the log should say of how rows are rendered."""
        return template_notes(context.tokenizer, rows)

    # ---- training ----

    def computed(self, row: TokenizedRow) -> TokenizedRow:
        """Return the row with the responses alone that the loss reads."""
        return row

    def tokens(self, row: TokenizedRow, shared: bool, prefix: int = 0) -> int:
        """Return the tokens that a row takes in a batch, with `prefix` more in front of every prompt."""
        return row_tokens(self.computed(row), shared, prefix)

    def collate(self, rows: Sequence[TokenizedRow], shared: bool) -> Batch:
        """Lay out rows as tensors; `count` is what the loss of the whole step is divided by: here, the rows."""
        return {**collate([self.computed(row) for row in rows], shared), "count": torch.tensor(len(rows))}

    def loss(self, model: Callable[[Batch], Tensor], batch: Batch, count: Tensor) -> tuple[Tensor, Metrics]:
        """Return the micro-batch's share of the step's loss, and detached metrics (one value a row)."""
        raise NotImplementedError

    def drift(self, policy: Tensor, reference: Tensor) -> tuple[str, str, float]:
        """Measure how far the policy is from the reference before the first step; 0 where they are the same.

        Args:
            policy: log-probabilities (S,) of some rows' responses, in nats.
            reference: the same under the reference.

        Returns:
            The report's field, how the log calls it, and the value.
        """
        return "step0_log_ratio", "mean |log-ratio| at step 0", (policy - reference).abs().mean().item()

    def gained(self, curve: Sequence[dict[str, Any]]) -> float | None:
        """Return how many nats the task's chosen answers have gained on rejected ones, in a stage that began at 0.

        Args:
            curve: the stage's logged steps.

        Returns:
            The mean over the last third of them, of the task's own rows; None where the objective does not measure it,
            or too little is logged.
        """
        return None

    # ---- held-out rows and samples ----

    def held_out(self, rows: AnyRows, log: Callable[[str], None]) -> AnyRows:
        """Return held-out rows as what they are judged as: preferences.

        Of a scored row, the best completion over the worst is a preference; of a correction, it over the answer.
        """
        if isinstance(rows, PreferenceSet):
            return rows
        rows.require("correction" if isinstance(rows, CorrectionSet) else "rewards")
        pairs = [pair for row in rows if (pair := row.preference()) is not None]
        if len(pairs) < len(rows):
            what = "change nothing" if isinstance(rows, CorrectionSet) else "have no better and worse completion"
            log(f"  {rows.source}: {len(rows) - len(pairs)} of {len(rows)} held-out rows {what} and are left out")
        return PreferenceSet.of(pairs, rows.source)

    def tokenize_held_out(self, rows: Sequence[Any], context: TaskContext) -> TokenizedRows:
        """Return held-out rows as tokens, each with two responses: better, worse."""
        return tokenize_preferences(rows, context.tokenizer, context.max_length)

    def load_held_out(self, path: Path) -> AnyRows:
        """Read held-out rows of the kind that the objective is judged on."""
        return load_preferences(path)

    def prompt(self, row: Any, tokenizer: Any) -> list[int]:
        """Return the tokens behind which a held-out row's answer is written."""
        return encode_prompt(tokenizer, row.prompt)

    def answers(
        self, policy: Policy, tokenizer: Any, rows: Sequence[Any], longest: int, longest_prompt: int
    ) -> list[tuple[str, bool]]:
        """Write answers to held-out rows, greedily; returns each text and whether it ended within `longest` tokens."""
        options = SamplingOptions(
            completions=1, temperature=1.0, max_new_tokens=longest, max_prompt_tokens=longest_prompt
        )
        return greedy_answers(policy, tokenizer, [row.prompt for row in rows], options)

    def rewrite(
        self,
        policy: Policy,
        rows: Sequence[Any],
        max_length: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Any:
        """Write what a gate compares beside likelihoods; None where there is no such thing.

        `progress` is called with (texts written, texts in all).
        """
        return None


class LikelihoodObjective(Objective):
    """Weighted negative log-likelihood of responses, averaged over the step's response tokens.

    Summed over a response's tokens and divided by one number for the whole step, which is what makes the optimum the
    one that the weights aim at (see `everalign.objectives.weighted_nll`). With one response of weight 1 a row it is
    the plain token cross-entropy.
    """

    def __init__(self, name: str = "var", options: ObjectiveOptions | None = None) -> None:
        super().__init__(name, options or ObjectiveOptions())

    def computed(self, row: TokenizedRow) -> TokenizedRow:
        """Leave out responses of weight 0, which teach nothing."""
        return row if all(row.weights) else row.only(i for i, weight in enumerate(row.weights) if weight > 0)

    def collate(self, rows: Sequence[TokenizedRow], shared: bool) -> Batch:
        """Lay out the responses that count; `count` is the number of tokens, those of weight 0 included."""
        tokens = sum(len(response) for row in rows for response in row.responses)
        return {**super().collate(rows, shared), "count": torch.tensor(tokens)}

    def loss(self, model: Callable[[Batch], Tensor], batch: Batch, count: Tensor) -> tuple[Tensor, Metrics]:
        """Return Σ weight·NLL / count; metric `nll` is per token of each response."""
        sums = model(batch)
        losses = weighted_nll(sums, batch["weights"], count, check_finite=False)
        return losses.sum(), {"nll": (-sums / batch["lengths"]).detach()}
