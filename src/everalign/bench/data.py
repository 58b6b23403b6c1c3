"""The rows of a bench: what every task learns, validates and tests on, filtered, cut and checked; and what is asked.

At the end of a run every final policy is asked the same: held-out prompts to answer, and chat rows to be scored on.
What cannot be asked is found before anything is learned.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from everalign.bench.recipe import Bench, BenchTask, expanded
from everalign.data.file_formats import raw_rows
from everalign.data.messages import (
    ChatPrompt,
    Completion,
    Prompt,
    checked_completion,
    checked_prompt,
    messages,
    prompt_key,
    prompt_of,
)
from everalign.data.readers import label_of, load_scored, with_label
from everalign.data.records import PREFERENCE_SCHEMA, Preference, PreferenceSet, Scored, ScoredSet
from everalign.data.rows import RowSet, Schema, content_id, spread
from everalign.demo.world import demo_tasks
from everalign.errors import InputError, located
from everalign.learning.options import TrainingOptions

Part = Literal["validation", "test"]
AnySet = TypeVar("AnySet", PreferenceSet, ScoredSet)
DEMO = "demo:"
"""A source `demo:NAME` is one of the demo's tasks."""
_DEMO_ROWS = (240, 60)
_LEAST_ROOM = 768
"""Tokens of a prompt that is answered, where the model can read as many and rows to learn are shorter."""
_ANSWERS = ("output", "completion", "answer", "chosen")
_CHAT_SCHEMA = Schema(
    columns=("prompt", "messages", "completions", *_ANSWERS),
    required=(),
    expected=f"expected 'messages', or 'prompt' with 'completions' or one of {', '.join(_ANSWERS)}",
)


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


if TYPE_CHECKING:
    from everalign.data.chat_tokens import ChatFormat


@dataclass(frozen=True)
class ChatRow:
    """A prompt with the answer that a policy should find likely."""

    prompt: Prompt
    answer: Completion


@dataclass(frozen=True)
class Asked:
    """What one model's final policies are asked.

    Args:
        prompts: by task, the held-out prompts to answer; none where no answers are wanted.
        max_new_tokens: longest answer.
        max_prompt_tokens: longest prompt, with an instruction.
        chat: rows for the perplexity; none where it is not wanted.
        too_long: by task, how many prompts were passed over because they leave no room for an answer.
        max_chat_tokens: longest chat row; longer ones are cut. None for what rows to learn are cut to.
        chat_cut: how many chat rows are longer.
    """

    prompts: Mapping[str, Sequence[Prompt]]
    max_new_tokens: int
    max_prompt_tokens: int
    chat: Sequence[ChatRow]
    too_long: Mapping[str, int]
    max_chat_tokens: int | None = None
    chat_cut: int = 0

    @property
    def facts(self) -> list[Any]:
        """What answers and perplexities depend on, as plain values."""
        prompts = {task: [content_id(prompt) for prompt in ones] for task, ones in self.prompts.items()}
        facts = [prompts, self.max_new_tokens, [content_id([row.prompt, row.answer]) for row in self.chat]]
        return facts if self.max_chat_tokens is None else [*facts, self.max_chat_tokens]


def choose_asked(bench: Bench, rows: Mapping[str, TaskRows]) -> dict[str, Asked]:
    """Chooses for every model what its policies are asked; nothing where the recipe asks for nothing.

    Raises:
        InputError: there is a chat row that cannot be read or whose prompt is trained on, or no prompt of a task leaves
            room for an answer.
    """
    if bench.answers is None and bench.chat is None:
        return {}
    chat = [] if bench.chat is None else _chat(bench, rows)
    return {model: _asked(bench, rows, model, chat) for model in bench.models}


def _asked(bench: Bench, rows: Mapping[str, TaskRows], model: str, chat: Sequence[ChatRow]) -> Asked:
    """Finds out what a model has room for behind the longest learned prompts of any contender."""
    from everalign.data.chat_tokens import ChatFormat
    from everalign.modeling.loading import load_config, load_tokenizer, resolve_model
    from everalign.modeling.positions import named_length

    name = expanded(bench.models[model])
    form = ChatFormat(load_tokenizer(name))
    readable = named_length(load_config(resolve_model(name), "language model", name))
    learners = (bench.learn_recipe(one, choice, model, 0) for one, at, choice in bench.all_trials() if at == model)
    pools = [pool.tokens for recipe in learners if (pool := recipe.make_method().prompts) is not None]
    readable = None if readable is None else readable - max(pools, default=0)
    asked = Asked({}, 1, 1, chat, {}) if bench.answers is None else _answerable(bench, rows, model, form, readable)
    if not chat:
        return asked
    wanted = (bench.training and bench.training.max_length) or TrainingOptions().max_length
    encoded = form.encode([row.prompt for row in chat], [(row.answer,) for row in chat], lambda i: f"chat row {i + 1}")
    longest = wanted if readable is None else min(wanted, readable)
    cut = sum(len(prompt) + len(answer) > longest for prompt, (answer,) in encoded)
    return replace(asked, chat=chat, max_chat_tokens=None if longest == wanted else longest, chat_cut=cut)


