"""Everalign keeps a language model aligned while preferences keep changing.

The names below are loaded when first used, so `import everalign` costs milliseconds and no torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from everalign.correction.corrector import Corrector
    from everalign.data import (
        Correction,
        CorrectionSet,
        Preference,
        PreferenceSet,
        load_corrections,
        load_preferences,
    )
    from everalign.learning import (
        AdapterOptions,
        CorrectionTaskOptions,
        Learner,
        RolloutOptions,
        Scores,
        TrainingOptions,
        WeightOptions,
    )

# torch keeps what oneDNN made ready for a product, by the product's shape, in two caches of 1,024 each. Batches of text
# are never of one shape for long, and up to 2 MB are kept of each: a bf16 training on a CPU would grow by gigabytes.
# Read when the first product is computed, by torch itself; what the user set stays.
for _capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, "64")

__all__ = [
    "AdapterOptions",
    "Correction",
    "CorrectionSet",
    "CorrectionTaskOptions",
    "Corrector",
    "Learner",
    "Preference",
    "PreferenceSet",
    "RolloutOptions",
    "Scores",
    "TrainingOptions",
    "WeightOptions",
    "load_corrections",
    "load_preferences",
]

_HOMES = {
    "AdapterOptions": "everalign.learning",
    "Correction": "everalign.data",
    "CorrectionSet": "everalign.data",
    "Corrector": "everalign.correction.corrector",
    "CorrectionTaskOptions": "everalign.learning",
    "Learner": "everalign.learning",
    "Preference": "everalign.data",
    "PreferenceSet": "everalign.data",
    "RolloutOptions": "everalign.learning",
    "Scores": "everalign.learning",
    "TrainingOptions": "everalign.learning",
    "WeightOptions": "everalign.learning",
    "load_corrections": "everalign.data",
    "load_preferences": "everalign.data",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes as long as all the rest

        return version("everalign")
    if name not in _HOMES:
        raise AttributeError(f"module 'everalign' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
