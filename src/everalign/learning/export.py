"""Merge an adapter into its base model, in fp32, and check the result before anybody gets it."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from everalign.errors import EveralignError, InputError
from everalign.files import new_folder
from everalign.modeling.loading import load_model

_PROBE_TOKENS = 32
_TOLERANCE = 1e-4


def export_merged(model_name: str, adapter: Path, tokenizer: Any, folder: Path) -> Path:
    """Write base model plus adapter as a plain Hugging Face model.

    Args:
        model_name: the base model.
        adapter: a PEFT adapter folder of it.
        tokenizer: saved beside the model.
        folder: must not exist yet; appears only once the merged model passed its check.

    Raises:
        InputError: the folder exists.
        EveralignError: merged logits differ from the adapter's by more than 1e-4 of their largest value.
    """
    if folder.exists():
        raise InputError(f"{folder} exists: choose another folder to export to")
    model = PeftModel.from_pretrained(load_model(model_name, "fp32"), str(adapter)).eval()
    probe = torch.arange(_PROBE_TOKENS)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        expected = model(input_ids=probe).logits
        merged = model.merge_and_unload()
        found = merged(input_ids=probe).logits
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= _TOLERANCE:
        raise EveralignError(f"the merged model's logits differ from the adapter's by {error:.2e} of their size")
    with new_folder(folder) as temporary:
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder
