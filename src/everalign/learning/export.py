"""Write a version as a plain Hugging Face model."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everalign.correction.files import CorrectorFacts, write_corrector_facts
from everalign.errors import InputError
from everalign.files import new_folder
from everalign.learning.run_data import VersionData
from everalign.learning.setup import Setup
from everalign.modeling.merging import merged_model


def export_merged(
    model_name: str, adapter: Path, tokenizer: Any, folder: Path, corrector: CorrectorFacts | None = None
) -> Path:
    """Write base model plus adapter as a plain Hugging Face model.

    Args:
        model_name: the base model.
        adapter: a PEFT adapter folder of it.
        tokenizer: saved beside the model.
        folder: must not exist yet; appears only once the merged model passed its check.
        corrector: what is known of it, where it is a corrector.

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
        if corrector is not None:
            write_corrector_facts(temporary, corrector)
    return folder


def corrector_facts(setup: Setup, versions: Sequence[VersionData]) -> CorrectorFacts | None:
    """Return what is known of the corrector that versions, at least one, have led to; None where it is none."""
    if setup.encoder is None:
        return None
    trained = [version.manifest.train for version in versions]
    scores = {task: score.model_dump() for task, score in versions[-1].scores.items()}
    return CorrectorFacts(
        template=setup.encoder.template.id,
        objectives=setup.encoder.objectives,
        encoding=setup.encoder.fingerprint,
        max_length=setup.options.max_length,
        base_model=setup.model_name,
        base_fingerprint=setup.model_key,
        data=hashlib.sha256("\n".join(rows.fingerprint for rows in trained).encode()).hexdigest(),
        rows=sum(rows.rows for rows in trained),
        held_out=scores or None,
        settings={**setup.facts()["settings"], "method": setup.method.name, "seed": setup.seed},
    )
