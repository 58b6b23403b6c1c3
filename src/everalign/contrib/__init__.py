"""Experimental parts, which nothing else in the package needs; so far, steering a corrector by its activations."""

from importlib import import_module
from typing import Any

_HOMES = {
    "SteeredEngine": "steering",
    "SteeringFacts": "steering_vectors",
    "SteeringOptions": "steering",
    "load_steered_corrector": "steering",
    "steer_corrector": "steering",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
