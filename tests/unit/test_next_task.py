"""Feedback as the next task: which rows it gives, and what keeps a few from teaching everybody."""

from collections import Counter
from dataclasses import asdict
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everalign.data import Correction, CorrectionSet, Preference, PreferenceSet, Scored, ScoredSet
from everalign.errors import InputError
from everalign.serving.feedback.task import NextTaskOptions, NotEnoughFeedback, build_task, cap_for_share, rows_of
from everalign.serving.store import FeedbackStore
from stores_for_tests import KEY, OTHER_KEY, exchange, feedback, later

A, B, C, D, E = (letter * 12 for letter in "abcde")
NO, YES, EDIT = "No, not at all.", "Yes, it is.", "Yes: 35 grams a litre."
QUESTION = "Is the sea salty?"

_numbers = count()


def said(key=A, question=QUESTION, original=NO, returned=YES, at=0, messages=None, **what):
    """An exchange of a key, and feedback on it."""
    id = f"c{next(_numbers)}"
    asked = {"question": question} if messages is None else {"messages": messages}
    answered = exchange(id, key_id=key, original=original, returned=returned, **asked)
    return answered, feedback(id, key_id=key, created=later(at), **what)


def edits(number, key=A, start=0, **what):
    """Edits of answers to as many questions, one after another."""
    return [
        said(
            key,
            f"How deep is sea number {i}?",
            f"Sea {i} has no bottom.",
            f"Sea {i} is deep.",
            at=i,
            edited_text=f"{i * 37} metres, at the {key}.",
            **what,
        )
        for i in range(start, start + number)
    ]


def options(kind="preferences", **given):
    return NextTaskOptions(**{"kind": kind, "minimum": 1, "held_out": 0.0, "key_share": 1.0, **given})


def task_of(found, kind="preferences", **given):
    return build_task(found, options(kind, **given))


def left_out(found, kind="preferences", **given):
    """What is left out, of whatever there is."""
    try:
        return dict(task_of(found, kind, **given).report.left_out)
    except NotEnoughFeedback as error:
        return dict(error.report.left_out)


PROMPT = ({"role": "user", "content": QUESTION},)


@pytest.mark.parametrize(
    ("what", "pair", "correction", "group"),
    [
        ({"edited_text": EDIT}, (EDIT, YES), (NO, EDIT), {EDIT: 1.0, YES: 0.0}),
        ({"edited_text": EDIT, "rating": 1, "preferred": "corrected"}, (EDIT, YES), (NO, EDIT), {EDIT: 1.0, YES: 0.0}),
        ({"edited_text": EDIT, "returned": NO}, (EDIT, NO), (NO, EDIT), {EDIT: 1.0, NO: 0.0}),
        ({"preferred": "corrected"}, (YES, NO), (NO, YES), {YES: 1.0, NO: 0.0}),
        ({"preferred": "original"}, (NO, YES), (NO, NO), {YES: 0.0, NO: 1.0}),
        ({"preferred": "original", "edited_text": f" {YES}\n"}, (NO, YES), (NO, NO), {YES: 0.0, NO: 1.0}),
        ({"preferred": "neither"}, None, None, None),
        ({"preferred": "corrected", "returned": NO}, None, None, None),
        ({"preferred": "corrected", "returned": NO, "rating": 1}, None, (NO, NO), None),
        ({"rating": 1, "returned": NO}, None, (NO, NO), None),
        ({"rating": 1}, None, None, None),
        ({"rating": -1, "returned": NO}, None, None, None),
        ({"rating": 0, "returned": NO}, None, None, None),
        ({"comment": "hm"}, None, None, None),
        ({"edited_text": EDIT, "returned": ""}, None, (NO, EDIT), None),
        ({"edited_text": EDIT, "original": ""}, (EDIT, YES), None, {EDIT: 1.0, YES: 0.0}),
        ({"preferred": "corrected", "original": " "}, None, None, None),
    ],
)
def test_what_one_judgement_gives(what, pair, correction, group):
    found = [said(**what)]
    assert list(rows_of(found, "preferences")[0]) == ([] if pair is None else [Preference(PROMPT, *pair)])
    assert list(rows_of(found, "corrections")[0]) == ([] if correction is None else [Correction(PROMPT, *correction)])
    assert [
        (row.prompt, dict(zip(row.completions, row.rewards, strict=True))) for row in rows_of(found, "scored")[0]
    ] == ([] if group is None else [(PROMPT, group)])


