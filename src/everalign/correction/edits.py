"""How much of an answer a correction keeps and changes; pure functions over lists of tokens."""

from collections.abc import Hashable, Sequence


def edit_ratio(answer: Sequence[Hashable], correction: Sequence[Hashable]) -> float:
    """Return the tokens that have to be put in, taken out or replaced, per token of the answer (Levenshtein).

    0 for a copy; above 1 where the correction is much longer than the answer. The paper's D (Ji et al., NeurIPS 2024,
    section 3.4).
    """
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(answer, correction) / max(1, len(answer))


def kept_share(answer: Sequence[Hashable], correction: Sequence[Hashable]) -> float:
    """Return the share of the answer's tokens that the correction has in the same order, from 0 to 1.

    The longest common subsequence; 1 for an answer of no tokens.
    """
    from rapidfuzz.distance import LCSseq

    return LCSseq.similarity(answer, correction) / len(answer) if answer else 1.0
