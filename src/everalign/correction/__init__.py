"""Correctors: small models that read a question and somebody's answer and write a better answer.

Names are loaded when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Corrected": "corrector",
    "CorrectionOptions": "corrector",
    "Corrector": "corrector",
    "Guards": "guards",
    "NO_GUARDS": "guards",
    "TEMPLATES": "templates",
    "Template": "templates",
    "get_template": "templates",
    "CorrectionEncoder": "encoder",
    "CorrectorFacts": "files",
    "CorrectorFiles": "files",
    "CorrectionScores": "evaluation",
    "EvaluationReport": "evaluation",
    "evaluate_corrector": "evaluation",
    "Filtered": "filters",
    "filter_corrections": "filters",
    "load_corrector_files": "files",
    "write_corrector_facts": "files",
    "CorrectorOptions": "options",
    "CorrectorReport": "report",
    "SteeringFacts": "steering_files",
    "SteeringOptions": "steering",
    "TrainedCorrector": "training",
    "steer_corrector": "steering",
    "train_corrector": "training",
    "CorrectionData": "pipeline",
    "Editor": "answering",
    "EndpointAnswers": "answering",
    "SampledAnswers": "answering",
    "make_corrections": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