def test_ratings_of_several_answers_are_a_scored_group():
    found = [
        said(A, returned="One.", rating=1),
        said(A, returned="Two.", rating=-1),
        said(A, returned="Three.", rating=0),
        said(A, "  is the SEA salty?", returned="One.", rating=1),
    ]
    rows, left = rows_of(found, "scored")
    assert list(rows) == [Scored(PROMPT, ("One.", "Two.", "Three."), (1.0, 0.0, 0.5))]
    assert left == Counter()
    assert rows_of(found[:1], "scored")[1] == {"one answer alone": 1}


def test_a_key_counts_once_in_a_reward_however_many_users_it_names():
    found = [said(A, returned="One.", rating=1, user=f"user-{i}") for i in range(8)]
    found += [said(B, returned="One.", rating=0), said(B, returned="Two.", rating=-1, at=1)]
    assert task_of(found, "scored").rows[0].rewards == (0.75, 0.0)


def test_messages_are_read_as_text_where_they_are_text():
    parts = [{"type": "text", "text": "Is the sea "}, {"type": "text", "text": "salty?"}]
    found = said(
        messages=({"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}),
        rating=1,
        edited_text=EDIT,
    )
    (row,) = rows_of([found], "preferences")[0]
    assert row.prompt == ({"role": "system", "content": "Be brief."}, *PROMPT)


@pytest.mark.parametrize(
    "messages",
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x"}}]},),
        ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": "The"}),
        ({"role": "user", "content": QUESTION}, {"role": "tool", "content": "3", "tool_call_id": "x"}),
        ({"role": "user", "content": ""},),
        ({"role": "user"},),
    ],
)
def test_what_is_no_question_in_text_is_left_out(messages):
    assert left_out([said(messages=messages, edited_text=EDIT)]) == {"no question in text": 1}
    assert rows_of([said(messages=messages, edited_text=EDIT)], "scored")[1] == {"no question in text": 1}


def test_the_same_row_twice_is_one_and_both_are_learned():
    found = [said(A, edited_text=EDIT), said(B, edited_text=EDIT), said(B, edited_text="Yes: 35 grams  a litre!", at=1)]
    found.append(said(A, "Is the lake salty?", edited_text=EDIT))
    task = task_of(found)
    assert len(task.rows) == 2
    assert task.report.left_out == {"duplicate": 2}
    assert set(task.feedback_ids) == {given.id for _, given in found}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"edited_text": "x" * 101}, "too long"),
        ({"edited_text": EDIT, "question": "x" * 101}, "too long"),
        ({"edited_text": "..."}, "empty"),
        ({"edited_text": "[[correction]] Yes"}, "template echo"),
        ({"edited_text": "I cannot rewrite this answer."}, "refusal of the task"),
    ],
)
def test_a_row_that_teaches_nothing_good_is_left_out(what, reason):
    found = said(**what)
    assert left_out([found, said(edited_text=EDIT)], longest=100) == {reason: 1}
    assert found[1].id not in task_of([found, said(edited_text=EDIT)], longest=100).feedback_ids


def test_a_long_answer_is_left_out_of_a_group():
    found = [said(returned="One.", rating=1), said(returned="x" * 101, rating=-1)]
    assert left_out(found, "scored", longest=100) == {"too long": 2}


# Guards against poisoning.


def test_one_key_gives_no_more_than_its_share():
    poison, good = edits(40, A, start=100), edits(5, B) + edits(5, C, start=50)
    free = task_of(poison + good)
    assert free.report.keys == {A: 40, B: 5, C: 5}
    guarded = task_of(poison + good, key_share=0.4)
    assert guarded.report.keys == {A: 6, B: 5, C: 5}
    assert guarded.report.left_out == {"too many of its key": 34}
    # The oldest stay, and the others wait for a later task.
    assert set(guarded.feedback_ids) == {found.id for _, found in poison[:6] + good}


def test_one_key_does_not_decide_what_is_tested_on():
    task = task_of(edits(200, A) + edits(40, B, start=200), held_out=0.3, key_share=0.5)
    whose = Counter(answer[-13:-1] for answer in (row.chosen for row in task.test))
    assert set(whose) == {A, B}
    assert whose[A] == whose[B]


