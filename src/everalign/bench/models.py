"""The models of a bench: each is found before anything is learned, and its content goes with every record."""

from __future__ import annotations

import hashlib
from pathlib import Path

from everalign.bench.recipe import Bench, expanded
from everalign.errors import located
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


def content_of(model: str) -> str | None:
    """Returns 16 hexadecimal digits of a model's files, with its base model's where it is an adapter.

    On the Hub it is the commit that is in the cache. None where that is not known without loading the model.

    Raises:
        InputError: there is no such model.
    """
    from everalign.modeling.base_adapter import base_and_adapter
    from everalign.modeling.loading import load_config, resolve_model

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
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(name, file)
        if isinstance(found, str):
            return Path(found).parent.name
    return None
