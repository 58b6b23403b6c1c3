"""Merge an adapter into its base model, in fp32, write the result, and check it before anybody gets it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from everalign.errors import EveralignError
from everalign.modeling.checkpoint import DTYPES, OutputDtype, write_checkpoint
from everalign.modeling.loading import load_model, plain_weights

_PROBE_TOKENS = 32
_TOLERANCE = 1e-4
# What rounding the weights may change, as a share of the logits' norm. It is the median of the probe's positions, since
# a router of experts that is undecided about some of them sends these elsewhere after any change.
_ROUNDING = {torch.float32: _TOLERANCE, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        dtype: of most weights, such as `bf16`.
        rounding: by how much rounding to it has changed the logits, as a share of their norm (median of positions).
    """

    dtype: str
    rounding: float


def merged_into(base: Any, adapter: Path) -> Any:
    """Return base model plus adapter as a plain Hugging Face model, in fp32.

    Args:
        base: the base model in fp32; it is changed in place.
        adapter: a PEFT adapter folder of it.

    Raises:
        EveralignError: merged logits differ from the adapter's by more than 1e-4 of their largest value.
    """
    model = PeftModel.from_pretrained(plain_weights(base), str(adapter)).eval()
    expected = _logits(model)
    merged = model.merge_and_unload()
    error = _difference(_logits(merged), expected)
    if not error <= _TOLERANCE:
        raise EveralignError(f"the merged model's logits differ from the adapter's by {error:.2e} of their size")
    return merged


def write_checked(model: Any, folder: Path, dtype: OutputDtype = "auto") -> Written:
    """Write a model as `write_checkpoint` does, and compare what is loaded from there with the model in memory.

    Args:
        model: in fp32; it is of no use afterwards, since its weights are given up for those that are loaded.
        folder: an empty one.
        dtype: of the weights.

    Raises:
        InputError: as `write_checkpoint`.
        EveralignError: what was written is another model, or rounding has changed it by more than its dtype should.
    """
    exact = _logits(model)
    kind = write_checkpoint(model, folder, dtype)
    kept = _logits(model)
    model.to("meta")
    rounding = ((kept - exact).norm(dim=-1).median() / exact.norm(dim=-1).median()).item()
    name = next((name for name, known in DTYPES.items() if known == kind), str(kind))
    if not rounding <= _ROUNDING.get(kind, _TOLERANCE):
        raise EveralignError(
            f"rounding the weights to {name} moves the logits by {rounding:.2e} of their norm: choose --dtype fp32"
        )
    error = _difference(_logits(load_model(str(folder), "fp32")), kept)
    if not error <= _TOLERANCE:
        raise EveralignError(f"the written model's logits differ from the merged ones by {error:.2e} of their size")
    return Written(name, rounding)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    probe = torch.arange(_PROBE_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    logits: Tensor = model(input_ids=probe, use_cache=False).logits.float()
    return logits


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of logits, as a share of the largest expected one."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