def test_what_repeats_a_row_that_has_to_wait_waits_with_it():
    found = edits(3, A) + edits(2, B, start=10)
    again = said(
        C,
        "How deep is sea number 2?",
        "Sea 2 has no bottom.",
        "Sea 2 is deep.",
        at=9,
        edited_text=found[2][1].edited_text,
    )
    task = task_of([*found, again], key_share=0.5)
    assert task.report.left_out == {"too many of its key": 1, "duplicate": 1}
    assert set(task.feedback_ids) == {given.id for _, given in [*found[:2], *found[3:]]}


def test_too_few_keys_are_told_what_to_do():
    with pytest.raises(
        NotEnoughFeedback, match=r"makes 0 preferences, and 5 are wanted: with key_share 0.4 at least 3 k"
    ):
        task_of(edits(40, A) + edits(40, B, start=50), key_share=0.4, minimum=5)


def test_without_keys_there_is_nobody_to_tell_apart():
    assert len(task_of(edits(9, "local"), key_share=0.1).rows) == 9
    with pytest.raises(NotEnoughFeedback):
        task_of(edits(9, "local") + edits(1, A, start=20), key_share=0.1)


@pytest.mark.parametrize(
    ("votes", "rows", "reasons"),
    [
        ("A+ B+ C-", "corrected", {"outvoted": 1}),
        ("A+ B-", None, {"contradictory": 2}),
        ("A+ B+ C- D- E+", None, {"contradictory": 5}),
        ("A- A- A- A- B+ C+", "corrected", {"outvoted": 4}),
        ("A+ A- B+", "corrected", {"outvoted": 1}),
        ("A+ A+ A-", "corrected", {"outvoted": 1}),
        ("A+ A-", None, {"contradictory": 2}),
    ],
)
def test_keys_that_contradict_one_another_vote(votes, rows, reasons):
    """Each is a key that prefers the corrected (+) or the original answer (-); a key's users share its one vote."""
    keys = {"A": A, "B": B, "C": C, "D": D, "E": E}
    found = [
        said(keys[vote[0]], preferred="corrected" if vote[1] == "+" else "original", user=f"u{i}", at=i)
        for i, vote in enumerate(votes.split())
    ]
    kept = {name: number for name, number in left_out(found, agreement=2 / 3).items() if name != "duplicate"}
    assert kept == reasons
    if rows is None:
        with pytest.raises(NotEnoughFeedback):
            task_of(found)
    else:
        assert list(task_of(found).rows) == [Preference(PROMPT, YES, NO)]


VARIANTS = (
    "is the SEA salty?",
    "Is\u200b the sea\ufeff salty?",
    "Is the se\u00ada salty",
    "Ｉｓ the\u00a0sea  salty ?",
    "Is the sea salty\U000e0041?!",
    "Is the sea salty\ufe0f?",
)


@pytest.mark.parametrize("kind", ["preferences", "corrections"])
def test_a_question_in_other_letters_or_with_signs_unseen_is_the_same(kind):
    found = [said(question=text, at=i, edited_text=EDIT) for i, text in enumerate((QUESTION, *VARIANTS))]
    task = task_of(found, kind)
    assert len(task.rows) == 1
    assert task.report.left_out == {"duplicate": len(VARIANTS)}


@pytest.mark.parametrize("question", VARIANTS)
def test_votes_on_a_question_in_other_letters_count(question):
    poison = said(A, question, edited_text="Bitter, always.")
    good = [said(key, rating=1) for key in (B, C)]
    assert left_out([poison, *good], "corrections")["outvoted"] == 1
    # Nor does an answer become another one by a sign that nobody sees.
    hidden = said(A, question, returned=f"{YES}\u200b", edited_text="Bitter, always.")
    assert left_out([hidden, *good], "corrections")["outvoted"] == 1


