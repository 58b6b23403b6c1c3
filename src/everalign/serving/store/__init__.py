"""Feedback store: answered requests, the feedback on them, and which of it was learned. Needs `everalign[serve]`."""

from everalign.errors import not_installed

try:
    from everalign.serving.store.database import FeedbackStore, StoreStats
    from everalign.serving.store.records import Exchange, Feedback, UnknownExchange
    from everalign.serving.store.redaction import Redaction
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "sqlalchemy":
        raise
    raise not_installed("the feedback store", "sqlalchemy", "serve") from error

__all__ = ["Exchange", "Feedback", "FeedbackStore", "Redaction", "StoreStats", "UnknownExchange"]
