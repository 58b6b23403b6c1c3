"""Training data: records, readers, chat templates, tokenization and the replay buffer.

Names are loaded when first used, so that importing the package costs nothing.
"""

from everalign.lazy import lazy_names

_HOMES = {
    "Correction": ".records",
    "CorrectionSet": ".records",
    "correction_of": ".records",
    "load_corrections": ".readers",
    "load_edits": ".readers",
    "Message": ".messages",
    "ChatPrompt": ".messages",
    "Preference": ".records",
    "PreferenceSet": ".records",
    "Scored": ".records",
    "ScoredSet": ".records",
    "load_scored": ".readers",
    "load_judged": ".readers",
    "load_unscored": ".readers",
    "load_drafts": ".readers",
    "load_questions": ".readers",
    "load_answers": ".readers",
    "load_uncorrected": ".readers",
    "load_prompts": ".readers",
    "check_disjoint": ".readers",
    "load_preferences": ".readers",
    "DEFAULT_CHAT_TEMPLATE": ".chat_template",
    "encode_prompt": ".chat_tokens",
    "encode_response": ".chat_tokens",
    "template_fingerprint": ".chat_tokens",
    "TokenizedRow": ".tokenization",
    "TokenizedRows": ".tokenization",
    "tokenize_preferences": ".tokenization",
    "tokenize_scored": ".tokenization",
    "ReplayBuffer": ".replay",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