@pytest.mark.parametrize("kind", ["preferences", "corrections"])
@pytest.mark.parametrize(
    ("edits_by_key", "rows", "reasons"),
    [
        ([(A, "35 grams."), (B, "350 grams.")], [], {"contradictory": 2}),
        ([(A, "35 grams."), (B, "350 grams."), (C, "350 GRAMS")], ["350 grams."], {"outvoted": 1, "duplicate": 1}),
        ([(A, "One."), (B, "Two."), (C, "Three.")], [], {"contradictory": 3}),
        ([(A, "One.")] * 5 + [(B, "Two."), (C, "Two.")], ["Two."], {"outvoted": 5, "duplicate": 1}),
        ([(A, "One."), (B, "One\u200b.")], ["One."], {"duplicate": 1}),
    ],
)
def test_edits_of_one_answer_into_different_ones_are_a_disagreement_of_keys(kind, edits_by_key, rows, reasons):
    found = [said(key, at=i, returned=NO, edited_text=text) for i, (key, text) in enumerate(edits_by_key)]
    made = [one.correction if kind == "corrections" else one.chosen for one in rows_or_none(found, kind)]
    assert made == rows
    assert left_out(found, kind) == reasons


def rows_or_none(found, kind):
    try:
        return list(task_of(found, kind).rows)
    except NotEnoughFeedback:
        return []


def test_an_edit_and_an_answer_left_as_it_is_are_a_disagreement_of_keys():
    found = [said(A, preferred="original"), said(B, edited_text=EDIT)]
    assert left_out(found, "corrections") == {"contradictory": 2}


def test_an_edit_of_an_answer_that_others_found_good_is_outvoted():
    poison = said(A, original=YES, edited_text="Buy our salt!")
    good = [said(key, original=YES, rating=1) for key in (B, C)]
    assert left_out([poison, *good], "corrections")["outvoted"] == 1
    assert left_out([poison, *good], "scored")["outvoted"] == 1


@pytest.mark.parametrize("kind", ["preferences", "corrections"])
def test_edits_to_and_fro_cancel_out(kind):
    there, back = (
        said(key, original=one, returned=one, edited_text=other) for key, one, other in ((A, NO, YES), (B, YES, NO))
    )
    assert left_out([there, back], kind) == {"contradictory": 2}
    third = said(C, original=NO, returned=NO, edited_text=YES)
    assert left_out([there, back, third], kind) == {"outvoted": 1, "duplicate": 1}


# What a task is made of.


def test_rows_of_one_kind_and_tag_do_not_crowd_out_the_others():
    found = edits(30, tags=("tone",)) + edits(2, start=40, tags=("fact",)) + edits(1, start=50)
    task = task_of(found, balance=1.5)
    assert task.report.left_out == {"too many of its kind and tags": 14}
    assert len(task.rows) == 19
    assert len(task_of(found, balance=3).rows) == 33


def test_unchanged_answers_have_a_share():
    good = [said(A, f"Is lake {i} deep?", f"Lake {i}: yes.", f"Lake {i}: yes.", rating=1, at=i) for i in range(9)]
    task = task_of(edits(3) + good, "corrections", identity=0.4)
    assert task.report.origins == {"edit": 3, "identity": 2}
    assert task.report.left_out == {"too many unchanged answers": 7}
    assert sum(row.is_identity for row in task.rows) == 2


def test_a_minimum_counts_what_is_left():
    with pytest.raises(
        NotEnoughFeedback, match=r"makes 3 preferences, and 4 are wanted: wait .*4 judgements.*1 duplicate"
    ):
        task_of([*edits(3), *edits(1)], minimum=4)
    assert len(task_of(edits(4), minimum=4).rows) == 4
    with pytest.raises(NotEnoughFeedback, match=r"makes 0 preferences"):
        task_of([])


def test_questions_are_held_out_once_and_for_all():
    found = edits(200)
    task = task_of(found, held_out=0.2)
    train, test = ({row.prompt[0]["content"] for row in rows} for rows in (task.rows, task.test))
    assert train.isdisjoint(test)
    assert len(train | test) == 200
    assert 20 <= len(test) <= 60
    assert len(task.feedback_ids) == 200
    assert (task.report.rows, task.report.held_out) == (len(task.rows), len(task.test))
    # The same questions, asked later and by another key in other letters, are on the same side.
    upper = [
        said(C, f"HOW deep  is sea number {i}?", "None.", "Some.", edited_text=f"{i} and more") for i in range(200)
    ]
    again = task_of(upper, held_out=0.2)
    assert {row.prompt[0]["content"].casefold().replace("  ", " ") for row in again.test} == {
        text.casefold() for text in test
    }
    assert task_of(found, held_out=0.0).test is None


