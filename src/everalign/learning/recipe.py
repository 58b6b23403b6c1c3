"""Recipes: every option of `everalign learn`, from a YAML file or from flags."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from everalign.data.readers import (
    UNSCORED_SCHEMA,
    check_disjoint,
    first_columns,
    load_corrections,
    load_judged,
    load_preferences,
    load_prompts,
    load_scored,
    load_unscored,
)
from everalign.data.rows import RowSet
from everalign.errors import InputError
from everalign.learning.learner import Learner
from everalign.learning.options import (
    PAPER_ADAPTER,
    AdapterOptions,
    CorrectionTaskOptions,
    RolloutOptions,
    TrainingOptions,
)
from everalign.learning.run_data import RunData, load_run
from everalign.methods import METHODS, LifeAlign, Method, make_method
from everalign.options import Options
from everalign.storage import write_text
from everalign.training.objectives import SCORED_OBJECTIVES
from everalign.training.options import WeightOptions, check_names


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without two of its surprises."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping; PyYAML itself would keep the last of two equal keys and not say so."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, (key, (key_node, _)) in enumerate(zip(keys, node.value, strict=True)):
            if key in keys[:index]:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
        return super().construct_mapping(node, deep)


# To PyYAML, which reads YAML 1.1, a number in this notation without a point is text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        InputError: the file is missing, is no YAML (names the line), holds something else than a mapping, or gives
            a key twice.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no text file in UTF-8 ({error})") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise InputError(f"{path}{line}: broken YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: broken YAML: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold keys and values, such as `model: tiny`")
    return value


# A preset's supervised stage stands before a preference stage; these have none.
_WITHOUT_SFT_STAGE = ("sft", "correction", *SCORED_OBJECTIVES)
# Training options that an objective does not look at, and why.
_IGNORED = {
    "sft": (("reference", "beta"), "has no margin"),
    "var": (("reference", "beta"), "has no margin"),
    "correction": (("reference", "beta"), "has no margin"),
    "snkl": (("beta",), "takes log-ratios as they are"),
}

SAMPLE_ANSWERS = 4
"""Held-out prompts of each task that a run from the command line answers for its report."""

Text = Annotated[str, Field(min_length=1)]


class _Keys(BaseModel):
    """One mapping: no unknown keys, exact types, and None for what is not given."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def _keys_of(title: str, hints: Mapping[str, Any]) -> type[_Keys]:
    keys: dict[str, Any] = {key: (kind | None, None) for key, kind in hints.items()}
    return create_model(title, __base__=_Keys, **keys)


def _field_types(options: type[Options]) -> dict[str, Any]:
    return {name: field.annotation for name, field in options.model_fields.items()}


def _method_arguments() -> dict[str, Any]:
    """Name and type of every argument that some method takes; `make_method` knows which takes which."""
    found: dict[str, Any] = {}
    for method in METHODS.values():
        hints = get_type_hints(method.__init__)
        found |= {name: hints[name] for name in inspect.signature(method).parameters}
    return found


TrainingKeys = _keys_of("TrainingKeys", _field_types(TrainingOptions))
AdapterKeys = _keys_of("AdapterKeys", _field_types(AdapterOptions))
WeightingKeys = _keys_of("WeightingKeys", _field_types(WeightOptions))
RolloutKeys = _keys_of("RolloutKeys", _field_types(RolloutOptions))
CorrectionKeys = _keys_of("CorrectionKeys", _field_types(CorrectionTaskOptions))
MethodKeys = _keys_of("MethodKeys", {"name": Text, **_method_arguments()})


class TaskKeys(_Keys):
    """One task: its name, unique in the run, and its files or Hub names."""

    name: Text
    train: Text
    test: Text | None = None


SECTIONS: Mapping[str, type[_Keys]] = {
    "method": MethodKeys,
    "training": TrainingKeys,
    "adapter": AdapterKeys,
    "weighting": WeightingKeys,
    "rollouts": RolloutKeys,
    "correction": CorrectionKeys,
    "tasks": TaskKeys,
}


# Their keys are flags of the same names.
_FLAT = ("training", "adapter", "weighting", "rollouts", "correction", "method")


