"""A corrector's tasks: which corrections are learned, and their tokens under the corrector's template."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from everalign.correction.encoder import CorrectionEncoder
from everalign.correction.encoding import compared, encode_corrections
from everalign.data.corrections import Correction, CorrectionSet
from everalign.data.encoding import EncodedPair, EncodedPairs
from everalign.data.groups import EncodedGroup, EncodedGroups
from everalign.errors import InputError


def learned_corrections(
    rows: CorrectionSet, encoder: CorrectionEncoder, max_length: int, identity: float, seed: int
) -> tuple[CorrectionSet, tuple[str, ...], tuple[str, ...]]:
    """Return the rows that are learned of those given, what is to be announced of that, and warnings.

    Args:
        rows: a task's rows.
        encoder: of the corrector's template.
        max_length: tokens of prompt and correction; longer ones are left out.
        identity: as many rows as this share of those that change anything are to leave a good answer as it is. Those
            that do count; the others are made of corrections, which are good answers.
        seed: draws them.

    Raises:
        InputError: no row fits.
    """
    made, copies = _with_identities(rows, identity, seed)
    encoded = encode_corrections(made, encoder, max_length)
    fitting = {group.id for group in encoded.groups}
    kept = tuple(row for row in made if row.id in fitting)
    if not kept:
        raise InputError(f"no correction fits max_length, {max_length} tokens with its prompt; raise it")
    lines = [f"  template {encoder.template.id}" + _named(encoder.objectives)]
    if copies:
        lines.append(f"  {copies} corrections are learned as answers that stay as they are, too")
    if encoded.dropped:
        lines.append(f"  {encoded.dropped} of {len(made)} rows are left out, too long for {max_length} tokens")
    return replace(rows, items=kept), tuple(lines), encoded.warnings(max_length)


def encode_learned(rows: Sequence[Any], encoder: CorrectionEncoder, max_length: int) -> EncodedGroups:
    """Return corrections as tokens, each the one text that is to follow its prompt; rows are known to fit."""
    encoded = encode_corrections(rows, encoder, max_length)
    return EncodedGroups(encoded.groups, max_length, encoded.shortened)


def encode_held_out(
    rows: Sequence[Correction], encoder: CorrectionEncoder, max_length: int, announce: Callable[[str], None]
) -> EncodedPairs:
    """Return held-out corrections as pairs behind the template's prompt: the correction over the answer as it is.

    Raises:
        InputError: none fits.
    """
    encoded = encode_corrections(rows, encoder, max_length, compared)
    if not encoded.groups:
        raise InputError(f"no held-out correction fits max_length, {max_length} tokens with its prompt; raise it")
    if encoded.dropped:
        announce(f"  {encoded.dropped} of {len(rows)} held-out rows are left out, too long for {max_length} tokens")
    for warning in encoded.warnings(max_length):
        announce(f"  warning: held-out: {warning}")
    pairs = tuple(map(_pair, encoded.groups))
    same = sum(pair.chosen == pair.rejected for pair in pairs)
    return EncodedPairs(pairs, max_length, encoded.shortened, 0, same)


def _pair(group: EncodedGroup) -> EncodedPair:
    correction, answer = group.responses
    return EncodedPair(group.id, group.prompt, correction, answer, group.weights[0])


def _with_identities(rows: CorrectionSet, identity: float, seed: int) -> tuple[CorrectionSet, int]:
    """Add corrections of what is good already, as many as are missing; returns how many were made."""
    edits = [row for row in rows if not row.is_identity]
    missing = round(identity * len(edits)) - (len(rows) - len(edits))
    if missing <= 0:
        return rows, 0
    drawn = random.Random(seed).sample(edits, missing)
    made = tuple(replace(row, answer=row.correction) for row in drawn)
    return replace(rows, items=rows.items + made), missing


def _named(objectives: Sequence[str]) -> str:
    return f", objectives {', '.join(objectives)}" if objectives else ""
