"""Write a version as a plain Hugging Face model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from everalign.correction.files import CorrectorFacts, write_corrector_facts
from everalign.errors import InputError
from everalign.files import new_folder
from everalign.learning.promotion import check_version
from everalign.learning.run_data import RunData, VersionData
from everalign.modeling.loading import load_model, load_tokenizer, model_fingerprint
from everalign.modeling.merging import merged_into
from everalign.storage import alone, lock_of


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Args:
        folder: where it is.
        version: which version it is.
        corrector: whether it is a corrector.
    """

    folder: Path
    version: str
    corrector: bool


def export_version(
    run: RunData, folder: Path, version: str | None = None, model: str | None = None, tokenizer: Any = None
) -> Exported:
    """Write a version merged into the base model as a plain Hugging Face model, in fp32.

    What has learned corrections becomes a corrector's folder, which `Corrector.from_pretrained` loads.

    Args:
        run: a run directory.
        folder: must not exist yet; appears only once the merged model passed its check.
        version: one of the run's line, by its folder's name or number; the current one when None.
        model: where the base model is now; where it was when the run was begun, when None.
        tokenizer: saved beside the model; the model's when None.

    Raises:
        InputError: nothing was learned yet, the folder exists, the line has no such version, it is damaged, or the
            base model is not the run's.
        EveralignError: merged logits differ from the adapter's by more than 1e-4 of their largest value.
    """
    line = _line_up_to(run, version)
    source = run.path / "versions" / line[-1].id
    check_version(source, line[-1].manifest.files)
    with alone(lock_of(folder), "exporting there"):
        if folder.exists():
            raise InputError(f"{folder} exists: choose another folder to export to")
        name = run.facts.model if model is None else model
        tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
        merged = merged_into(_base_model(run, name), source / "adapter")
        corrector = _corrector_facts(run, line, name)
        with new_folder(folder) as temporary:
            merged.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            if corrector is not None:
                write_corrector_facts(temporary, corrector)
    return Exported(folder, line[-1].id, corrector is not None)


def _line_up_to(run: RunData, version: str | None) -> list[VersionData]:
    """The version and those it builds on, oldest first."""
    if not run.versions:
        raise InputError("nothing to export: learn a task first")
    names = [version.id for version in run.versions]
    found = [i for i, name in enumerate(names) if version in (None, name, name.partition("-")[0])]
    if found:
        return list(run.versions[: found[-1] + 1])
    if any(version in (name, name.partition("-")[0]) for name in run.left_out):
        raise InputError(f"{run.path}: {version} was left out of the run's line: roll back to it first")
    raise InputError(f"{run.path}: has no version {version!r}: choose one of {', '.join(names)}")


def _base_model(run: RunData, name: str) -> Any:
    """The run's base model in fp32."""
    model = load_model(name, "fp32")
    dtype = torch.bfloat16 if run.facts.settings.get("precision") == "bf16" else torch.float32
    if model_fingerprint(model, dtype) != run.facts.model_fingerprint:
        raise InputError(f"{name}: is not the model that {run.path} was begun with: name that one as the model")
    return model


def _corrector_facts(run: RunData, line: list[VersionData], model: str) -> CorrectorFacts | None:
    """What is known of the corrector that versions have led to; None where it is none."""
    if run.facts.objective != "correction":
        return None
    trained = [version.manifest.train for version in line]
    scores = {task: score.model_dump() for task, score in line[-1].scores.items()}
    settings = run.facts.settings
    return CorrectorFacts(
        template=settings["template"],
        objectives=tuple(filter(None, settings["objectives"].split(","))),
        encoding=settings["encoding"],
        max_length=settings["max_length"],
        base_model=model,
        base_fingerprint=run.facts.model_fingerprint,
        data=hashlib.sha256("\n".join(rows.fingerprint for rows in trained).encode()).hexdigest(),
        rows=sum(rows.rows for rows in trained),
        held_out=scores or None,
        settings={**settings, "method": run.facts.method.name, "seed": run.facts.seed},
    )
