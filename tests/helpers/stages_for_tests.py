"""Running one stage on tiny models, with everything a test may want to vary."""

from pathlib import Path
from typing import Any

import pytest
import torch

from everalign.modeling.policy import Policy
from everalign.training.hooks import StageHooks
from everalign.training.objectives import make_objective
from everalign.training.options import StageOptions
from everalign.training.reference import Reference, sequence_logprobs
from everalign.training.stage import StageResult, train_stage


class GivenHooks(StageHooks):
    """Hooks made of functions: `penalty` and `gradient_hook`."""

    def __init__(self, penalty: Any = None, gradient_hook: Any = None) -> None:
        self._penalty, self._gradient_hook = penalty, gradient_hook

    def penalty(self, policy: Policy) -> Any:
        return None if self._penalty is None else self._penalty(policy)

    def adjust_gradients(self, policy: Policy) -> None:
        if self._gradient_hook is not None:
            self._gradient_hook(policy)


FAST = {"learning_rate": 1e-2, "batch_size": 8, "tokens_per_batch": 480, "warmup": 0.0, "logging_steps": 1}


def train(
    policy: Policy,
    name: str,
    pairs: list[Any],
    folder: Path,
    *,
    seed: int = 0,
    hooks: dict[str, Any] | None = None,
    **options: Any,
) -> StageResult:
    """One stage against the base model, without checkpoints unless `checkpoint_steps` says so."""
    objective = make_objective(name)
    reference = None
    if objective.needs_reference:
        with policy.as_base():
            logprobs = sequence_logprobs(policy, pairs, 320)

        def reference() -> Reference:
            return Reference("base", logprobs)

    given = dict(hooks or {})
    functions = {name: given.pop(name) for name in ("penalty", "gradient_hook") if name in given}
    given |= {"hooks": GivenHooks(**functions)} if functions else {}
    settings = StageOptions(**{**FAST, "checkpoint_steps": 0, **options})
    kept = folder if settings.checkpoint_steps else None
    # The result is not kept, which would end the checkpoints, and a second call would load it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("everalign.training.stage.save_result", lambda *_: None)
        return train_stage(policy, objective, pairs, settings, kept, seed=seed, reference=reference, **given)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    """Copies of the trained weights."""
    return {name: value.clone() for name, value in policy.state_dict().items()}


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference of two policies' weights."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)
