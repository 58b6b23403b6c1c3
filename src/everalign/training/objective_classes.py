"""Objectives: how each turns rows into batches and a batch into a loss."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from everalign.data.collate import Batch, row_tokens
from everalign.data.records import Preference, Scored, ScoredSet
from everalign.data.tokenization import TokenizedRow, TokenizedRows, deduplicate, drop_overlong, tokenize_scored
from everalign.errors import InputError, check_shortfall
from everalign.objectives import (
    dpo_loss,
    focalpo_loss,
    fpo_gradient_at_zero,
    fpo_loss,
    hybrid_margin,
    implicit_margin,
    snkl_loss,
)
from everalign.objectives.partition_function import Segments
from everalign.training.base_objective import (
    AnyRows,
    LikelihoodObjective,
    Metrics,
    Objective,
    PreparedRows,
    TaskContext,
)
from everalign.training.objectives import weighting_settings
from everalign.training.options import ObjectiveOptions
from everalign.training.reference import policy_key
from everalign.training.reward_weights import TAKE_ONE_COMPLETION, check_completions, compute_weights, refuse_alone

DEFAULT_GAMMA = 2.0
FOCALPO_GAMMA = 0.05
# HyPO's β per token for DPO's on sums: 5 at 0.1.
PER_TOKEN_BETA_RATIO = 50.0


class SupervisedObjective(LikelihoodObjective):
    """Token negative log-likelihood of the chosen responses (`sft`)."""

    def computed(self, row: TokenizedRow) -> TokenizedRow:
        """Return the chosen response."""
        return row.only([0])

    def tokens(self, row: TokenizedRow, shared: bool, prefix: int = 0) -> int:
        """Return the tokens of both responses: rows are batched as in the preference stage that may follow."""
        return row_tokens(row, shared, prefix)

    def collate(self, rows: Sequence[TokenizedRow], shared: bool) -> Batch:
        """Lay out the chosen sequences; `count` is the number of their response tokens."""
        batch = super().collate(rows, shared)
        return {**batch, "count": batch["lengths"].sum()}


class DpoObjective(Objective):
    """DPO: a loss of the implicit margin, averaged over the step's pairs.

    Attributes:
        margin: maps log-probabilities of pairs and β to margins (B,).
        margin_loss: maps margins (B,) to un-reduced losses (B,).
        per_token: whether log-probabilities are divided by their responses' tokens first.
    """

    needs_reference = True
    margin = staticmethod(implicit_margin)
    per_token = False

    def __init__(self, name: str, options: ObjectiveOptions) -> None:
        super().__init__(name, options)
        self.margin_loss: Callable[[Tensor], Tensor] = partial(dpo_loss, check_finite=False)

    def loss(self, model: Callable[[Batch], Tensor], batch: Batch, count: Tensor) -> tuple[Tensor, Metrics]:
        """Return Σ weight·loss(margin) / count; metrics `margin` and `accuracy` per pair."""
        policy, reference = model(batch), batch["reference"]
        if self.per_token:
            policy, reference = policy / batch["lengths"], reference / batch["lengths"]
        margin = self.margin(*_pairs(policy, reference), self.options.beta, check_finite=False)
        losses = self.margin_loss(margin) * batch["weight"]
        detached = margin.detach()
        return losses.sum() / count, {"margin": detached, "accuracy": (detached > 0).float()}

    def drift(self, policy: Tensor, reference: Tensor) -> tuple[str, str, float]:
        """Return the mean implicit margin."""
        margin = implicit_margin(*_pairs(policy, reference), self.options.beta)
        return "step0_margin", "margin at step 0", margin.mean().item()

    def gained(self, curve: Sequence[dict[str, Any]]) -> float | None:
        """Return the mean implicit margin over β of the last third of the logged steps."""
        own = [point["own_margin"] for point in curve if "own_margin" in point]
        margins = own or [point["margin"] for point in curve]
        if self.margin is not implicit_margin or len(margins) < 3:
            return None
        last = margins[-(len(margins) // 3) :]
        return float(sum(last)) / len(last) / self.options.beta


def _pairs(policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split log-probabilities (2B,) of pairs into chosen and rejected (B,) under the policy and the reference."""
    chosen, rejected = policy.view(-1, 2).unbind(1)
    reference_chosen, reference_rejected = reference.view(-1, 2).unbind(1)
    return chosen, rejected, reference_chosen, reference_rejected


