"""Training data: records, readers, chat templates, tokenization and the replay buffer.

Names are loaded when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Correction": "records",
    "CorrectionSet": "records",
    "correction_of": "records",
    "load_corrections": "readers",
    "load_edits": "readers",
    "Message": "messages",
    "ChatPrompt": "messages",
    "Preference": "records",
    "PreferenceSet": "records",
    "Scored": "records",
    "ScoredSet": "records",
    "load_scored": "readers",
    "load_judged": "readers",
    "load_unscored": "readers",
    "load_drafts": "readers",
    "load_questions": "readers",
    "load_answers": "readers",
    "load_uncorrected": "readers",
    "load_prompts": "readers",
    "check_disjoint": "readers",
    "load_preferences": "readers",
    "DEFAULT_CHAT_TEMPLATE": "chat_template",
    "encode_prompt": "chat_tokens",
    "encode_response": "chat_tokens",
    "template_fingerprint": "chat_tokens",
    "TokenizedRow": "tokenization",
    "TokenizedRows": "tokenization",
    "tokenize_preferences": "tokenization",
    "tokenize_scored": "tokenization",
    "ReplayBuffer": "replay",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
