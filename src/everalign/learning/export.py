"""Export a version: merged into its base model as a plain Hugging Face model, or as a PEFT adapter."""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from everalign.correction.corrector_files import CorrectorFacts, write_corrector_facts
from everalign.data.chat_template import DEFAULT_CHAT_TEMPLATE, uses_default_template
from everalign.errors import InputError
from everalign.learning.promotion import check_version
from everalign.learning.run_data import RunData, VersionData
from everalign.learning.run_files import Score
from everalign.modeling.base_adapter import tokenizer_folder
from everalign.modeling.base_weights import quantisation
from everalign.modeling.loading import (
    base_key,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
)
from everalign.modeling.lora import CONFIG, WEIGHTS
from everalign.modeling.model_files import (
    DTYPES,
    OutputDtype,
    merged_into,
    moved_by_quantisation,
    source_folder,
    write_checked,
)
from everalign.modeling.prompt_pool import refuse_prompts
from everalign.modeling.sampling import write_ends
from everalign.storage import exclusive, lock_of, new_folder, read_json, write_json, write_text

# Ranks that vLLM makes room for; its default is 16.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
# Labels that vLLM can take for a model's name as they are.
_MODEL_NAME = re.compile(r"[\w.:@+/-]+")
_NAMED_OTHERWISE = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def max_lora_rank(rank: int) -> int | None:
    """Returns the smallest `--max-lora-rank` of vLLM for an adapter of this rank; None where there is none."""
    return next((most for most in VLLM_RANKS if rank <= most), None)


def servable(base: str, source: Path) -> str:
    """Returns a name of the base model that other programs know: its folder for `tiny` or a GGUF file."""
    return base if Path(base).is_dir() or _ON_THE_HUB.fullmatch(base) else str(source)


def vllm_command(base: str, folder: Path, rank: int, label: str | None = None) -> str | None:
    """Returns the command that serves an adapter with vLLM, by its label; None where its rank is too high for that."""
    most = max_lora_rank(rank)
    if most is None:
        return None
    name = label if label is not None and _MODEL_NAME.fullmatch(label) else folder.name
    return (
        f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules {name}={folder} "
        f"--generation-config {folder}"
    )


