"""Recipes of `everalign bench`: what is compared, on which tasks, and how it is tuned. Importing it is light.

    models: {base: $MODELS/base}
    tasks:
      harmless: {train: harmless.train.jsonl.gz, test: harmless.test.jsonl.gz, limit: 400}
      academy: {train: domains.train.jsonl.gz, test: domains.test.jsonl.gz, where: {domain: academy}}
    orders: 3
    seeds: [0, 1, 2, 3, 4]
    contenders:
      er: {method: er, objective: dpo, tune: {learning_rate: [3e-4, 1e-3], replay: [0.1, 0.2]}}
      lifealign: {method: lifealign, tune: {learning_rate: [3e-4, 1e-3], gamma: [1.0, 2.0]}}
    baseline: er

Files and models are named from where the command runs; `$NAME` stands for an environment variable.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, field_validator, model_validator

from everalign.bench.contenders import OF_MARGINS, SAME_FOR_ALL, Choice, Contender, given, section_of, unknown_name
from everalign.errors import InputError
from everalign.learning.recipe import AdapterKeys, Keys, Recipe, Text, TrainingKeys, line_of, read_yaml
from everalign.methods.table import method_file
from everalign.options import first_problem
from everalign.storage import sha256_of
from everalign.training.objectives import reads

TUNABLE = ("accuracy", "reward_accuracy", "margin")
_NUMBERS = ("last", "backward_transfer", "average_performance")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+*-]*")
_Share = Annotated[float, Field(gt=0, lt=1)]
_Positive = Annotated[int, Field(ge=1)]


def _checked_orders(value: Any) -> Any:
    """A number of orders, or a list of lists of task names."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if not isinstance(value, list) or not value or not all(isinstance(order, list) and order for order in value):
        raise InputError(f"must be a number of orders, or a list of lists of task names, found {value!r}")
    for order in value:
        if not all(isinstance(name, str) for name in order):
            raise InputError(f"{order} must hold names of tasks")
        if value.count(order) > 1:
            raise InputError(f"the order {order} is given twice")
    return value


def _checked_seeds(seeds: list[int]) -> list[int]:
    repeated = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if repeated is not None:
        raise InputError(f"the seed {repeated} is given twice")
    return seeds


_Orders = Annotated[Any, AfterValidator(_checked_orders)]
_Seeds = Annotated[list[int], Field(min_length=1), AfterValidator(_checked_seeds)]


class BenchTask(Keys):
    """One task. Without `validation` a share of the training prompts is cut off for it.

    `scored` names files of answers with rewards, from which contenders learn that name one of them.
    """

    train: Text
    validation: Text | None = None
    test: Text
    where: dict[str, Any] | None = None
    limit: _Positive | None = None
    system: Text | None = None
    scored: dict[Text, Text] | None = None


class Tuning(Keys):
    """The seeds and orders of the trials, apart from those of the comparison."""

    seeds: _Seeds = Field(default=[1000])
    orders: _Orders = 1


class AnswerKeys(Keys):
    """What is asked of every final policy: its greedy answers to held-out prompts, and who judges them."""

    prompts: _Positive = 50
    max_new_tokens: _Positive = 96
    reward_model: Text | None = None


class ChatKeys(Keys):
    """Held-out chat rows that have nothing to do with the tasks, for the perplexity of every final policy."""

    rows: Text
    limit: _Positive = 200


