"""Merge an adapter into its base model, in fp32, and check the result before anybody gets it."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from everalign.errors import EveralignError
from everalign.modeling.loading import load_model

_PROBE_TOKENS = 32
_TOLERANCE = 1e-4


def merged_model(model_name: str, adapter: Path) -> Any:
    """Return base model plus adapter as a plain Hugging Face model, in fp32.

    Args:
        model_name: the base model.
        adapter: a PEFT adapter folder of it.

    Raises:
        EveralignError: merged logits differ from the adapter's by more than 1e-4 of their largest value.
    """
    return merged_into(load_model(model_name, "fp32"), adapter)


def merged_into(base: Any, adapter: Path) -> Any:
    """As `merged_model`, of a base model that is loaded in fp32 already; it is changed in place."""
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    probe = torch.arange(_PROBE_TOKENS)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        expected = model(input_ids=probe).logits
        merged = model.merge_and_unload()
        found = merged(input_ids=probe).logits
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= _TOLERANCE:
        raise EveralignError(f"the merged model's logits differ from the adapter's by {error:.2e} of their size")
    return merged
