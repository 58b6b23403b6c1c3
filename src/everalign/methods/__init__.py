"""Continual-learning methods: what is carried from task to task, one file a method.

See `Method` for the hooks and for how to add a method. Names are loaded when first used, so that importing the package
costs nothing.
"""

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

from everalign.methods.table import ENTRIES, check_method, check_taken, method_file

if TYPE_CHECKING:
    from everalign.methods.base import Method, Task
    from everalign.methods.baselines import ExperienceReplay, MultiTask, SequentialFineTuning, SingleTask
    from everalign.methods.experts import LabelledExperts
    from everalign.methods.lifealign import LifeAlign

    METHODS: dict[str, type[Method]]

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

_HOMES = {"Method": "base", "Task": "base", **{entry.kind: entry.home for entry in ENTRIES.values()}}


def __getattr__(name: str) -> Any:
    if name == "METHODS":
        globals()[name] = {method: __getattr__(entry.kind) for method, entry in ENTRIES.items()}
        return globals()[name]
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "METHODS"})


def make_method(name: str, **arguments: Any) -> "Method":
    """Makes a method by its name on the command line, or of a class in a file, `FILE.py:CLASS`.

    Raises:
        InputError: there is no such method, or it does not take one of the arguments.
    """
    if method_file(name) is None:
        check_method(name, arguments)
        kind: type[Method] = __getattr__(ENTRIES[name].kind)
    else:
        from everalign.methods.from_file import method_from_file

        kind = method_from_file(name)
        check_taken(name, arguments, inspect.signature(kind).parameters)
    return kind(**arguments)
