"""Write a version for others: merged into its base model as a plain Hugging Face model, or its adapter alone."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from everalign.correction.files import CorrectorFacts, write_corrector_facts
from everalign.data.rendering import DEFAULT_CHAT_TEMPLATE, uses_default_template
from everalign.errors import InputError
from everalign.files import new_folder, read_json, write_json, write_text
from everalign.learning.model_card import model_card, servable, vllm_command
from everalign.learning.promotion import check_version
from everalign.learning.run_data import RunData, VersionData
from everalign.modeling.base_adapter import tokenizer_folder
from everalign.modeling.checkpoint import DTYPES, OutputDtype, source_folder
from everalign.modeling.loading import load_config, load_model, load_tokenizer, model_fingerprint, resolve_model
from everalign.modeling.merging import merged_into, write_checked
from everalign.modeling.stops import write_ends
from everalign.storage import alone, lock_of

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What tells how texts and images are read, beside what the tokenizer saves itself.
_READING = ("tokenizer.model", "tekken.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Args:
        folder: where it is.
        version: which version it is.
        corrector: whether it is a corrector.
        dtype: of the weights, such as `bf16`.
        rounding: by how much rounding to that dtype has changed the logits, as a share of their norm; 0 of an adapter.
        rank: of an adapter; None where it is merged.
        command: how vLLM serves an adapter; None where it is merged, or cannot be served so.
    """

    folder: Path
    version: str
    corrector: bool
    dtype: str
    rounding: float = 0.0
    rank: int | None = None
    command: str | None = None


def export_version(
    run: RunData,
    folder: Path,
    version: str | None = None,
    model: str | None = None,
    tokenizer: Any = None,
    dtype: OutputDtype = "auto",
) -> Exported:
    """Write a version merged into its base model: the base model's folder with other weights and a model card.

    Merged in fp32 and rounded once. What has learned corrections becomes a corrector's folder, which
    `Corrector.from_pretrained` loads.

    Args:
        run: a run directory.
        folder: must not exist yet; appears only once the merged model passed its check.
        version: one of the run's line, by its folder's name or number; the current one when None.
        model: where the base model is now; where it was when the run was begun, when None.
        tokenizer: the one that was learned with; the model's when None.
        dtype: of the weights; the base model's own with `auto`.

    Raises:
        InputError: nothing was learned yet, the folder exists, the line has no such version, it is damaged, or the
            base model is not the run's.
        EveralignError: merged logits differ from the adapter's by more than 1e-4 of their largest value, or what was
            written from the merged ones.
    """
    line, source = _chosen(run, version)
    name = run.facts.model if model is None else model
    with _alone(folder):
        tokenizer = load_tokenizer(name, adapter=run.base_adapter) if tokenizer is None else tokenizer
        base = _base_model(run, name)
        generation, base_folder = base.generation_config, source_folder(base.name_or_path)
        merged = merged_into(base, source / "adapter")
        corrector = _corrector_facts(run, line, name)
        with new_folder(folder) as temporary:
            written = write_checked(merged, temporary, dtype)
            if run.base_adapter is not None and tokenizer_folder(run.base_adapter) is not None:
                # The adapter's own, which may have more tokens than the base model's.
                tokenizer.save_pretrained(temporary)
            _finish(temporary, generation, tokenizer, run, line)
            card = model_card(run, line, name, base_folder, folder, written.dtype, None)
            write_text(temporary / "README.md", card)
            if corrector is not None:
                write_corrector_facts(temporary, corrector)
    return Exported(folder, line[-1].id, corrector is not None, written.dtype, written.rounding)


def export_adapter(
    run: RunData,
    folder: Path,
    version: str | None = None,
    model: str | None = None,
    tokenizer: Any = None,
    dtype: OutputDtype = "auto",
) -> Exported:
    """Write a version's adapter alone, in PEFT's format, with its tokenizer, the ends of its answers and a model card.

    Arguments and errors as in `export_version`; with `auto` the adapter stays in fp32, as it was learned.
    """
    line, source = _chosen(run, version)
    if run.base_adapter is not None:
        raise InputError(
            f"{run.path} starts from the adapter {run.facts.base_adapter}, and its versions sit on the base model with "
            "that merged into it, so none of them is of use alone: export the merged model, without --adapter"
        )
    name = run.facts.model if model is None else model
    base = source_folder(resolve_model(name))
    kind = "fp32" if dtype == "auto" else dtype
    adapter = {key: tensor.to(DTYPES[kind]) for key, tensor in load_file(source / "adapter" / _WEIGHTS).items()}
    if not all(tensor.isfinite().all() for tensor in adapter.values()):
        raise InputError(f"the adapter has values beyond the range of {kind}: choose --dtype bf16 or fp32")
    config = read_json(source / "adapter" / _CONFIG)
    if model is not None:
        config["base_model_name_or_path"] = servable(model, base)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    with _alone(folder), new_folder(folder) as temporary:
        tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
        save_file(adapter, temporary / _WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / _CONFIG, config)
        tokenizer.save_pretrained(temporary)
        for file in (base / file for file in (*_READING, "generation_config.json")):
            if file.is_file():
                shutil.copyfile(file, temporary / file.name)
        _finish(temporary, _generation_config(base, name), tokenizer, run, line)
        write_text(temporary / "README.md", model_card(run, line, name, base, folder, kind, rank))
    command = vllm_command(servable(name, base), folder, rank)
    return Exported(folder, line[-1].id, False, kind, rank=rank, command=command)


def _chosen(run: RunData, version: str | None) -> tuple[list[VersionData], Path]:
    """Return the version with those that it builds on, and its folder."""
    line = _line_up_to(run, version)
    source = run.path / "versions" / line[-1].id
    check_version(source, line[-1].manifest.files)
    return line, source


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from exporting to a folder, which must not be there yet."""
    with alone(lock_of(folder), "exporting there"):
        if folder.exists():
            raise InputError(f"{folder} exists: choose another folder to export to")
        yield


def _finish(folder: Path, generation: Any, tokenizer: Any, run: RunData, line: list[VersionData]) -> None:
    """Say in an export's folder how chats are written, and where answers end."""
    # Versions of before this was noted: there, a chat is likelier than none.
    chats = run.facts.objective != "correction" and any(version.manifest.chats is not False for version in line)
    if chats and uses_default_template(tokenizer):
        write_text(folder / "chat_template.jinja", DEFAULT_CHAT_TEMPLATE)
    write_ends(folder, generation, tokenizer, chats)


def _generation_config(base: Path, name: str) -> GenerationConfig:
    """Return a model's generation configuration without loading the model; what its configuration says without one."""
    if (base / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(base)
    return GenerationConfig.from_model_config(load_config(str(base), "model", name))


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
    model = load_model(name, "fp32", adapter=run.base_adapter)
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
