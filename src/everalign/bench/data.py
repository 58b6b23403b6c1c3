"""The rows of a bench: training, validation and test rows of every task, filtered, cut and checked."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from everalign.bench.recipe import Bench, BenchTask, expanded
from everalign.data.file_formats import raw_rows
from everalign.data.messages import ChatPrompt, Prompt
from everalign.data.readers import label_of, load_scored, with_label
from everalign.data.records import PREFERENCE_SCHEMA, Preference, PreferenceSet, Scored, ScoredSet
from everalign.data.rows import RowSet, content_id
from everalign.demo.world import demo_tasks
from everalign.errors import InputError, located

Part = Literal["validation", "test"]
AnySet = TypeVar("AnySet", PreferenceSet, ScoredSet)
DEMO = "demo:"
"""A source `demo:NAME` is one of the demo's tasks."""
_DEMO_ROWS = (240, 60)


@dataclass(frozen=True)
class TaskRows:
    """What is learned of a task, what it is scored on, and the fingerprint of its validation rows.

    `scored` are answers with rewards by name, for contenders that learn from them in place of `train`; their prompts
    are among those of `train`.
    """

    train: RowSet[Any]
    held_out: PreferenceSet
    validation: str = ""
    scored: Mapping[str, ScoredSet] = field(default_factory=dict)


def load_rows(bench: Bench, part: Part, log: Callable[[str], None] = lambda _: None) -> dict[str, TaskRows]:
    """Reads the tasks' files. What is learned is the same for both parts.

    Test files are read for the part `validation` too: what is wrong with them is said before anything is tuned.

    Args:
        bench: the recipe.
        part: what is held out.
        log: called with a note on the columns of a file that nothing reads, and on prompts without scored rows.

    Raises:
        InputError: a file is missing or bad, a filter leaves no row, validation and training rows share prompts, or no
            prompt that is learned has scored rows.
    """
    check_files(bench)
    found: dict[str, TaskRows] = {}
    unread: dict[str, None] = {}
    for name, task in bench.tasks.items():
        train = _read(name, task, "train", bench.label)
        if task.validation is None:
            train, validation = cut_validation(train, bench.validation_share, bench.split_seed)
        else:
            validation = _read(name, task, "validation", bench.label)
            prompts = {_prompt_key(row) for row in train}
            if shared := sum(_prompt_key(row) in prompts for row in validation):
                raise InputError(
                    f"tasks.{name}.validation: {shared} of {len(validation)} rows have a prompt that is trained on: "
                    "remove them, or leave `validation` out to have it cut off the training rows"
                )
        if task.limit is not None and len(train) > task.limit:
            numbers = random.Random(bench.split_seed).sample(range(len(train)), task.limit)
            train = replace(train, items=tuple(train[number] for number in sorted(numbers)))
        test = _read(name, task, "test", bench.label)
        _check_label(name, bench.label, train, validation, test)
        for key, rows in (("train", train), ("validation", validation), ("test", test)):
            if rows.ignored:
                # By file, which several tasks may have rows of.
                file = expanded(str(getattr(task, key) or task.train))
                unread[f"note: {file}: columns that are not read: {', '.join(rows.ignored)}"] = None
        held_out, validated = test if part == "test" else validation, validation.fingerprint
        scored = {
            rows: _scored(f"tasks.{name}.scored.{rows}", path, train, log) for rows, path in (task.scored or {}).items()
        }
        if task.system is not None:
            # Last, so that a prompt is cut off alike in tasks with and without.
            train, held_out = (with_system(rows, task.system) for rows in (train, held_out))
            scored = {key: with_system(rows, task.system) for key, rows in scored.items()}
        found[name] = TaskRows(train, held_out, validated, scored)
    for note in unread:
        log(note)
    return found


def check_files(bench: Bench) -> None:
    """Refuses a recipe that names a missing file; reads none."""
    for name, task in bench.tasks.items():
        for key in ("train", "validation", "test"):
            _check_source(f"tasks.{name}.{key}", getattr(task, key))
        for key, path in (task.scored or {}).items():
            if path.startswith(DEMO):
                raise InputError(f"tasks.{name}.scored.{key}: the demo's tasks have no rewards: name a file")
            _check_source(f"tasks.{name}.scored.{key}", path)
    if bench.chat is not None:
        _check_source("chat.rows", bench.chat.rows)
    if bench.answers is not None and bench.answers.reward_model is not None:
        with located("answers.reward_model"):
            folder = expanded(bench.answers.reward_model)
        if not os.path.isdir(folder):
            raise InputError(f"answers.reward_model: {folder}: no such folder; train one with everalign reward train")


def cut_validation(rows: PreferenceSet, share: float, seed: int) -> tuple[PreferenceSet, PreferenceSet]:
    """Cuts about a share of the prompts off, at least one; no prompt has rows on both sides, not in other tasks either.

    Raises:
        InputError: there are fewer than two prompts.
    """
    # A number from 0 to 1 by the prompt and the seed alone, so that tasks that share prompts cut the same ones.
    digests = {key: hashlib.sha256(f"{seed}/{key}".encode()).hexdigest() for key in map(_prompt_key, rows)}
    places = {key: int(digest[:16], 16) / 16**16 for key, digest in digests.items()}
    if len(places) < 2:
        raise InputError(f"{rows.source}: has too few prompts to cut validation rows off: name a validation file")
    order = sorted(places, key=places.__getitem__)
    count = min(len(order) - 1, max(1, sum(place < share for place in places.values())))
    cut = set(order[:count])
    sides: tuple[list[Preference], list[Preference]] = ([], [])
    for row in rows:
        sides[_prompt_key(row) in cut].append(row)
    return replace(rows, items=tuple(sides[0])), replace(rows, items=tuple(sides[1]))


