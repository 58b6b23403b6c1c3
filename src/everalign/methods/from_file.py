"""Methods that stand in a file of the user's, named `FILE.py:CLASS`: experiments and controls need no place in here."""

import importlib.util
import sys
from functools import cache
from pathlib import Path

from everalign.errors import InputError
from everalign.methods.base import Method
from everalign.methods.table import method_file
from everalign.storage import sha256_of


def method_from_file(name: str) -> type[Method]:
    """Loads the class of a method named `FILE.py:CLASS`.

    Its `name` becomes this name with a hash of the file, so that runs of an edited method are not taken for the same.

    Raises:
        InputError: there is no such file or class, it cannot be loaded, or is no method that learns in sequence.
    """
    path, class_name = method_file(name), name.rpartition(":")[2]
    if path is None or not path.is_file():
        raise InputError(f"{name}: {path}: no such file in {Path.cwd()}")
    return _loaded(path.resolve(), sha256_of(path)[:12], name, class_name)


@cache
def _loaded(path: Path, digest: str, name: str, class_name: str) -> type[Method]:
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
    if not (isinstance(found, type) and issubclass(found, Method) and found.__module__ == module_name):
        own = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module_name
        ]
        raise InputError(f"{name}: {path} has no class {class_name} of a method; it has {', '.join(own) or 'none'}")
    if found.regime != "sequential":
        # A run directory tells the other regimes by the names of our own methods.
        raise InputError(f"{name}: a method in a file must learn its tasks in sequence, and this one is {found.regime}")
    found.name = f"{name} {digest}"
    return found
