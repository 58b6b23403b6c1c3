"""From rewards to weights: how much each completion of a dataset counts, computed once before training."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch

from everalign.data.scored import Scored
from everalign.errors import InputError
from everalign.objectives import WeightStatistics, global_scale, var_weights, weight_statistics

DatasetEstimator = Literal["group", "group_loo", "in_batch"]
_ROWS_NAMED = 3


@dataclass(frozen=True)
class WeightOptions:
    """How rewards become weights (see `everalign.objectives.var_weights`).

    Args:
        estimator: where a prompt's normaliser comes from: `group`, its own completions; `group_loo`, the other
            ones, which aims at the optimum exactly but with weights of any size; `in_batch`, the other prompts', for
            data with one completion a prompt. There a reward is compared with the mean of the prompt's other
            completions, or, where some prompt has but one, with that of the dataset.
        temperature: reward that is worth one nat, in units of the dataset's standard deviation of rewards, or as
            they are without `scale_rewards`.
        target_ess: share of the responses, between 0 and 1, that the weights shall be worth; the temperature is
            found. 0 for a given temperature.
        scale_rewards: divide all rewards by their standard deviation over the dataset.
        weight_cap: largest weight; 0 for none.
    """

    estimator: DatasetEstimator = "group"
    temperature: float = 1.0
    target_ess: float = 0.0
    scale_rewards: bool = True
    weight_cap: float = 0.0

    def __post_init__(self) -> None:
        if self.estimator not in get_args(DatasetEstimator):
            names = ", ".join(get_args(DatasetEstimator))
            raise InputError(f"estimator must be one of {names}, found {self.estimator!r}")
        for name in ("temperature", "target_ess", "weight_cap"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise InputError(f"{name} must be a number of at least 0, found {value!r}")
        if self.temperature == 0:
            raise InputError("temperature must be above 0: towards 0 only the best completion counts")
        if self.target_ess >= 1:
            raise InputError(f"target_ess must be below 1, found {self.target_ess!r}: at 1 all completions count alike")


@dataclass(frozen=True)
class Weighed:
    """Rows with weights, and what was done to get them.

    Attributes:
        rows: the rows, each completion with its weight.
        statistics: figures of the weights, over all rows.
        temperature: given or found; None where the rows brought their weights.
        scale: what rewards were divided by.
    """

    rows: tuple[Scored, ...]
    statistics: WeightStatistics
    temperature: float | None
    scale: float

    def summary(self) -> str:
        """One line of text for a log."""
        given = (
            "as given, weighting options do not apply"
            if self.temperature is None
            else f"temperature {self.temperature:.3g}"
        )
        s = self.statistics
        return f"{given}, worth {s.effective_share:.0%} of {s.rows} completions, the largest {s.largest_weight:.3g}"

    def facts(self) -> dict[str, Any]:
        """Return the figures, for a manifest; what does not exist is None."""
        figures = {name: None if value != value else value for name, value in asdict(self.statistics).items()}
        return {"temperature": self.temperature, "scale": self.scale, **figures}


def weigh(rows: Sequence[Scored], lengths: Sequence[Sequence[int]], options: WeightOptions) -> Weighed:
    """Give every completion of a dataset its weight.

    Args:
        rows: all rows of a task, of which either all or none have weights already.
        lengths: tokens of each row's completions, for the statistics.
        options: how.

    Raises:
        InputError: rewards do not differ, a row has too few completions for the estimator, or only some rows have
            weights; names the rows.
    """
    given = [row for row in rows if row.weights is not None]
    if given and len(given) < len(rows):
        number = next(i for i, row in enumerate(rows, start=1) if row.weights is None)
        raise InputError(f"row {number} has no weights, while others have: give all rows weights, or none")
    groups = torch.tensor([number for number, row in enumerate(rows) for _ in row.completions])
    rewards = torch.tensor([reward for row in rows for reward in row.rewards], dtype=torch.float64)
    tokens = torch.tensor([length for row in lengths for length in row])
    cap = options.weight_cap or None
    if given:
        weights = torch.tensor([weight for row in given for weight in row.weights or ()], dtype=torch.float64)
        return Weighed(tuple(rows), weight_statistics(weights, groups, rewards, tokens), None, 1.0)
    check_completions(rows, options)
    alone = options.estimator == "in_batch" and any(len(row.completions) == 1 for row in rows)
    try:
        scale = global_scale(rewards) if options.scale_rewards else 1.0
        found = var_weights(
            rewards,
            groups,
            estimator=options.estimator,
            temperature=None if options.target_ess else options.temperature,
            target_ess=options.target_ess or None,
            reward_scale=scale,
            baselines=rewards.mean().expand(len(rows)) if alone else None,
            weight_cap=cap,
        )
        statistics = weight_statistics(found.weights, groups, rewards, tokens, weight_cap=cap)
    except ValueError as error:
        raise InputError(f"rewards: {error}") from error
    parts = torch.split(found.weights, [len(row.completions) for row in rows])
    weighed = tuple(_with_weights(row, part.tolist()) for row, part in zip(rows, parts, strict=True))
    return Weighed(weighed, statistics, found.temperature, scale)


def _with_weights(row: Scored, weights: list[float]) -> Scored:
    try:
        return replace(row, weights=tuple(weights))
    except InputError as error:
        raise InputError(f"the row {row.id} would get the weights {weights}: raise the temperature") from error


def check_completions(rows: Sequence[Scored], options: WeightOptions) -> None:
    """Refuse rows without weights that have too few completions for the estimator; names them by their place."""
    alone = [n for n, row in enumerate(rows, start=1) if len(row.completions) == 1 and row.weights is None]
    if alone and options.estimator != "in_batch":
        named = ", ".join(map(str, alone[:_ROWS_NAMED])) + (", ..." if len(alone) > _ROWS_NAMED else "")
        raise InputError(
            f"{len(alone)} rows have one completion only (rows {named}), whose weight would be 1 whatever its reward: "
            "sample more, leave these rows out, or use the estimator in_batch"
        )
