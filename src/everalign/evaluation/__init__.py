"""Measures of alignment on held-out preferences; scorers and the LLM judge are in modules of their own.

Names are loaded when first used: they need torch, which the rest of the package does not.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everalign.evaluation.preference import HeldOut, PreferenceScore, score_base, score_preferences

__all__ = ["HeldOut", "PreferenceScore", "score_base", "score_preferences"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from everalign.evaluation import preference

    return getattr(preference, name)
