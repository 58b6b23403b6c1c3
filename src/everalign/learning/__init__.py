"""The learner: a visible loop over tasks, its run directory and its scores.

Names are loaded when first used, so that reading a run needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everalign.learning.learner import Learner
    from everalign.learning.options import AdapterOptions, TrainingOptions
    from everalign.learning.scores import Scores

__all__ = ["AdapterOptions", "Learner", "Scores", "TrainingOptions"]

_HOMES = {"AdapterOptions": "options", "Learner": "learner", "Scores": "scores", "TrainingOptions": "options"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
