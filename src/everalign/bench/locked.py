"""What a bench locks: the models' content, the settings that tuning has chosen, and when test rows were scored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from accelerate import init_empty_weights
from huggingface_hub import try_to_load_from_cache
from pydantic import BaseModel, ConfigDict

from everalign.bench.contenders import Choice
from everalign.bench.data import TaskRows
from everalign.bench.recipe import Bench, expanded
from everalign.bench.records import Record, code_digest
from everalign.errors import InputError, located
from everalign.learning.run_store import now
from everalign.modeling.architecture import choose_targets
from everalign.modeling.base_adapter import base_and_adapter
from everalign.modeling.loading import language_model_class, load_config, resolve_model
from everalign.modeling.shrinking import MODEL_ERRORS, quiet
from everalign.storage import read_model, sha256_of, write_json

_AGAIN = "run the same command with --tune again; trials that are the same are not repeated"
_READ = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")
"""What a model is loaded from; not its card, nor what else lies beside it."""


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())
    format: Literal[1]
    recipe: str


class Trial(BaseModel):
    """One trial: the values tried, and the mean of the measures that are tuned on; None where training failed."""

    choice: dict[str, Any]
    score: float | None
    failed: str | None = None


class ChosenFile(_File):
    """chosen.json: what tuning has chosen, by model and contender.

    Args:
        codes: by model and contender, the versions of the code that made its trials.
        data: by task, fingerprints of the rows that were learned and of those that trials were scored on.
        models: by model, its content, see `everalign.bench.locked.content_of`.
    """

    created: str
    tune_on: list[str]
    chosen: dict[str, dict[str, dict[str, Any]]]
    trials: dict[str, dict[str, list[Trial]]]
    codes: dict[str, dict[str, list[str]]] = {}
    data: dict[str, dict[str, str]] = {}
    models: dict[str, str | None] = {}

    def difference(self, data: Mapping[str, Mapping[str, str]], models: Mapping[str, str | None]) -> str | None:
        """What the settings were chosen with that is otherwise now, in words; None where nothing is."""
        for task, wanted in data.items():
            then = self.data.get(task, {})
            if parts := [part for part, fingerprint in wanted.items() if then.get(part) != fingerprint]:
                return f"with other {' and '.join(parts)} rows of {task}"
        # What is not known of a model, then or now, is no difference.
        contents = {name: {self.models.get(name), content} for name, content in models.items()}
        changed = [name for name, both in contents.items() if None not in both and len(both) > 1]
        return f"with other files of the model {changed[0]}" if changed else None


class TestedFile(_File):
    """tested.json: when test rows were first scored, with which recipe, and when with another one or other code."""

    __test__ = False  # no test class of pytest's
    code: str
    first: str
    again: list[dict[str, str]] = []


def data_facts(rows: Mapping[str, TaskRows]) -> dict[str, dict[str, str]]:
    """Returns by task what settings are chosen from."""
    return {
        task: {
            "training": found.train.fingerprint,
            "validation": found.validation,
            **{f"scored ({name})": scored.fingerprint for name, scored in found.scored.items()},
        }
        for task, found in rows.items()
    }


def trial_of(choice: Choice, found: Sequence[Record], measures: Sequence[str]) -> Trial:
    """Returns a trial with its mean over its finished runs."""
    failed = next((record.failed for record in found if record.failed is not None), None)
    if failed is not None:
        return Trial(choice=dict(choice), score=None, failed=failed)
    scores = [score for record in found if (score := record.mean(measures)) is not None]
    score = sum(scores) / len(scores) if scores and len(scores) == len(found) else None
    return Trial(choice=dict(choice), score=score)


def best_of(name: str, model: str, tried: Sequence[Trial]) -> dict[str, Any]:
    """Returns the choice of the highest score, the first of equals.

    Raises:
        InputError: no trial has a score.
    """
    known = [one for one in tried if one.score is not None]
    if not known:
        if len(tried) == 1 and tried[0].failed is None:
            return tried[0].choice  # a method without one of the measures, and nothing to choose from
        why = tried[0].failed or "it has none of the measures that are tuned on"
        raise InputError(f"contenders.{name}: no trial on {model} has a score: {why}")
    return max(known, key=lambda one: one.score or 0.0).choice


def merged(path: Path, file: ChosenFile) -> ChosenFile:
    """Returns the new choices beside those that other contenders have from the same recipe, rows and models."""
    if not path.exists():
        return file
    earlier = read_model(path, ChosenFile, "delete it and tune again")
    if earlier.recipe != file.recipe or earlier.difference(file.data, file.models) is not None:
        return file
    update = {}
    for key in ("chosen", "trials", "codes"):
        old, new, both = getattr(earlier, key), getattr(file, key), dict[str, Any]()
        for model, tried in file.trials.items():
            kept = {name: one for name, one in old.get(model, {}).items() if name not in tried}
            both[model] = {**kept, **new.get(model, {})}
        update[key] = both
    return file.model_copy(update=update)


def read_chosen(bench: Bench, path: Path, only: Sequence[str]) -> ChosenFile | None:
    """Returns what was chosen for this very recipe; None where nothing is tuned.

    Raises:
        InputError: nothing is chosen yet, or for another recipe, or not for all contenders.
    """
    if all(len(contender.trials) == 1 for contender in bench.contenders.values()):
        return None
    if not path.exists():
        raise InputError(f"{path}: no settings are chosen yet: run the same command with --tune first")
    file = read_model(path, ChosenFile, "delete it and tune again")
    if file.recipe != bench.digest:
        raise InputError(f"{path}: was chosen for another recipe ({file.recipe}, and this is {bench.digest}): {_AGAIN}")
    wanted = only or list(bench.contenders)
    missing = [name for name in wanted if any(name not in file.chosen.get(model, {}) for model in bench.models)]
    if missing:
        raise InputError(f"{path}: has no settings for {', '.join(missing)}: tune them first, with --tune")
    return file


def check_chosen(
    path: Path, file: ChosenFile, rows: Mapping[str, TaskRows], models: Mapping[str, str | None], only: Sequence[str]
) -> list[str]:
    """Refuses settings that were chosen from other rows or for other models; returns notes on the code of the trials.

    Raises:
        InputError: names what has changed.
    """
    if (difference := file.difference(data_facts(rows), models)) is not None:
        raise InputError(f"{path}: was chosen {difference}: {_AGAIN}")
    others = {
        name
        for ones in file.codes.values()
        for name, codes in ones.items()
        if (not only or name in only) and set(codes) != {code_digest()}
    }
    return [f"settings chosen by trials of another version of the code: {', '.join(sorted(others))}"] if others else []


def touch(bench: Bench, output: Path, anew: bool) -> list[str]:
    """Records that test rows are scored; one test is one recipe with one version of the code, resumed or not.

    Args:
        bench: the recipe.
        output: folder of the file.
        anew: whether any run is still to be scored.

    Returns:
        Notes for the results, where there was another test before.
    """
    path = output / "tested.json"
    if not path.exists():
        write_json(path, TestedFile(format=1, recipe=bench.digest, code=code_digest(), first=now()).model_dump())
        return []
    file = read_model(path, TestedFile)
    tests = [(file.recipe, file.code), *((one["recipe"], one["code"]) for one in file.again)]
    this = (bench.digest, code_digest())
    if anew and this not in tests:
        tests.append(this)
        again = [*file.again, {"at": now(), "recipe": bench.digest, "code": code_digest()}]
        write_json(path, file.model_copy(update={"again": again}).model_dump())
    if len(tests) == 1 and file.recipe == bench.digest:
        return []
    changed = "" if file.recipe == bench.digest else f", with another recipe ({file.recipe})"
    which = f"this is test {tests.index(this) + 1} in this folder" if this in tests else "none is scored anew"
    return [f"test rows were first scored on {file.first}{changed}; {which}"]


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
    parts: list[str | None] = []
    for source in sources:
        if Path(source).is_dir():
            files = sorted(path for path in Path(source).iterdir() if path.is_file() and path.suffix in _READ)
            parts.append("\n".join(f"{path.name} {sha256_of(path)}" for path in files))
        else:
            cached = (try_to_load_from_cache(source, file) for file in ("config.json", "adapter_config.json"))
            parts.append(next((Path(file).parent.name for file in cached if isinstance(file, str)), None))
    known = [part for part in parts if part is not None]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16] if len(known) == len(parts) else None
