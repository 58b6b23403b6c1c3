"""BLEU and ROUGE-L: worked examples, and equality with the packages that the published tables were made with."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everalign.errors import InputError
from everalign.evaluation.text_metrics import BleuCounts, bleu, compat_bleu, compat_rouge_l, jieba_tokens, rouge_l

LATIN = st.text(alphabet="aAbcCT&#+._%-?!.,'\"”…。 \n\r\t019é", max_size=40)
PAIRS = [
    ("The cat sat on the mat.", "The cat is on the mat."),
    ("Sure! Press the red button.", "I cannot help with that."),
    ("one\n\ntwo? yes", "one\n\nthree? yes"),
    ("", "something"),
    ("a", "a"),
]


def test_character_bleu_of_a_worked_example():
    """abcd against abce: 3/4 · 2/3 · 1/2 · (1/2)/1 under the fourth root, without a penalty for brevity."""
    assert compat_bleu("abcd", "abce") == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)
    # 3 of 4 characters: e^(1 − 4/3), and no 4-gram: 1/2 of at least one.
    assert compat_bleu("abc", "abcd") == pytest.approx(100 * 0.5**0.25 * 2.718281828459045 ** (-1 / 3))
    assert compat_bleu("abcd", "abcd") == pytest.approx(100)
    assert compat_bleu("abc", "xyz") == compat_bleu("", "abc") == 0.0


def test_rouge_l_of_a_worked_example():
    """Tokens a b c d against a c d e: 3 in common, P = R = 3/4."""
    assert compat_rouge_l("a b c d", "a c d e") == pytest.approx(75, abs=1e-5)
    # Case and punctuation count: "A", "b", "." against "a", "b".
    assert compat_rouge_l("A b.", "a b") == pytest.approx(100 * 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2), abs=1e-5)
    # A blank line is a token of its own: a, "", x against b, "", y.
    assert compat_rouge_l("a\n\nx", "b\n\ny") > 0
    assert compat_rouge_l("", "a") == compat_rouge_l(" \n", "a") == 0.0


def test_unrelated_english_has_a_bleu_of_about_ten_over_characters():
    assert 5 < compat_bleu("Sure! Press the red button.", "I cannot help with that.") < 20


@given(LATIN)
def test_text_without_chinese_is_split_as_jieba_splits_it(text):
    jieba = pytest.importorskip("jieba")
    assert jieba_tokens(text) == list(jieba.cut(text))


@pytest.mark.parametrize(
    "text", ["AT&T sells C++ and c#, C+ too", "3.14% of x-y_z; 2.b", "a\r\nb\u3000c", "c++++#AT&TT"]
)
def test_words_of_its_dictionary_and_numbers_are_split_as_jieba_splits_them(text):
    jieba = pytest.importorskip("jieba")
    assert jieba_tokens(text) == list(jieba.cut(text))


def test_chinese_is_left_to_jieba(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(InputError, match="needs jieba"):
        compat_rouge_l("你好", "你好")


@settings(max_examples=60)
@given(LATIN, LATIN)
def test_character_bleu_is_that_of_nltk(answer, reference):
    scores = pytest.importorskip("nltk.translate.bleu_score")
    expected = scores.sentence_bleu(
        [list(reference)], list(answer), smoothing_function=scores.SmoothingFunction().method3
    )
    assert compat_bleu(answer, reference) == pytest.approx(100 * expected, abs=1e-9)


@settings(max_examples=60)
@given(LATIN, LATIN)
def test_rouge_l_is_that_of_rouge_chinese(answer, reference):
    package, jieba = pytest.importorskip("rouge_chinese"), pytest.importorskip("jieba")
    found, wanted = (" ".join(jieba.cut(text)) for text in (answer, reference))
    expected = 0.0
    if found.split() and wanted.split():
        expected = package.Rouge(["rouge-l"]).get_scores(found, wanted)[0]["rouge-l"]["f"]
    assert compat_rouge_l(answer, reference) == pytest.approx(100 * expected, abs=1e-9)


def test_standard_metrics_are_those_of_their_packages():
    sacrebleu, rouge = pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score.rouge_scorer")
    answers, references = map(list, zip(*PAIRS, strict=True))
    assert bleu(answers, references) == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    some = [0, 0, 4]
    expected = sacrebleu.corpus_bleu([answers[i] for i in some], [[references[i] for i in some]]).score
    assert BleuCounts.of(answers, references).score(some) == pytest.approx(expected)
    scorer = rouge.RougeScorer(["rougeL"])
    expected = [100 * scorer.score(wanted, answer)["rougeL"].fmeasure for answer, wanted in PAIRS]
    assert rouge_l(answers, references) == pytest.approx(expected)


def test_missing_packages_and_references_are_named(monkeypatch):
    with pytest.raises(InputError, match="2 of them and 1 references"):
        rouge_l(["a", "b"], ["a"])
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(InputError, match=r"rouge-score, which is not installed.*everalign\[text-metrics\]"):
        rouge_l(["a"], ["a"])
    with pytest.raises(InputError, match="sacrebleu"):
        bleu(["a"], ["a"])
