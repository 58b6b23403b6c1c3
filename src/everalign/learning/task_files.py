"""The files of a recipe's tasks, read before anything is trained."""

from collections.abc import Callable
from typing import Any

from everalign.data.corrections import load_corrections
from everalign.data.prompts import load_prompts
from everalign.data.readers import check_disjoint, first_columns, load_preferences
from everalign.data.row_set import RowSet
from everalign.data.scored import load_judged, load_scored
from everalign.data.unscored import UNSCORED_SCHEMA, load_unscored
from everalign.errors import InputError
from everalign.learning.recipe import Recipe
from everalign.training.teaching import SCORED_OBJECTIVES

LoadedTask = tuple[str, RowSet[Any], RowSet[Any] | None]


def load_tasks(recipe: Recipe) -> list[LoadedTask]:
    """Read the tasks' files, all of them before anything is trained.

    Returns:
        Name, training rows and test rows (None where the task has none) of every task.

    Raises:
        InputError: a file cannot be read, a row is bad, or a test set shares rows with any task's training set.
    """
    skip, tasks = bool(recipe.skip_bad_rows), recipe.tasks or []
    load = load_test = _loader(recipe.objective)
    if recipe.objective in SCORED_OBJECTIVES:
        # Held-out rows are judged as preferences, whichever way they are written.
        load_test = load_judged
    if recipe.reward is not None:
        load = _load_unrewarded
    loaded: list[LoadedTask] = [
        (
            task.name,
            load(task.train, skip_bad_rows=skip),
            None if task.test is None else load_test(task.test, skip_bad_rows=skip),
        )
        for task in tasks
    ]
    for _, train, _ in loaded:
        for _, _, test in loaded:
            check_disjoint(train, test or (), allow=bool(recipe.allow_overlap))
    return loaded


def _loader(objective: str | None) -> Callable[..., RowSet[Any]]:
    """Return what reads an objective's files."""
    if objective == "correction":
        return load_corrections
    if objective == "snkl":
        return load_judged
    return _load_rewarded if objective in SCORED_OBJECTIVES else load_preferences


def _load_rewarded(source: str, *, skip_bad_rows: bool) -> RowSet[Any]:
    """Read scored rows; preferences are what people give most often in their place."""
    first = first_columns(source, "train", ("completions", "chosen", "rejected"))
    if first and "completions" not in first:
        raise InputError(
            f"{source}: preferences have no rewards: name who gives them with reward, or learn them with fpo or snkl"
        )
    return load_scored(source, skip_bad_rows=skip_bad_rows)


def _load_unrewarded(source: str, *, skip_bad_rows: bool) -> RowSet[Any]:
    """Read rows that somebody gives rewards to: answers, pairs or prompts alone; rows that have rewards keep them."""
    first = first_columns(source, "train", ("completions", "chosen", "rejected", "rewards"))
    if "rewards" in first:
        return load_scored(source, skip_bad_rows=skip_bad_rows)
    if not first:
        _refuse_other_names(source)
    return (load_unscored if first else load_prompts)(source, skip_bad_rows=skip_bad_rows)


def _refuse_other_names(source: str) -> None:
    """Refuse what would be taken for prompts alone, its answers unread, because their column has another name."""
    others = UNSCORED_SCHEMA.other_names["completions"]
    if found := [name for name in others if name in first_columns(source, "train", others)]:
        raise InputError(
            f"{source}: field {found[0]!r}: answers stand in 'completions', a list; rename it, or, to have answers "
            "sampled to the prompts alone, remove it"
        )
