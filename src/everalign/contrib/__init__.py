"""Experimental parts, which nothing else in the package needs; so far, steering a corrector by its activations."""

from everalign.lazy import lazy_names

_HOMES = {
    "SteeredEngine": ".steering",
    "SteeringFacts": ".steering_vectors",
    "SteeringOptions": ".steering",
    "load_steered_corrector": ".steering",
    "steer_corrector": ".steering",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
