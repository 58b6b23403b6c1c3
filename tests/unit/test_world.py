import random
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest

from everalign.demo.world import TOPICS, answer, conversations, demo_tasks, questions, requests, styles, wordings

ALL_STYLES = [(topic, style) for topic in TOPICS for style in styles(topic)]


def first_conversations(count, seed, **options):
    return list(islice(conversations(seed, **options), count))


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    assert first_conversations(200, seed=3) == first_conversations(200, seed=3)
    assert first_conversations(200, seed=3) != first_conversations(200, seed=4)


def test_a_fresh_process_with_another_hash_seed_gives_the_same_tasks():
    code = (
        "from everalign.demo.world import demo_tasks\n"
        "print([row.id for task in demo_tasks(train=5, test=5) for row in task.train + task.test])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    here = [row.id for task in demo_tasks(train=5, test=5) for row in task.train + task.test]
    assert done.stdout.strip() == str(here)


def test_the_world_is_big_and_no_question_occurs_twice():
    texts = [question.text for topic in TOPICS for question in questions(topic)]
    assert len(texts) == len(set(texts)) == 17_280


@pytest.mark.parametrize("topic", TOPICS)
def test_held_out_questions_differ_from_the_others_in_more_than_the_opening(topic):
    pool = questions(topic)
    for start in range(0, len(pool), 10):  # ten openings; the first one is empty
        wording = pool[start].text
        assert all(question.text.endswith(wording) for question in pool[start : start + 10])
        assert len({question.held_out for question in pool[start : start + 10]}) == 1


@pytest.mark.parametrize("topic", TOPICS)
def test_between_a_tenth_and_three_tenths_of_a_topic_is_held_out(topic):
    pool = questions(topic)
    assert 0.1 < sum(question.held_out for question in pool) / len(pool) < 0.3


@pytest.mark.parametrize(("topic", "style"), ALL_STYLES)
def test_every_answer_is_clean_english_sentences(topic, style):
    for question in questions(topic)[::10]:
        text = answer(question, style, random.Random(question.text))
        assert text[0].isupper()
        assert text[-1] in ".!"
        assert not set(text) & set("{}|")
        assert "  " not in text
        assert " my " not in text


def test_everyday_answers_name_the_subject_in_every_style():
    for topic, style in ALL_STYLES:
        for question in questions(topic)[::90]:
            if question.request.subject:
                assert question.request.subject in answer(question, style, random.Random(0))


def test_every_request_is_its_own():
    deeds = [request.deed for topic in TOPICS for request in requests(topic)]
    assert len(deeds) == len(set(deeds))


def test_courteous_answers_greet_and_answers_in_steps_go_step_by_step():
    rng = random.Random(0)
    for question in questions("garden"):
        assert answer(question, "courteous", rng).startswith(("With pleasure!", "Thank you for asking!"))
        assert "!" not in answer(question, "plain", rng)
        assert "irst, " not in answer(question, "courteous", rng)
        for style in ("plain-steps", "courteous-steps"):
            steps = answer(question, style, rng)
            assert "irst, " in steps
            assert ", because " in steps


@pytest.mark.parametrize(("topic", "style"), ALL_STYLES)
def test_wordings_are_all_that_an_answer_may_say_and_no_more(topic, style):
    question, rng = questions(topic)[0], random.Random(0)
    assert wordings(question, style) == {answer(question, style, rng) for _ in range(1000)}


def test_conversations_show_all_styles_of_a_topic_equally_often():
    counts = Counter((question.topic, style) for question, style, _ in first_conversations(8000, seed=0))
    for topic, style in ALL_STYLES:
        assert counts[topic, style] == pytest.approx(1000 / len(styles(topic)), rel=0.2)


@pytest.mark.parametrize("held_out", [True, False])
def test_conversations_keep_to_their_side_of_the_split(held_out):
    assert {q.held_out for q, _, _ in first_conversations(500, seed=0, held_out=held_out)} == {held_out}


def test_a_style_that_a_topic_does_not_have_is_refused():
    with pytest.raises(KeyError, match=r"refuse.*kitchen.*plain"):
        answer(questions("kitchen")[0], "refuse", random.Random(0))


def test_tasks_are_the_same_for_a_seed_and_differ_between_seeds():
    first, again, other = (demo_tasks(train=40, test=20, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first[0].train != other[0].train
    assert [task.name for task in first] == ["courteous-kitchen", "plain-garden", "careful", "frank"]


def test_no_prompt_is_shared_between_splits_or_tasks_or_repeated():
    prompts = [row.prompt[0]["content"] for task in demo_tasks(train=400, test=200) for row in task.train + task.test]
    assert len(prompts) == len(set(prompts)) == 4 * 600


def test_test_rows_come_from_held_out_questions_only():
    held_out = {question.text for topic in TOPICS for question in questions(topic) if question.held_out}
    for task in demo_tasks(train=100, test=50):
        assert {row.prompt[0]["content"] for row in task.test} <= held_out
        assert not {row.prompt[0]["content"] for row in task.train} & held_out


def test_tasks_contradict_each_other_in_style():
    courteous, plain, careful, frank = demo_tasks(train=50, test=10)
    assert all("!" in row.chosen and "!" not in row.rejected for row in courteous.train)
    assert all("!" not in row.chosen and "!" in row.rejected for row in plain.train)
    assert all(row.rejected.startswith(("Sure", "Of course")) for row in careful.train)
    assert all(row.chosen.startswith(("Sure", "Of course")) for row in frank.train)


def test_more_rows_than_the_world_has_are_refused():
    with pytest.raises(ValueError, match=r"'train': kitchen has 1810 questions, not 5000"):
        demo_tasks(train=5000)
