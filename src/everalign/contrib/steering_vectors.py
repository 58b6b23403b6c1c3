"""A corrector's steering on disk: `steering.safetensors`, and `steering.json` that says whose and what it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from everalign.errors import InputError
from everalign.modeling.loading import model_fingerprint
from everalign.storage import read_json, read_tensors, sha256_of, write_json, write_tensors

VECTORS_FILE, FACTS_FILE = "steering.safetensors", "steering.json"

_PRECISIONS = (torch.float32, torch.bfloat16)


class SteeringSetting(BaseModel):
    """What corrections are like at one strength.

    Args:
        strength: α.
        edit_share: mean over the rows of the tokens edited, per token of the longer one of answer and correction.
        changed: share of the answers that are changed.
        well_formed: share of the corrections that end by themselves, are not empty, repeat no mark of the template, and
            have at most twice the tokens of the answer or of the correction it should get, whichever is longer.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    strength: float
    edit_share: float
    changed: float
    well_formed: float


class SteeringFacts(BaseModel):
    """What is known of a steering, as `steering.json` holds it.

    Args:
        format: of the file.
        layers: the layers that are steered, 0 for the first one.
        norms: of each of them, the length of what strength 1 adds: the mean distance of the states behind the
            beginning of a correction from those behind the beginning of its answer.
        direction: how the direction was found, `principal` or `mean`.
        rows: rows it was extracted from.
        prefixes: pairs of beginnings in them.
        template: id of the corrector's template.
        fingerprints: of the model it was extracted from, by precision.
        vectors: sha256 of `steering.safetensors`.
        lowest: the least strength that edits follow, and at which corrections stay well-formed.
        highest: the greatest one.
        spearman: rank correlation of strength and edit share over those of `settings` from `lowest` to `highest`.
        settings: what corrections of held-out rows are like, by strength.
        held_out: how many rows these are.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    format: Literal[1] = 1
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    norms: tuple[Annotated[float, Field(gt=0)], ...]
    direction: str
    rows: int
    prefixes: int
    template: str
    fingerprints: dict[str, str]
    vectors: str = ""
    lowest: Annotated[float, Field(le=0)]
    highest: Annotated[float, Field(ge=0)]
    spearman: float
    settings: tuple[SteeringSetting, ...]
    held_out: int


@dataclass(frozen=True)
class Steering:
    """What moves a corrector between copying and correcting.

    Args:
        shifts: by the layer's number, what strength 1 adds to its output, (d,) fp32.
        lowest: the least strength that may be asked for.
        highest: the greatest one.
    """

    shifts: dict[int, Tensor]
    lowest: float
    highest: float

    def at(self, strength: float) -> dict[int, Tensor]:
        """Return what a strength adds to each layer.

        Raises:
            InputError: it is outside of what was found to give well-formed corrections.
        """
        if not self.lowest <= strength <= self.highest:
            raise InputError(
                f"strength: is known to be followed by well-formed corrections from {self.lowest:g} to "
                f"{self.highest:g}, found {strength:g}"
            )
        return {layer: strength * shift for layer, shift in self.shifts.items()}


def fingerprints(model: Any) -> dict[str, str]:
    """Return a model's fingerprints: in its own precision, and in the lower ones that it may be loaded in."""
    own = next(model.parameters()).dtype
    known = _PRECISIONS[_PRECISIONS.index(own) :] if own in _PRECISIONS else (own,)
    return {str(dtype): model_fingerprint(model, dtype) for dtype in known}


def write_steering(folder: Path, steering: Steering, facts: SteeringFacts) -> None:
    """Write a steering into its corrector's folder."""
    vectors = torch.stack([steering.shifts[layer] for layer in facts.layers])
    write_tensors(folder / VECTORS_FILE, {"vectors": vectors})
    written = facts.model_copy(update={"vectors": sha256_of(folder / VECTORS_FILE)})
    write_json(folder / FACTS_FILE, written.model_dump(mode="json"))


def read_steering(folder: Path, model: Any, template: str) -> Steering:
    """Read a corrector's steering, checked against the corrector.

    Args:
        folder: the corrector's.
        model: the corrector, loaded.
        template: id of its template.

    Raises:
        InputError: there is none, a file is damaged, or it was made for another model, precision or template.
    """
    path = folder / FACTS_FILE
    if not path.is_file():
        raise InputError(f"{folder}: this corrector cannot be steered yet; run everalign correct steer first")
    facts = _read_facts(path)
    if facts.template != template:
        raise InputError(f"{path}: was made for the template {facts.template!r}, not {template!r}; {_AGAIN}")
    dtype = str(next(model.parameters()).dtype)
    if dtype not in facts.fingerprints:
        known = ", ".join(facts.fingerprints)
        raise InputError(f"{path}: was made for weights in {known}, and the model is in {dtype}; {_AGAIN}")
    if facts.fingerprints[dtype] != model_fingerprint(model):
        raise InputError(f"{path}: was made for other weights than this corrector's; {_AGAIN}")
    vectors = _read_vectors(folder / VECTORS_FILE, facts, model.config.get_text_config())
    return Steering(dict(zip(facts.layers, vectors, strict=True)), facts.lowest, facts.highest)


_AGAIN = "run everalign correct steer again"


def _read_facts(path: Path) -> SteeringFacts:
    content = read_json(path)
    try:
        return SteeringFacts.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path}: field {field!r}: {first['msg']}; {_AGAIN}") from None


def _read_vectors(path: Path, facts: SteeringFacts, config: Any) -> Tensor:
    if not path.is_file() or sha256_of(path) != facts.vectors:
        raise InputError(f"{path}: is missing or not the one that {FACTS_FILE} tells of; {_AGAIN}")
    found = read_tensors(path, ("vectors",), "steering")
    vectors = torch.empty(0) if found is None else found["vectors"]
    fits = max(facts.layers) < config.num_hidden_layers and bool(torch.isfinite(vectors).all())
    if vectors.shape != (len(facts.layers), config.hidden_size) or not fits:
        raise InputError(f"{path}: does not fit the corrector's layers; {_AGAIN}")
    return vectors
