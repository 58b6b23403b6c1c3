"""The learner: a visible loop over tasks, its run directory and its scores.

Names are loaded when first used, so that reading a run needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everalign.learning.learner import Learner
    from everalign.learning.options import AdapterOptions, CorrectionTaskOptions, RolloutOptions, TrainingOptions
    from everalign.learning.scores import Scores
    from everalign.training.options import WeightOptions

__all__ = [
    "AdapterOptions",
    "CorrectionTaskOptions",
    "Learner",
    "RolloutOptions",
    "Scores",
    "TrainingOptions",
    "WeightOptions",
]

_HOMES = {
    "AdapterOptions": "everalign.learning.options",
    "CorrectionTaskOptions": "everalign.learning.options",
    "Learner": "everalign.learning.learner",
    "RolloutOptions": "everalign.learning.options",
    "Scores": "everalign.learning.scores",
    "TrainingOptions": "everalign.learning.options",
    "WeightOptions": "everalign.training.options",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