def _prompt_key(row: Preference | Scored) -> str:
    return content_id(row.prompt)


def _scored(key: str, path: str, train: PreferenceSet, log: Callable[[str], None]) -> ScoredSet:
    """Reads answers with rewards to the prompts that are learned; all others are left out, held-out ones above all."""
    rows, prompts = load_scored(expanded(path)), {_prompt_key(row) for row in train}
    kept = tuple(row for row in rows if _prompt_key(row) in prompts)
    if not kept:
        raise InputError(f"{key}: {path}: none of its prompts is one of the {len(prompts)} that are learned as pairs")
    if missing := len(prompts) - len({_prompt_key(row) for row in kept}):
        log(f"note: {key}: {missing} of {len(prompts)} prompts that are learned as pairs have no scored row")
    return replace(rows, items=kept)


def with_system(rows: AnySet, text: str) -> AnySet:
    """Returns the rows with a system message before every prompt, or before the text of the one that is there."""
    return replace(rows, items=tuple(replace(row, prompt=prompt_with_system(row.prompt, text)) for row in rows))


def prompt_with_system(prompt: Prompt, text: str) -> Prompt:
    """Returns a prompt with a system message before it, or before the text of the one that is there."""
    if isinstance(prompt, str):
        return ({"role": "system", "content": text}, {"role": "user", "content": prompt})
    messages = tuple(prompt)
    if messages[0]["role"] == "system":
        messages = ({**messages[0], "content": f"{text}\n\n{messages[0]['content']}"}, *messages[1:])
    else:
        messages = ({"role": "system", "content": text}, *messages)
    return replace(prompt, messages=messages) if isinstance(prompt, ChatPrompt) else messages


def _check_label(name: str, column: str | None, *sets: PreferenceSet) -> None:
    labels = list(dict.fromkeys(label for rows in sets for label in rows.labels))
    if len(labels) > 1:
        raise InputError(
            f"tasks.{name}: its rows have several labels in {column!r} ({', '.join(labels)}), and a task has one: keep "
            f"those of one with `where: {{{column}: {labels[0]}}}`"
        )


def _check_source(key: str, source: str | None) -> None:
    if source is None:
        return
    if source.startswith(DEMO):
        known = [task.name for task in demo_tasks(1, 1)]
        if source.removeprefix(DEMO) not in known:
            raise InputError(f"{key}: {source!r} is no task of the demo, which has {', '.join(known)}")
        return
    with located(key):
        path = expanded(source)
    if not os.path.isfile(path):
        raise InputError(f"{key}: {path}: no such file")


def _read(name: str, task: BenchTask, key: Literal["train", "validation", "test"], label: str | None) -> PreferenceSet:
    """Reads one file of a task with its filter, and the column of labels where there is one."""
    source = str(getattr(task, key))
    if source.startswith(DEMO):
        if label is not None:
            raise InputError(f"tasks.{name}.{key}: the demo's tasks have no column {label!r}: leave label out")
        if key == "validation" or task.where:
            what = "where" if task.where else "validation"
            raise InputError(f"tasks.{name}.{what}: the demo's tasks have none: leave it out")
        of_demo = next(one for one in demo_tasks(*_DEMO_ROWS) if one.name == source.removeprefix(DEMO))
        return PreferenceSet(tuple(of_demo.train if key == "train" else of_demo.test), source)
    path, where = expanded(source), task.where or {}
    labelled = PREFERENCE_SCHEMA if label is None else with_label(PREFERENCE_SCHEMA, label)
    schema = replace(labelled, columns=tuple(dict.fromkeys((*labelled.columns, *where))))
    rows, ignored = [], dict[str, None]()
    for place, raw in raw_rows(path, "train", schema):
        if isinstance(raw, InputError):
            raise raw
        if isinstance(raw, Mapping):
            ignored |= dict.fromkeys(str(column) for column in raw if column not in schema.columns)
        if not isinstance(raw, Mapping) or _matches(raw, where, place):
            row = Preference.from_json(raw, place)
            rows.append(row if label is None else replace(row, label=label_of(raw, label, place, schema)))
    shown = f"{path} where {json.dumps(where, ensure_ascii=False)}" if where else path
    if not rows:
        raise InputError(f"tasks.{name}.{key}: {shown}: no row is left")
    return PreferenceSet(tuple(rows), shown, ignored=tuple(ignored))


def _matches(row: Mapping[str, Any], where: Mapping[str, Any], place: str) -> bool:
    for column, wanted in where.items():
        if column not in row:
            raise InputError(f"{place}: field {column!r}: no such column, which `where` asks for", where=place)
        values: Sequence[Any] = wanted if isinstance(wanted, list) else [wanted]
        if row[column] not in values:
            return False
    return True
