"""Continual-learning methods: what is carried from task to task, one file a method.

See `Method` for the hooks and for how to add a method.
"""

import difflib
import inspect
from typing import Any

from everalign.errors import InputError
from everalign.methods.base import Method, Task
from everalign.methods.baselines import BufferOnly, ExperienceReplay, MultiTask, SequentialFineTuning, SingleTask
from everalign.methods.copr import OptimalPolicyRegularization
from everalign.methods.cppo import ContinualPpo
from everalign.methods.ewc import ElasticWeightConsolidation
from everalign.methods.experts import LabelledExperts
from everalign.methods.from_file import method_file, method_from_file
from everalign.methods.gradient_projection import GradientEpisodicMemory, OrthogonalGradients
from everalign.methods.l2p import LearningToPrompt
from everalign.methods.lifealign import LifeAlign
from everalign.methods.lifealign_rf import RehearsalFreeLifeAlign
from everalign.methods.olora import OrthogonalLora
from everalign.methods.slao import MergeBeforeForget

__all__ = [
    "METHODS",
    "ExperienceReplay",
    "LabelledExperts",
    "LifeAlign",
    "Method",
    "MultiTask",
    "SequentialFineTuning",
    "SingleTask",
    "Task",
    "make_method",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LifeAlign,
        SequentialFineTuning,
        ExperienceReplay,
        MultiTask,
        SingleTask,
        GradientEpisodicMemory,
        ElasticWeightConsolidation,
        OrthogonalLora,
        LearningToPrompt,
        ContinualPpo,
        OptimalPolicyRegularization,
        OrthogonalGradients,
        MergeBeforeForget,
        BufferOnly,
        RehearsalFreeLifeAlign,
        LabelledExperts,
    )
}


def make_method(name: str, **arguments: Any) -> Method:
    """Makes a method by its name on the command line, or of a class in a file, `FILE.py:CLASS`.

    Raises:
        InputError: there is no such method, or it does not take one of the arguments.
    """
    if method_file(name) is not None:
        kind = method_from_file(name)
    elif name in METHODS:
        kind = METHODS[name]
    else:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"unknown method {name!r}{hint}: choose one of {', '.join(METHODS)}, or name FILE.py:CLASS")
    known = inspect.signature(kind).parameters
    for argument in arguments:
        if argument not in known:
            raise InputError(f"{argument} means nothing to the method {name!r}, which would ignore it: leave it out")
    return kind(**arguments)