def test_a_task_that_nothing_could_judge_is_none():
    with pytest.raises(NotEnoughFeedback, match=r"makes no preferences to test on \(held_out 0.001\)"):
        task_of(edits(5), held_out=0.001)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "rewards"},
        {"minimum": 0},
        {"longest": 0},
        {"key_share": 0},
        {"key_share": 1.1},
        {"agreement": 0},
        {"agreement": float("nan")},
        {"balance": 0.5},
        {"balance": float("inf")},
        {"identity": 1},
        {"held_out": -0.1},
        {"held_out": 1},
    ],
)
def test_an_option_out_of_its_range_is_named(bad):
    with pytest.raises(InputError, match=f"^{next(iter(bad))} must be"):
        NextTaskOptions(**bad)


def test_a_kind_of_rows_that_is_none_is_named():
    with pytest.raises(InputError, match=r"^kind: must be one of preferences, corrections, scored, found 'edits'"):
        rows_of([], "edits")


def test_sets_are_of_their_kind():
    kinds = {"preferences": PreferenceSet, "corrections": CorrectionSet, "scored": ScoredSet}
    for kind, expected in kinds.items():
        task = task_of(edits(30), kind, held_out=0.3)
        assert (type(task.rows), type(task.test)) == (expected, expected)
        assert task.rows.source == "feedback"


def test_learned_feedback_gives_no_second_task(address):
    with FeedbackStore.open(address) as store:
        for answered, given_of_it in edits(20, KEY) + edits(20, OTHER_KEY, start=30):
            store.add_exchange(answered)
            store.add_feedback(given_of_it)
        task = build_task(store.feedback(unlearned=True), options(key_share=0.5, minimum=30))
        store.mark_learned(task.feedback_ids, "feedback-1")
        with pytest.raises(NotEnoughFeedback):
            build_task(store.feedback(unlearned=True), options())
        answered, given_of_it = said(KEY, edited_text=EDIT)
        store.add_exchange(answered)
        store.add_feedback(given_of_it)
        assert len(build_task(store.feedback(unlearned=True), options()).rows) == 1
        assert len(rows_of(store.feedback(), "preferences")[0]) == 41


def test_the_most_of_each_is_the_largest_that_keeps_the_share():
    assert cap_for_share([100, 100, 100], 0.5) == 100
    assert cap_for_share([100, 10, 10], 0.5) == 20
    assert cap_for_share([100, 1], 0.5) == 1
    assert cap_for_share([100], 0.5) == 0
    assert cap_for_share([], 0.5) == 0
    assert cap_for_share([7], 1.0) == 7


feedbacks = st.lists(
    st.builds(
        said,
        key=st.sampled_from([A, B, C]),
        question=st.sampled_from(["Salty?", "salty?", "Deep?", "Wide?"]),
        original=st.sampled_from([NO, YES, "", "Perhaps it is."]),
        returned=st.sampled_from([NO, YES, "", "Well, who knows?"]),
        at=st.integers(0, 3),
        user=st.sampled_from([None, "u", "v"]),
        rating=st.sampled_from([-1, 0, 1]),
        preferred=st.sampled_from([None, None, "original", "corrected", "neither"]),
        edited_text=st.sampled_from([None, None, EDIT, NO, "..."]),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(feedbacks, st.sampled_from(["preferences", "corrections", "scored"]), st.sampled_from([0.4, 0.5, 1.0]))
def test_every_judgement_is_in_one_row_or_left_out_for_one_reason(found, kind, share):
    try:
        task = build_task(found, NextTaskOptions(kind=kind, minimum=1, held_out=0.3, key_share=share))
    except NotEnoughFeedback:
        return
    report = task.report
    assert report.feedback == len(found)
    if kind != "scored":
        assert report.rows + report.held_out + sum(report.left_out.values()) == len(found)
    assert report.rows == len(task.rows) == len({row.id for row in task.rows})
    assert all(number <= max(share * (report.rows + report.held_out), 0) for number in report.keys.values())
    assert asdict(
        build_task(found[::-1], NextTaskOptions(kind=kind, minimum=1, key_share=share, held_out=0.3)).report
    ) == asdict(report)
