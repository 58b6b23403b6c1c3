"""Continual-learning methods: what is carried from task to task, one file a method.

See `Method` for the hooks and for how to add a method. Names are loaded when first used, so that importing the package
costs nothing.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from everalign.errors import InputError
from everalign.methods.table import DEFAULT, ENTRIES, check_method, check_taken, method_file

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


def as_method(
    method: "Method | type[Method] | str | Mapping[str, Any] | None", arguments: Mapping[str, Any]
) -> "Method":
    """Returns a method, or makes one.

    Args:
        method: a method, the name of one, or a dictionary of `name` and arguments; None for `lifealign`.
        arguments: further ones, by name.

    Raises:
        InputError: there is no such method, or an argument would be ignored.
    """
    if isinstance(method, Mapping):
        return make_method(**{"name": DEFAULT, **method, **arguments})
    if method is None or isinstance(method, str):
        return make_method(method or DEFAULT, **arguments)
    kind: type[Method] = __getattr__("Method")
    if isinstance(method, type) and issubclass(method, kind):
        return method(**arguments)
    if not isinstance(method, kind):
        raise InputError(
            f"method: must be a name such as 'er', or a method such as ExperienceReplay(), found {method!r}",
            field="method",
        )
    if arguments:
        name = next(iter(arguments))
        raise InputError(f"{name}: give it to the method itself, {type(method).__name__}({name}=...)", field=name)
    return method


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