class Recipe(_Keys):
    """What was given, by a file or by flags, and what the learner makes of it."""

    model: Text | None = None
    base_adapter: Text | None = None
    method: MethodKeys | None = None  # type: ignore[valid-type]  # its keys are the methods' own arguments
    objective: Text | None = None
    output: Text | None = None
    seed: int | None = None
    preset: Text | None = None
    tasks: Annotated[list[TaskKeys], Field(min_length=1)] | None = None
    training: TrainingKeys | None = None  # type: ignore[valid-type]  # its keys are those of TrainingOptions
    adapter: AdapterKeys | None = None  # type: ignore[valid-type]  # its keys are those of AdapterOptions
    weighting: WeightingKeys | None = None  # type: ignore[valid-type]  # its keys are those of WeightOptions
    reward: Text | None = None
    rollouts: RolloutKeys | None = None  # type: ignore[valid-type]  # its keys are those of RolloutOptions
    correction: CorrectionKeys | None = None  # type: ignore[valid-type]  # its keys are CorrectionTaskOptions' own
    gate: float | None = None
    gate_scorer: Text | None = None
    cache: Text | None = None
    allow_overlap: bool | None = None
    sample_answers: Annotated[int, Field(ge=0)] | None = None
    skip_bad_rows: bool | None = None
    report: bool | None = None

    @field_validator("method", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: list[TaskKeys] | None) -> list[TaskKeys] | None:
        names = [task.name for task in tasks or []]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the name {repeated!r} is given twice; every task needs its own")
        return tasks

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a YAML file; an InputError names the file and the key."""
        try:
            return cls.model_validate(read_yaml(path))
        except ValidationError as error:
            raise InputError(f"{path}: {_explain(error, _dotted)}") from None

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> Recipe:
        """Make a recipe of flags, by their names with underscores; an InputError names the flag.

        Args:
            flags: `method` is a method's name and `tasks` a list as in a file; every other flag has the name of its
                key, whatever mapping of the file that is in. None is a flag that is not given.
        """
        nested: dict[str, Any] = {section: {} for section in _FLAT}
        nested["method"] = {"name": flags.get("method")}
        for name, value in flags.items():
            if name in cls.model_fields:
                nested.setdefault(name, value)
            else:
                nested[_section_of(name)][name] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise InputError(_explain(error, _flag)) from None

    def over(self, other: Recipe) -> Recipe:
        """Return both together; where both give a value, this one's counts. Tasks are replaced as a whole."""
        mine, theirs = self._given(), other._given()
        for section in _FLAT:
            mine[section] = {**theirs.get(section, {}), **mine.get(section, {})}
        return Recipe.model_validate({**theirs, **mine})

    def training_options(self) -> TrainingOptions:
        """Return the preset's training options with the given ones in their place."""
        given = self._given("training")
        if self.objective in _WITHOUT_SFT_STAGE:
            given = {"sft_epochs": 0.0, **given}
        return TrainingOptions.preset(self.preset or "default", **given)

    def adapter_options(self) -> AdapterOptions:
        """Return the preset's adapter options with the given ones in their place."""
        return (PAPER_ADAPTER if self.preset == "paper" else AdapterOptions()).replace(**self._given("adapter"))

    def make_method(self) -> Method:
        """Build the method; an argument that it would ignore is refused."""
        return make_method(**{"name": LifeAlign.name, **self._given("method")})

    def learner_arguments(self, needs_tasks: bool = True) -> dict[str, Any]:
        """Return keyword arguments of `Learner`; what is not given is left to its defaults.

        Args:
            needs_tasks: whether tasks have to be given.

        Raises:
            InputError: model, output or tasks are not given, or an option has a value it cannot have.
        """
        for name, flag in (("model", "--model"), ("output", "--output"), ("tasks", "--task")):
            if getattr(self, name) is None and (needs_tasks or name != "tasks"):
                raise InputError(f"no {name} given: add {flag}, or the key {name!r} to the recipe")
        given = self._given()
        self._refuse_ignored()
        plain = ("model", "base_adapter", "objective", "output", "seed", "reward", "gate", "allow_overlap", "cache")
        return {
            "sample_answers": SAMPLE_ANSWERS if self.sample_answers is None else self.sample_answers,
            **{name: given[name] for name in (*plain, "gate_scorer") if name in given},
            "method": self.make_method(),
            "training": self.training_options(),
            "adapter": self.adapter_options(),
            **self._weighting(),
            **self._rollouts(),
            **self._correction(),
        }

    def complete(self) -> dict[str, Any]:
        """Return a recipe's keys with the values they will have: presets and defaults in full."""
        method = self.make_method()
        learner = inspect.signature(Learner).parameters
        gamma = {} if method.gamma is None else {"gamma": method.gamma}
        training = self.training_options().model_dump()
        ignored, _ = _IGNORED.get(self.objective or "", ((), ""))
        training = {name: value for name, value in training.items() if name not in ignored}
        return {
            **{name: learner[name].default for name in ("objective", "seed")},
            "sample_answers": SAMPLE_ANSWERS,
            **{key: value for key, value in self._given().items() if key != "preset"},
            "method": {"name": method.name, **gamma, **method.settings()},
            "training": training,
            "adapter": self.adapter_options().model_dump(),
            **{name: options.settings(self.objective or "") for name, options in self._weighting().items()},
            **{name: options.model_dump() for name, options in self._rollouts().items()},
            **{name: options.model_dump() for name, options in self._correction().items()},
        }

    def _refuse_ignored(self) -> None:
        ignored, why = _IGNORED.get(self.objective or "", ((), ""))
        for name in ignored:
            if name in self._given("training"):
                raise InputError(f"the objective {self.objective} {why} and would ignore {name}: leave it out")
        weighting = self._given("weighting")
        if weighting and self.objective not in SCORED_OBJECTIVES:
            name = next(iter(weighting))
            raise InputError(f"{name} is for rewards, which only var and snkl learn from: leave it out")
        check_names(self.objective or "", weighting)
        correction = self._given("correction")
        if correction and self.objective != "correction":
            raise InputError(f"{next(iter(correction))} is for the objective correction: leave it out")
        rollouts = self._given("rollouts")
        if rollouts and self.reward is None:
            raise InputError(f"{next(iter(rollouts))} is for answers that are sampled, which need a reward: add reward")

    def _weighting(self) -> dict[str, WeightOptions]:
        scored = self.objective in SCORED_OBJECTIVES
        return {"weighting": WeightOptions(**self._given("weighting"))} if scored else {}

    def _rollouts(self) -> dict[str, RolloutOptions]:
        return {} if self.reward is None else {"rollouts": RolloutOptions(**self._given("rollouts"))}

    def _correction(self) -> dict[str, CorrectionTaskOptions]:
        corrects = self.objective == "correction"
        return {"correction": CorrectionTaskOptions(**self._given("correction"))} if corrects else {}

    def _given(self, section: str | None = None) -> dict[str, Any]:
        values = self.model_dump(exclude_none=True)
        return values if section is None else values.get(section, {})


