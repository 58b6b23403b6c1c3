"""Steer a corrector between copying and correcting, by a direction of its residual stream.

    report = steer_corrector("runs/corrector", load_corrections("edits.test.jsonl"))
    Corrector.from_pretrained("runs/corrector").correct("Is the sea salty?", "No.", strength=0.5)

Behind the same question and answer, the states after the first tokens of the answer (the corrector copies) and of the
correction (it corrects) differ; what the differences have in common is the direction, layer by layer. Which layer to
move along it, to which side and how far, is told by what the corrector then does with other rows: the edits have to
follow the strength while the corrections stay well-formed. To which side is no formality: moved towards what it is
like behind the first words of a correction, a corrector may take them for written.

Source: Ji et al., NeurIPS 2024 (arXiv 2402.02416), section 3.4, after representation engineering (Zou et al., arXiv
2310.01405). The paper leaves open which layers are moved, how pairs are centred and what the sign is.
"""

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from everalign.correction.encoder import CorrectionEncoder
from everalign.correction.engines import TOKENS_PER_BATCH
from everalign.correction.files import load_corrector_files
from everalign.correction.steering_files import (
    FACTS_FILE,
    Steering,
    SteeringFacts,
    fingerprints,
    write_steering,
)
from everalign.correction.steering_trials import Trials, best_layers, rank_correlation, well_formed
from everalign.data.corrections import Correction, CorrectionSet
from everalign.errors import EveralignError, InputError
from everalign.modeling.loading import Precision, load_model, load_tokenizer
from everalign.modeling.residual_stream import decoder_layers, residuals
from everalign.modeling.runtime import training_device
from everalign.storage import alone, lock_of

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
    announce: Callable[[str], None] = lambda _: None,
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
        announce: called with one line for each thing that happens.
        progress: called with ("steering", trials done, trials in all).

    Returns:
        What `steering.json` says.

    Raises:
        InputError: the corrector, the rows or the options cannot be used.
        EveralignError: no layer was found whose strength decides how much is edited.
    """
    options, path = options or SteeringOptions(), Path(folder)
    with alone(lock_of(path / FACTS_FILE), "steering this corrector"):
        if (path / FACTS_FILE).exists() and not overwrite:
            raise InputError(f"{path / FACTS_FILE} exists: ask for overwrite to find a new direction")
        files = load_corrector_files(path)
        parts = _divided(rows, options, seed)
        encoder = files.encoder(load_tokenizer(str(path)))
        model = load_model(str(path), precision, device=training_device())
        count = len(decoder_layers(model))
        candidates = _candidates(count, options.layers)
        extracted, chosen_on, held = (len(part) for part in (parts.extract, parts.choose, parts.report))
        announce(f"  {extracted} rows to extract from, {chosen_on} to choose on, {held} held")
        differences = prefix_differences(model, encoder, parts.extract, options.prefix)
        shifts = {layer: _shift(differences[layer], options.direction) for layer in {n for c in candidates for n in c}}
        trials = Trials(model, encoder, tokens_per_batch, options.settings, len(candidates) + 1, progress)
        steering, layers = best_layers(trials, parts.choose, shifts, candidates, announce)
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