def _answerable(
    bench: Bench, rows: Mapping[str, TaskRows], model: str, form: ChatFormat, readable: int | None
) -> Asked:
    """Takes evenly spaced prompts that leave room for an answer, also behind every contender's instruction."""
    wanted = bench.answers
    assert wanted is not None
    room = max(_LEAST_ROOM, (bench.training and bench.training.max_length) or 0)
    room = room if readable is None else min(room, readable - wanted.max_new_tokens)
    instructions = [
        texts for one, _, choice in bench.all_trials() if (texts := bench.instruction(one, choice)) is not None
    ]
    prompts, too_long = {}, {}
    for task, found in rows.items():
        distinct = list({content_id(row.prompt): row.prompt for row in found.held_out}.values())
        longest = [len(ids) for ids in form.encode_prompts(distinct)]
        for text in {texts[task] for texts in instructions if task in texts}:
            also = form.encode_prompts([prompt_with_system(prompt, text) for prompt in distinct])
            longest = [max(one, len(ids)) for one, ids in zip(longest, also, strict=True)]
        fit = [prompt for prompt, length in zip(distinct, longest, strict=True) if length <= room]
        if not fit:
            raise InputError(
                f"answers.max_new_tokens: an answer of {wanted.max_new_tokens} tokens leaves room for {room} of a "
                f"prompt on {model}, and every prompt of {task} is longer: lower it"
            )
        prompts[task], too_long[task] = spread(fit, wanted.prompts), len(distinct) - len(fit)
    return Asked(prompts, wanted.max_new_tokens, max(room, 1), [], too_long)


def _chat(bench: Bench, rows: Mapping[str, TaskRows]) -> list[ChatRow]:
    """Reads the chat rows, evenly spaced; none may have a prompt that a task trains on."""
    assert bench.chat is not None
    path = expanded(bench.chat.rows)
    found = [_chat_row(value, place) for place, value in raw_rows(path, "train", _CHAT_SCHEMA)]
    if not found:
        raise InputError(f"chat.rows: {path}: no rows in it")
    chosen = spread(found, bench.chat.limit)
    prompts = {prompt_key(row.prompt) for row in chosen}
    for task, learned in rows.items():
        shared = len(prompts & {prompt_key(row.prompt) for row in learned.train})
        if shared:
            raise InputError(f"chat.rows: {path}: {shared} prompts are trained on in {task}: remove their rows")
    return chosen


def _chat_row(value: object, place: str) -> ChatRow:
    if isinstance(value, InputError):
        raise value
    with located(place):
        row = _CHAT_SCHEMA.checked_row(value)
        if row.get("messages") is not None:
            turns = messages(row["messages"], "messages")
            prompt: Any = turns[:-1]
            answer: Any = turns[-1:]
            name = "messages"
        else:
            name = next((key for key in ("completions", *_ANSWERS) if row.get(key) is not None), "completions")
            if row.get("prompt") is None or row.get(name) is None:
                raise _CHAT_SCHEMA.missing_column("prompt" if row.get("prompt") is None else name, row.keys())
            prompt, answer = prompt_of(row, row["prompt"]), row[name]
            if name == "completions":
                answer = answer[0] if isinstance(answer, list) and answer else None
        asked = checked_prompt(prompt, "messages" if name == "messages" else "prompt", name)
        return ChatRow(asked, checked_completion(answer, name, asked))


def check_reward_model(bench: Bench, rows: Mapping[str, TaskRows]) -> list[str]:
    """Refuses a reward model that is none, or was trained on a prompt of the tasks; returns what it could not check."""
    from everalign.modeling.reward_model import read_reward_facts, read_reward_prompts

    if bench.answers is None or bench.answers.reward_model is None:
        return []
    key, folder = "answers.reward_model", Path(expanded(bench.answers.reward_model))
    try:
        read_reward_facts(folder)
        trained = read_reward_prompts(folder)
    except InputError as error:
        raise error.at(key) from None
    if trained is None:
        return [f"{folder}: its training prompts are not on record, so it is not checked that the tasks' are others"]
    for task, found in rows.items():
        for what, ones in (("judged", found.held_out), ("learned", found.train)):
            shared = {prompt_key(row.prompt) for row in ones} & trained
            if shared:
                raise InputError(
                    f"{key}: {folder} was trained on {len(shared)} prompts that are {what} in {task}: train one on "
                    "other prompts"
                )
    return []