Location = Sequence[int | str]

_MEANINGS = {
    "string_type": "must be text (in quotes, where it looks like something else)",
    "model_type": "must hold keys and values",
    "list_type": "must be a list",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "missing": "is missing",
}


def _explain(error: ValidationError, name: Callable[[Location], str]) -> str:
    """One sentence on the first problem; an unknown key goes first, because it explains what is missing."""
    problems = error.errors(include_url=False)
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    where, kind, found = first["loc"], first["type"], first["input"]
    if kind == "extra_forbidden":
        inside = f" in {_dotted(where[:-1])}" if len(where) > 1 else ""
        return f"unknown key {str(where[-1])!r}{inside}{_hint(where)}"
    if kind == "value_error":
        return f"{name(where)}: {first['ctx']['error']}"
    meaning = _MEANINGS.get(kind) or first["msg"].replace("Input should be", "must be")
    return f"{name(where)}: {meaning}" + ("" if kind == "missing" else f", found {found!r}")


def _hint(where: Location) -> str:
    key, section = str(where[-1]), str(where[0]) if len(where) > 1 else ""
    levels: Mapping[str, type[_Keys]] = {"": Recipe, **SECTIONS}
    known = list(levels[section].model_fields)
    if near := difflib.get_close_matches(key, known, n=1):
        return f": did you mean {near[0]!r}?"
    if homes := [name for name, level in levels.items() if key in level.model_fields]:
        return f": it belongs under {homes[0]!r}" if homes[0] else ": it belongs outside, beside 'model'"
    return f": known are {', '.join(known)}"


def _dotted(where: Location) -> str:
    if where[0] == "tasks" and len(where) > 1:
        where = (f"task {int(where[1]) + 1}", *where[2:])
    return ".".join(str(part) for part in where)


def _flag(where: Location) -> str:
    if where[0] == "tasks":
        return "--task"
    name = where[0] if where[-1] == "name" else where[-1]
    return f"--{str(name).replace('_', '-')}"


def _section_of(flag: str) -> str:
    return next(section for section in _FLAT if flag in SECTIONS[section].model_fields)


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
