"""The feedback store: answered requests that may be kept, what people said of the answers, and what was learned of it.

Names are loaded when first used; records need nothing but Python, the store itself needs `everalign[serve]`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from everalign.serving.store.engine import not_installed

if TYPE_CHECKING:
    from everalign.serving.store.database import FeedbackStore, StoreStats
    from everalign.serving.store.records import Exchange, Feedback, UnknownExchange
    from everalign.serving.store.redaction import Redaction

__all__ = ["Exchange", "Feedback", "FeedbackStore", "Redaction", "StoreStats", "UnknownExchange"]

_HOMES = {
    "Exchange": "records",
    "Feedback": "records",
    "FeedbackStore": "database",
    "Redaction": "redaction",
    "StoreStats": "database",
    "UnknownExchange": "records",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "sqlalchemy":
            raise
        raise not_installed("the feedback store", "sqlalchemy", "serve") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
