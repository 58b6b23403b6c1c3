"""The flags of how rewards become weights, as every verb has them that learns from rewards; a recipe's keys."""

from typing import Annotated

from everalign.cli.verbs import flag

REWARDS = "Rewards (objectives var, snkl)"
_ESTIMATORS = "Normaliser of var: group, group_loo, in_batch, reference, quantile or support."

Estimator = Annotated[str | None, flag(_ESTIMATORS, REWARDS)]
Temperature = Annotated[float | None, flag("Reward that is worth one nat.", REWARDS)]
TargetEss = Annotated[float | None, flag("Find the temperature for this effective share.", REWARDS)]
ScaleRewards = Annotated[bool | None, flag("Divide rewards by their deviation; on.", REWARDS, "")]
WeightCap = Annotated[float | None, flag("Largest weight (var); 0 for none.", REWARDS)]
LengthNormalize = Annotated[bool | None, flag("Log-probabilities per token (estimator support).", REWARDS, "")]
WeightFloor = Annotated[float | None, flag("Completions that weigh less are left out.", REWARDS)]
DropConstant = Annotated[bool | None, flag("Leave out prompts whose rewards are all one.", REWARDS, "")]
