"""BLEU-4 and ROUGE-L of answers against references: the standard ones, and those of LifeAlign's published tables.

`bleu` and `rouge_l` are sacreBLEU's and rouge-score's (`pip install 'everalign[text-metrics]'`). The tables were made
by LLaMA-Factory instead, with nltk, jieba and rouge_chinese: BLEU over characters, which gives unrelated English
sentences about 10, and a ROUGE-L that keeps case and punctuation. `compat_bleu` and `compat_rouge_l` are these, number
for number, and need no package; only Chinese text needs jieba. All values are percentages.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from everalign.errors import InputError, not_installed

_CHINESE = re.compile("[\u4e00-\u9fd5]")
# jieba 0.42: what it hands to its dictionary and, of the rest, what separates.
_JIEBA_WORDS = re.compile("([\u4e00-\u9fd5a-zA-Z0-9+#&._%-]+)")
_JIEBA_SPACE = re.compile(r"(\r\n|\s)")
# The only words of its dictionary without Chinese characters, and how it cuts all else that has none.
_JIEBA_KNOWN = re.compile(r"(AT&T|[cC]#|[cC]\+\+)")
_JIEBA_LATIN = re.compile(r"([a-zA-Z0-9]+(?:\.\d+)?%?)")
# Where rouge_chinese ends a sentence; the texts have spaces between tokens by then.
_SENTENCE_ENDS = (
    (re.compile(r"([。！？?])([^”’])"), r"\1\n\2"),
    (re.compile(r"(\.{6})([^”’])"), r"\1\n\2"),
    (re.compile(r"(…{2})([^”’])"), r"\1\n\2"),
    (re.compile(r"([。！？?][”’])([^，。！？?])"), r"\1\n\2"),
)
_ORDER = 4


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Returns sacreBLEU's corpus BLEU-4 with its default tokenizer (13a).

    Raises:
        InputError: sacreBLEU is not installed, or there is not one reference for each of at least one answer.
    """
    return BleuCounts.of(answers, references).score(range(len(answers)))


@dataclass(frozen=True)
class BleuCounts:
    """What corpus BLEU is made of, answer by answer, so that the BLEU of any selection costs no second counting.

    Args:
        rows: for each answer 4 numbers of matching n-grams, 4 of n-grams, and the lengths of answer and reference.
    """

    rows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, answers: Sequence[str], references: Sequence[str]) -> "BleuCounts":
        """Counts; errors as in `bleu`."""
        _check(answers, references)
        counted = _sacrebleu()(effective_order=True)
        found = [counted.sentence_score(answer, [wanted]) for answer, wanted in zip(answers, references, strict=True)]
        return cls(tuple((*one.counts, *one.totals, one.sys_len, one.ref_len) for one in found))

    def score(self, numbers: Sequence[int]) -> float:
        """Returns the corpus BLEU of the answers of these numbers; one may be there twice."""
        weights = np.bincount(numbers, minlength=len(self.rows)).astype(np.float64)
        return float(self.scores(weights[None])[0])

    def scores(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns (B,) corpus BLEUs in which answer n counts as often as weights (B, N) say."""
        compute = _sacrebleu().compute_bleu
        sums = (weights @ np.array(self.rows)).round().astype(int).tolist()
        found = [compute(one[:_ORDER], one[_ORDER : 2 * _ORDER], *one[-2:], smooth_method="exp") for one in sums]
        return np.array([one.score for one in found])


def _sacrebleu() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise not_installed("BLEU", "sacrebleu", "text-metrics") from error
    return BLEU


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """Returns rouge-score's ROUGE-L F1 of each answer, without stemming.

    It lower-cases, and reads Latin letters and digits alone: of other scripts it is 0.

    Raises:
        InputError: rouge-score is not installed, or there is not one reference for each of at least one answer.
    """
    _check(answers, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise not_installed("ROUGE-L", "rouge-score", "text-metrics") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(answers, references, strict=True)
    return [100 * float(scorer.score(wanted, answer)["rougeL"].fmeasure) for answer, wanted in pairs]


def compat_bleu(answer: str, reference: str) -> float:
    """Returns nltk's `sentence_bleu` over characters with smoothing `method3`.

    The i-th order without a match counts as 2^-i matches; without a common character it is 0.
    """
    log_sum, unmatched = 0.0, 0
    for n in range(1, _ORDER + 1):
        found, wanted = (Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (answer, reference))
        matches, all_of_them = sum((found & wanted).values()), max(1, sum(found.values()))
        if not matches:
            if n == 1:
                return 0.0
            unmatched += 1
        log_sum += math.log((matches or 0.5**unmatched) / all_of_them) / _ORDER
    brevity = 0.0 if len(answer) > len(reference) else 1 - len(reference) / len(answer)
    return 100 * math.exp(brevity + log_sum)


def compat_rouge_l(answer: str, reference: str) -> float:
    """Returns rouge_chinese's ROUGE-L F1 of jieba's tokens, 0 where one of the texts has none.

    With a, r tokens and a longest common subsequence of l it is 2PR / (P + R + 1e-8), P = l / a, R = l / r. A line
    of spaces alone is a token that matches another such line, as it is there.
    """
    found, wanted = (_rouge_words(" ".join(jieba_tokens(text))) for text in (answer, reference))
    if found is None or wanted is None:
        return 0.0
    numbers: dict[str, int] = {}
    first, second = ([numbers.setdefault(word, len(numbers)) for word in words] for words in (found, wanted))
    common = LCSseq.similarity(first, second)
    precision, recall = common / len(found), common / len(wanted)
    return 100 * 2 * precision * recall / (precision + recall + 1e-8)


def _rouge_words(text: str) -> list[str] | None:
    """The words that rouge_chinese compares; None of a text without any."""
    if not text.split():
        return None
    for end, cut in _SENTENCE_ENDS:
        text = end.sub(cut, text)
    sentences = [" ".join(line.split()) for line in text.rstrip().split("\n") if line]
    return [word for sentence in sentences for word in sentence.split(" ")]


def jieba_tokens(text: str) -> list[str]:
    """Returns what `jieba.cut` does.

    Raises:
        InputError: there are Chinese characters in the text, and jieba is not installed.
    """
    if _CHINESE.search(text):
        try:
            import jieba
        except ImportError as error:
            raise not_installed("splitting Chinese text into words", "jieba", "text-metrics") from error
        return list(jieba.cut(text))
    tokens: list[str] = []
    # The pattern's group makes every second part one that matched.
    for number, part in enumerate(_JIEBA_WORDS.split(text)):
        if number % 2:
            known = _JIEBA_KNOWN.split(part)
            for i, piece in enumerate(known):
                tokens += [piece] if i % 2 else [token for token in _JIEBA_LATIN.split(piece) if token]
        else:
            for i, piece in enumerate(_JIEBA_SPACE.split(part)):
                tokens += [piece] if i % 2 else list(piece)
    return tokens


def _check(answers: Sequence[str], references: Sequence[str]) -> None:
    if not answers or len(answers) != len(references):
        raise InputError(
            f"answers: {len(answers)} of them and {len(references)} references; give one for each, and at least one"
        )
