"""The rows of a bench: training, validation and test rows of every task, filtered, cut and checked."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from everalign.bench.recipe import Bench, BenchTask, expanded
from everalign.data.file_formats import raw_rows
from everalign.data.records import PREFERENCE_SCHEMA, Preference, PreferenceSet
from everalign.data.rows import content_id
from everalign.demo.world import demo_tasks
from everalign.errors import InputError

Part = Literal["validation", "test"]
DEMO = "demo:"
"""A source `demo:NAME` is one of the demo's tasks."""
_DEMO_ROWS = (240, 60)


@dataclass(frozen=True)
class TaskRows:
    """What is learned of a task, and what it is scored on."""

    train: PreferenceSet
    held_out: PreferenceSet


def load_rows(bench: Bench, part: Part) -> dict[str, TaskRows]:
    """Reads the tasks' files; test files only for the part `test`. What is learned is the same for both parts.

    Raises:
        InputError: a file is missing or bad, a filter leaves no row, or validation and training rows share prompts.
    """
    for name, task in bench.tasks.items():
        for key in ("train", "validation", "test"):
            _check_source(f"tasks.{name}.{key}", getattr(task, key))
    found = {}
    for name, task in bench.tasks.items():
        train = _read(name, task, "train")
        if task.validation is None:
            train, validation = cut_validation(train, bench.validation_share, bench.split_seed)
        else:
            validation = _read(name, task, "validation")
            _check_apart(name, train, validation)
        if task.limit is not None and len(train) > task.limit:
            numbers = random.Random(bench.split_seed).sample(range(len(train)), task.limit)
            train = replace(train, items=tuple(train[number] for number in sorted(numbers)))
        held_out = _read(name, task, "test") if part == "test" else validation
        found[name] = TaskRows(train, held_out)
    return found


def cut_validation(rows: PreferenceSet, share: float, seed: int) -> tuple[PreferenceSet, PreferenceSet]:
    """Cuts a share of the prompts off; no prompt has rows on both sides.

    Raises:
        InputError: there are fewer than two prompts.
    """
    prompts = sorted({_prompt_key(row) for row in rows})
    if len(prompts) < 2:
        raise InputError(f"{rows.source}: has too few prompts to cut validation rows off: name a validation file")
    count = min(len(prompts) - 1, max(1, int(share * len(prompts))))
    cut = set(random.Random(seed).sample(prompts, count))
    sides: tuple[list[Preference], list[Preference]] = ([], [])
    for row in rows:
        sides[_prompt_key(row) in cut].append(row)
    return replace(rows, items=tuple(sides[0])), replace(rows, items=tuple(sides[1]))


def _prompt_key(row: Preference) -> str:
    return content_id(row.prompt)


def _check_apart(name: str, train: PreferenceSet, validation: PreferenceSet) -> None:
    prompts = {_prompt_key(row) for row in train}
    shared = sum(_prompt_key(row) in prompts for row in validation)
    if shared:
        raise InputError(
            f"tasks.{name}.validation: {shared} of {len(validation)} rows have a prompt that is trained on: remove "
            "them, or leave `validation` out to have it cut off the training rows"
        )


def _check_source(key: str, source: str | None) -> None:
    if source is None:
        return
    if source.startswith(DEMO):
        known = [task.name for task in demo_tasks(1, 1)]
        if source.removeprefix(DEMO) not in known:
            raise InputError(f"{key}: {source!r} is no task of the demo, which has {', '.join(known)}")
    elif not os.path.isfile(path := expanded(source)):
        raise InputError(f"{key}: {path}: no such file")


def _read(name: str, task: BenchTask, key: Literal["train", "validation", "test"]) -> PreferenceSet:
    """Reads one file of a task with its filter."""
    source = str(getattr(task, key))
    if source.startswith(DEMO):
        return _demo_rows(name, source, key, task.where)
    path, where = expanded(source), task.where or {}
    schema = replace(PREFERENCE_SCHEMA, columns=tuple(dict.fromkeys((*PREFERENCE_SCHEMA.columns, *where))))
    rows = []
    for place, raw in raw_rows(path, "train", schema):
        if isinstance(raw, InputError):
            raise raw
        if not isinstance(raw, Mapping) or _matches(raw, where, place):
            rows.append(Preference.from_json(raw, place))
    label = f"{path} where {json.dumps(where, ensure_ascii=False)}" if where else path
    if not rows:
        raise InputError(f"tasks.{name}.{key}: {label}: no row is left")
    return PreferenceSet(tuple(rows), label)


def _matches(row: Mapping[str, Any], where: Mapping[str, Any], place: str) -> bool:
    for column, wanted in where.items():
        if column not in row:
            raise InputError(f"{place}: field {column!r}: no such column, which `where` asks for", where=place)
        values: Sequence[Any] = wanted if isinstance(wanted, list) else [wanted]
        if row[column] not in values:
            return False
    return True


def _demo_rows(name: str, source: str, key: str, where: Any) -> PreferenceSet:
    if key == "validation" or where:
        what = "where" if where else "validation"
        raise InputError(f"tasks.{name}.{what}: the demo's tasks have none: leave it out")
    task = next(task for task in demo_tasks(*_DEMO_ROWS) if task.name == source.removeprefix(DEMO))
    return PreferenceSet(tuple(task.train if key == "train" else task.test), source)
