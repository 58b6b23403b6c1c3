"""Steer a corrector between copying and correcting, by a direction of its residual stream."""

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from everalign.contrib.activations import decoder_layers, residuals
from everalign.contrib.steering_vectors import (
    FACTS_FILE,
    Steering,
    SteeringFacts,
    SteeringSetting,
    fingerprints,
    write_steering,
)
from everalign.correction.corrector_files import load_corrector_files
from everalign.correction.edits import edit_share
from everalign.correction.engines import TOKENS_PER_BATCH, LocalEngine
from everalign.correction.output_checks import Guards
from everalign.correction.tokenization import CorrectionEncoder
from everalign.data.records import Correction, CorrectionSet
from everalign.errors import EveralignError, InputError
from everalign.modeling.loading import Precision, load_model, load_tokenizer
from everalign.modeling.runtime import training_device
from everalign.storage import exclusive, lock_of

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
    log: Callable[[str], None],
) -> tuple[Steering, tuple[int, ...]]:
    """Return the layers and the side along which edits follow the strength furthest, and how far they do."""
    scores = []
    for layers in candidates:
        tried = trials.run(rows, Steering({layer: shifts[layer] for layer in layers}, -math.inf, math.inf))
        for sign, kept in ((1.0, followed(tried)), (-1.0, followed(mirrored(tried)))):
            scores.append((kept[-1].edit_share - kept[0].edit_share, sign, kept, layers))
        score, _, kept, _ = max(scores[-2:], key=lambda found: found[0])
        ends = f"{kept[0].edit_share:.2f} at {kept[0].strength:g} to {kept[-1].edit_share:.2f} at {kept[-1].strength:g}"
        log(f"  layer {', '.join(map(str, layers))}: edited {ends}")
    score, sign, kept, layers = max(scores, key=lambda found: found[0])
    if score <= 0:
        raise EveralignError(
            "no strength changes how much is edited while corrections stay well-formed; "
            "give more rows, or other layers or strengths"
        )
    moved = {layer: sign * shifts[layer] for layer in layers}
    return Steering(moved, kept[0].strength, kept[-1].strength), layers


Direction = Literal["principal", "mean"]

STRENGTHS = (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)
FEWEST_ROWS = 16
_MOST_LAYERS = 8


