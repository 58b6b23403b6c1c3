"""Feedback store: answered requests, the feedback on them, and which of it was learned. Needs `everalign[serve]`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from everalign.errors import not_installed
from everalign.serving.store.records import Exchange, Feedback, UnknownExchange

if TYPE_CHECKING:
    from everalign.serving.store.database import FeedbackStore, StoreStats
    from everalign.serving.store.records import Redaction

__all__ = ["Exchange", "Feedback", "FeedbackStore", "Redaction", "StoreStats", "UnknownExchange"]

_LAZY = {"FeedbackStore": "database", "StoreStats": "database", "Redaction": "records"}


def __getattr__(name: str) -> Any:
    """Loads what needs SQLAlchemy when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "sqlalchemy":
            raise
        raise not_installed("the feedback store", "sqlalchemy", "serve") from error