class Bench(Keys):
    """A whole bench."""

    models: Any
    tasks: Annotated[dict[str, BenchTask], Field(min_length=1)]
    label: Text | None = None
    orders: _Orders = 1
    seeds: _Seeds
    contenders: Annotated[dict[str, Contender], Field(min_length=1)]
    training: TrainingKeys | None = None
    adapter: AdapterKeys | None = None
    baseline: Text | None = None
    tuning: Tuning = Tuning()
    tune_on: Annotated[list[Text], Field(min_length=1)] = Field(default=["accuracy.last", "reward_accuracy.last"])
    unequal_budget: bool = False
    forward_transfer: bool | None = None
    answers: AnswerKeys | None = None
    chat: ChatKeys | None = None
    validation_share: _Share = 0.1
    split_seed: int = 20261120
    test_limit: Annotated[int, Field(ge=0)] = 0
    output: Text | None = None
    _source: tuple[Path, yaml.Node] | None = PrivateAttr(default=None)

    @field_validator("models", mode="before")
    @classmethod
    def _named_models(cls, value: Any) -> Any:
        """A list of models names each by the last part of its path."""
        if isinstance(value, list) and all(isinstance(model, str) and model for model in value) and value:
            names = [re.sub(r"[^\w.+-]+", "-", Path(model).name) for model in value]
            if len(set(names)) < len(names):
                raise InputError("two models have one name: give a mapping from names to models")
            value = dict(zip(names, value, strict=True))
        if not isinstance(value, dict) or not value:
            raise InputError("must be a list of models, or a mapping from a name to a model")
        for name, model in value.items():
            if not isinstance(name, str) or not isinstance(model, str) or not model:
                raise InputError(f"{name!r}: {model!r} must be a model's name with its folder or Hub name")
        return value

    @field_validator("training")
    @classmethod
    def _one_limit(cls, training: Any) -> Any:
        if training is not None and training.test_limit is not None:
            raise InputError(SAME_FOR_ALL["test_limit"])
        return training

    @field_validator("tune_on")
    @classmethod
    def _known_metrics(cls, names: list[str]) -> list[str]:
        known = [f"{metric}.{number}" for metric in TUNABLE for number in _NUMBERS]
        for name in names:
            if name not in known:
                raise InputError(unknown_name("measure", name, known))
        return names

    @model_validator(mode="after")
    def _fits_together(self) -> Bench:
        for what, names in (("models", self.models), ("tasks", self.tasks), ("contenders", self.contenders)):
            for name in names:
                if not _NAME.fullmatch(name):
                    raise InputError(f"{what}.{name}: a name is letters, digits and _ . + * - only: it names files")
        for key, orders in (("orders", self.orders), ("tuning.orders", self.tuning.orders)):
            possible = math.factorial(len(self.tasks))
            if isinstance(orders, int) and orders > possible:
                raise InputError(f"{key}: {len(self.tasks)} tasks have {possible} orders, not {orders}")
            for order in [] if isinstance(orders, int) else orders:
                if sorted(order) != sorted(self.tasks):
                    raise InputError(f"{key}: {order} must name every task once: {', '.join(self.tasks)}")
        if self.baseline is not None and self.baseline not in self.contenders:
            raise InputError(f"baseline: {unknown_name('contender', self.baseline, list(self.contenders))}")
        self._check_contenders()
        return self

    def _check_contenders(self) -> None:
        budgets = self.budgets
        if len(set(budgets.values())) > 1 and not self.unequal_budget:
            counts = ", ".join(f"{name} {count}" for name, count in budgets.items())
            raise InputError(
                f"contenders: every one must have equally many trials, found {counts}: even the lists under `tune` "
                "out, or say `unequal_budget: true`"
            )
        for name, contender in self.contenders.items():
            try:
                contender.check_instruction(self.tasks)
                contender.check_options(self.training)
                self._check_scored(contender)
            except InputError as error:
                raise InputError(f"contenders.{name}.{error}") from None
        wanted = {contender.scored for contender in self.contenders.values()}
        for name, task in self.tasks.items():
            if unread := next((rows for rows in task.scored or {} if rows not in wanted), None):
                raise InputError(f"tasks.{name}.scored.{unread}: no contender learns from it: leave it out")

    def _check_scored(self, contender: Contender) -> None:
        """Refuses scored rows that some task does not have."""
        if contender.scored is None:
            return
        if self.label is not None:
            raise InputError("scored: scored rows have no labels here: leave label out, or learn from pairs")
        for name, task in self.tasks.items():
            if contender.scored not in (task.scored or {}):
                known = ", ".join(task.scored or {}) or "none"
                raise InputError(f"scored: tasks.{name}.scored has no file {contender.scored!r}, but {known}")

    @classmethod
    def read(cls, path: Path) -> Bench:
        """Reads a recipe; an InputError names the file, the line and the key."""
        value, nodes = read_yaml(path)
        try:
            found = cls.model_validate(value)
            found._source = (path, nodes)
            return found
        except ValidationError as error:
            problem = first_problem(cls, error)
            where: tuple[int | str, ...] = problem.where
            if not where and problem.cause is not None:
                # A check of the whole names its key itself.
                where = tuple(str(problem.cause).partition(":")[0].split("."))
                text = str(problem.cause)
            else:
                text = f"{'.'.join(map(str, where))}{problem.what}"
            place = f"{path}:{line_of(nodes, where)}"
            raise InputError(f"{place}: {text}", where=place, field=str(where[-1]), hint=problem.hint) from None

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name what the recipe says; not its comments, and not where results go."""
        said = self.model_dump(exclude={"output"}, exclude_none=True)
        # A mapping has no order as JSON, and that of the tasks is the order of learning.
        said["order"] = [list(self.tasks), self.task_orders(), self.task_orders(tuning=True)]
        # A filter may ask for null, which is no key that is left out.
        said["where"] = [task.where for task in self.tasks.values()]
        # A method in a file is no part of the package's code.
        files = {file for one in self.contenders.values() if (file := method_file(str(one.method.name))) is not None}
        said |= {"files": {str(file): sha256_of(file) for file in files}} if files else {}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def located(self, error: InputError) -> InputError:
        """Returns an error whose message begins with a key of the recipe with the file and line of that key."""
        where = str(error).partition(":")[0].split(".")
        if self._source is None or where[0] not in type(self).model_fields:
            return error
        path, nodes = self._source
        return error.at(f"{path}:{line_of(nodes, where)}")

    @property
    def budgets(self) -> dict[str, int]:
        """The number of trials of every contender that learns."""
        return {name: len(one.trials) for name, one in self.contenders.items() if one.learns}

    def task_orders(self, tuning: bool = False) -> list[tuple[str, ...]]:
        """The orders of the comparison or of the trials; seeded permutations begin with the recipe's own order."""
        orders = self.tuning.orders if tuning else self.orders
        if not isinstance(orders, int):
            return [tuple(order) for order in orders]
        found, rng = [tuple(self.tasks)], random.Random(self.split_seed)
        while len(found) < orders:
            order = list(self.tasks)
            rng.shuffle(order)
            if tuple(order) not in found:
                found.append(tuple(order))
        return found

    def instruction(self, contender: str, choice: Choice) -> Mapping[str, str] | None:
        """Returns by task the system message of a contender that learns nothing; None for one that learns."""
        one = self.contenders[contender]
        texts = choice.get("system", one.system)
        if one.learns:
            return None
        return texts or {} if not isinstance(texts, str) else dict.fromkeys(self.tasks, texts)

    def learn_recipe(self, contender: str, choice: Choice, model: str, seed: int) -> Recipe:
        """Returns the recipe of one run, without its output and tasks.

        That of a contender that learns nothing holds the shared settings, which held-out rows are scored with.

        Raises:
            InputError: names the contender, and the option that is wrong or would be ignored.
        """
        from everalign.methods import METHODS

        one = self.contenders[contender]
        objective = choice.get("objective", one.objective) if one.learns else "dpo"
        # What all share, and an objective or a method has no use for, is no mistake of the contender.
        shared = given(self.training)
        shared = {key: value for key, value in shared.items() if key not in OF_MARGINS or reads(objective, key)}
        without_adapter = getattr(METHODS.get(one.method.name), "prompts", None) is not None
        if without_adapter:
            shared.pop("reference", None)
        sections: dict[str, dict[str, Any]] = {
            "training": {**shared, **given(one.training), "test_limit": self.test_limit},
            "adapter": {**({} if without_adapter else given(self.adapter)), **given(one.adapter)},
            "weighting": given(one.weighting),
            "method": given(one.method) if one.learns else {"name": "seqft"},
        }
        for option, value in choice.items():
            section = section_of(option)
            if section:
                sections[section][option] = value
        if not sections["weighting"]:
            # Runs are named by what their recipes say, and most say nothing of it.
            del sections["weighting"]
        whole = {"model": expanded(self.models[model]), "objective": objective, "preset": one.preset, "seed": seed}
        try:
            return Recipe.model_validate({**whole, **sections})
        except ValidationError as error:
            problem = first_problem(Recipe, error)
            where = ".".join(map(str, problem.where))
            raise InputError(f"contenders.{contender}: {where}{problem.what}", field=str(problem.where[-1])) from None

    def check_contenders(self) -> None:
        """Builds every method of every trial, so that a wrong option is found before anything is trained.

        Models are looked for elsewhere, under their own names.
        """
        from everalign.learning.options import DEFAULT_OBJECTIVE
        from everalign.training.objectives import make_objective

        for name, model, choice in self.all_trials():
            try:
                arguments = self.learn_recipe(name, choice, model, 0).model_copy(
                    update={"output": "-", "model": "tiny"}
                )
                made = arguments.learner_arguments(needs_tasks=False)
                make_objective(made.get("objective", DEFAULT_OBJECTIVE), made["training"].beta, made["method"].gamma)
            except InputError as error:
                raise error if str(error).startswith("contenders.") else error.at(f"contenders.{name}") from None
            self._check_measures(name, made["method"].regime if self.contenders[name].learns else "joint")

    def _check_measures(self, name: str, regime: str) -> None:
        """Refuses to choose among trials by a measure that none of them will have."""
        numbers = {measure.rpartition(".")[2] for measure in self.tune_on}
        lacking = numbers - {"last"} if regime != "sequential" else set()
        if len(self.tasks) == 1:
            lacking |= numbers & {"backward_transfer"}
        if lacking and len(self.contenders[name].trials) > 1:
            measure = next(measure for measure in self.tune_on if measure.rpartition(".")[2] in lacking)
            why = "of a single task" if len(self.tasks) == 1 else "of a method that does not learn tasks in sequence"
            raise InputError(
                f"tune_on: contenders.{name} cannot be tuned on {measure}, which there is none {why}: tune "
                "on .last, or give it no choice under `tune`"
            )

    def preset_notes(self) -> list[str]:
        """Returns what the shared settings replace of contenders' presets, a note for each."""
        return [
            f"{name}: the shared settings replace some of its preset: {', '.join(replaced)}"
            for name, one in self.contenders.items()
            if (replaced := one.replaced(self.training, self.adapter))
        ]

    def all_trials(self) -> Iterator[tuple[str, str, Choice]]:
        """Yields contender, model and choice of every trial."""
        for model in self.models:
            for name, contender in self.contenders.items():
                yield from ((name, model, choice) for choice in contender.trials)


def expanded(name: str) -> str:
    """Returns a file or a model with its environment variables filled in.

    Raises:
        InputError: one of them is not set.
    """
    found = os.path.expandvars(os.path.expanduser(name))
    if missing := re.search(r"\$\{?\w+\}?", found):
        raise InputError(
            f"{name}: the environment variable {missing.group()} is not set: set it, or name the whole path"
        )
    return found