class FpoObjective(DpoObjective):
    """FPO: DPO with a focusing exponent on the probability of the wrong ranking.

    Attributes:
        default_gamma: γ where none is given.
        focused: maps margins (B,) and γ to un-reduced losses (B,).
    """

    default_gamma = DEFAULT_GAMMA
    focused = staticmethod(fpo_loss)

    def __init__(self, name: str, options: ObjectiveOptions) -> None:
        super().__init__(name, options)
        self.gamma = self.default_gamma if options.gamma is None else options.gamma
        self.margin_loss = partial(self.focused, gamma=self.gamma, check_finite=False)

    def settings(self) -> dict[str, Any]:
        """Return γ."""
        return {"gamma": self.gamma}


class NormalisedFpoObjective(FpoObjective):
    """FPO with the gradient of DPO at margin 0: the focus without the shorter steps (`fpo-normalised`)."""

    def __init__(self, name: str, options: ObjectiveOptions) -> None:
        super().__init__(name, options)
        scale = fpo_gradient_at_zero(self.gamma)
        self.margin_loss = lambda margin: fpo_loss(margin, self.gamma, check_finite=False) / scale


class FocalPoObjective(FpoObjective):
    """FocalPO: badly ranked pairs count less, the opposite of FPO (`focalpo`)."""

    default_gamma = FOCALPO_GAMMA
    focused = staticmethod(focalpo_loss)


class HybridObjective(DpoObjective):
    """HyPO: DPO whose reference margin is cut off below 0 (`hypo`)."""

    margin = staticmethod(hybrid_margin)


class TokenHybridObjective(HybridObjective):
    """HyPO on log-probabilities per token (`hypo-ln`)."""

    per_token = True


class RankedDpoObjective(DpoObjective):
    """The mean of DPO's loss and of HyPO's per token (`dpo+hypo-ln`), from the same log-probabilities.

    DPO stops pushing a pair that is better ordered than under the reference, also where the policy still ranks it
    wrongly; the second term goes on there. Metrics are DPO's.
    """

    def loss(self, model: Callable[[Batch], Tensor], batch: Batch, count: Tensor) -> tuple[Tensor, Metrics]:
        """Return Σ weight·(DPO + HyPO)/2 / count; metrics `margin` and `accuracy` per pair, of DPO's margin."""
        policy, reference, lengths = model(batch), batch["reference"], batch["lengths"]
        margin = self.margin(*_pairs(policy, reference), self.options.beta, check_finite=False)
        beta = PER_TOKEN_BETA_RATIO * self.options.beta
        ranked = hybrid_margin(*_pairs(policy / lengths, reference / lengths), beta, check_finite=False)
        losses = (self.margin_loss(margin) + self.margin_loss(ranked)) / 2 * batch["weight"]
        detached = margin.detach()
        return losses.sum() / count, {"margin": detached, "accuracy": (detached > 0).float()}


