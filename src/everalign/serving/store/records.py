"""Records of the feedback store: answered requests and the feedback on them, every field checked; and their redaction.

A redaction takes out personal data: e-mail addresses, phone and card numbers, API keys, and patterns of your own. It is
any function from text to text; `Redaction` is the built-in one. Its patterns find what looks like personal data: they
find no names, and they may take out what only looks like it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

from everalign.data.rows import content_id, kind
from everalign.errors import InputError

OUTCOMES = ("applied", "unchanged", "skipped")
MODES = ("off", "shadow", "correct", "strict")
RATINGS = (-1, 0, 1)
SIDES = ("original", "corrected", "neither")

# Names are part of an index, and databases limit the size of its entries.
LONGEST_NAME = 256
LONGEST_COMMENT = 10_000
LONGEST_TAG = 64
MOST_TAGS = 16


class UnknownExchange(InputError):  # noqa: N818  # the gateway's error code has this name
    """Feedback on an answer that is not stored, or that another key asked for; which of the two is not disclosed."""


@dataclass(frozen=True)
class Exchange:
    """One answered request.

    Args:
        id: the completion's id, as the client saw it.
        created: when it was answered; needs a time zone, stored in UTC.
        key_id: the first 12 hexadecimal digits of the sha256 of the client's key, or "local".
        upstream: name of the server that answered.
        model: the upstream's model.
        messages: the conversation as it was sent, at least one message.
        original: the upstream's answer; may be empty.
        returned: the answer that the client got; may be empty.
        outcome: one of `OUTCOMES`.
        reason: why the correction was skipped or rejected; None if there is no reason.
        mode: one of `MODES`.
        corrector: the corrector's version; None without a corrector.
        template: the corrector's template; None without a corrector.
        usage: token counts, by any names.

    Raises:
        InputError: a field is wrong; the message names the field and says what to do.
    """

    id: str
    created: datetime
    key_id: str
    upstream: str
    model: str
    messages: tuple[dict[str, Any], ...]
    original: str
    returned: str
    outcome: str
    reason: str | None
    mode: str
    corrector: str | None
    template: str | None
    usage: dict[str, Any]

    def __post_init__(self) -> None:
        for field in ("id", "key_id", "upstream", "model"):
            _check_name(getattr(self, field), field)
        for field in ("reason", "corrector", "template"):
            if getattr(self, field) is not None:
                _check_name(getattr(self, field), field)
        _check_text(self.original, "original")
        _check_text(self.returned, "returned")
        _check_one_of(self.outcome, OUTCOMES, "outcome")
        _check_one_of(self.mode, MODES, "mode")
        object.__setattr__(self, "created", _utc(self.created))
        if not isinstance(self.messages, list | tuple):
            raise InputError(f"field 'messages': must be a list of messages, found {kind(self.messages)}")
        if not self.messages:
            raise InputError("field 'messages': the list is empty; give at least one message")
        for i, message in enumerate(self.messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InputError(f"field 'messages[{i}]': must be an object with 'role', found {kind(message)}")
            _check_json(message, f"messages[{i}]")
        object.__setattr__(self, "messages", tuple(dict(message) for message in self.messages))
        if not isinstance(self.usage, dict):
            raise InputError(f"field 'usage': must be an object, found {kind(self.usage)}")
        _check_json(self.usage, "usage")


@dataclass(frozen=True)
class Feedback:
    """One user's judgement of an answer. Of several from the same (exchange, key_id, user), the last one counts.

    Args:
        exchange: id of the exchange.
        key_id: as in `Exchange`; only the key that asked may give feedback.
        user: one of the key's users; None if the key has a single user.
        rating: of the answer that the client got: 1 good, -1 bad, 0 neither; None if not given.
        preferred: one of `SIDES`; None if not given.
        edited_text: the answer as it should have been; None if not given.
        tags: at most `MOST_TAGS`; repeated ones count once.
        comment: free text; None if not given.
        created: when it was given; needs a time zone, stored in UTC.

    Raises:
        InputError: a field is wrong, or all are empty; the message names the field and says what to do.
    """

    exchange: str
    key_id: str
    user: str | None
    rating: int | None
    preferred: str | None
    edited_text: str | None
    tags: tuple[str, ...]
    comment: str | None
    created: datetime

    def __post_init__(self) -> None:
        _check_name(self.exchange, "exchange")
        _check_name(self.key_id, "key_id")
        if self.user is not None:
            _check_name(self.user, "user")
        if self.rating is not None and (isinstance(self.rating, bool) or self.rating not in RATINGS):
            raise InputError(f"field 'rating': must be -1, 0 or 1, found {self.rating!r}")
        if self.preferred is not None:
            _check_one_of(self.preferred, SIDES, "preferred")
        if self.edited_text is not None:
            _check_text(self.edited_text, "edited_text")
            if not self.edited_text.strip():
                raise InputError("field 'edited_text': is empty; give the answer as it should be, or leave it out")
        if self.comment is not None:
            _check_text(self.comment, "comment", LONGEST_COMMENT)
        object.__setattr__(self, "tags", _checked_tags(self.tags))
        object.__setattr__(self, "created", _utc(self.created))
        given = (self.rating, self.preferred, self.edited_text, self.comment, self.tags or None)
        if all(value is None for value in given):
            raise InputError("the feedback is empty: give rating, preferred, edited_text, tags or comment")

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that identify a judgement: who judged what and how; not tags, comment and time."""
        who = [self.exchange, self.key_id, self.user]
        return content_id([*who, self.rating, self.preferred, self.edited_text])


