"""What is taken out of texts before anything is written: addresses, numbers, keys, and patterns of one's own.

Patterns find what looks like personal data; they do not find names, and they may take out what only looks like it.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from everalign.errors import InputError
from everalign.serving.store.records import Exchange, Feedback

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
_USER_DIGITS = 12


@dataclass(frozen=True)
class Redaction:
    """Replaces what it finds by the kind's name in brackets, such as `[email]`.

    Args:
        kinds: which of `KINDS` to look for: e-mail addresses; phone numbers; card numbers (13 to 19 digits with a
            right check digit); API keys, bearer tokens and passwords.
        patterns: further (name, regular expression) pairs; what matches becomes `[name]`. They run on every text that
            is kept: one that backtracks slows the gateway down.

    Raises:
        InputError: there is no such kind, or a pattern is none or matches the empty text.
    """

    kinds: Sequence[str] = KINDS
    patterns: Sequence[tuple[str, str]] = ()
    _rules: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in self.kinds:
            if name not in KINDS:
                raise InputError(f"redaction: there is no {name!r}; choose from {', '.join(KINDS)}")
        own = tuple((_compiled(name, pattern), _constant(f"[{name}]")) for name, pattern in self.patterns)
        # Keys first: a card's or a phone's digits may stand inside one.
        built_in = {
            "key": tuple((pattern, _without_key) for pattern in _KEY),
            "email": ((_EMAIL, "[email]"),),
            "card": ((_CARD, _without_card),),
            "phone": ((_PHONE, _without_phone),),
        }
        rules = tuple(rule for kind, found in built_in.items() if kind in self.kinds for rule in found)
        object.__setattr__(self, "_rules", own + rules)

    def text(self, text: str) -> str:
        """Return a text without what the rules find."""
        for pattern, put in self._rules:
            text = pattern.sub(put, text)
        return text

    def exchange(self, exchange: Exchange) -> Exchange:
        """Return an exchange whose messages and answers are redacted."""
        return replace(
            exchange,
            messages=tuple(self._message(message) for message in exchange.messages),
            original=self.text(exchange.original),
            returned=self.text(exchange.returned),
        )

    def feedback(self, feedback: Feedback) -> Feedback:
        """Return feedback whose texts are redacted; a user whose name is personal data gets a digest for a name."""
        user = feedback.user
        if user is not None and self.text(user) != user:
            user = f"user-{hashlib.sha256(user.encode()).hexdigest()[:_USER_DIGITS]}"
        edited, comment = (
            None if text is None else self.text(text) for text in (feedback.edited_text, feedback.comment)
        )
        tags = tuple(self.text(tag) for tag in feedback.tags)
        return replace(feedback, user=user, edited_text=edited, comment=comment, tags=tags)

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        return {key: value if key == "role" else self._value(value) for key, value in message.items()}

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self._value(item) for key, item in value.items()}
        return [self._value(item) for item in value] if isinstance(value, list | tuple) else value


def _compiled(name: str, pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"redaction: the pattern of {name!r} is no regular expression: {error}") from None
    if compiled.search("") is not None:
        raise InputError(f"redaction: the pattern of {name!r} matches the empty text; make it find something")
    return compiled


def _constant(text: str) -> Callable[[re.Match[str]], str]:
    """Put a text as it is, whatever backslashes it has."""
    return lambda _: text


def _without_key(match: re.Match[str]) -> str:
    return "".join(text for text in match.groupdict().values() if text) + "[key]"


def _without_phone(match: re.Match[str]) -> str:
    digits = sum(char.isdigit() for char in match[0])
    return "[phone]" if digits >= _FEWEST_PHONE_DIGITS else match[0]


def _without_card(match: re.Match[str]) -> str:
    digits = [int(char) for char in match[0] if char.isdigit()]
    return "[card]" if passes_luhn(digits) else match[0]


def passes_luhn(digits: Sequence[int]) -> bool:
    """Whether the last digit is the check digit of the others by Luhn's formula (ISO/IEC 7812-1)."""
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return (sum(digits[::-2]) + sum(doubled)) % 10 == 0
