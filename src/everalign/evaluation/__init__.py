"""Judge-free measures of alignment on held-out preferences."""

from everalign.evaluation.preference import HeldOut, PreferenceScore, score_preferences

__all__ = ["HeldOut", "PreferenceScore", "score_preferences"]
