"""The learner: a visible loop over tasks, its run directory and its scores.

Names are loaded when first used, so that reading a run needs no torch.
"""

from typing import TYPE_CHECKING

from everalign.lazy import lazy_names

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
    "AdapterOptions": ".options",
    "CorrectionTaskOptions": ".options",
    "Learner": ".learner",
    "RolloutOptions": ".options",
    "Scores": ".scores",
    "TrainingOptions": ".options",
    "WeightOptions": "everalign.training.options",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