def _check_name(value: Any, field: str, longest: int = LONGEST_NAME) -> None:
    _check_text(value, field, longest)
    if not value.strip():
        raise InputError(f"field {field!r}: is empty; fill it in")


def _check_text(value: Any, field: str, longest: int | None = None) -> None:
    """Refuse what is no text, or text that a database or a trainer could not hold."""
    if not isinstance(value, str):
        raise InputError(f"field {field!r}: must be text, found {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"field {field!r}: half a surrogate pair at character {error.start + 1}; repair the text's encoding"
        ) from None
    if "\0" in value:
        raise InputError(f"field {field!r}: has the character U+0000 at {value.index(chr(0)) + 1}; remove it")
    if longest is not None and len(value) > longest:
        raise InputError(f"field {field!r}: {len(value)} characters; at most {longest} are stored")


def _checked_tags(tags: Any) -> tuple[str, ...]:
    """Return tags in their order, each once; raises InputError if there are too many, or one cannot be stored."""
    if not isinstance(tags, list | tuple):
        raise InputError(f"field 'tags': must be a list of texts, found {kind(tags)}")
    if len(tags) > MOST_TAGS:
        raise InputError(f"field 'tags': {len(tags)} tags; at most {MOST_TAGS} are stored")
    for i, tag in enumerate(tags):
        _check_name(tag, f"tags[{i}]", LONGEST_TAG)
    return tuple(dict.fromkeys(tags))


def _check_json(value: Any, field: str) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"field {field!r}: is not JSON: {error}") from None
    _check_text(text, field)


def _check_one_of(value: Any, known: tuple[str, ...], field: str) -> None:
    if not isinstance(value, str) or value not in known:
        raise InputError(f"field {field!r}: must be one of {', '.join(known)}, found {value!r}")


def _utc(value: Any) -> datetime:
    if not isinstance(value, datetime):
        raise InputError(f"field 'created': must be a datetime, found {kind(value)}")
    if value.utcoffset() is None:
        raise InputError("field 'created': has no time zone; give it in UTC, as datetime.now(timezone.utc)")
    return value.astimezone(timezone.utc)


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
_FEWEST_DIGITS = 7  # of a phone number
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
        for name in kinds:
            if name not in KINDS:
                raise InputError(f"redaction: there is no {name!r}; choose from {', '.join(KINDS)}")
        # Keys first: the digits of a card or a phone may be part of one.
        built_in: dict[str, list[_Rule]] = {
            # What says that a key follows, such as `password: `, stays.
            "key": [(one, lambda found: "".join(filter(None, found.groupdict().values())) + "[key]") for one in _KEY],
            "email": [(_EMAIL, _marked("email"))],
            "card": [(_CARD, lambda found: "[card]" if passes_luhn(_digits(found[0])) else found[0])],
            "phone": [(_PHONE, lambda found: "[phone]" if len(_digits(found[0])) >= _FEWEST_DIGITS else found[0])],
        }
        self._rules += [rule for name, rules in built_in.items() if name in kinds for rule in rules]

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


def _digits(text: str) -> list[int]:
    return [int(char) for char in text if char.isdigit()]


def passes_luhn(digits: Sequence[int]) -> bool:
    """Whether the last digit is the check digit of the others by Luhn's formula (ISO/IEC 7812-1)."""
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return (sum(digits[::-2]) + sum(doubled)) % 10 == 0
