"""Redaction: what looks like personal data is taken out, and what does not stays."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everalign.errors import InputError
from everalign.serving.store import Redaction
from everalign.serving.store.records import passes_luhn, redact_exchange, redact_feedback
from stores_for_tests import exchange, feedback


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("write to ann.b+c@mail.example.org, now", "write to [email], now"),
        ("<ann@example.org>", "<[email]>"),
        ("call +49 30 1234567 today", "call [phone] today"),
        ("call +1 (555) 123-4567.", "call [phone]."),
        ("(030) 1234-5678", "[phone]"),
        ("555-123-4567", "[phone]"),
        ("030/1234567", "[phone]"),
        ("card 4111 1111 1111 1111 ok", "card [card] ok"),
        ("4111-1111-1111-1111", "[card]"),
        ("378282246310005", "[card]"),
        ("Authorization: Bearer abcDEF123456.x-y", "Authorization: Bearer [key]"),
        ("OPENAI is sk-proj-abcdefghij0123456789", "OPENAI is [key]"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "[key]"),
        ("AKIAIOSFODNN7EXAMPLE", "[key]"),
        ("token eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeK", "token [key]"),
        ("password: hunter22!", "password: [key]"),
        ('{"api_key": "abc123def"}', '{"api_key": "[key]"}'),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIB\nAA==\n-----END RSA PRIVATE KEY-----", "[key]"),
    ],
)
def test_what_looks_like_personal_data_is_taken_out(text, redacted):
    assert Redaction()(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "In 2024 there were 1,234,567 of them, 12.5 % more than on 2023-11-05.",
        "Version 1.2.3.4 at 127.0.0.1:8080",
        "4111 1111 1111 1112",
        "pi is 3.14159265358979323846",
        "a @ b, @ann, x@y",
        "The bearer of this token is a secretary.",
        "1 + 2 = 3; 100 000 000",
        "sk-short",
        "",
    ],
)
def test_what_does_not_stays(text):
    assert Redaction()(text) == text


def test_only_what_is_asked_for_is_taken_out():
    text = "ann@example.org, +49 30 1234567, ACME-1234"
    assert Redaction(kinds=("email",))(text) == "[email], +49 30 1234567, ACME-1234"
    assert Redaction(kinds=(), patterns=[("case \\1", r"ACME-\d+")])(text).endswith("1234567, [case \\1]")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kinds": ("name",)}, "redaction: there is no 'name'; choose from email, phone, card, key"),
        ({"patterns": [("case", "(")]}, "redaction: the pattern of 'case' is not a regular expression"),
        ({"patterns": [("case", r"\d*")]}, "redaction: the pattern of 'case' matches the empty text"),
    ],
)
def test_what_cannot_be_looked_for_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Redaction(**given)


def test_every_text_of_an_exchange_is_redacted_and_nothing_else():
    parts = [{"type": "text", "text": "I am ann@example.org"}]
    call = {"function": {"name": "mail", "arguments": '{"to": "ann@example.org"}'}, "n": 3}
    given = exchange(
        "ann@example.org",
        messages=({"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}),
        original="ann@example.org",
        returned="Hello!",
    )
    found = redact_exchange(given, Redaction())
    assert "ann@example.org" not in str(found.messages) + found.original
    assert found.messages[0] == {"role": "user", "content": [{"type": "text", "text": "I am [email]"}]}
    assert found.messages[1]["tool_calls"][0]["n"] == 3
    assert (found.id, found.returned, found.usage) == (given.id, given.returned, given.usage)


def test_a_redaction_may_be_any_function_of_text():
    found = redact_exchange(exchange(original="no", returned="yes"), str.upper)
    assert (found.original, found.returned, found.messages[0]["role"]) == ("NO", "YES", "user")


def test_users_with_personal_names_stay_different_ones():
    ann, bob = (redact_feedback(feedback(user=f"{name}@example.org"), Redaction()) for name in ("ann", "bob"))
    assert ann.user != bob.user
    assert "example" not in ann.user
    assert ann.user == redact_feedback(feedback(user="ann@example.org", rating=-1), Redaction()).user
    assert redact_feedback(feedback(user="u-17"), Redaction()).user == "u-17"


@pytest.mark.parametrize(
    "text",
    [
        "a" * 200_000,
        "a." * 100_000,
        "a@" * 100_000,
        "a@" + "a-" * 100_000,
        "a@" + "a." * 100_000,
        "1" * 200_000,
        "1 " * 100_000,
        "+1" * 100_000,
        "+1 (1" * 50_000,
        "(11)" * 50_000,
        "0 " * 100_000,
        "sk-" * 60_000,
        "eyJ" + "a" * 100_000 + "." * 10_000,
        "eyJaaaaaaaa." * 20_000,
        "bearer " * 30_000,
        "token:" * 30_000,
        "password" + " " * 100_000,
        "-----BEGIN PRIVATE KEY-----" * 5_000,
        "-----BEGIN " + "A " * 100_000,
        " " * 200_000,
    ],
)
def test_no_text_takes_long(text):
    started = time.process_time()
    Redaction()(text)
    assert time.process_time() - started < 1.5


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="0123456789 +-()./@abc:_sk=", max_size=80))
def test_what_is_redacted_stays_as_it_is(text):
    """Redacting twice changes nothing more: the marks are nothing that is looked for."""
    once = Redaction(kinds=("email", "card", "key"))(text)
    assert Redaction(kinds=("email", "card"))(once) == once


def test_luhn():
    assert passes_luhn([int(digit) for digit in "79927398713"])
    assert not any(passes_luhn([int(digit) for digit in f"7992739871{last}"]) for last in "012456789")
