"""Everalign keeps a language model aligned while preferences keep changing.

    from everalign import Learner

    learner = Learner("tiny", method="er", output="runs/polite")
    learner.learn("polite.csv", name="polite", test="polite.test.csv")
    learner.export("polite-model")

`Learner` learns tasks one after another, `Corrector` rewrites answers, `RewardModel` rates them. The `load_*` functions
read rows, the `*Options` are settings, and bad input is an `InputError` that says what to do.

All names are loaded when first used, so `import everalign` costs milliseconds and no torch.
"""

import os
from typing import TYPE_CHECKING

from everalign.lazy import lazy_names

if TYPE_CHECKING:
    from everalign.correction.corrector import Corrected, Corrector
    from everalign.correction.options import CorrectorOptions
    from everalign.correction.training import train_corrector
    from everalign.data import (
        Correction,
        CorrectionSet,
        Preference,
        PreferenceSet,
        Scored,
        ScoredSet,
        load_corrections,
        load_preferences,
        load_prompts,
        load_scored,
    )
    from everalign.errors import DivergedError, EveralignError, GateRefusedError, InputError, NotEnoughEvidenceError
    from everalign.evaluation.scorers import RewardModel
    from everalign.learning import (
        AdapterOptions,
        CorrectionTaskOptions,
        Learner,
        RolloutOptions,
        Scores,
        TrainingOptions,
        WeightOptions,
    )
    from everalign.methods import make_method
    from everalign.training.options import RewardOptions
    from everalign.training.reward_model import train_reward_model

    __version__: str

# torch keeps what oneDNN made ready for a product, by the product's shape, in two caches of 1,024 each. Batches of text
# are never of one shape for long, and up to 2 MB are kept of each: a bf16 training on a CPU would grow by gigabytes.
# Read when the first product is computed, by torch itself; what the user set stays.
for _capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, "64")

_HOMES = {
    "AdapterOptions": "everalign.learning",
    "Correction": "everalign.data",
    "Corrected": "everalign.correction.corrector",
    "CorrectionSet": "everalign.data",
    "CorrectionTaskOptions": "everalign.learning",
    "Corrector": "everalign.correction.corrector",
    "CorrectorOptions": "everalign.correction.options",
    "DivergedError": "everalign.errors",
    "EveralignError": "everalign.errors",
    "GateRefusedError": "everalign.errors",
    "InputError": "everalign.errors",
    "Learner": "everalign.learning",
    "NotEnoughEvidenceError": "everalign.errors",
    "Preference": "everalign.data",
    "PreferenceSet": "everalign.data",
    "RewardModel": "everalign.evaluation.scorers",
    "RewardOptions": "everalign.training.options",
    "RolloutOptions": "everalign.learning",
    "Scored": "everalign.data",
    "ScoredSet": "everalign.data",
    "Scores": "everalign.learning",
    "TrainingOptions": "everalign.learning",
    "WeightOptions": "everalign.learning",
    "load_corrections": "everalign.data",
    "load_preferences": "everalign.data",
    "load_prompts": "everalign.data",
    "load_scored": "everalign.data",
    "make_method": "everalign.methods",
    "train_corrector": "everalign.correction.training",
    "train_reward_model": "everalign.training.reward_model",
}

__all__ = [
    "AdapterOptions",
    "Corrected",
    "Correction",
    "CorrectionSet",
    "CorrectionTaskOptions",
    "Corrector",
    "CorrectorOptions",
    "DivergedError",
    "EveralignError",
    "GateRefusedError",
    "InputError",
    "Learner",
    "NotEnoughEvidenceError",
    "Preference",
    "PreferenceSet",
    "RewardModel",
    "RewardOptions",
    "RolloutOptions",
    "Scored",
    "ScoredSet",
    "Scores",
    "TrainingOptions",
    "WeightOptions",
    "load_corrections",
    "load_preferences",
    "load_prompts",
    "load_scored",
    "make_method",
    "train_corrector",
    "train_reward_model",
]


def _version() -> str:
    from importlib.metadata import version  # takes as long as all the rest

    return version("everalign")


__getattr__, __dir__ = lazy_names(__name__, _HOMES, {"__version__": _version})
