"""From rewards to weights: how much each completion of a dataset counts, computed once before training."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from everalign.data.records import Scored
from everalign.errors import InputError
from everalign.objectives import WeightStatistics, global_scale, var_weights, weight_statistics
from everalign.training.options import WeightOptions

_ROWS_NAMED = 3
# Need rewards of answers of the reference, which every row then has to hold.
FROM_REFERENCE_REWARDS = ("reference", "quantile")
# Can tell what a completion is worth that is its prompt's only one.
TAKE_ONE_COMPLETION = ("in_batch", *FROM_REFERENCE_REWARDS)


@dataclass(frozen=True)
class WeightedRows:
    """Rows with weights, and what was done to get them.

    Attributes:
        rows: the rows that are learned, each completion with its weight.
        statistics: figures of the weights, over all rows, before any are left out.
        temperature: given or found; None where the rows brought their weights.
        scale: what rewards were divided by.
        left_out: completions below the floor, or all of whose prompt have one reward.
        left_out_weight: share of all weight that they had.
    """

    rows: tuple[Scored, ...]
    statistics: WeightStatistics
    temperature: float | None
    scale: float
    left_out: int = 0
    left_out_weight: float = 0.0

    def one_line(self) -> str:
        """One line of text for a log."""
        given = (
            "as given, weighting options do not apply"
            if self.temperature is None
            else f"temperature {self.temperature:.3g}"
        )
        s = self.statistics
        line = f"{given}, worth {s.effective_share:.0%} of {s.rows} completions, the largest {s.largest_weight:.3g}"
        if self.left_out:
            line += f"; {self.left_out} completions with {self.left_out_weight:.1%} of the weight are left out"
        return line

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, for a manifest; what does not exist is None."""
        figures = {name: None if value != value else value for name, value in asdict(self.statistics).items()}
        left_out = {"left_out": self.left_out, "left_out_weight": self.left_out_weight} if self.left_out else {}
        return {"temperature": self.temperature, "scale": self.scale, **figures, **left_out}


def compute_weights(
    rows: Sequence[Scored],
    lengths: Sequence[Sequence[int]],
    options: WeightOptions,
    reference: Sequence[Tensor] | None = None,
    scale: float | None = None,
) -> WeightedRows:
    """Give every completion of a dataset its weight.

    Args:
        rows: all rows of a task, of which either all or none have weights already.
        lengths: tokens of each row's completions, for the statistics and for `length_normalize`.
        options: how.
        reference: for `support`, log-probabilities of each row's completions under the reference, in nats, summed
            over their tokens.
        scale: what rewards are divided by, where `scale_rewards` asks for it; their own standard deviation when None.

    Raises:
        InputError: rewards do not differ, a row has too few completions or no reference rewards for the estimator, or
            only some rows have weights; names the rows.
    """
    given = [row for row in rows if row.weights is not None]
    if given and len(given) < len(rows):
        number = next(i for i, row in enumerate(rows, start=1) if row.weights is None)
        raise InputError(f"row {number} has no weights, while others have: give all rows weights, or none")
    options = options.resolved()
    groups = torch.tensor([number for number, row in enumerate(rows) for _ in row.completions])
    rewards = torch.tensor([reward for row in rows for reward in row.rewards], dtype=torch.float64)
    tokens = torch.tensor([length for row in lengths for length in row])
    cap = options.weight_cap or None
    if given:
        weights = torch.tensor([weight for row in given for weight in row.weights or ()], dtype=torch.float64)
        return WeightedRows(tuple(rows), weight_statistics(weights, groups, rewards, tokens), None, 1.0)
    check_completions(rows, options)
    try:
        scale = (scale or global_scale(rewards)) if options.scale_rewards else 1.0
        found = var_weights(
            rewards,
            groups,
            estimator=options.estimator,
            temperature=None if options.target_ess else options.temperature,
            target_ess=options.target_ess or None,
            reward_scale=scale,
            weight_cap=cap,
            **_evidence(rows, rewards, tokens, options, reference),
        )
        statistics = weight_statistics(found.weights, groups, rewards, tokens, weight_cap=cap)
    except ValueError as error:
        raise InputError(f"rewards: {error}") from error
    return _keep(rows, WeightedRows((), statistics, found.temperature, scale), found.weights, options)


