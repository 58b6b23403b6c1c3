"""What every final policy is asked at the end of a run: held-out prompts to answer, and chat rows to be scored on.

All contenders on one model are asked the same. What cannot be asked is found before anything is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everalign.bench.data import TaskRows, prompt_with_system
from everalign.bench.recipe import Bench, expanded
from everalign.data.file_formats import raw_rows
from everalign.data.messages import (
    Completion,
    Prompt,
    checked_completion,
    checked_prompt,
    messages,
    prompt_key,
    prompt_of,
)
from everalign.data.rows import Schema, content_id, spread
from everalign.errors import InputError, located
from everalign.learning.options import TrainingOptions

if TYPE_CHECKING:
    from everalign.data.chat_tokens import ChatFormat

_LEAST_ROOM = 768
"""Tokens of a prompt that is answered, where the model can read as many and rows to learn are shorter."""
_ANSWERS = ("output", "completion", "answer", "chosen")
_CHAT_SCHEMA = Schema(
    columns=("prompt", "messages", "completions", *_ANSWERS),
    required=(),
    expected=f"expected 'messages', or 'prompt' with 'completions' or one of {', '.join(_ANSWERS)}",
)


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