class VarObjective(LikelihoodObjective):
    """VAR: each response's negative log-likelihood times the weight that its reward became.

    Attributes:
        what: what the log calls the weights.
        can_cap: whether capping them can be advised.
        weights_suffice: whether a row of one completion teaches something once it has brought its weight.
        takes_preferences: whether preferences are taken too, as rows of two completions.
    """

    what, can_cap = "weights", True
    weights_suffice, takes_preferences = True, False
    first_is_best = False

    @property
    def fewest_answers(self) -> int:  # type: ignore[override]
        """Answers that a sampled prompt needs to be learned from."""
        return 1 if self.options.weighting.estimator in TAKE_ONE_COMPLETION else 2

    def settings(self) -> dict[str, Any]:
        """Return the weighting options that mean something."""
        return weighting_settings(self.name, self.options.weighting)

    def prepare(self, rows: AnyRows, context: TaskContext, scale: float | None = None) -> PreparedRows:
        """Give every completion its weight, once those that do not fit are left out."""
        if not rows.has("rewards") and not (self.takes_preferences and rows.record is Preference):
            raise InputError(
                f"the objective {self.name} learns from scored rows (prompt, completions, rewards), or, given reward, "
                "from answers and from prompts alone"
            )
        scored: Sequence[Scored] = [row if isinstance(row, Scored) else Scored.from_preference(row) for row in rows]
        weighting, given = self.options.weighting, any(row.weights is not None for row in scored)
        total, lines, facts = sum(len(row.completions) for row in scored), [], {}
        usable = scored
        if weighting.estimator == "support" and not given:
            usable = deduplicate(scored, context.tokenizer)
            facts["merged_completions"] = merged = total - sum(len(row.completions) for row in usable)
            if merged:
                lines.append(f"  {merged} of {total} completions are listed before with the same reward and left out")
        if not self.weights_suffice:
            refuse_alone(
                enumerate(usable, start=1), "with nothing to compare it to: sample more, or leave these rows out"
            )
        check_completions(usable, weighting)
        fewest = 1 if given and self.weights_suffice else self.fewest_answers
        fit = drop_overlong(usable, context.tokenizer, context.max_length, fewest=fewest)
        if not fit.rows:
            raise InputError(f"no row has completions that fit max_length {context.max_length}: raise it")
        if fit.dropped_completions:
            lines.append(
                f"  {fit.dropped_completions} of {total} completions are longer than max_length allows and left out, "
                f"and {fit.dropped_rows} of {len(scored)} rows with them"
            )
        reference = None
        # Rows with weights need no probabilities.
        if weighting.estimator == "support" and all(row.weights is None for row in fit.rows):
            alike = [replace(row, weights=(1.0,) * len(row.completions)) for row in fit.rows]
            tokens = tokenize_scored(alike, context.tokenizer, context.max_length)
            with context.policy.as_base():  # whatever was learned by now
                key = policy_key(context.model_key, {})
                reference = context.cache.logprobs(context.policy, key, tokens, context.tokens_per_batch)
        weighed = compute_weights(fit.rows, fit.lengths, weighting, reference, scale)
        lines.append(f"  {self.what}: {weighed.one_line()}")
        lines += [f"  warning: {warning}" for warning in weighed.statistics.warnings(can_cap=self.can_cap)]
        remedy = f"raise --max-length (max_length), {context.max_length} now"
        warnings = (
            *check_shortfall(fit.dropped_rows, len(scored), "rows are too long and left out", remedy),
            *check_shortfall(fit.dropped_completions, total, "completions are too long and left out", remedy),
        )
        facts |= {"dropped_completions": fit.dropped_completions, "dropped_rows": fit.dropped_rows}
        learned = ScoredSet(weighed.rows, rows.source, rows.skipped)
        return PreparedRows(learned, rows, {**facts, **weighed.to_dict()}, tuple(lines), warnings)

    def tokenize(self, rows: Sequence[Any], replayed: Sequence[Any], context: TaskContext) -> TokenizedRows:
        """Return a task's weighted rows and the replayed ones behind them as tokens."""
        return tokenize_scored([*rows, *replayed], context.tokenizer, context.max_length)


class SelfNormalisedObjective(VarObjective):
    """Each row's divergence from the shares that its rewards ask for (see `snkl_loss`), averaged over the step's rows.

    A response's share is its part of the row's weights: how the probability of these responses is to be divided among
    them, relative to the reference. The log-ratio is taken as it is (β = 1): only so is pi* where the loss is 0.
    """

    needs_reference = True
    fewest_answers = 2
    what, can_cap = "targets", False
    weights_suffice, takes_preferences = False, True

    def computed(self, row: TokenizedRow) -> TokenizedRow:
        """Return all responses: a share of 0 is for one that is never to be given."""
        return row

    def collate(self, rows: Sequence[TokenizedRow], shared: bool) -> Batch:
        """Add to all responses of every row what the loss reads of their shares; `count` is the number of rows.

        `log_shares` (S,) fp32, -inf for a share of 0; `best` and `worst` (B,), the sequences of each row's largest and
        smallest share, the first of them where several are.
        """
        first, shares = 0, []
        best: list[int] = []
        worst: list[int] = []
        for row in rows:
            best.append(first + row.weights.index(max(row.weights)))
            worst.append(first + row.weights.index(min(row.weights)))
            shares += [weight / sum(row.weights) for weight in row.weights]
            first += len(row.weights)
        return {
            **super().collate(rows, shared),
            "count": torch.tensor(len(rows)),
            "log_shares": torch.tensor(shares, dtype=torch.float64).log().float(),
            "best": torch.tensor(best),
            "worst": torch.tensor(worst),
        }

    def loss(self, model: Callable[[Batch], Tensor], batch: Batch, count: Tensor) -> tuple[Tensor, Metrics]:
        """Return Σ weight·KL / count; metrics by row: `kl` itself, and `margin` and `accuracy` of its best response.

        The margin is that of the largest over the smallest share, at β = 1; 0 where all shares are equal.
        """
        sums, sizes = model(batch), batch["sizes"]
        segments = Segments(torch.arange(len(sizes), device=sizes.device), batch["row"], sizes)
        # Softmax at temperature 1 of the logarithms of shares gives the shares back.
        losses = snkl_loss(sums, batch["reference"], batch["log_shares"], segments, 1.0, check_finite=False)
        log_ratio = sums.detach() - batch["reference"]
        margin = log_ratio[batch["best"]] - log_ratio[batch["worst"]]
        metrics = {"kl": losses.detach(), "margin": margin, "accuracy": (margin > 0).float()}
        return (losses * batch["weight"]).sum() / count, metrics
