"""Rows corrected at several strengths, and the layers, the side and the range of a steering that follow from it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from everalign.correction.edits import edit_share
from everalign.correction.encoder import CorrectionEncoder
from everalign.correction.guards import Guards
from everalign.correction.local_engine import LocalEngine
from everalign.correction.steering_files import Steering, SteeringSetting
from everalign.data.corrections import Correction
from everalign.errors import EveralignError

# What makes a correction well-formed; what it keeps of the answer is what the strength is to change.
_WELL_FORMED = Guards(growth=None, code=False, url=False)
# So much smaller may the share of well-formed corrections be than without steering.
_TOLERANCE = 0.1
# Edits per token that a stronger steering may do less, by chance.
_SLACK = 0.02
# Nor is what goes on and on: with more tokens than so many times the answer or its correction, whichever is longer.
_TIMES = 2


class Trials:
    """Corrects rows at all strengths; what comes out at strength 0 is computed once for the same rows.

    Args:
        model: the corrector.
        encoder: of its tokenizer and template.
        tokens_per_batch: tokens computed at once.
        strengths: to try, 0 among them, in rising order.
        count: how many trials there will be.
        progress: called with ("steering", trials done, trials in all).
    """

    def __init__(
        self,
        model: Any,
        encoder: CorrectionEncoder,
        tokens_per_batch: int,
        strengths: list[float],
        count: int,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self._model, self._encoder, self._tokens_per_batch = model, encoder, tokens_per_batch
        self._strengths, self._progress = strengths, progress
        self._done, self._count = 0, count
        self._plain: dict[tuple[str, ...], SteeringSetting] = {}

    def run(self, rows: Sequence[Correction], steering: Steering) -> list[SteeringSetting]:
        """Return what corrections of rows are like at each strength, whatever range the steering is for."""
        endless = replace(steering, lowest=-math.inf, highest=math.inf)
        engine = LocalEngine(self._model, self._encoder, self._tokens_per_batch, steering=endless)
        names = tuple(row.id for row in rows)
        found = []
        for strength in self._strengths:
            if strength == 0 and names in self._plain:
                found.append(self._plain[names])
                continue
            found.append(self._setting(engine, rows, strength))
            if strength == 0:
                self._plain[names] = found[-1]
        self._done += 1
        self._progress("steering", self._done, self._count)
        return found

    def _setting(self, engine: LocalEngine, rows: Sequence[Correction], strength: float) -> SteeringSetting:
        answers = [self._encoder.response(row.answer) for row in rows]
        wanted = [self._encoder.response(row.correction) for row in rows]
        most = [_TIMES * max(len(answer), len(correction)) for answer, correction in zip(answers, wanted, strict=True)]
        written = engine.write([(row.question, row.answer) for row in rows], None, max(most), strength)
        found = [self._encoder.response(one.text) for one in written]
        fine = [
            _WELL_FORMED.objection(row.answer, one.text, one.finished, self._encoder.template) is None
            and len(tokens) <= longest
            for row, one, tokens, longest in zip(rows, written, found, most, strict=True)
        ]
        ratios = [edit_share(answer, tokens) for answer, tokens in zip(answers, found, strict=True)]
        changed = sum(one.text != row.answer for one, row in zip(written, rows, strict=True))
        count = len(rows)
        return SteeringSetting(
            strength=strength, edit_share=sum(ratios) / count, changed=changed / count, well_formed=sum(fine) / count
        )


def well_formed(settings: Sequence[SteeringSetting]) -> list[SteeringSetting]:
    """Return the settings around strength 0 as far as corrections stay as well-formed as they are there, or nearly."""
    middle = next(i for i, setting in enumerate(settings) if setting.strength == 0)
    least = settings[middle].well_formed - _TOLERANCE
    return _stretch(settings, middle, lambda _, outer: outer.well_formed >= least)


def followed(settings: Sequence[SteeringSetting]) -> list[SteeringSetting]:
    """Return those of the well-formed settings, from strength 0 on to both sides, as far as edits grow with strength.

    What is moved too far stops being a correction long before it stops being well-formed.
    """
    kept = well_formed(settings)
    middle = next(i for i, setting in enumerate(kept) if setting.strength == 0)

    def grows(inner: SteeringSetting, outer: SteeringSetting) -> bool:
        gained = outer.edit_share - inner.edit_share
        return (gained if outer.strength > 0 else -gained) >= -_SLACK

    return _stretch(kept, middle, grows)


def mirrored(settings: Sequence[SteeringSetting]) -> list[SteeringSetting]:
    """Return the settings of the opposite direction."""
    return [one.model_copy(update={"strength": -one.strength or 0.0}) for one in reversed(settings)]


def _stretch(
    settings: Sequence[SteeringSetting], middle: int, goes_on: Callable[[SteeringSetting, SteeringSetting], bool]
) -> list[SteeringSetting]:
    """Return the settings around one of them, outwards as long as each goes on from the one further in."""
    first = last = middle
    while first > 0 and goes_on(settings[first], settings[first - 1]):
        first -= 1
    while last + 1 < len(settings) and goes_on(settings[last], settings[last + 1]):
        last += 1
    return list(settings[first : last + 1])


def rank_correlation(settings: Sequence[SteeringSetting]) -> float:
    """Return Spearman's correlation of strength and edit share; 0 where the ratio is always the same."""
    ratios = [setting.edit_share for setting in settings]
    if len({*ratios}) < 2:
        return 0.0
    from scipy.stats import spearmanr

    return float(spearmanr([setting.strength for setting in settings], ratios).statistic)


def best_layers(
    trials: Trials,
    rows: Sequence[Correction],
    shifts: dict[int, Tensor],
    candidates: Sequence[tuple[int, ...]],
    announce: Callable[[str], None],
) -> tuple[Steering, tuple[int, ...]]:
    """Return the layers and the side along which edits follow the strength furthest, and how far they do."""
    scores = []
    for layers in candidates:
        tried = trials.run(rows, Steering({layer: shifts[layer] for layer in layers}, -math.inf, math.inf))
        for sign, kept in ((1.0, followed(tried)), (-1.0, followed(mirrored(tried)))):
            scores.append((kept[-1].edit_share - kept[0].edit_share, sign, kept, layers))
        score, _, kept, _ = max(scores[-2:], key=lambda found: found[0])
        ends = f"{kept[0].edit_share:.2f} at {kept[0].strength:g} to {kept[-1].edit_share:.2f} at {kept[-1].strength:g}"
        announce(f"  layer {', '.join(map(str, layers))}: edited {ends}")
    score, sign, kept, layers = max(scores, key=lambda found: found[0])
    if score <= 0:
        raise EveralignError(
            "no strength changes how much is edited while corrections stay well-formed; "
            "give more rows, or other layers or strengths"
        )
    moved = {layer: sign * shifts[layer] for layer in layers}
    return Steering(moved, kept[0].strength, kept[-1].strength), layers
