"""Write a version as a plain Hugging Face model."""

from pathlib import Path
from typing import Any

from everalign.errors import InputError
from everalign.files import new_folder
from everalign.modeling.merging import merged_model


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
    merged = merged_model(model_name, adapter)
    with new_folder(folder) as temporary:
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder
