"""Steer a corrector between copying and correcting along a direction of its residual stream.

    steer_corrector("runs/corrector", load_corrections("edits.test.jsonl"))
    corrector = load_steered_corrector("runs/corrector", strength=0.5)

The direction is what the states after the first tokens of corrections differ by from those after the first tokens of
the answers (representation engineering, Zou et al., arXiv 2310.01405; for correctors Ji et al., arXiv 2402.02416,
section 3.4). Layer and usable strengths are chosen by what corrections of held-out rows are like.
"""

import copy
import hashlib
import math
import os
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from everalign.contrib.steering_vectors import (
    FACTS_FILE,
    Steering,
    SteeringFacts,
    SteeringSetting,
    decoder_layers,
    fingerprints,
    read_steering,
    residuals,
    shifted,
    write_steering,
)
from everalign.correction.checks import Approver, Guards
from everalign.correction.corrector import CorrectionOptions, Corrector
from everalign.correction.corrector_files import load_corrector_files
from everalign.correction.edits import edit_share
from everalign.correction.engines import TOKENS_PER_BATCH
from everalign.correction.local_engine import LocalEngine
from everalign.correction.tokenization import CorrectionEncoder
from everalign.data.records import Correction, CorrectionSet
from everalign.errors import EveralignError, InputError
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.runtime import training_device
from everalign.options import Options, Precision
from everalign.storage import exclusive, lock_of

if TYPE_CHECKING:
    from typing_extensions import Self

Direction = Literal["principal", "mean"]

STRENGTHS = (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)
FEWEST_ROWS = 16
_MOST_LAYERS = 8
# What makes a correction well-formed; how much of the answer it keeps is what the strength is to change.
_WELL_FORMED = Guards(growth=None, code=False, url=False)
# A correction with more tokens than this many times the longer of answer and known correction is not well-formed.
_TIMES_LONGER = 2
# The share of well-formed corrections may be this much smaller than without steering.
_TOLERANCE = 0.1
# A higher strength may, by chance, edit this much less.
_SLACK = 0.02


class SteeredEngine(LocalEngine):
    """A corrector in this process whose layers' outputs are shifted; as it is until `at` sets a strength.

    Args:
        model, encoder, tokens_per_batch: as in `LocalEngine`.
        steering: the vectors.
    """

    def __init__(
        self,
        model: Any,
        encoder: CorrectionEncoder,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        steering: Steering | None = None,
    ) -> None:
        super().__init__(model, encoder, tokens_per_batch)
        self.steering = steering or Steering({}, 0.0, 0.0)
        self._shifts: dict[int, Tensor] = {}

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **local: Any) -> "Self":
        """Load a corrector with its steering vectors; raises InputError where they are missing or not its own."""
        engine = super().from_pretrained(folder, **local)
        engine.steering = read_steering(Path(folder), engine._model.model, engine.template.id)
        return engine

    def at(self, strength: float, steering: Steering | None = None) -> "Self":
        """Return an engine of the same model that is steered; raises InputError for a strength out of range."""
        steered = copy.copy(self)
        steered.steering = steering or self.steering
        shifts = steered.steering.at(strength)
        device = self._model.model.device
        steered._shifts = {layer: shift.to(device) for layer, shift in shifts.items()} if strength else {}
        return steered

    @property
    def fingerprint(self) -> str:
        """That of the plain engine at strength 0, else sha256 over it and what is added to the layers."""
        plain = super().fingerprint
        if not self._shifts:
            return plain
        added = {layer: shift.tolist() for layer, shift in sorted(self._shifts.items())}
        return hashlib.sha256(f"{plain} {added}".encode()).hexdigest()

    def decoding_context(self) -> AbstractContextManager[None]:
        """Shifts the layers' outputs."""
        return shifted(decoder_layers(self._model.model), self._shifts) if self._shifts else nullcontext()


def load_steered_corrector(
    folder: str | os.PathLike[str],
    strength: float,
    *,
    options: CorrectionOptions | None = None,
    approver: Approver | None = None,
    **local: Any,
) -> Corrector:
    """Load a corrector that `steer_corrector` has measured, at one strength.

    Args:
        folder: the corrector's.
        strength: below 0 it copies more, above 0 it corrects more; 0 is the corrector as it is.
        options, approver: as in `Corrector`.
        local: other arguments of `Corrector.from_pretrained`.

    Raises:
        InputError: the corrector or its steering vectors cannot be loaded, or the strength is out of range.
    """
    return Corrector(SteeredEngine.from_pretrained(folder, **local).at(strength), options, approver)


class SteeringOptions(Options):
    """How a direction is found."""

    direction: Direction = Field(
        default="mean",
        description="mean of the normalised differences, or principal, their first component.\n`principal` is "
        "uncentred, as in the paper. On the one corrector that both were measured on, edits followed the mean over a "
        "wider range.",
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="Layers to steer together, 0 for the first one; the best single one if not given."
    )
    strengths: tuple[float, ...] = Field(default=STRENGTHS, description="Strengths to try, in addition to 0.")
    rows: int = Field(default=64, ge=2, description="Most rows to extract the direction from.")
    trials: int = Field(default=24, ge=2, description="Most rows to compare layers on, and most rows of the report.")
    prefix: int = Field(default=8, ge=1, description="Most tokens of an answer and a correction that are compared.")

    @model_validator(mode="after")
    def _check(self) -> "SteeringOptions":
        if len({value for value in self.strengths if value != 0}) < max(2, len(self.strengths)):
            found = ", ".join(f"{value:g}" for value in self.strengths)
            raise InputError(
                f"strengths must be at least two different numbers other than 0, found {found}", field="strengths"
            )
        if self.layers is not None and (not self.layers or len({*self.layers}) < len(self.layers)):
            raise InputError(
                f"layers must be different numbers, at least one, found {list(self.layers)}", field="layers"
            )
        return self


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
    """Find a corrector's steering vectors, measure them, and write them into the corrector's folder.

    Args:
        folder: a corrector's, as `train_corrector` writes it.
        rows: corrections, preferably ones it was not trained on. Of those that change anything, half are for extracting
            the direction, a quarter for choosing the layer, and a quarter for the report.
        options: the defaults when None.
        seed: draws the rows.
        overwrite: replace steering vectors that are there.
        precision: of the weights; vectors found in fp32 serve bf16 too.
        tokens_per_batch: tokens computed at once.
        log: called with one line for each step.
        progress: called with ("steering", trials done, trials in all); a trial corrects some rows at one strength.

    Returns:
        The content of `steering.json`.

    Raises:
        InputError: the corrector, the rows or the options cannot be used.
        EveralignError: at no layer does the strength decide how much is edited.
    """
    options, path = options or SteeringOptions(), Path(folder)
    with exclusive(lock_of(path / FACTS_FILE), "steering this corrector"):
        if (path / FACTS_FILE).exists() and not overwrite:
            raise InputError(f"{path / FACTS_FILE} exists: ask for overwrite to find a new direction")
        files = load_corrector_files(path)
        edits = [row for row in rows if not row.is_identity]
        if len(edits) < FEWEST_ROWS:
            raise InputError(
                f"{rows.source}: {len(edits)} rows whose correction is another text than the answer; "
                f"at least {FEWEST_ROWS} are needed"
            )
        random.Random(seed).shuffle(edits)
        quarter = len(edits) // 4
        trial_rows = min(quarter, options.trials)
        choosing, reporting = edits[:trial_rows], edits[quarter : quarter + trial_rows]
        extracting = edits[2 * quarter :][: options.rows]
        log(f"  {len(extracting)} rows to extract from, {len(choosing)} to choose on, {len(reporting)} held out")

        encoder = files.encoder(load_tokenizer(str(path)))
        model = load_model(str(path), precision, device=training_device())
        candidates = _candidate_layers(len(decoder_layers(model)), options.layers)
        differences = prefix_differences(model, encoder, extracting, options.prefix)
        shifts = {}
        for layer in {layer for candidate in candidates for layer in candidate}:
            # Strength 1 adds the mean distance between copying and correcting.
            length = differences[layer].norm(dim=1).mean()
            shifts[layer] = (common_direction(differences[layer], options.direction) * length).float()
        engine = SteeredEngine(model, encoder, tokens_per_batch)
        strengths = sorted({0.0, *options.strengths})
        trials = _Trials(engine, strengths, len(strengths) * (len(candidates) + 1), progress)
        steering = _best_layers(trials, choosing, shifts, candidates, log)
        settings = trials.run(reporting, steering)
        usable = well_formed([one for one in settings if steering.lowest <= one.strength <= steering.highest])
        spearman = rank_correlation(usable)
        if spearman <= 0:
            raise EveralignError(
                f"the edits of {len(reporting)} held-out rows do not follow the strength (Spearman {spearman:.2f}); "
                "give more rows, or other layers or strengths"
            )
        steering = Steering(steering.shifts, usable[0].strength, usable[-1].strength)
        layers = tuple(steering.shifts)
        facts = SteeringFacts(
            layers=layers,
            norms=tuple(float(shift.norm()) for shift in steering.shifts.values()),
            direction=options.direction,
            rows=len(extracting),
            prefixes=differences.shape[1],
            template=encoder.template.id,
            fingerprints=fingerprints(model),
            lowest=steering.lowest,
            highest=steering.highest,
            spearman=spearman,
            settings=tuple(settings),
            held_out=len(reporting),
        )
        write_steering(path, steering, facts)
        return facts


# ---- directions ----


def prefix_differences(model: Any, encoder: CorrectionEncoder, rows: Sequence[Correction], longest: int) -> Tensor:
    """Return how the states after a correction's first k tokens differ from those after its answer's: (L, N, d) fp32.

    N counts, over all rows, each k from the first different token up to `longest` or the end of the shorter text.

    Raises:
        InputError: no row fits the model.
    """
    layers = decoder_layers(model)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    differences = []
    for row in rows:
        prompt = encoder.prompt(row.question, row.answer)
        copied, corrected = encoder.response(row.answer), encoder.response(row.correction)
        length = min(len(copied), len(corrected), longest)
        common = next((k for k in range(length) if copied[k] != corrected[k]), length)
        if common == length or len(prompt) + length > context:
            continue
        tokens = torch.tensor([prompt + copied[:length], prompt + corrected[:length]])
        states = residuals(model, layers, tokens, length - common)
        differences.append(states[:, 1] - states[:, 0])
    if not differences:
        raise InputError(f"none of {len(rows)} rows can be extracted from: all are too long, or differ too late")
    return torch.cat(differences, dim=1)


def common_direction(differences: Tensor, kind: Direction) -> Tensor:
    """Return the unit vector (d,) that differences (N, d) have in common, on the side that most of them are on.

    Each difference has the same weight, whatever its length.
    """
    normal = F.normalize(differences.double(), dim=1)
    mean = normal.mean(0)
    if kind == "mean":
        return F.normalize(mean, dim=0)
    first: Tensor = torch.linalg.svd(normal, full_matrices=False)[2][0]
    return -first if first @ mean < 0 else first


def _candidate_layers(count: int, given: tuple[int, ...] | None) -> list[tuple[int, ...]]:
    """Return the given layers together, or single layers, evenly spaced where there are many."""
    if given is not None:
        for layer in given:
            if not 0 <= layer < count:
                raise InputError(f"layers: the corrector has layers 0 to {count - 1}, found {layer}")
        return [tuple(sorted(given))]
    tried = min(count, _MOST_LAYERS)
    return [(layer,) for layer in sorted({round(i * (count - 1) / max(1, tried - 1)) for i in range(tried)})]


# ---- strengths ----


@dataclass
class _Trials:
    """Corrects rows at all strengths, and at strength 0 only once for the same rows.

    Args:
        engine: the corrector.
        strengths: those to try, 0 among them, in rising order.
        count: how many trials there will be.
        progress: called with ("steering", trials done, trials in all).
    """

    engine: SteeredEngine
    strengths: Sequence[float]
    count: int
    progress: Callable[[str, int, int], None]
    done: int = 0
    unsteered: dict[tuple[str, ...], SteeringSetting] = field(default_factory=dict)

    def run(self, rows: Sequence[Correction], steering: Steering) -> list[SteeringSetting]:
        """Return what corrections of rows are like at each strength, whatever the steering's range."""
        unlimited = Steering(steering.shifts, -math.inf, math.inf)
        ids = tuple(row.id for row in rows)
        settings = []
        for strength in self.strengths:
            found = self.unsteered.get(ids) if strength == 0 else None
            settings.append(found or self._measure(rows, self.engine.at(strength, unlimited), strength))
            if strength == 0:
                self.unsteered[ids] = settings[-1]
            self.done += 1
            self.progress("steering", self.done, self.count)
        return settings

    def _measure(self, rows: Sequence[Correction], engine: SteeredEngine, strength: float) -> SteeringSetting:
        encoder = engine.encoder
        answers = [encoder.response(row.answer) for row in rows]
        known = [encoder.response(row.correction) for row in rows]
        limits = [_TIMES_LONGER * max(map(len, pair)) for pair in zip(answers, known, strict=True)]
        outputs = engine.write([(row.question, row.answer) for row in rows], None, max(limits))
        edited = changed = well_formed = 0.0
        for row, answer, output, limit in zip(rows, answers, outputs, limits, strict=True):
            tokens = encoder.response(output.text)
            edited += edit_share(answer, tokens)
            changed += output.text != row.answer
            violation = _WELL_FORMED.first_violation(
                row.answer, output.text, output.finished, engine.template, row.question
            )
            well_formed += violation is None and len(tokens) <= limit
        count = len(rows)
        return SteeringSetting(
            strength=strength, edit_share=edited / count, changed=changed / count, well_formed=well_formed / count
        )


