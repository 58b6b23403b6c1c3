"""Measures of alignment on held-out preferences; scorers and the LLM judge are in modules of their own.

Names are loaded when first used: they need torch, which the rest of the package does not.
"""

from typing import TYPE_CHECKING

from everalign.lazy import lazy_names

if TYPE_CHECKING:
    from everalign.evaluation.preference import HeldOut, PreferenceScore, score_base, score_preferences

__all__ = ["HeldOut", "PreferenceScore", "score_base", "score_preferences"]

__getattr__, __dir__ = lazy_names(__name__, dict.fromkeys(__all__, ".preference"))
