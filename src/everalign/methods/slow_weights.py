"""How much of a task's update is added to long-term memory: an average over its steps, and a fitted step length."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from everalign.modeling.policy import Policy
from everalign.training.hooks import Stage, parameters

STEPS = (0.4, 0.6, 0.8, 1.0, 1.2)


class AdapterAverage:
    """An exponential moving average of what learns, over a stage's steps.

    After t steps the decay is min(decay, (1 + t) / (10 + t)), so that the start of training is soon forgotten.

    Args:
        decay: at least 0 and below 1; 0 for no average.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.reset()

    def reset(self) -> None:
        """Forget everything, for a new stage."""
        self._values: list[Tensor] = []
        self._steps = 0

    def update(self, policy: Policy) -> None:
        """Take the policy after one more step into the average."""
        if not self.decay:
            return
        now = [parameter.detach() for parameter in parameters(policy)]
        if not self._values:
            self._values = [value.clone() for value in now]
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
        for average, value in zip(self._values, now, strict=True):
            average.lerp_(value.to(average), 1 - decay)
        self._steps += 1

    def apply(self, policy: Policy) -> None:
        """Overwrite what learns by the average, if there is one."""
        if self._values:
            with torch.no_grad():
                for parameter, average in zip(parameters(policy), self._values, strict=True):
                    parameter.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average, on the CPU."""
        found = {f"average/{number}": value.cpu() for number, value in enumerate(self._values)}
        return {**found, "average/steps": torch.tensor(self._steps)} if found else {}

    def load_state_dict(self, state: Mapping[str, Tensor], policy: Policy) -> None:
        """Restore what `state_dict` returned, on the policy's device."""
        self.reset()
        if "average/steps" in state:
            self._steps = int(state["average/steps"])
            like = parameters(policy)
            self._values = [state[f"average/{number}"].to(value) for number, value in enumerate(like)]


def fit_step(stage: Stage, groups: Sequence[Sequence[int]], steps: Sequence[float] = STEPS) -> float:
    """Scale the short-term update by the step whose loss, a mean over groups of rows, is lowest; return that step.

    Args:
        stage: the task's last; its policy is changed in place.
        groups: rows of the stage, one group a task; an empty one does not count.
        steps: what is tried. Of steps that are equally good the one nearest to 1 is taken.
    """
    groups = [group for group in groups if group]
    if not groups:
        return 1.0
    policy = stage.policy
    trained = policy.factors()

    def scale(step: float) -> None:
        policy.write_factors({name: (left * step, right) for name, (left, right) in trained.items()})

    losses = {}
    for step in sorted(steps, key=lambda step: abs(step - 1)):
        scale(step)
        losses[step] = sum(stage.loss(group) for group in groups) / len(groups)
    best = min(losses, key=lambda step: losses[step])
    scale(best)
    return best
