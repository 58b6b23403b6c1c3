"""Correctors: small models that read a question and somebody's answer and write a better answer.

Names are loaded when first used, so that importing the package costs nothing.
"""

from everalign.lazy import lazy_names

_HOMES = {
    "Corrected": ".corrector",
    "CorrectionOptions": ".corrector",
    "Corrector": ".corrector",
    "Guards": ".checks",
    "NO_GUARDS": ".checks",
    "TEMPLATES": ".templates",
    "Template": ".templates",
    "get_template": ".templates",
    "CorrectionEncoder": ".tokenization",
    "CorrectorFacts": ".corrector_files",
    "CorrectorFiles": ".corrector_files",
    "CorrectionScores": ".evaluation",
    "EvaluationReport": ".evaluation",
    "evaluate_corrector": ".evaluation",
    "Filtered": ".checks",
    "filter_corrections": ".checks",
    "load_corrector_files": ".corrector_files",
    "write_corrector_facts": ".corrector_files",
    "CorrectorOptions": ".options",
    "CorrectorReport": ".training",
    "TrainedCorrector": ".training",
    "train_corrector": ".training",
    "CorrectionData": ".make_data",
    "LlmReviser": ".generators",
    "EndpointAnswers": ".generators",
    "LocalModel": ".generators",
    "make_corrections": ".make_data",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