def _best_layers(
    trials: _Trials,
    rows: Sequence[Correction],
    shifts: dict[int, Tensor],
    candidates: Sequence[tuple[int, ...]],
    log: Callable[[str], None],
) -> Steering:
    """Return the layers, and the sign of their vectors, at which edits follow the strength over the widest range."""
    best, steering = 0.0, None
    for layers in candidates:
        tried = trials.run(rows, Steering({layer: shifts[layer] for layer in layers}, -math.inf, math.inf))
        ranges = [(sign, followed(tried if sign > 0 else mirrored(tried))) for sign in (1.0, -1.0)]
        sign, usable = max(ranges, key=lambda found: found[1][-1].edit_share - found[1][0].edit_share)
        least, most = usable[0], usable[-1]
        log(
            f"  layer {', '.join(map(str, layers))}: edited {least.edit_share:.2f} at {least.strength:g} to "
            f"{most.edit_share:.2f} at {most.strength:g}"
        )
        if most.edit_share - least.edit_share > best:
            best = most.edit_share - least.edit_share
            steering = Steering({layer: sign * shifts[layer] for layer in layers}, least.strength, most.strength)
    if steering is None:
        raise EveralignError(
            "no strength changes how much is edited while corrections stay well-formed; "
            "give more rows, or other layers or strengths"
        )
    return steering


def well_formed(settings: Sequence[SteeringSetting]) -> list[SteeringSetting]:
    """Return the settings around strength 0 at which about as many corrections are well-formed as there."""
    least = next(one.well_formed for one in settings if one.strength == 0) - _TOLERANCE
    return _around_zero(settings, lambda _, outer: outer.well_formed >= least)


def followed(settings: Sequence[SteeringSetting]) -> list[SteeringSetting]:
    """Return the well-formed settings around strength 0 as far as edits grow with the strength.

    A state that is moved too far stops giving corrections long before they stop being well-formed.
    """

    def grows(inner: SteeringSetting, outer: SteeringSetting) -> bool:
        gained = outer.edit_share - inner.edit_share
        return (gained if outer.strength > 0 else -gained) >= -_SLACK

    return _around_zero(well_formed(settings), grows)


def mirrored(settings: Sequence[SteeringSetting]) -> list[SteeringSetting]:
    """Return the settings of the opposite direction."""
    return [one.model_copy(update={"strength": -one.strength or 0.0}) for one in reversed(settings)]


def _around_zero(
    settings: Sequence[SteeringSetting], extends: Callable[[SteeringSetting, SteeringSetting], bool]
) -> list[SteeringSetting]:
    """Return the settings from strength 0 outwards, as long as `extends(inner, outer)` holds."""
    first = last = next(i for i, setting in enumerate(settings) if setting.strength == 0)
    while first > 0 and extends(settings[first], settings[first - 1]):
        first -= 1
    while last + 1 < len(settings) and extends(settings[last], settings[last + 1]):
        last += 1
    return list(settings[first : last + 1])


def rank_correlation(settings: Sequence[SteeringSetting]) -> float:
    """Return Spearman's correlation of strength and edit share; 0 where the share is constant."""
    shares = [setting.edit_share for setting in settings]
    if len({*shares}) < 2:
        return 0.0
    from scipy.stats import spearmanr

    return float(spearmanr([setting.strength for setting in settings], shares).statistic)