@dataclass(frozen=True)
class SteeringOptions:
    """How a direction is found.

    Args:
        direction: of the normalised differences, `mean`, or `principal`, their first principal component, uncentred,
            as in the paper. The mean was followed further on the one corrector that both were measured on.
        layers: those to steer together, 0 for the first one; None to choose the best single one.
        strengths: those that are tried, besides 0.
        rows: most rows that the direction is extracted from.
        trials: most rows that layers are compared on, and again most rows of the report.
        prefix: most tokens of an answer and a correction that are looked at.

    Raises:
        InputError: an option is out of its range.
    """

    direction: Direction = "mean"
    layers: tuple[int, ...] | None = None
    strengths: tuple[float, ...] = STRENGTHS
    rows: int = 64
    trials: int = 24
    prefix: int = 8

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise InputError(f"direction must be one of {', '.join(get_args(Direction))}, found {self.direction!r}")
        for name, least in (("rows", 2), ("trials", 2), ("prefix", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, found {getattr(self, name)}")
        tried = {value for value in self.strengths if math.isfinite(value) and value != 0}
        if len(tried) < max(2, len(self.strengths)):
            found = ", ".join(f"{value:g}" for value in self.strengths)
            raise InputError(f"strengths must be at least two different finite numbers other than 0, found {found}")
        if self.layers is not None and (not self.layers or len({*self.layers}) < len(self.layers)):
            raise InputError(f"layers must be different numbers, at least one, found {list(self.layers)}")

    @property
    def settings(self) -> list[float]:
        """All strengths, 0 among them, from the least to the greatest."""
        return sorted({0.0, *self.strengths})


@dataclass(frozen=True)
class _Parts:
    """Rows apart: to extract from, to choose a layer on, and to report on."""

    extract: list[Correction]
    choose: list[Correction]
    report: list[Correction]


def steer_corrector(
    folder: str | os.PathLike[str],
    rows: CorrectionSet,
    *,
    options: SteeringOptions | None = None,
    seed: int = 0,
    overwrite: bool = False,
    precision: Precision = "fp32",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    log: Callable[[str], None] = lambda _: None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> SteeringFacts:
    """Find out how a corrector is steered, and write it into the corrector's folder.

    Args:
        folder: a corrector's, as `train_corrector` writes it.
        rows: corrections, best such as it was not trained on. Half of those that change anything are extracted from,
            a quarter chooses the layer, and a quarter is reported on.
        options: how; the defaults when None.
        seed: draws the rows.
        overwrite: replace a steering that is there.
        precision: of the weights; a steering found in fp32 is for bf16 too.
        tokens_per_batch: tokens computed at once.
        log: called with one line for each thing that happens.
        progress: called with ("steering", trials done, trials in all).

    Returns:
        What `steering.json` says.

    Raises:
        InputError: the corrector, the rows or the options cannot be used.
        EveralignError: no layer was found whose strength decides how much is edited.
    """
    options, path = options or SteeringOptions(), Path(folder)
    with exclusive(lock_of(path / FACTS_FILE), "steering this corrector"):
        if (path / FACTS_FILE).exists() and not overwrite:
            raise InputError(f"{path / FACTS_FILE} exists: ask for overwrite to find a new direction")
        files = load_corrector_files(path)
        parts = _divided(rows, options, seed)
        encoder = files.encoder(load_tokenizer(str(path)))
        model = load_model(str(path), precision, device=training_device())
        count = len(decoder_layers(model))
        candidates = _candidates(count, options.layers)
        extracted, chosen_on, held = (len(part) for part in (parts.extract, parts.choose, parts.report))
        log(f"  {extracted} rows to extract from, {chosen_on} to choose on, {held} held")
        differences = prefix_differences(model, encoder, parts.extract, options.prefix)
        shifts = {layer: _shift(differences[layer], options.direction) for layer in {n for c in candidates for n in c}}
        trials = Trials(model, encoder, tokens_per_batch, options.settings, len(candidates) + 1, progress)
        steering, layers = best_layers(trials, parts.choose, shifts, candidates, log)
        found = trials.run(parts.report, steering)
        kept = well_formed([one for one in found if steering.lowest <= one.strength <= steering.highest])
        spearman = rank_correlation(kept)
        if spearman <= 0:
            raise EveralignError(
                f"the edits of {len(parts.report)} held-out rows do not follow the strength (Spearman {spearman:.2f}); "
                "give more rows, or other layers or strengths"
            )
        steering = Steering(steering.shifts, kept[0].strength, kept[-1].strength)
        facts = SteeringFacts(
            layers=layers,
            norms=tuple(float(steering.shifts[layer].norm()) for layer in layers),
            direction=options.direction,
            rows=len(parts.extract),
            prefixes=differences.shape[1],
            template=encoder.template.id,
            fingerprints=fingerprints(model),
            lowest=steering.lowest,
            highest=steering.highest,
            spearman=spearman,
            settings=tuple(found),
            held_out=len(parts.report),
        )
        write_steering(path, steering, facts)
        return facts


# ---- directions ----


def prefix_differences(model: Any, encoder: CorrectionEncoder, rows: Sequence[Correction], longest: int) -> Tensor:
    """Return how the states behind a correction's first k tokens differ from those behind its answer's: (L, N, d).

    Of every row and every k up to `longest` and to the shorter one's end, as far as the two do not begin alike. fp32.

    Raises:
        InputError: no row fits the model.
    """
    layers = decoder_layers(model)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    found = []
    for row in rows:
        prompt = encoder.prompt(row.question, row.answer)
        copy, correct = encoder.response(row.answer), encoder.response(row.correction)
        length = min(len(copy), len(correct), longest)
        alike = next((k for k in range(length) if copy[k] != correct[k]), length)
        if alike == length or len(prompt) + length > context:
            continue
        tokens = torch.tensor([prompt + copy[:length], prompt + correct[:length]])
        states = residuals(model, layers, tokens, length - alike)
        found.append(states[:, 1] - states[:, 0])
    if not found:
        raise InputError(f"none of {len(rows)} rows can be extracted from: all are too long, or differ too late")
    return torch.cat(found, dim=1)


def common_direction(differences: Tensor, kind: Direction) -> Tensor:
    """Return the unit vector (d,) that differences (N, d) have in common, on the side that most of them are on.

    Each counts alike, whatever its length.
    """
    normal = F.normalize(differences.double(), dim=1)
    mean = normal.mean(0)
    if kind == "mean":
        return F.normalize(mean, dim=0)
    first: Tensor = torch.linalg.svd(normal, full_matrices=False)[2][0]
    return -first if first @ mean < 0 else first


def _shift(differences: Tensor, kind: Direction) -> Tensor:
    """What strength 1 adds: as much as copying and correcting are apart on average."""
    length: Tensor = differences.norm(dim=1).mean()
    return (common_direction(differences, kind) * length).float()


def _candidates(count: int, given: tuple[int, ...] | None) -> list[tuple[int, ...]]:
    """Return the layers to try: those given, together; or each alone, evenly spaced where there are many."""
    if given is not None:
        for layer in given:
            if not 0 <= layer < count:
                raise InputError(f"layers: the corrector has layers 0 to {count - 1}, found {layer}")
        return [tuple(sorted(given))]
    tried = min(count, _MOST_LAYERS)
    return [(layer,) for layer in sorted({round(i * (count - 1) / max(1, tried - 1)) for i in range(tried)})]


def _divided(rows: CorrectionSet, options: SteeringOptions, seed: int) -> _Parts:
    edits = [row for row in rows if not row.is_identity]
    if len(edits) < FEWEST_ROWS:
        raise InputError(
            f"{rows.source}: {len(edits)} rows whose correction is another text than the answer; "
            f"at least {FEWEST_ROWS} are needed"
        )
    random.Random(seed).shuffle(edits)
    quarter = len(edits) // 4
    trials = min(quarter, options.trials)
    extract = edits[2 * quarter :][: options.rows]
    return _Parts(extract, edits[:trials], edits[quarter : quarter + trials])
