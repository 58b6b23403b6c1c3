"""Fields of a record: text, weights, ids; every check names the field and says what to do."""

import hashlib
import json
import math
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any

from everalign.errors import InputError


def check_text(value: Any, field: str) -> None:
    """Refuse what is no text, empty, or not encodable."""
    if not isinstance(value, str):
        raise InputError(f"field {field!r}: must be text, found {kind(value)}")
    if not value.strip():
        raise InputError(f"field {field!r}: is empty; fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"field {field!r}: half a surrogate pair at character {error.start + 1}; repair the text's encoding"
        ) from None


def checked_weight(value: Any) -> float:
    """Return a row's weight: a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"field 'weight': must be a number, found {kind(value)}")
    if not is_finite(value) or value <= 0:
        raise InputError(f"field 'weight': must be positive and finite, found {shown(value)}; remove rows of no weight")
    return float(value)


def is_finite(value: Real) -> bool:
    """Whether a number is one that a float holds; JSON knows whole numbers of any size."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Real) -> str:
    """Return a number for a message, in a few digits."""
    try:
        return str(float(value))
    except OverflowError:
        return "a whole number of over 300 digits"


def kind(value: object) -> str:
    """What a JSON value is called, for messages."""
    names: dict[type, str] = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "text", list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def content_id(content: Any) -> str:
    """Name what a record holds by 16 hexadecimal digits; the same content has the same name in every kind of file."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=json_form)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def json_form(value: Any) -> Any:
    """Return a part that JSON does not know, such as a chat prompt with its tools, as its fields."""
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} has no JSON form")
    return {field.name: getattr(value, field.name) for field in fields(value)}
