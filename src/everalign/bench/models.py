"""The models of a bench: each is found before anything is learned, and its content goes with every record."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from huggingface_hub import try_to_load_from_cache

from everalign.bench.recipe import Bench, expanded
from everalign.errors import located
from everalign.modeling.architecture import choose_targets
from everalign.modeling.base_adapter import base_and_adapter
from everalign.modeling.loading import language_model_class, load_config, resolve_model
from everalign.modeling.shrinking import MODEL_ERRORS, quiet
from everalign.storage import sha256_of

_READ = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")
"""What a model is loaded from; not its card, nor what else lies beside it."""


def find_models(bench: Bench) -> dict[str, str | None]:
    """Returns by model's name what identifies its content, see `content_of`; downloads configurations at most.

    Raises:
        InputError: a model is not there; names its key.
    """
    found = {}
    for name, model in bench.models.items():
        with located(f"models.{name}"):
            found[name] = content_of(expanded(model))
    return found


def check_targets(bench: Bench) -> None:
    """Refuses adapters of modules that a model does not have, by its configuration alone.

    Raises:
        InputError: names the contender and the module.
    """
    wanted: dict[str, dict[str, str | list[str]]] = {model: {} for model in bench.models}
    for name, model, choice in bench.all_trials():
        recipe = bench.learn_recipe(name, choice, model, 0)
        if bench.contenders[name].learns and recipe.make_method().prompts is None:
            targets = recipe.adapter_options().module_names()
            if targets != "all-linear":
                wanted[model][f"{name} {targets}"] = targets
    for model, found in wanted.items():
        skeleton = _skeleton(expanded(bench.models[model])) if found else None
        for key, targets in found.items():
            if skeleton is not None:
                with located(f"contenders.{key.partition(' ')[0]}: on {model}"):
                    choose_targets(skeleton, targets, frozenset())


def _skeleton(model: str) -> Any | None:
    """A model without values; None where its configuration does not suffice to make one, so that its run will tell."""
    base, _ = base_and_adapter(model, resolve_model(model))
    config = load_config(resolve_model(base), "model", base)
    if getattr(config, "auto_map", None):
        return None  # code of its own is run when the model is loaded, and not before
    try:
        with quiet(), init_empty_weights():
            return language_model_class(config).from_config(config)
    except MODEL_ERRORS:
        return None


def content_of(model: str) -> str | None:
    """Returns 16 hexadecimal digits of a model's files, with its base model's where it is an adapter.

    On the Hub it is the commit that is in the cache. None where that is not known without loading the model.

    Raises:
        InputError: there is no such model.
    """
    base, adapter = base_and_adapter(model, resolve_model(model))
    sources = [resolve_model(name) for name in (base, adapter) if name is not None]
    load_config(sources[0], "model", base)
    parts = [_files(Path(source)) if Path(source).is_dir() else _commit(source) for source in sources]
    known = [part for part in parts if part is not None]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16] if len(known) == len(parts) else None


def _files(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _READ)
    return "\n".join(f"{path.name} {sha256_of(path)}" for path in files)


def _commit(name: str) -> str | None:
    for file in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(name, file)
        if isinstance(found, str):
            return Path(found).parent.name
    return None
