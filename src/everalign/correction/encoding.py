"""Corrections as rows to train on and to be judged by: one prompt, and what a corrector may write after it."""

from collections.abc import Sequence
from dataclasses import dataclass

from everalign.correction.encoder import CorrectionEncoder
from everalign.data.corrections import Correction
from everalign.data.encoding import check_max_length
from everalign.data.groups import EncodedGroup
from everalign.errors import InputError


@dataclass(frozen=True)
class EncodedCorrections:
    """Encoded rows, and what the length limit cost.

    Args:
        corrections: prompt and correction of every row whose correction fits.
        identities: prompt and answer of every row whose answer fits.
        compared: prompt, correction and answer (in this order) of every row where both fit.
        dropped: rows whose correction does not fit.
        shortened: rows of `corrections` whose question or answer lost tokens.
    """

    corrections: tuple[EncodedGroup, ...]
    identities: tuple[EncodedGroup, ...]
    compared: tuple[EncodedGroup, ...]
    dropped: int
    shortened: int


def encode_corrections(rows: Sequence[Correction], encoder: CorrectionEncoder, max_length: int) -> EncodedCorrections:
    """Tokenises corrections; prompts are shortened as `CorrectionEncoder.prompt` says, what follows them never.

    Args:
        rows: the corrections.
        encoder: of the corrector's tokenizer and template.
        max_length: tokens of prompt and correction together, at least 8.

    Raises:
        InputError: `max_length` is too small, or a text cannot be tokenised; names the row.
    """
    check_max_length(max_length)
    corrections: list[EncodedGroup] = []
    identities: list[EncodedGroup] = []
    compared: list[EncodedGroup] = []
    shortened = 0
    for number, row in enumerate(rows, start=1):
        try:
            prompt = encoder.prompt(row.question, row.answer)
            correction, answer = encoder.response(row.correction), encoder.response(row.answer)
            wanted = ((corrections, (correction,)), (identities, (answer,)), (compared, (correction, answer)))
            for groups, responses in wanted:
                groups += _group(row, prompt, responses, encoder, max_length)
        except InputError as error:
            raise InputError(f"row {number} (id {row.id}): {error}") from None
        fits = encoder.room(correction, max_length) > 0
        shortened += fits and not encoder.fits(prompt, correction, max_length)
    dropped = len(rows) - len(corrections)
    return EncodedCorrections(tuple(corrections), tuple(identities), tuple(compared), dropped, shortened)


def _group(
    row: Correction, prompt: list[int], responses: tuple[list[int], ...], encoder: CorrectionEncoder, max_length: int
) -> list[EncodedGroup]:
    """Return the row with its prompt in the room that the longest response leaves; nothing where that is too little."""
    longest = max(responses, key=len)
    if not encoder.fits(prompt, longest, max_length):
        if not (room := encoder.room(longest, max_length)):
            return []
        prompt = encoder.prompt(row.question, row.answer, room)
    return [EncodedGroup(row.id, prompt, responses, (row.weight,) * len(responses))]
