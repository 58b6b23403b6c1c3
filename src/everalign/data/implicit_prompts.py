"""Find the prompt of a preference that has none of its own: what `chosen` and `rejected` begin with alike."""

import re
import unicodedata
from typing import Any

from everalign.data.messages import Completion, checked_completion, message_text, messages
from everalign.data.rows import check_text, field_error
from everalign.errors import InputError

# What opens an assistant's turn in plain text, by convention. A text uses the first convention that it matches.
_TURNS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"\n\nAssistant:",
        r"<\|im_start\|>assistant\n",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        r"<\|assistant\|>\n?",
        r"<start_of_turn>model\n",
        r"\[/INST\]",
        r"^### (?:Response|Assistant):\n?",
        r"(?<=\s)ASSISTANT:",
        r"^(?:Assistant|AI|Bot|Response|Answer|A):",
    )
)
_JOINERS = "\u200d\ufe0e\ufe0f"


def split_conversations(
    prompt: str | None, chosen: list[Any], rejected: list[Any]
) -> tuple[Any, Completion, Completion]:
    """Splits two conversations into the messages they share and the two answers, each from an assistant's message on.

    Args:
        prompt: the row's own prompt if it has one; it must repeat one of the shared messages.
        chosen: the better conversation.
        rejected: the worse conversation.

    Raises:
        InputError: the conversations do not begin alike, or the prompt is not among their messages.
    """
    better, worse = messages(chosen, "chosen"), messages(rejected, "rejected")
    shared = 0
    while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
        shared += 1
    while shared and not (better[shared]["role"] == worse[shared]["role"] == "assistant"):
        shared -= 1
    if shared == 0:
        raise field_error(
            "prompt",
            "none found; 'chosen' and 'rejected' are message lists that do not begin alike: "
            'give the prompt as messages too, such as [{"role": "user", "content": "..."}]',
        )
    context = better[:shared]
    if prompt is not None and prompt.strip() not in {message_text(message).strip() for message in context}:
        raise field_error(
            "prompt",
            "its text is not a message of the conversations in 'chosen' and 'rejected'",
            "leave the column out, or give the answers alone",
        )
    return context, checked_completion(better[shared:], "chosen"), checked_completion(worse[shared:], "rejected")


def split_texts(chosen: str, rejected: str, missing: InputError) -> tuple[str, str, str]:
    """Splits two texts into the prompt they share and the two answers.

    The prompt ends behind the last shared mark of an assistant's turn. Without such a mark it ends before the first
    word that differs, and a space before that word belongs to the answers, as in TRL.

    Args:
        chosen: the better text.
        rejected: the worse text.
        missing: raised if the texts share nothing.
    """
    check_text(chosen, "chosen")
    check_text(rejected, "rejected")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    alike = next((i for i, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    found = ([turn.end() for turn in pattern.finditer(chosen, 0, alike)] for pattern in _TURNS)
    turns = next((ends for ends in found if ends), [])
    # A text that ends with the mark has no answer behind it.
    cut = max((end for end in turns if chosen[end:].strip() and rejected[end:].strip()), default=None)
    if cut is None:
        cut = alike
        shorter = min(len(chosen), len(rejected))
        while cut and (cut == shorter or not (_begins_word(chosen, cut) and _begins_word(rejected, cut))):
            cut -= 1
        if cut and chosen[cut - 1] == " ":
            cut -= 1
    if not chosen[:cut].strip():
        raise missing
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _begins_word(text: str, place: int) -> bool:
    """Whether a word may begin at `place`. In scripts without spaces every character may begin one."""

    def spaced_letter(character: str) -> bool:
        # Chinese, Japanese, Thai and Khmer letters are left out: spaces do not divide their words.
        code = ord(character)
        spaced = code < 0x0E00 or 0x10A0 <= code < 0x1780 or 0x1E00 <= code < 0x2000 or 0xAC00 <= code < 0xD7B0
        return spaced and (character.isalnum() or character in "'’_")

    before, here = text[place - 1], text[place]
    if unicodedata.combining(here) or here in _JOINERS or before == _JOINERS[0]:
        return False
    return not (spaced_letter(before) and spaced_letter(here))
