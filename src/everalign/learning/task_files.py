"""The tasks of a recipe: their files, read by what the objective learns from, and which of them are left to learn."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from everalign.data.file_formats import source_name
from everalign.data.readers import (
    Source,
    check_disjoint,
    first_columns,
    load_corrections,
    load_judged,
    load_preferences,
    load_prompts,
    load_scored,
    load_unscored,
    renamed,
)
from everalign.data.rows import OTHER_NAMES, RowSet, field_error
from everalign.errors import InputError
from everalign.learning.options import DEFAULT_OBJECTIVE
from everalign.learning.recipe import Recipe, nothing_left
from everalign.learning.run_data import load_run
from everalign.training.objectives import OBJECTIVES

LoadedTask = tuple[str, RowSet[Any], RowSet[Any] | None]
Load = Callable[..., RowSet[Any]]


def loaders(objective: str, rewarded: bool) -> tuple[Load, Load]:
    """Returns what reads an objective's rows, and its held-out rows; `rewarded` says that a scorer gives rewards."""
    load, load_test = _LOADERS[OBJECTIVES[objective].rows if objective in OBJECTIVES else "preferences"]
    return (_load_unrewarded if rewarded else load), load_test


def load_tasks(recipe: Recipe) -> list[LoadedTask]:
    """Read the tasks' files, all of them before anything is trained.

    Returns:
        Name, training rows and test rows (None where the task has none) of every task.

    Raises:
        InputError: a file cannot be read, a row is bad, or a test set shares rows with any task's training set.
    """
    skip, tasks = bool(recipe.skip_bad_rows), recipe.tasks or []
    load, load_test = loaders(recipe.objective or DEFAULT_OBJECTIVE, recipe.reward is not None)
    loaded: list[LoadedTask] = []
    for task in tasks:
        columns = task.columns or recipe.columns
        train = load(renamed(task.train, columns), skip_bad_rows=skip, label=recipe.label)
        test = None
        if task.test is not None:
            test = load_test(renamed(task.test, columns), skip_bad_rows=skip, label=recipe.label)
        if recipe.chat_prompts:
            train, test = as_chats(train), None if test is None else as_chats(test)
        loaded += [(task.name, train, test)] if recipe.label is None else _by_label(task.name, train, test)
    names = [name for name, _, _ in loaded]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two tasks are called {repeated!r} once they are split by label: rename one")
    labelled = recipe.labelled
    for name, train, _ in loaded:
        for other, _, test in loaded:
            # What another label's policy has learned leaks nothing.
            if test is not None and (not labelled or (train.labels or [name]) == (test.labels or [other])):
                check_disjoint(train, test, allow=bool(recipe.allow_overlap))
    return loaded


def as_chats(rows: RowSet[Any]) -> RowSet[Any]:
    """Returns the rows with every prompt that is text as a user's message.

    Raises:
        InputError: the rows are corrections, which have no prompts.
    """
    if not all(hasattr(row, "prompt") for row in rows):
        raise InputError(
            f"{rows.source}: chat_prompts is for prompts, and corrections have questions: leave it out",
            where=rows.source,
            field="chat_prompts",
        )
    items = (
        replace(row, prompt=({"role": "user", "content": row.prompt},)) if isinstance(row.prompt, str) else row
        for row in rows
    )
    return replace(rows, items=tuple(items))


def left_to_learn(recipe: Recipe, loaded: Sequence[LoadedTask]) -> list[LoadedTask]:
    """Returns those tasks of a run to continue that have no version yet, whatever became of it.

    Raises:
        InputError: there are none.
    """
    done = {version.task for version in load_run(recipe.output or "").all_versions}
    left = [task for task in loaded if task[0] not in done]
    if not left:
        raise nothing_left(recipe)
    return left


def _by_label(name: str, train: RowSet[Any], test: RowSet[Any] | None) -> list[LoadedTask]:
    """The task, or where its rows have several labels a task NAME/LABEL for each."""
    parts, tests = train.by_label(), {} if test is None else test.by_label()
    if test is not None and (unknown := next((label for label in tests if label not in parts), None)):
        raise InputError(
            f"{test.source}: has rows of the label {unknown!r}, of which {train.source} has none: leave them out, or "
            "give them with the task that learns this label"
        )
    if len(parts) == 1:
        return [(name, train, test)]
    return [(f"{name}/{label}", rows, tests.get(label)) for label, rows in parts.items()]


def _load_rewarded(source: Source, *, skip_bad_rows: bool = False, label: str | None = None) -> RowSet[Any]:
    """Read scored rows; preferences are what people give most often in their place."""
    first = first_columns(source, "train", ("completions", "chosen", "rejected"))
    if first and "completions" not in first:
        raise InputError(
            f"{source_name(source)}: preferences have no rewards: name a scorer with reward, or learn them with fpo or "
            "snkl"
        )
    return load_scored(source, skip_bad_rows=skip_bad_rows, label=label)


# By what an objective learns from: what reads its rows, and its held-out rows. Those of scored rows are judged as
# preferences, whichever way they are written.
_LOADERS: dict[str, tuple[Load, Load]] = {
    "preferences": (load_preferences, load_preferences),
    "scored": (_load_rewarded, load_judged),
    "judged": (load_judged, load_judged),
    "corrections": (load_corrections, load_corrections),
}


def _load_unrewarded(source: Source, *, skip_bad_rows: bool = False, label: str | None = None) -> RowSet[Any]:
    """Reads rows for a scorer: answers, pairs or prompts alone; rows that have rewards keep them."""
    others = OTHER_NAMES["completions"]
    first = first_columns(source, "train", ("completions", "chosen", "rejected", "rewards", *others))
    if "rewards" in first:
        return load_scored(source, skip_bad_rows=skip_bad_rows, label=label)
    if not first.isdisjoint(("completions", "chosen", "rejected")):
        return load_unscored(source, skip_bad_rows=skip_bad_rows, label=label)
    # Without this, rows whose answers are in a column of another name would be taken for prompts alone.
    if found := [name for name in others if name in first]:
        raise field_error(
            found[0],
            "answers stand in 'completions', a list",
            "rename it, or, to have answers sampled to the prompts alone, remove it",
        ).at(source_name(source))
    return load_prompts(source, skip_bad_rows=skip_bad_rows, label=label)
