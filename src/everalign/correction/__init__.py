"""Correctors: small models that read a question and somebody's answer and write a better answer.

Names are loaded when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Corrected": "corrector",
    "CorrectionOptions": "corrector",
    "Corrector": "corrector",
    "Guards": "checks",
    "NO_GUARDS": "checks",
    "TEMPLATES": "templates",
    "Template": "templates",
    "get_template": "templates",
    "CorrectionEncoder": "tokenization",
    "CorrectorFacts": "corrector_files",
    "CorrectorFiles": "corrector_files",
    "CorrectionScores": "evaluation",
    "EvaluationReport": "evaluation",
    "evaluate_corrector": "evaluation",
    "Filtered": "checks",
    "filter_corrections": "checks",
    "load_corrector_files": "corrector_files",
    "write_corrector_facts": "corrector_files",
    "CorrectorOptions": "options",
    "CorrectorReport": "training",
    "TrainedCorrector": "training",
    "train_corrector": "training",
    "CorrectionData": "make_data",
    "LlmReviser": "generators",
    "EndpointAnswers": "generators",
    "LocalModel": "generators",
    "make_corrections": "make_data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
