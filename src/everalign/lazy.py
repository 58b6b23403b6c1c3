"""Packages whose names are loaded when first used, so that importing one costs nothing."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], made: Mapping[str, Callable[[], Any]] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return what a package calls `__getattr__` and `__dir__` (PEP 562).

        __getattr__, __dir__ = lazy_names(__name__, {"ReplayBuffer": ".replay"})

    Args:
        package: its `__name__`.
        homes: the module of each name, in full, or from the package on with a dot in front.
        made: what makes the values of further names, called each time.
    """
    makers = made or {}

    def load(name: str) -> Any:
        if name in makers:
            return makers[name]()
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name], package), name)

    return load, lambda: sorted({*vars(sys.modules[package]), *homes, *makers})
