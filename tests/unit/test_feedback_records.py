"""Exchanges and feedback: every field is checked, and the message names it."""

from datetime import datetime

import pytest

from everalign.errors import InputError
from stores_for_tests import NOW, exchange, feedback


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"id": ""}, r"field 'id': is empty"),
        ({"id": 3}, r"field 'id': must be text, found a number"),
        ({"id": "x" * 257}, r"field 'id': 257 characters; at most 256"),
        ({"key_id": " "}, r"field 'key_id': is empty"),
        ({"upstream": None}, r"field 'upstream': must be text, found null"),
        ({"model": "a\0b"}, r"field 'model': has the character U\+0000 at 2; remove it"),
        ({"reason": ""}, r"field 'reason': is empty"),
        ({"corrector": 3}, r"field 'corrector': must be text"),
        ({"template": "x" * 300}, r"field 'template': 300 characters"),
        ({"original": None}, r"field 'original': must be text, found null"),
        ({"returned": "\ud800"}, r"field 'returned': half a surrogate pair at character 1"),
        ({"returned": "ab\0"}, r"field 'returned': has the character U\+0000 at 3"),
        ({"outcome": "corrected"}, r"field 'outcome': must be one of applied, unchanged, skipped, found 'corrected'"),
        ({"mode": None}, r"field 'mode': must be one of off, shadow, correct, strict, found None"),
        ({"created": "2026-01-01"}, r"field 'created': must be a datetime, found text"),
        ({"created": datetime(2026, 1, 1)}, r"field 'created': has no time zone; give it in UTC"),
        ({"messages": "hi"}, r"field 'messages': must be a list of messages, found text"),
        ({"messages": ()}, r"field 'messages': the list is empty"),
        ({"messages": ({"role": "user"}, "hi")}, r"field 'messages\[1\]': must be an object with 'role', found text"),
        ({"messages": ({"content": "hi"},)}, r"field 'messages\[0\]': must be an object with 'role'"),
        ({"messages": ({"role": "user", "content": {1, 2}},)}, r"field 'messages\[0\]': is not JSON"),
        ({"messages": ({"role": "user", "content": "\udfff"},)}, r"field 'messages\[0\]': half a surrogate pair"),
        ({"usage": None}, r"field 'usage': must be an object, found null"),
        ({"usage": {"x": float("nan")}}, r"field 'usage': is not JSON"),
    ],
)
def test_a_wrong_field_of_an_exchange_is_named(given, message):
    with pytest.raises(InputError, match=message):
        exchange(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"exchange": ""}, r"field 'exchange': is empty"),
        ({"user": ""}, r"field 'user': is empty"),
        ({"user": "x" * 257}, r"field 'user': 257 characters"),
        ({"rating": 2}, r"field 'rating': must be -1, 0 or 1, found 2"),
        ({"rating": True}, r"field 'rating': must be -1, 0 or 1, found True"),
        ({"rating": "1"}, r"field 'rating': must be -1, 0 or 1, found '1'"),
        ({"preferred": "mine"}, r"field 'preferred': must be one of original, corrected, neither, found 'mine'"),
        ({"edited_text": " \n"}, r"field 'edited_text': is empty; give the answer as it should be, or leave it out"),
        ({"edited_text": ["x"]}, r"field 'edited_text': must be text, found a list"),
        ({"comment": "x" * 10_001}, r"field 'comment': 10001 characters; at most 10000"),
        ({"tags": "tone"}, r"field 'tags': must be a list of texts, found text"),
        ({"tags": ["a", ""]}, r"field 'tags\[1\]': is empty"),
        ({"tags": ["x" * 65]}, r"field 'tags\[0\]': 65 characters; at most 64"),
        ({"tags": [str(i) for i in range(17)]}, r"field 'tags': 17 tags; at most 16"),
        ({"created": None}, r"field 'created': must be a datetime, found null"),
        ({"rating": None}, r"the feedback is empty: give rating, preferred, edited_text, tags or comment"),
    ],
)
def test_a_wrong_field_of_feedback_is_named(given, message):
    with pytest.raises(InputError, match=message):
        feedback(**given)


def test_messages_of_endless_depth_are_refused():
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InputError, match=r"field 'messages\[0\]': is not JSON"):
        exchange(messages=({"role": "user", "content": deep},))


def test_a_judgements_id_is_of_who_and_what_alone():
    same = {feedback(rating=1, **more).id for more in ({}, {"comment": "x"}, {"tags": ("a",)}, {"created": NOW})}
    assert len(same) == 1
    others = [feedback(rating=-1), feedback(user="u"), feedback(rating=1, edited_text="x"), feedback("other")]
    assert len(same | {other.id for other in others}) == 5


def test_a_tag_twice_is_one():
    assert feedback(tags=["b", "a", "b"]).tags == ("b", "a")
