"""The model card of an export: what was learned from what, how, what it scored, and how it is served."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from everalign.files import read_json
from everalign.learning.run_data import RunData, VersionData

# Ranks that vLLM makes room for; its default is 16.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_NAMED_OTHERWISE = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def max_lora_rank(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` of vLLM that an adapter of this rank needs; None where there is none."""
    return next((most for most in VLLM_RANKS if rank <= most), None)


def servable(base: str, source: Path) -> str:
    """Return a name of the base model that others know: its folder where only we do, as of `tiny` or of a GGUF file."""
    return base if Path(base).is_dir() or _ON_THE_HUB.fullmatch(base) else str(source)


def vllm_command(base: str, folder: Path, rank: int) -> str | None:
    """Return how vLLM serves an adapter on its base model; None where its rank is beyond what vLLM takes."""
    most = max_lora_rank(rank)
    if most is None:
        return None
    return (
        f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules {folder.name}={folder} "
        f"--generation-config {folder}"
    )


def model_card(
    run: RunData, line: Sequence[VersionData], base: str, source: Path, folder: Path, dtype: str, rank: int | None
) -> str:
    """Write the card, in Markdown.

    Args:
        run: the run.
        line: the exported version and those that it builds on, oldest first.
        base: the base model, as it is to be named.
        source: its folder, whose card may name a licence.
        folder: the export.
        dtype: of the weights.
        rank: of the adapter; None where it is merged.
    """
    used = _use_merged(source, folder) if rank is None else _use_adapter(servable(base, source), source, folder, rank)
    parts = [
        _metadata(base, source, rank),
        f"# {folder.name}",
        _what(run, line, base, dtype, rank),
        _tasks(line),
        _scores(run, line),
        f"## Use\n\n{used}",
        _making(run, line),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _metadata(base: str, source: Path, rank: int | None) -> str:
    facts: dict[str, Any] = {"library_name": "transformers" if rank is None else "peft"}
    card = source / "README.md"
    if card.is_file() and (licence := (metadata_load(card) or {}).get("license")):
        facts["license"] = licence
    name = _NAMED_OTHERWISE.get(base, base)
    if _ON_THE_HUB.fullmatch(name) and not Path(name).exists():
        facts |= {"base_model": name, "base_model_relation": "finetune" if rank is None else "adapter"}
    facts |= {"pipeline_tag": _kind(source)[0], "tags": ["everalign", *([] if rank is None else ["lora"])]}
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def _kind(source: Path) -> tuple[str, str]:
    """Return what transformers calls the task of such a model, and the auto class that loads it."""
    config = source / "config.json"
    if config.is_file() and "vision_config" in read_json(config):
        return "image-text-to-text", "AutoModelForImageTextToText"
    return "text-generation", "AutoModelForCausalLM"


def _what(run: RunData, line: Sequence[VersionData], base: str, dtype: str, rank: int | None) -> str:
    kind = "merged into the base model" if rank is None else f"an adapter of rank {rank}"
    tasks = "1 task" if len(line) == 1 else f"{len(line)} tasks one after another"
    return (
        f"`{base}` after {tasks}, learned with the method `{run.facts.method.name}` and the objective "
        f"`{run.facts.objective}`: version `{line[-1].id}` of a run of Everalign {run.facts.everalign}, {kind}, in "
        f"{dtype}."
    )


def _tasks(line: Sequence[VersionData]) -> str:
    rows = []
    for version in line:
        manifest = version.manifest
        stages = ", ".join(f"{s.stage} {s.steps} steps" for s in manifest.stages)
        rows.append([version.task, manifest.train.source, manifest.train.rows, manifest.train.fingerprint[:16], stages])
    return "## Tasks\n\n" + _table(["task", "rows from", "rows", "fingerprint", "training"], rows)


def _scores(run: RunData, line: Sequence[VersionData]) -> str:
    last = line[-1].scores
    if not last:
        return ""
    own = {version.task: version.scores.get(version.task) for version in line}
    rows = []
    for task, score in last.items():
        found = (run.zero_shot.get(task), own.get(task), score)
        rows.append([task, score.pairs, *("–" if s is None else f"{100 * s.accuracy:.1f}" for s in found)])
    return (
        "## Scores\n\nHeld-out accuracy in %: how often the better of two answers is the likelier one per token.\n\n"
        + _table(["task", "pairs", "base model", "after its task", "now"], rows)
    )


def _use_merged(source: Path, folder: Path) -> str:
    return f'''```python
from transformers import pipeline

write = pipeline("{_kind(source)[0]}", model="{folder}")
```

or `vllm serve {folder}`. Answers end at the tokens that `generation_config.json` names.'''


def _use_adapter(base: str, source: Path, folder: Path, rank: int) -> str:
    command = vllm_command(base, folder, rank)
    served = (
        f"vLLM takes adapters up to rank {VLLM_RANKS[-1]}, and this one has rank {rank}: serve the merged model."
        if command is None
        else f"```\n{command}\n```\n\nvLLM needs `--max-lora-rank {max_lora_rank(rank)}` for rank {rank} (its default "
        "is 16). `--generation-config` names the tokens at which answers end. The adapter is LoRA alone "
        "(no `modules_to_save`, no DoRA, no bias); vLLM refuses it where it adapts modules that vLLM's own version of "
        "the architecture has not made adaptable, such as routers of experts or, in some, `lm_head`: serve the merged "
        "model then."
    )
    auto = _kind(source)[1]
    return f'''```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

{served}'''


def _making(run: RunData, line: Sequence[VersionData]) -> str:
    facts = run.facts
    method = {key: value for key, value in facts.method.model_dump().items() if key != "name"}
    rows = [["method", facts.method.name], *_flat(method), ["objective", facts.objective], *_flat(facts.settings)]
    rows += [["seed", facts.seed], ["base model's fingerprint", facts.model_fingerprint[:16]]]
    rows += [["learned (UTC)", line[-1].manifest.created], *_flat(facts.libraries), *_flat(facts.machine)]
    return "## Making\n\n" + _table(["setting", "value"], rows)


def _flat(values: Mapping[str, Any]) -> list[list[Any]]:
    return [[name, value] for name, value in values.items() if value is not None]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |" for cells in lines)
