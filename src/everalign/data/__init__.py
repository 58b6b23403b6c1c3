"""Preference data: records, readers, chat templating, token encoding and the replay buffer.

Names are loaded when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Correction": "corrections",
    "CorrectionSet": "corrections",
    "correction_of": "corrections",
    "load_corrections": "corrections",
    "load_edits": "corrections",
    "Message": "messages",
    "ChatPrompt": "messages",
    "Preference": "records",
    "PreferenceSet": "readers",
    "Scored": "scored",
    "ScoredSet": "scored",
    "load_scored": "scored",
    "load_judged": "scored",
    "Unscored": "unscored",
    "UnscoredSet": "unscored",
    "load_unscored": "unscored",
    "Draft": "drafts",
    "DraftSet": "drafts",
    "load_drafts": "drafts",
    "PromptRow": "prompts",
    "PromptSet": "prompts",
    "load_prompts": "prompts",
    "check_disjoint": "readers",
    "load_preferences": "readers",
    "DEFAULT_CHAT_TEMPLATE": "templating",
    "encode_prompt": "templating",
    "encode_response": "templating",
    "template_fingerprint": "templating",
    "EncodedPair": "encoding",
    "EncodedPairs": "encoding",
    "encode_pairs": "encoding",
    "ReplayBuffer": "replay",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