def model_card(
    run: RunData, line: Sequence[VersionData], base: str, source: Path, folder: Path, dtype: str, rank: int | None
) -> str:
    """Returns the model card, in Markdown.

    Args:
        run: the run.
        line: the exported version and those that it builds on, oldest first; with labels, those of one label.
        base: the base model's name for others.
        source: its folder, whose card may name a licence.
        folder: the export.
        dtype: of the weights.
        rank: of the adapter; None where it is merged.
    """
    facts, version, merged = run.facts, line[-1], rank is None
    label = version.manifest.label
    whose = "" if label is None else f" for the label `{label}`"
    tasks = "1 task" if len(line) == 1 else f"{len(line)} tasks one after another"
    kind = "merged into the base model" if merged else f"an adapter of rank {rank}"
    about = (
        f"`{base}`{whose} after {tasks}, learned with the method `{facts.method.name}` and the objective "
        f"`{facts.objective}`: version `{version.id}` of a run of Everalign {facts.everalign}, {kind}, in {dtype}."
    )
    learned = [
        [
            *(one.task, one.manifest.train.source, one.manifest.train.rows, one.manifest.train.fingerprint[:16]),
            ", ".join(f"{stage.stage} {stage.steps} steps" for stage in one.manifest.stages),
        ]
        for one in line
    ]
    own = {one.task: one.scores.get(one.task) for one in line}
    scores = []
    for task, now in _own_scores(line).items():
        found = (run.zero_shot.get(task), own.get(task), now)
        scores.append([task, now.pairs, *("–" if one is None else f"{100 * one.accuracy:.1f}" for one in found)])
    method = {name: value for name, value in facts.method.model_dump().items() if name != "name"}
    settings: dict[str, Any] = {"method": facts.method.name, **method, "objective": facts.objective, **facts.settings}
    settings |= {"seed": facts.seed, "base model's fingerprint": facts.model_fingerprint[:16]}
    settings |= {"learned (UTC)": version.manifest.created, **facts.libraries, **facts.machine}
    parts = [
        _front_matter(base, source, merged),
        f"# {folder.name}\n\n{about}",
        "## Tasks\n\n" + _table(["task", "rows from", "rows", "fingerprint", "training"], learned),
        "## Scores\n\nHeld-out accuracy in %: how often the better of two answers is the likelier one per token.\n\n"
        + _table(["task", "pairs", "base model", "after its task", "now"], scores)
        if scores
        else "",
        f"## Use\n\n{_use_merged(source, folder) if rank is None else _use_adapter(base, source, folder, rank, label)}",
        "## Making\n\n"
        + _table(["setting", "value"], [[name, value] for name, value in settings.items() if value is not None]),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _own_scores(line: Sequence[VersionData]) -> Mapping[str, Score]:
    """What the exported version scored; with labels, on those tasks alone that its adapter has learned."""
    if line[-1].manifest.label is None:
        return line[-1].scores
    return {one.task: line[-1].scores[one.task] for one in line if one.task in line[-1].scores}


def _front_matter(base: str, source: Path, merged: bool) -> str:
    facts: dict[str, Any] = {"library_name": "transformers" if merged else "peft"}
    card = source / "README.md"
    if card.is_file() and (licence := (metadata_load(card) or {}).get("license")):
        facts["license"] = licence
    name = _NAMED_OTHERWISE.get(base, base)
    if _ON_THE_HUB.fullmatch(name) and not Path(name).exists():
        facts |= {"base_model": name, "base_model_relation": "finetune" if merged else "adapter"}
    facts |= {"pipeline_tag": _kind(source)[0], "tags": ["everalign", *([] if merged else ["lora"])]}
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def _kind(source: Path) -> tuple[str, str]:
    """Returns transformers' names of the task of such a model, and of the auto class that loads it."""
    config = source / "config.json"
    if config.is_file() and "vision_config" in read_json(config):
        return "image-text-to-text", "AutoModelForImageTextToText"
    return "text-generation", "AutoModelForCausalLM"


def _use_merged(source: Path, folder: Path) -> str:
    return f'''```python
from transformers import pipeline

write = pipeline("{_kind(source)[0]}", model="{folder}")
```

or `vllm serve {folder}`. Answers end at the tokens that `generation_config.json` names.'''


def _use_adapter(base: str, source: Path, folder: Path, rank: int, label: str | None) -> str:
    base, auto = servable(base, source), _kind(source)[1]
    command = vllm_command(base, folder, rank, label)
    served = (
        f"vLLM takes adapters up to rank {VLLM_RANKS[-1]}, and this one has rank {rank}: serve the merged model."
        if command is None
        else f"```\n{command}\n```\n\nvLLM needs `--max-lora-rank {max_lora_rank(rank)}` for rank {rank} (its default "
        "is 16). `--generation-config` names the tokens at which answers end. The adapter is LoRA alone "
        "(no `modules_to_save`, no DoRA, no bias); vLLM refuses it where it adapts modules that vLLM's own version of "
        "the architecture has not made adaptable, such as routers of experts or, in some, `lm_head`: serve the merged "
        "model then."
    )
    return f'''```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

{served}'''


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |" for cells in lines)


# How texts and images are read, beside what the tokenizer saves itself.
_READING = ("tokenizer.model", "tekken.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Args:
        folder: the export.
        version: the exported version.
        corrector: whether it is a corrector.
        dtype: of the weights, such as `bf16`.
        rounding: by how much rounding to that dtype has changed the logits, as a share of their norm; 0 of an adapter.
        quantisation: by how much they differ, by the same measure, from those on the quantised weights that it was
            learned on; None where it was learned on the weights that it is merged into, or is an adapter.
        rank: of an adapter; None where it is merged.
        command: how vLLM serves an adapter; None where it is merged, or cannot be served so.
    """

    folder: Path
    version: str
    corrector: bool
    dtype: str
    rounding: float = 0.0
    quantisation: float | None = None
    rank: int | None = None
    command: str | None = None


def export_version(
    run: RunData,
    folder: Path,
    version: str | None = None,
    model: str | None = None,
    tokenizer: Any = None,
    dtype: OutputDtype = "auto",
    label: str | None = None,
    base: str | None = None,
) -> Exported:
    """Writes a version merged into its base model: the base model's folder with other weights and a model card.

    Merged in fp32 and rounded once. A run that learned corrections gives a corrector's folder, which
    `Corrector.from_pretrained` loads.

    Args:
        run: a run directory.
        folder: must not exist yet; appears only once the merged model passed its check.
        version: one of the lineage, by its folder's name or number; the current one when None.
        model: where the base model is now; where it was when the run was begun, when None.
        tokenizer: the one that was learned with; the model's when None.
        dtype: of the weights; the base model's own with `auto`.
        label: whose adapter, of a run that keeps one for each label; as of the version.
        base: the model in full precision to merge into, where the run learned on a quantised copy of it. One that
            was quantised as it was loaded is merged into its plain weights without this.

    Raises:
        InputError: nothing was learned yet, the folder exists, the line has no such version or label, the version is
            damaged, the base model is not the run's, or logits on `base` are further from those on the quantised
            weights than quantisation explains.
        EveralignError: merged logits differ from the adapter's by more than 1e-4 of their largest value, or what was
            written from the merged ones.
    """
    line = _line_up_to(run, version, label)
    source = run.path / "versions" / line[-1].id
    name = run.facts.model if model is None else model
    with _alone(folder):
        tokenizer = load_tokenizer(name, adapter=run.base_adapter) if tokenizer is None else tokenizer
        own = _base_model(run, name)
        learned_on = _quantised(run, name, own, base)
        plain = own if base is None else load_model(base, "fp32")
        generation, base_folder = plain.generation_config, source_folder(plain.name_or_path)
        merged = merged_into(plain, source / "adapter")
        moved = None
        if learned_on is not None:
            moved = moved_by_quantisation(learned_on, source / "adapter", merged, base or name, tokenizer)
        corrector = _corrector_facts(run, line, base or name)
        with new_folder(folder) as temporary:
            written = write_checked(merged, temporary, dtype)
            if run.base_adapter is not None and tokenizer_folder(run.base_adapter) is not None:
                # The adapter's own, which may have more tokens than the base model's.
                tokenizer.save_pretrained(temporary)
            _finish(temporary, generation, tokenizer, run, line)
            card = model_card(run, line, base or name, base_folder, folder, written.dtype, None)
            write_text(temporary / "README.md", card)
            if corrector is not None:
                write_corrector_facts(temporary, corrector)
    return Exported(folder, line[-1].id, corrector is not None, written.dtype, written.rounding, moved)


def export_adapter(
    run: RunData,
    folder: Path,
    version: str | None = None,
    model: str | None = None,
    tokenizer: Any = None,
    dtype: OutputDtype = "auto",
    label: str | None = None,
    pad_rank: bool = False,
) -> Exported:
    """Writes a version's adapter alone, in PEFT's format, with its tokenizer, stop tokens and a model card.

    Arguments and errors as in `export_version`; with `auto` the adapter stays in fp32, as it was learned. `pad_rank`
    fills it up with zeros to the next rank that vLLM makes room for, for servers that load no other ranks.
    """
    line = _line_up_to(run, version, label)
    source = run.path / "versions" / line[-1].id
    if run.base_adapter is not None:
        raise InputError(
            f"{run.path} starts from the adapter {run.facts.base_adapter}, and its versions sit on the base model with "
            "that merged into it, so none of them is of use alone: export the merged model, without --adapter"
        )
    name = run.facts.model if model is None else model
    base = source_folder(resolve_model(name))
    kind = "fp32" if dtype == "auto" else dtype
    adapter = {key: tensor.to(DTYPES[kind]) for key, tensor in load_file(source / "adapter" / WEIGHTS).items()}
    if not all(tensor.isfinite().all() for tensor in adapter.values()):
        raise InputError(f"the adapter has values beyond the range of {kind}: choose --dtype bf16 or fp32")
    config = read_json(source / "adapter" / CONFIG)
    if model is not None:
        config["base_model_name_or_path"] = servable(model, base)
    if pad_rank:
        adapter, config = _padded(adapter, config, run.path)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    with _alone(folder), new_folder(folder) as temporary:
        tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
        save_file(adapter, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, config)
        tokenizer.save_pretrained(temporary)
        for file in (base / file for file in (*_READING, "generation_config.json")):
            if file.is_file():
                shutil.copyfile(file, temporary / file.name)
        if (base / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(base)
        else:  # what the model's configuration says, without loading the model
            generation = GenerationConfig.from_model_config(load_config(str(base), "model", name))
        _finish(temporary, generation, tokenizer, run, line)
        write_text(temporary / "README.md", model_card(run, line, name, base, folder, kind, rank))
    command = vllm_command(servable(name, base), folder, rank, label)
    return Exported(folder, line[-1].id, False, kind, rank=rank, command=command)


def _padded(adapter: dict[str, Tensor], config: dict[str, Any], run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's factors with rows of A and columns of B that are zero, and α so that the product stays."""
    rank, room = config["r"], max_lora_rank(config["r"])
    if room is None:
        most = VLLM_RANKS[-1]
        raise InputError(f"{run}: its adapter has rank {rank}, and servers take at most {most}: leave pad_rank out")
    found = {}
    for name, factor in adapter.items():
        more = (0, 0, 0, room - rank) if ".lora_A." in name else (0, room - rank)
        found[name] = torch.nn.functional.pad(factor, more)
    return found, {**config, "r": room, "lora_alpha": config["lora_alpha"] * room / rank}


def _line_up_to(run: RunData, version: str | None, label: str | None) -> list[VersionData]:
    """The version, whose files are checked, after those it builds on; with labels, the last of the label."""
    if not run.versions:
        raise InputError("nothing to export: learn a task first")
    for number, one in enumerate(run.versions, start=1):
        if one.is_called(version or run.head):
            line = _of_label(run, run.versions[:number], label)
            refuse_prompts(run.path / "versions" / line[-1].id / "adapter")
            check_version(run.path / "versions" / line[-1].id, line[-1].manifest.files)
            return line
    if any(one.is_called(str(version)) for one in run.off_lineage):
        raise InputError(f"{run.path}: {version} was left out of the run's line: roll back to it first")
    names = ", ".join(one.id for one in run.versions)
    raise InputError(f"{run.path}: has no version {version!r}: choose one of {names}")


def _of_label(run: RunData, line: Sequence[VersionData], label: str | None) -> list[VersionData]:
    """The versions of a label; all of a run that has none."""
    known = [name for name in dict.fromkeys(one.manifest.label for one in line) if name is not None]
    if not known and label is not None:
        method = run.facts.method.name
        raise InputError(f"{run.path}: the method {method} keeps no adapter for each label: leave label out")
    if known and label not in known:
        names = ", ".join(known)
        what = "keeps an adapter for each label" if label is None else f"has no adapter for the label {label!r}"
        raise InputError(f"{run.path}: {what}: name one with label: {names}", field="label")
    return [one for one in line if one.manifest.label == label]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Context manager that keeps other processes from exporting to a folder, which must not exist yet."""
    with exclusive(lock_of(folder), "exporting there"):
        if folder.exists():
            raise InputError(f"{folder} exists: choose another folder to export to")
        yield


def _finish(folder: Path, generation: Any, tokenizer: Any, run: RunData, line: list[VersionData]) -> None:
    """Writes into an export how chats are rendered, and the tokens at which answers end."""
    # Version 0.1.0 did not record it: chats are likelier.
    chats = run.facts.objective != "correction" and any(version.manifest.chats is not False for version in line)
    if chats and uses_default_template(tokenizer):
        write_text(folder / "chat_template.jinja", DEFAULT_CHAT_TEMPLATE)
    write_ends(folder, generation, tokenizer, chats)


def _base_model(run: RunData, name: str) -> Any:
    """The run's base model in fp32."""
    model = load_model(name, "fp32", adapter=run.base_adapter)
    dtype = torch.bfloat16 if run.facts.settings.get("precision") == "bf16" else torch.float32
    if base_key(model_fingerprint(model, dtype), run.facts.settings.get("quantize")) != run.facts.model_fingerprint:
        raise InputError(f"{name}: is not the model that {run.path} was started with: name that one as the model")
    return model


def _quantised(run: RunData, name: str, own: Any, base: str | None) -> Any:
    """The model that a run learned on, where a version is merged into other weights than those; else None."""
    quantize = run.facts.settings.get("quantize")
    if base is None:
        return None if quantize is None else load_model(name, run.facts.settings["precision"], quantize=quantize)
    if quantize is not None:
        raise InputError(
            f"base: {run.path} quantised {name} as it was loaded, and merges into its plain weights: leave base out, "
            "or say with model where that model is now",
            field="base",
        )
    if quantisation(own.config) is None:
        raise InputError(f"base: the base model of {run.path}, {name}, is not quantised: leave base out", field="base")
    return own


def _corrector_facts(run: RunData, line: list[VersionData], model: str) -> CorrectorFacts | None:
    """The facts of the corrector that a lineage has led to; None where it is none."""
    if run.facts.objective != "correction":
        return None
    trained = [version.manifest.train for version in line]
    scores = {task: score.model_dump() for task, score in _own_scores(line).items()}
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
