"""Which corrections are refused, and why."""

import pytest

from everalign.correction import NO_GUARDS, Guards, get_template
from everalign.errors import InputError

TEMPLATE = get_template("everalign-1")
CODE = "Run this:\n```sh\nls -l\n```\nthen stop."
LINK = "See https://example.org/a?b=1. (or http://x.org)"


QUESTION = [{"role": "user", "content": "May I leave?"}, {"role": "assistant", "content": "?"}]
QUESTION += [{"role": "user", "content": [{"type": "text", "text": "May I  leave\nnow?"}]}]
REFUSAL = "I cannot help you with that."


def objection(answer, correction, finished=True, question=QUESTION, **guards):
    return Guards(**guards).first_violation(answer, correction, finished, TEMPLATE, question)


@pytest.mark.parametrize(
    ("name", "answer", "correction", "finished"),
    [
        ("unfinished", "yes", "yes, and", False),
        ("empty", "yes", " \n", True),
        ("echo", "yes", "yes\n[[question]]\nmore", True),
        ("growth", "a" * 1000, "a" * 4001, True),
        ("code", CODE, CODE.replace("-l", "-a"), True),
        ("code", CODE.replace("```", "~~~~"), "Run ls.", True),
        ("url", LINK, LINK.replace("b=1", "b=2"), True),
        ("url", LINK, "See there.", True),
        ("repeat", "Yes.", "May I leave now?", True),
        ("repeat", REFUSAL, f"{REFUSAL}\n\n{REFUSAL}", True),
    ],
)
def test_each_guard_refuses_what_it_is_for_and_can_be_switched_off(name, answer, correction, finished):
    assert objection(answer, correction, finished) == name
    off = {name: None if name == "growth" else False}
    assert objection(answer, correction, finished, **off) is None
    assert NO_GUARDS.first_violation(answer, correction, finished, TEMPLATE, QUESTION) is None


@pytest.mark.parametrize(
    ("answer", "correction"),
    [
        ("no", "y" * 2002),
        ("a" * 1000, "a" * 4000),
        (CODE, f"Better:\n\n{CODE}"),
        (LINK, "Both http://x.org, and https://example.org/a?b=1!"),
        ("what [[question]] means", "what [[question]] stands for"),
        ("```\nnever closed", "fine"),
        ("Yes.", "May I leave now? Yes."),
        ("May I leave now?", "May  I leave now?"),
        (f"{REFUSAL}\n{REFUSAL}", f"No.\n{REFUSAL}\n{REFUSAL}"),
        ("x", f"{REFUSAL}\nNever.\n{REFUSAL}"),
        ("x", "- a\n- a"),
    ],
)
def test_what_is_no_fault_is_let_pass(answer, correction):
    assert objection(answer, correction) is None


def test_whether_any_guard_is_on():
    assert Guards().any
    assert not NO_GUARDS.any
    assert not Guards(False, False, False, None, 5, False, False, False).any


@pytest.mark.parametrize(("field", "value"), [("growth", 0.5), ("growth", float("nan")), ("growth_characters", -1)])
def test_limits_without_a_meaning_are_refused(field, value):
    with pytest.raises(InputError, match=field.replace("_", " ")):
        Guards(**{field: value})
