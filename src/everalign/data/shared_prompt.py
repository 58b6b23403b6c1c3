"""The prompt of two whole texts, or of two whole conversations: what they begin with alike, cut where a turn begins.

So hh-rlhf and others store their pairs. TRL cuts two texts where they first differ, which may be in the middle of an
answer; here the cut is made at the beginning of that answer, or, in texts without turns, at the beginning of a word.
"""

import re
import unicodedata
from typing import Any

from everalign.data.fields import check_text
from everalign.data.messages import Completion, checked_completion, message_text, messages
from everalign.errors import InputError

# What opens an assistant's turn in a text; the first kind that a text has is the one that it is written with.
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
    """Return the messages that two conversations share, before an assistant's, and what follows in each.

    Args:
        prompt: the row's own, where it repeats one of the messages as text; None where there is none.
        chosen: the better conversation.
        rejected: the worse one.

    Raises:
        InputError: they share no beginning, or the prompt is another text.
    """
    better, worse = messages(chosen, "chosen"), messages(rejected, "rejected")
    shared = 0
    while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
        shared += 1
    while shared and not (better[shared]["role"] == worse[shared]["role"] == "assistant"):
        shared -= 1
    if shared == 0:
        raise InputError(
            "field 'prompt': none found; 'chosen' and 'rejected' are message lists that do not begin alike: "
            'give the prompt as messages too, such as [{"role": "user", "content": "..."}]'
        )
    context = better[:shared]
    if prompt is not None and prompt.strip() not in {message_text(message).strip() for message in context}:
        raise InputError(
            "field 'prompt': its text is no message of the conversations in 'chosen' and 'rejected'; "
            "leave the column out, or give the answers alone"
        )
    return context, checked_completion(better[shared:], "chosen"), checked_completion(worse[shared:], "rejected")


def split_texts(chosen: str, rejected: str, missing: InputError) -> tuple[str, str, str]:
    """Return what two texts share, through the last mark of an assistant's turn, and what follows in each.

    Without such a mark the prompt ends before the first word that differs; a space before it belongs to the answers, as
    in TRL.

    Args:
        chosen: the better text.
        rejected: the worse one.
        missing: raised where they share nothing.
    """
    check_text(chosen, "chosen")
    check_text(rejected, "rejected")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    alike = next((i for i, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    found = ([turn.end() for turn in pattern.finditer(chosen, 0, alike)] for pattern in _TURNS)
    turns = next((ends for ends in found if ends), [])
    # A text that ends with the mark has no answer behind it.
    cut = max((end for end in turns if chosen[end:].strip() and rejected[end:].strip()), default=None)
    cut = _before_word(chosen, rejected, alike) if cut is None else cut
    if not chosen[:cut].strip():
        raise missing
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _before_word(chosen: str, rejected: str, alike: int) -> int:
    """Return where the word begins in which two texts differ, or the space before it."""
    shorter = min(len(chosen), len(rejected))
    cut = alike
    while cut and (cut == shorter or not (_begins(chosen, cut) and _begins(rejected, cut))):
        cut -= 1
    return cut - 1 if cut and chosen[cut - 1] == " " else cut


def _begins(text: str, place: int) -> bool:
    """Whether a word, or a character that is a word of its own, may begin at this place."""
    before, here = text[place - 1], text[place]
    if unicodedata.combining(here) or here in _JOINERS or before == _JOINERS[0]:
        return False
    return not (_is_letter(before) and _is_letter(here))


def _is_letter(character: str) -> bool:
    """Whether a character is part of words that spaces divide; Chinese and Japanese ones, Thai and Khmer are not."""
    code = ord(character)
    spaced = code < 0x0E00 or 0x10A0 <= code < 0x1780 or 0x1E00 <= code < 0x2000 or 0xAC00 <= code < 0xD7B0
    return spaced and (character.isalnum() or character in "'’_")
