"""Corrections as rows to train on and to be judged by: one prompt, and what a corrector may write after it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from everalign.correction.encoder import CorrectionEncoder
from everalign.data.corrections import Correction
from everalign.data.encoding import check_max_length
from everalign.data.groups import EncodedGroup
from everalign.errors import InputError
from everalign.shortfall import check_shortfall

Texts = Callable[[Correction], tuple[str, ...]]


@dataclass(frozen=True)
class EncodedCorrections:
    """Encoded rows, and what the length limit cost.

    Args:
        groups: prompt and texts of every row whose texts fit.
        dropped: rows where one does not.
        shortened: rows of `groups` whose question or answer lost tokens.
    """

    groups: tuple[EncodedGroup, ...]
    dropped: int
    shortened: int

    def warnings(self, max_length: int) -> tuple[str, ...]:
        """Return what the limit cost where that is much.

        Raises:
            InputError: most rows are left out.
        """
        total, remedy = len(self.groups) + self.dropped, f"raise --max-length (max_length), {max_length} now"
        dropped = check_shortfall(self.dropped, total, "rows are too long and left out", remedy)
        what = "rows have their question or answer cut"
        return (*dropped, *check_shortfall(self.shortened, total, what, remedy, refuse=False))


def taught(row: Correction) -> tuple[str, ...]:
    """What a corrector learns to write: the correction."""
    return (row.correction,)


def copied(row: Correction) -> tuple[str, ...]:
    """What the warm-up learns to write: the answer as it is."""
    return (row.answer,)


def compared(row: Correction) -> tuple[str, ...]:
    """What a corrector is judged by: the correction, and the answer as it is."""
    return (row.correction, row.answer)


def encode_corrections(
    rows: Iterable[Correction],
    encoder: CorrectionEncoder,
    max_length: int,
    texts: Texts = taught,
    most: int | None = None,
) -> EncodedCorrections:
    """Tokenises corrections; prompts are shortened as `CorrectionEncoder.prompt` says, what follows them never.

    Args:
        rows: the corrections.
        encoder: of the corrector's tokenizer and template.
        max_length: tokens of prompt and the longest text together, at least 8.
        texts: what may follow a row's prompt.
        most: stop when so many rows fit; None for all.

    Raises:
        InputError: `max_length` is too small, or a text cannot be tokenised; names the row.
    """
    check_max_length(max_length)
    groups: list[EncodedGroup] = []
    dropped = shortened = 0
    for number, row in enumerate(rows, start=1):
        if len(groups) == most:
            break
        try:
            group, was_shortened = _group(row, texts(row), encoder, max_length)
        except InputError as error:
            raise InputError(f"row {number} (id {row.id}): {error}") from None
        if group is None:
            dropped += 1
        else:
            groups.append(group)
            shortened += was_shortened
    return EncodedCorrections(tuple(groups), dropped, shortened)


def _group(
    row: Correction, texts: tuple[str, ...], encoder: CorrectionEncoder, max_length: int
) -> tuple[EncodedGroup | None, bool]:
    """Return a row, its prompt in the room that the longest text leaves, or None where that is too little."""
    responses = tuple(encoder.response(text) for text in texts)
    longest = max(responses, key=len)
    prompt = encoder.prompt(row.question, row.answer)
    short = not encoder.fits(prompt, longest, max_length)
    if short:
        if not (room := encoder.room(longest, max_length)):
            return None, False
        prompt = encoder.prompt(row.question, row.answer, room)
    return EncodedGroup(row.id, prompt, responses, (row.weight,) * len(responses)), short
