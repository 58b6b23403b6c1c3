"""Steering vectors on disk, and the residual-stream activations that they are made of."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from everalign.errors import InputError
from everalign.modeling.loading import model_fingerprint
from everalign.modeling.shrinking import layer_list
from everalign.storage import read_model, read_tensors, sha256_of, write_json, write_tensors


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return a causal language model's layers, the one nearest to the tokens first.

    Raises:
        InputError: the model does not hold its layers in one list.
    """
    layers = layer_list(model)
    if layers is None:
        config = model.config.get_text_config()
        raise InputError(
            f"a {config.model_type} model cannot be steered: it does not hold its {config.num_hidden_layers} layers "
            "in one list"
        )
    return layers


@contextmanager
def shifted(layers: Sequence[nn.Module], shifts: Mapping[int, Tensor]) -> Iterator[None]:
    """Add a vector to layers' outputs, at every position, in what this thread computes inside the block.

    Args:
        layers: of one model.
        shifts: a vector (d,) of any dtype and device by the layer's index.
    """
    thread = get_ident()

    def hook(shift: Tensor) -> Any:
        def add(_layer: nn.Module, _inputs: Any, output: Any) -> Any:
            if get_ident() != thread:
                return None
            states = output[0] if isinstance(output, tuple) else output
            moved = states + shift.to(states)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return add

    with ExitStack() as stack:
        for index, shift in shifts.items():
            stack.callback(layers[index].register_forward_hook(hook(shift)).remove)
        yield


@torch.no_grad()
def residuals(model: Any, layers: Sequence[nn.Module], tokens: Tensor, last: int) -> Tensor:
    """Return the outputs of L layers at the last positions: (L, B, last, d) fp32 on the CPU.

    Args:
        model: a causal language model in evaluation mode.
        layers: all of its layers.
        tokens: (B, T) int64, without padding.
        last: number of positions, at most T.
    """
    outputs: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        outputs.append(states[:, -last:].float().cpu())

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    return torch.stack(outputs)


VECTORS_FILE, FACTS_FILE = "steering.safetensors", "steering.json"

_PRECISIONS = (torch.float32, torch.bfloat16)
_AGAIN = "run everalign correct steer again"


class SteeringSetting(BaseModel):
    """What corrections are like at one strength.

    Args:
        strength: factor of the steering vectors; 0 for none.
        edit_share: mean over the rows of `edit_share` between answer and correction, in tokens.
        changed: share of the answers that are changed.
        well_formed: share of the corrections that end by themselves, are not empty, repeat no mark of the template, and
            have at most twice the tokens of the answer or of its known correction, whichever is longer.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    strength: float
    edit_share: float
    changed: float
    well_formed: float


class SteeringFacts(BaseModel):
    """The content of `steering.json`.

    Args:
        format: of the file.
        layers: indices of the layers that are steered, 0 for the first one.
        norms: length of each layer's vector: the mean distance between the states after the beginning of a correction
            and those after the beginning of its answer.
        direction: how the direction was found, `principal` or `mean`.
        rows: rows it was extracted from.
        prefixes: pairs of beginnings in them.
        template: id of the corrector's template.
        fingerprints: of the model it was extracted from, by precision.
        vectors: sha256 of `steering.safetensors`.
        lowest: the lowest strength down to which edits follow the strength and corrections stay well-formed.
        highest: the highest one.
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
    """Vectors that move a corrector between copying and correcting.

    Args:
        shifts: by the layer's index, what strength 1 adds to its output, (d,) fp32.
        lowest: the lowest strength that may be asked for.
        highest: the highest one.
    """

    shifts: dict[int, Tensor]
    lowest: float
    highest: float

    def at(self, strength: float) -> dict[int, Tensor]:
        """Return what a strength adds to each layer.

        Raises:
            InputError: corrections are not known to stay well-formed at this strength.
        """
        if not self.lowest <= strength <= self.highest:
            raise InputError(
                f"strength: corrections are known to stay well-formed from {self.lowest:g} to {self.highest:g}, "
                f"found {strength:g}"
            )
        return {layer: strength * shift for layer, shift in self.shifts.items()}


def fingerprints(model: Any) -> dict[str, str]:
    """Return a model's fingerprints: in its own precision, and in the lower ones that it may be loaded in."""
    own = next(model.parameters()).dtype
    known = _PRECISIONS[_PRECISIONS.index(own) :] if own in _PRECISIONS else (own,)
    return {str(dtype): model_fingerprint(model, dtype) for dtype in known}


def write_steering(folder: Path, steering: Steering, facts: SteeringFacts) -> None:
    """Write steering vectors into their corrector's folder."""
    vectors = torch.stack([steering.shifts[layer] for layer in facts.layers])
    write_tensors(folder / VECTORS_FILE, {"vectors": vectors})
    written = facts.model_copy(update={"vectors": sha256_of(folder / VECTORS_FILE)})
    write_json(folder / FACTS_FILE, written.model_dump(mode="json"))


def read_steering(folder: Path, model: Any, template: str) -> Steering:
    """Read a corrector's steering vectors and check that they were made for it.

    Args:
        folder: the corrector's.
        model: the corrector, loaded.
        template: id of its template.

    Raises:
        InputError: there are none, a file is damaged, or they were made for another model, precision or template.
    """
    path, vectors_path = folder / FACTS_FILE, folder / VECTORS_FILE
    if not path.is_file():
        raise InputError(f"{folder}: this corrector cannot be steered yet; run everalign correct steer first")
    facts = read_model(path, SteeringFacts, _AGAIN)
    if facts.template != template:
        raise InputError(f"{path}: was made for the template {facts.template!r}, not {template!r}; {_AGAIN}")
    dtype = str(next(model.parameters()).dtype)
    if dtype not in facts.fingerprints:
        known = ", ".join(facts.fingerprints)
        raise InputError(f"{path}: was made for weights in {known}, and the model is in {dtype}; {_AGAIN}")
    if facts.fingerprints[dtype] != model_fingerprint(model):
        raise InputError(f"{path}: was made for other weights than this corrector's; {_AGAIN}")

    if not vectors_path.is_file() or sha256_of(vectors_path) != facts.vectors:
        raise InputError(f"{vectors_path}: is missing or not the one that {FACTS_FILE} names; {_AGAIN}")
    tensors = read_tensors(vectors_path, ("vectors",), "steering") or {"vectors": torch.empty(0)}
    vectors, config = tensors["vectors"], model.config.get_text_config()
    fits = max(facts.layers) < config.num_hidden_layers and vectors.shape == (len(facts.layers), config.hidden_size)
    if not fits or not bool(torch.isfinite(vectors).all()):
        raise InputError(f"{vectors_path}: does not fit the corrector's layers; {_AGAIN}")
    return Steering(dict(zip(facts.layers, vectors, strict=True)), facts.lowest, facts.highest)
