"""How much of an answer a correction keeps and changes; pure functions over texts and lists of tokens."""

import re
from collections.abc import Hashable, Sequence

# Words, and signs one by one; where a script puts no spaces between words, its letters one by one.
_ONE_BY_ONE = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = rf"[{_ONE_BY_ONE}]|[^\W{_ONE_BY_ONE}]+|[^\w\s]"
_WORDS, _PIECES = re.compile(_WORD), re.compile(rf"\s+|{_WORD}")


def words(text: str) -> list[str]:
    """Return a text's words and signs, in whose number edits and lengths are told."""
    return _WORDS.findall(text)


def pieces(text: str) -> list[str]:
    """Return a text's words and signs with the white space between them; joined, they are the text."""
    return _PIECES.findall(text)


def edit_ratio(answer: Sequence[Hashable], correction: Sequence[Hashable]) -> float:
    """Return the tokens that have to be put in, taken out or replaced, per token of the answer (Levenshtein).

    0 for a copy; above 1 where the correction is much longer than the answer. The paper's D (Ji et al., NeurIPS 2024,
    section 3.4).
    """
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(answer, correction) / max(1, len(answer))


def edit_share(answer: Sequence[Hashable], correction: Sequence[Hashable]) -> float:
    """Return the tokens that have to be put in, taken out or replaced, per token of the longer one, from 0 to 1.

    Unlike `edit_ratio`, which has no bound: a single correction that goes on and on does not outweigh all others.
    """
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_distance(answer, correction)


def kept_share(answer: Sequence[Hashable], correction: Sequence[Hashable]) -> float:
    """Return the share of the answer's tokens that the correction has in the same order, from 0 to 1.

    The longest common subsequence; 1 for an answer of no tokens.
    """
    from rapidfuzz.distance import LCSseq

    return LCSseq.similarity(answer, correction) / len(answer) if answer else 1.0
