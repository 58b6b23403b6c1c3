"""What a run knows of how it was begun, so that nobody has to say it again: `RUN/recipe.yaml`, or else `run.json`."""

import inspect
from pathlib import Path
from typing import Any

import yaml

from everalign.errors import InputError
from everalign.files import write_text
from everalign.learning.recipe import SECTIONS, Recipe, TaskKeys
from everalign.learning.run_data import RunData, load_run
from everalign.methods import METHODS

_FILE = "recipe.yaml"


def write_recipe(run: Path, recipe: Recipe) -> None:
    """Keep a run's recipe with the tasks of earlier ones, by paths that hold wherever the next command is given."""
    path = run / _FILE
    before = Recipe.read(path).tasks or [] if path.exists() else []
    tasks = {task.name: task for task in (*before, *map(_absolute, recipe.tasks or []))}
    kept = recipe.model_dump(exclude_none=True, exclude={"tasks", "output"})
    kept = {name: value for name, value in kept.items() if value != {}}
    if tasks:
        kept["tasks"] = [task.model_dump(exclude_none=True) for task in tasks.values()]
    write_text(path, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))


def completed(recipe: Recipe) -> Recipe:
    """Return a recipe with what the run that its output holds was begun with, wherever it says nothing itself.

    Without tasks of its own it gets those that the run was given and has not finished.
    """
    path = Path(recipe.output or "")
    if recipe.output is None or not (path / "run.json").exists():
        return recipe
    run = load_run(path)
    known = Recipe.read(path / _FILE) if (path / _FILE).exists() else _from_facts(run)
    whole = recipe.over(known)
    if recipe.tasks is not None:
        return whole
    done = {version.task for version in run.everything}
    left = [task for task in known.tasks or [] if task.name not in done]
    return whole.model_copy(update={"tasks": None if run.regime == "joint" and done else left or None})


def nothing_left(recipe: Recipe) -> InputError:
    """Return the error that a run was to go on without any task to learn."""
    return InputError(
        f"{recipe.output}: every task that it was given is learned, or was not promoted: name the next with --task, or "
        "feedback with --from-feedback"
    )


def _absolute(task: TaskKeys) -> TaskKeys:
    """A task whose files are named from the root; names on the Hub stay."""
    files = {name: getattr(task, name) for name in ("train", "test")}
    found = {name: str(Path(file).resolve()) for name, file in files.items() if file and Path(file).exists()}
    return task.model_copy(update=found)


def _from_facts(run: RunData) -> Recipe:
    """The recipe of a run that Python code has begun; who gave rewards is not on record by name."""
    facts = run.facts
    given: dict[str, Any] = {"model": facts.model, "objective": facts.objective, "seed": facts.seed}
    if run.base_adapter is not None:
        given["base_adapter"] = run.base_adapter
    gates = [version.manifest.gate for version in run.everything]
    if gates and gates[-1] is not None:
        given["gate"] = gates[-1].tolerance
    settings = {name: value for name, value in facts.settings.items() if value not in (None, "")}
    for section in ("training", "adapter", "weighting", "correction"):
        keys = {name: settings[name] for name in SECTIONS[section].model_fields if name in settings}
        if keys and (section != "correction" or facts.objective == "correction"):
            given[section] = keys
    method = facts.method.model_dump()
    known = ["name", *inspect.signature(METHODS[facts.method.name]).parameters]
    given["method"] = {name: value for name, value in method.items() if name in known and value is not None}
    return Recipe.model_validate(given)
