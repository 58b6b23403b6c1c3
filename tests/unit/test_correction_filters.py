"""Filters: every reason to leave a correction out, counted, and what stays."""

import random

import pytest

from everalign.correction import filter_corrections, get_template
from everalign.correction.checks import REASONS, jaccard, near_duplicates
from everalign.data import CorrectionSet
from everalign.errors import InputError

LONG = "The quick brown fox jumps over the lazy dog while nobody is looking at it at all"


def rows(*triples):
    return CorrectionSet.of(
        [dict(zip(("question", "answer", "correction"), triple, strict=True)) for triple in triples], "mine"
    )


def dropped(*triples, **options):
    return dict(filter_corrections(rows(*triples), **options).dropped)


@pytest.mark.parametrize(
    ("correction", "reason"),
    [
        ("...", "empty"),
        ("\u200b—!", "empty"),
        ("long " * 4000, "too long"),
        ("Fine.\n[[correction]]\nFine.", "template echo"),
        ("I'm sorry, but I cannot rewrite this answer.", "refusal of the task"),
        ("I am unable to make it more helpful or correct the given response", "refusal of the task"),
        ("No answer was provided. Please send one.", "refusal of the task"),
        ("Please provide the original answer so that I can improve it.", "refusal of the task"),
    ],
)
def test_each_fault_is_counted_by_its_reason(correction, reason):
    found = filter_corrections(rows(("q", "a", correction), ("q", "b", "fine")))
    assert dict(found.dropped) == {reason: 1}
    assert [row.answer for row in found.rows] == ["b"]
    assert found.one_line() == f"1 corrections kept, 1 left out (1 {reason})"


@pytest.mark.parametrize(
    "correction",
    [
        "😀",
        "+",
        "I'm sorry, but I cannot help with that.",
        "You cannot answer this without a map.",
        "##Correction: ASSISTANT:",
    ],
)
def test_what_answers_the_question_stays(correction):
    assert dropped(("q", "a", correction)) == {}


def test_an_unchanged_answer_stays():
    text = "I cannot edit the text of a law."
    found = filter_corrections(rows(("q", text, text), ("q", "a", "a")))
    assert len(found.rows) == 2
    assert found.rows.source == "mine"
    assert found.one_line() == "2 corrections kept, 0 left out"


def test_the_marks_are_those_of_the_template():
    assert dropped(("q", "a", "x ASSISTANT: y"), template=get_template("aligner-1")) == {"template echo": 1}


def test_a_duplicate_differs_by_case_punctuation_and_space_at_most():
    first = ("Why, then?", "No idea!", "Because.")
    same = ("why then", "no  idea", "BECAUSE")
    assert dropped(first, same, ("Why?", *first[1:]), ("Why then", "No clue", "Because")) == {"duplicate": 1}
    assert dropped(("q", "a", "..."), ("q", "a", "...")) == {"empty": 2}


def test_a_near_duplicate_shares_its_question():
    near = LONG.replace("lazy", "lazi")
    other = " ".join(reversed(LONG.split()))
    assert dropped(("q", LONG, other), ("Q!", near, other)) == {"near-duplicate": 1}
    assert dropped(("q", LONG, other), ("r", near, other)) == {}
    assert dropped(("q", LONG, other), ("q", near, other), near=1.0) == {}
    assert dropped(("q", LONG, other), ("q", LONG, LONG)) == {}
    # Of what is left out, nothing counts as a copy.
    assert dropped(("q", LONG, "..."), ("q", near, other)) == {"empty": 1}


@pytest.mark.parametrize("near", [0.5, 0.75, 0.9, 1.0])
def test_comparing_few_sets_finds_what_comparing_all_would(near):
    rng = random.Random(0)
    sets = [frozenset(rng.sample("abcdefghijklmnopqrst", rng.randint(3, 20))) for _ in range(200)]
    kept, expected = [], []
    for i, members in enumerate(sets):
        (expected if any(jaccard(members, sets[j]) >= near for j in kept) else kept).append(i)
    assert list(near_duplicates(sets, near)) == expected
    assert expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"longest": 0}, "longest: must be at least 1 character, found 0"),
        ({"near": 0}, "near: must be above 0 and at most 1, found 0"),
        ({"near": 1.5}, "near: must be above 0 and at most 1, found 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        filter_corrections(rows(("q", "a", "b")), **options)


def test_every_reason_is_listed():
    assert len(set(REASONS)) == 6
