"""Redaction of personal data: e-mail addresses, phone and card numbers, API keys, and patterns of your own.

A redaction is any function from text to text; `Redaction` is the built-in one. Its patterns find what looks like
personal data: they find no names, and they may take out what only looks like it.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from everalign.errors import InputError
from everalign.serving.store.records import Exchange, Feedback

Redact = Callable[[str], str]
_Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]

KINDS = ("email", "phone", "card", "key")

# Every repetition is bounded or cannot overlap what follows it, so that no text takes more than linear time.
_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w])")
# International numbers, or at least nine digits in groups: not years, prices, dates or version numbers.
_PHONE = re.compile(
    r"(?<![\w.+])(?:\+\d{1,3}(?:[ ./-]?\(?\d{1,5}\)?){2,6}|\(\d{2,5}\)(?:[ ./-]?\d{2,5}){2,4}"
    r"|0\d{1,4}(?:[ /-]\d{2,8}){1,4}|\d{3}[ .-]\d{3}[ .-]\d{4})(?![\w])"
)
_FEWEST_PHONE_DIGITS = 7
_KEYS = (
    r"(?P<before>\b[Bb]earer\s{1,4})[\w.~+/=-]{8,}",
    r"\b(?:sk|pk|rk)[-_][\w-]{16,}",
    r"\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\bhf_\w{16,}",
    r"\bxox[abposr]-[\w-]{10,}",
    r"\bA(?:KIA|SIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}",
    r"(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}",
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[\w\s+/=]{0,20000}(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?",
    r"(?P<named>\b(?:api[_-]?key|secret|token|password|passwd)[\"']?\s{0,4}[:=]\s{0,4}[\"']?)[^\s\"',;]{6,}",
)
_KEY = tuple(re.compile(pattern, re.IGNORECASE if "named" in pattern else 0) for pattern in _KEYS)


class Redaction:
    """Replaces what it finds by the kind's name in brackets, such as `[email]`. Call it with a text.

    Args:
        kinds: which of `KINDS` to look for: e-mail addresses; phone numbers; card numbers (13 to 19 digits with a
            right check digit); API keys, bearer tokens and passwords.
        patterns: further (name, regular expression) pairs; a match becomes `[name]`. They run on every stored text: one
            that backtracks slows the gateway down.

    Raises:
        InputError: a kind is unknown, or a pattern is not a regular expression or matches the empty text.
    """

    def __init__(self, kinds: Sequence[str] = KINDS, patterns: Sequence[tuple[str, str]] = ()) -> None:
        self._rules: list[_Rule] = []
        for name, pattern in patterns:
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise InputError(f"redaction: the pattern of {name!r} is not a regular expression: {error}") from None
            if compiled.search("") is not None:
                raise InputError(f"redaction: the pattern of {name!r} matches the empty text; make it find something")
            self._rules.append((compiled, _marked(name)))
        for kind in kinds:
            if kind not in KINDS:
                raise InputError(f"redaction: there is no {kind!r}; choose from {', '.join(KINDS)}")
        # Keys first: the digits of a card or a phone may be part of one.
        built_in: dict[str, list[_Rule]] = {
            "key": [(pattern, _without_key) for pattern in _KEY],
            "email": [(_EMAIL, _marked("email"))],
            "card": [(_CARD, _without_card)],
            "phone": [(_PHONE, _without_phone)],
        }
        self._rules += [rule for kind, rules in built_in.items() if kind in kinds for rule in rules]

    def __call__(self, text: str) -> str:
        for pattern, replacement in self._rules:
            text = pattern.sub(replacement, text)
        return text


def redact_exchange(exchange: Exchange, redact: Redact) -> Exchange:
    def redacted(value: Any) -> Any:
        if isinstance(value, str):
            return redact(value)
        if isinstance(value, dict):
            return {key: redacted(item) for key, item in value.items()}
        return [redacted(item) for item in value] if isinstance(value, list | tuple) else value

    return replace(
        exchange,
        messages=tuple({**redacted(message), "role": message["role"]} for message in exchange.messages),
        original=redact(exchange.original),
        returned=redact(exchange.returned),
    )


def redact_feedback(feedback: Feedback, redact: Redact) -> Feedback:
    """Return feedback with redacted texts; a user name with personal data becomes a digest, so that users differ."""
    user = feedback.user
    if user is not None and redact(user) != user:
        user = f"user-{hashlib.sha256(user.encode()).hexdigest()[:12]}"
    return replace(
        feedback,
        user=user,
        edited_text=None if feedback.edited_text is None else redact(feedback.edited_text),
        comment=None if feedback.comment is None else redact(feedback.comment),
        tags=tuple(map(redact, feedback.tags)),
    )


def _marked(name: str) -> Callable[[re.Match[str]], str]:
    return lambda _: f"[{name}]"  # a function, because backslashes in a replacement text mean something


def _without_key(match: re.Match[str]) -> str:
    return "".join(text for text in match.groupdict().values() if text) + "[key]"


def _without_phone(match: re.Match[str]) -> str:
    return "[phone]" if sum(char.isdigit() for char in match[0]) >= _FEWEST_PHONE_DIGITS else match[0]


def _without_card(match: re.Match[str]) -> str:
    return "[card]" if passes_luhn([int(char) for char in match[0] if char.isdigit()]) else match[0]


def passes_luhn(digits: Sequence[int]) -> bool:
    """Whether the last digit is the check digit of the others by Luhn's formula (ISO/IEC 7812-1)."""
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return (sum(digits[::-2]) + sum(doubled)) % 10 == 0