def _evidence(
    rows: Sequence[Scored],
    rewards: Tensor,
    tokens: Tensor,
    options: WeightOptions,
    reference: Sequence[Tensor] | None,
) -> dict[str, Any]:
    """Return what the estimator looks at beside rewards, by its name in `var_weights`."""
    if options.estimator == "in_batch" and any(len(row.completions) == 1 for row in rows):
        return {"baselines": rewards.mean().expand(len(rows))}
    if options.estimator in FROM_REFERENCE_REWARDS:
        return {"reference_rewards": torch.tensor([row.reference_rewards for row in rows], dtype=torch.float64)}
    if options.estimator == "support" and reference is not None:
        lengths = tokens if options.length_normalize else None
        return {"reference_logprobs": torch.cat(list(reference)), "lengths": lengths}
    return {}


def _keep(rows: Sequence[Scored], found: WeightedRows, weights: Tensor, options: WeightOptions) -> WeightedRows:
    """Give the rows their weights; completions below the floor and rows without any other are left out."""
    kept = weights >= options.weight_floor
    if options.drop_constant:
        kept &= torch.tensor([len(set(row.rewards)) > 1 for row in rows for _ in row.completions])
    parts = torch.split(weights * kept, [len(row.completions) for row in rows])
    weighed = []
    for row, part in zip(rows, parts, strict=True):
        if part.any():
            try:
                weighed.append(replace(row, weights=tuple(part.tolist())))
            except InputError as error:
                what = f"the row {row.id} would get the weights {part.tolist()}"
                raise InputError(f"{what}: raise the temperature") from error
    if not weighed:
        if options.drop_constant:
            raise InputError("no row has rewards that differ, and drop_constant leaves all others out: do without it")
        raise InputError(f"every completion weighs less than weight_floor, {options.weight_floor:g}: lower it")
    lost = (weights * ~kept).sum() / weights.sum()
    return replace(found, rows=tuple(weighed), left_out=int((~kept).sum()), left_out_weight=lost.item())


def check_completions(rows: Sequence[Scored], options: WeightOptions) -> None:
    """Refuse rows without weights that lack what the estimator needs; names them by their place."""
    unweighed = [(number, row) for number, row in enumerate(rows, start=1) if row.weights is None]
    if options.estimator in FROM_REFERENCE_REWARDS:
        counts = [(number, len(row.reference_rewards or ())) for number, row in unweighed]
        for number, count in counts:
            if count == 0:
                raise InputError(
                    f"row {number}: field 'reference_rewards': no such column in this row, from which the estimator "
                    f"{options.estimator} takes what is usual for a prompt; give rewards of the reference's own "
                    "answers to it",
                    field="reference_rewards",
                )
            if count != counts[0][1]:
                raise InputError(
                    f"row {number}: field 'reference_rewards': {count} numbers, while row {counts[0][0]} has "
                    f"{counts[0][1]}; give every row as many",
                    field="reference_rewards",
                )
    if options.estimator not in TAKE_ONE_COMPLETION:
        refuse_alone(
            unweighed,
            "whose weight would be 1 whatever its reward: sample more, leave these rows out, or use the estimator "
            "in_batch (or, with reference_rewards, reference)",
        )


def refuse_alone(rows: Iterable[tuple[int, Scored]], why: str) -> None:
    """Refuse rows, given with their places, that have one completion; `why` ends the error."""
    alone = [str(number) for number, row in rows if len(row.completions) == 1]
    if alone:
        named = "rows " + ", ".join(alone[:_ROWS_NAMED]) + (", ..." if len(alone) > _ROWS_NAMED else "")
        raise InputError(f"{len(alone)} rows have one completion only ({named}), {why}")
