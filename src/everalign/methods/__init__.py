"""Continual-learning methods: what is carried from task to task, one file a method.

See `Method` for the hooks and for how to add a method. Names are loaded when first used, so that importing the package
costs nothing.
"""

import importlib.util
import inspect
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everalign.errors import InputError
from everalign.lazy import lazy_names
from everalign.methods.table import DEFAULT, ENTRIES, check_method, check_taken, method_file
from everalign.storage import sha256_of

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

_HOMES = {"Method": ".base", "Task": ".base", **{entry.kind: f".{entry.home}" for entry in ENTRIES.values()}}


@cache
def _all_methods() -> "dict[str, type[Method]]":
    return {method: __getattr__(entry.kind) for method, entry in ENTRIES.items()}


__getattr__, __dir__ = lazy_names(__name__, _HOMES, {"METHODS": _all_methods})


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
    file = method_file(name)
    if file is None:
        check_method(name, arguments)
        kind: type[Method] = __getattr__(ENTRIES[name].kind)
    else:
        if not file.is_file():
            raise InputError(f"{name}: {file}: no such file in {Path.cwd()}")
        kind = _class_in_file(name, file.resolve(), name.rpartition(":")[2], sha256_of(file)[:12])
        check_taken(name, arguments, inspect.signature(kind).parameters)
    return kind(**arguments)


@cache
def _class_in_file(name: str, path: Path, class_name: str, digest: str) -> "type[Method]":
    """Loads the class of a method that stands in a file of the user's: experiments and controls need no place in here.

    Its `name` becomes this name with a hash of the file, so that runs of an edited method are not taken for the same.

    Raises:
        InputError: there is no such class, the file cannot be loaded, or it is no method that learns in sequence.
    """
    kind: type[Method] = __getattr__("Method")
    module_name = f"everalign_method_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{name}: {path} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{name}: {path}:{error.lineno}: {error.msg}") from error
    except Exception as error:  # whatever a user's file does
        raise InputError(f"{name}: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, kind) and found.__module__ == module_name):
        own = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, kind) and value.__module__ == module_name
        ]
        raise InputError(f"{name}: {path} has no class {class_name} of a method; it has {', '.join(own) or 'none'}")
    if found.regime != "sequential":
        # A run directory tells the other regimes by the names of our own methods.
        raise InputError(f"{name}: a method in a file must learn its tasks in sequence, and this one is {found.regime}")
    found.name = f"{name} {digest}"
    return found
