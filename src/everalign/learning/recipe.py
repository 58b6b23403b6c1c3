"""Recipes: every option of `everalign learn`, from a YAML file or from flags. Importing this loads nothing heavy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, create_model, field_validator

from everalign.data.readers import check_columns, parse_columns
from everalign.errors import InputError, system_error
from everalign.learning.options import (
    DEFAULT_METHOD,
    DEFAULT_OBJECTIVE,
    PAPER_ADAPTER,
    AdapterOptions,
    CorrectionTaskOptions,
    MethodOptions,
    RolloutOptions,
    TrainingOptions,
    check_trackers,
)
from everalign.learning.promotion import check_tolerance
from everalign.learning.run_data import RunData, load_run
from everalign.methods.table import ENTRIES, check_method, check_space
from everalign.options import STRICT, Problem, check_model_path, first_problem
from everalign.storage import write_text
from everalign.training.objectives import OBJECTIVES, check_objective, check_weighting, reads, weighting_settings
from everalign.training.options import WeightOptions

if TYPE_CHECKING:
    from everalign.methods import Method


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without two of its surprises."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuses a key that is given twice; PyYAML itself keeps the last one silently."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, (key, (key_node, _)) in enumerate(zip(keys, node.value, strict=True)):
            if key in keys[:index]:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
        return super().construct_mapping(node, deep)


# PyYAML reads YAML 1.1, in which a number in this notation without a point is text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> tuple[dict[str, Any], yaml.Node]:
    """Reads a YAML file that holds one mapping.

    Returns:
        The mapping, and its nodes, which know their lines.

    Raises:
        InputError: the file is missing, is no YAML (names the line), holds something else than a mapping, or gives
            a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value, nodes = yaml.load(text, _Loader), yaml.compose(text, _Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {system_error(error, named=False)}") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise InputError(f"{path}{line}: broken YAML: {error.problem}", where=f"{path}{line}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: broken YAML: {error}") from None
    if not isinstance(value, dict) or nodes is None:
        raise InputError(f"{path}: must hold keys and values, such as `model: tiny`")
    return value, nodes


def line_of(nodes: yaml.Node, where: Location) -> int:
    """Returns the line of the key at a path, or of the innermost part of the path that is there."""
    line = nodes.start_mark.line + 1
    for part in where:
        if isinstance(nodes, yaml.MappingNode):
            found = next(((key, value) for key, value in nodes.value if key.value == str(part)), None)
        else:
            found = (nodes.value[part],) * 2 if isinstance(nodes, yaml.SequenceNode) and isinstance(part, int) else None
        if found is None:
            return line
        line, nodes = found[0].start_mark.line + 1, found[1]
    return line


SAMPLE_ANSWERS = 4
"""Held-out prompts of each task that a run from the command line answers for its report."""

Text = Annotated[str, Field(min_length=1)]
Location = Sequence[int | str]


class Keys(BaseModel):
    """One mapping: no unknown keys, exact types, and None for what is not given."""

    model_config = STRICT


def _keys_of(options: type[BaseModel], **more: Any) -> Any:
    """Returns a model of the same keys and bounds in which nothing has to be given."""
    keys: dict[str, Any] = {name: (kind | None, None) for name, kind in more.items()}
    for name, field in options.model_fields.items():
        kind: Any = field.annotation
        for item in field.metadata:
            kind = Annotated[kind, item]
        keys[name] = (kind | None, Field(default=None, description=field.description))
    return create_model(options.__name__.replace("Options", "Keys"), __base__=Keys, **keys)


def name_alone(value: Any) -> Any:
    """Returns what a recipe says of a method: its name alone stands for a mapping with it."""
    return {"name": value} if isinstance(value, str) else value


def _parsed_columns(value: Any) -> Any:
    """Returns what a recipe says of columns, which a flag says as NAME=COLUMN,..."""
    return parse_columns(value) if isinstance(value, str) else value


Columns = Annotated[dict[Text, Text], BeforeValidator(_parsed_columns), AfterValidator(check_columns)]


class TaskKeys(Keys):
    """One task: its name, unique in the run, its files or Hub names, and their names of columns."""

    name: Text
    train: Text
    test: Text | None = None
    columns: Columns | None = None


MethodKeys = _keys_of(MethodOptions, name=Text)
TrainingKeys = _keys_of(TrainingOptions)
AdapterKeys = _keys_of(AdapterOptions)
WeightKeys = _keys_of(WeightOptions)
RolloutKeys = _keys_of(RolloutOptions)
CorrectionTaskKeys = _keys_of(CorrectionTaskOptions)
SECTIONS: Mapping[str, type[BaseModel]] = {
    "method": MethodKeys,
    "training": TrainingKeys,
    "adapter": AdapterKeys,
    "weighting": WeightKeys,
    "rollouts": RolloutKeys,
    "correction": CorrectionTaskKeys,
    "tasks": TaskKeys,
}
# Their keys are flags of the same names.
_FLAT = ("training", "adapter", "weighting", "rollouts", "correction", "method")


class Recipe(Keys):
    """What was given, by a file or by flags, and what the learner makes of it."""

    model: Text | None = Field(
        default=None,
        description="A Hugging Face folder, a Hub name, a .gguf file, `tiny` or `smollm2`; the recipe's by default.",
    )
    base_adapter: Text | None = Field(
        default=None, title="DIR", description="A PEFT adapter to start from, merged into the model; none by default."
    )
    method: MethodKeys | None = None  # type: ignore[valid-type]
    objective: Text | None = Field(
        default=None,
        description="fpo (default), fpo-normalised, focalpo, dpo, hypo, hypo-ln, dpo+hypo-ln or sft; var for scored "
        "rows; snkl for both; correction for a corrector.",
    )
    output: Text | None = Field(default=None, title="DIR", description="The run directory; the recipe's by default.")
    seed: int | None = Field(default=None, description="Random seed; 0 by default.")
    preset: Text | None = Field(default=None, description="default, or paper (LifeAlign's scripts).")
    tasks: Annotated[list[TaskKeys], Field(min_length=1)] | None = None
    columns: Columns | None = None
    chat_prompts: bool | None = Field(
        default=None,
        description="Read a prompt that is text as a user's message, for models with a chat template.\n"
        "Otherwise a text is continued as it is.",
    )
    label: Text | None = Field(
        default=None,
        title="COLUMN",
        description="Column of the rows' labels (experts); a task of several labels is learned as one task each.\n"
        "Without it a task's name is its label.",
    )
    training: TrainingKeys | None = None  # type: ignore[valid-type]
    adapter: AdapterKeys | None = None  # type: ignore[valid-type]
    weighting: WeightKeys | None = None  # type: ignore[valid-type]
    reward: Text | None = Field(
        default=None,
        title="DIR|MODULE:FUNCTION|URL#MODEL",
        description="Scorer of answers without rewards, and of answers sampled for prompts.",
    )
    rollouts: RolloutKeys | None = None  # type: ignore[valid-type]
    correction: CorrectionTaskKeys | None = None  # type: ignore[valid-type]
    gate: float | None = Field(
        default=None,
        description="Promote a task only if its held-out rows show that no accuracy fell by more than this share.\n"
        "Exit code 3 where one did, 4 where they do not suffice to tell.",
    )
    gate_scorer: Text | None = Field(
        default=None,
        title="DIR|MODULE:FUNCTION|URL#MODEL",
        description="Scorer that the gate also asks about the corrections of a corrector.",
    )
    cache: Text | None = Field(
        default=None,
        title="DIR",
        description="Reference log-probabilities, which runs may share; in the run by default.",
    )
    allow_overlap: bool | None = Field(
        default=None, description="Allow rows to be in both the training and the test set."
    )
    sample_answers: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Held-out prompts of a task that the policy answers for the report; 4 by default."
    )
    log_to: Text | None = Field(
        default=None,
        title="TRACKER,...",
        description="Experiment trackers to log to as well: tensorboard, wandb, trackio, mlflow.",
    )
    skip_bad_rows: bool | None = Field(default=None, description="Skip bad rows and report them.")
    report: bool | None = Field(default=None, description="Write DIR/report.html at the end; on by default.")

    _name_alone = field_validator("method", mode="before")(name_alone)

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: list[TaskKeys] | None) -> list[TaskKeys] | None:
        names = [task.name for task in tasks or []]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"the name {repeated!r} is given twice; every task needs its own")
        return tasks

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Reads a YAML file; an InputError names the file, the line and the key."""
        value, nodes = read_yaml(path)
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            problem = first_problem(cls, error)
            place = f"{path}:{line_of(nodes, problem.where)}"
            key = str(problem.where[-1])
            # YAML takes `no`, 2024 and 1e-3 for other things than text.
            quotes = "; put it in quotes" if " must be text" in problem.what else ""
            what = _in_words(problem, _dotted(problem.where))
            raise InputError(f"{place}: {what}{quotes}", where=place, field=key) from None

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> Recipe:
        """Makes a recipe of flags, by their names with underscores; an InputError names the flag.

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
                section = next(section for section in _FLAT if name in SECTIONS[section].model_fields)
                nested[section][name] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            problem = first_problem(cls, error)
            first, last = problem.where[0], str(problem.where[-1])
            name = "task" if first == "tasks" else str(first) if last == "name" else last
            flag = f"--{name.replace('_', '-')}"
            raise InputError(_in_words(problem, flag), field=flag) from None

    def over(self, other: Recipe) -> Recipe:
        """Returns both together; where both give a value, this one's counts. Tasks are replaced as a whole."""
        mine, theirs = self._given(), other._given()
        for section in _FLAT:
            mine[section] = {**theirs.get(section, {}), **mine.get(section, {})}
        return Recipe.model_validate({**theirs, **mine})

    def training_options(self) -> TrainingOptions:
        """Returns the preset's training options with the given ones in their place."""
        given = self._given("training")
        if not reads(self.objective, "sft_epochs"):
            # A preset's supervised stage stands before a preference stage, and these have none.
            given = {"sft_epochs": 0.0, **given}
        return TrainingOptions.preset(self.preset or "default", **given)

    def adapter_options(self) -> AdapterOptions:
        """Returns the preset's adapter options with the given ones in their place."""
        return (PAPER_ADAPTER if self.preset == "paper" else AdapterOptions()).replace(**self._given("adapter"))

    def _method_arguments(self) -> dict[str, Any]:
        given = {"name": DEFAULT_METHOD, **self._given("method")}
        if self.preset == "paper" and given["name"] == DEFAULT_METHOD:
            given = {"space": "factors", **given}
        return given

    @property
    def labelled(self) -> bool:
        """Whether the method keeps a policy for each label; a method in a file is loaded for it."""
        entry = ENTRIES.get(self._method_arguments()["name"])
        return self.make_method().labelled if entry is None else entry.labelled

    @property
    def trackers(self) -> list[str]:
        """The experiment trackers that are told of the training."""
        return [name.strip() for name in (self.log_to or "").split(",") if name.strip()]

    def make_method(self) -> Method:
        """Builds the method, which loads torch; an argument that it would ignore is refused."""
        from everalign.methods import make_method

        return make_method(**self._method_arguments())

    def check(self, needs_tasks: bool = True) -> None:
        """Finds what can be found wrong before anything heavy is loaded; `learner_arguments` finds the rest.

        Args:
            needs_tasks: whether tasks have to be given.

        Raises:
            InputError: model, output or tasks are not given, an option has a value it cannot have, or would be ignored.
        """
        for name, flag in (("model", "--model"), ("output", "--output"), ("tasks", "--task")):
            if getattr(self, name) is None and (needs_tasks or name != "tasks"):
                raise InputError(f"no {name} given: add {flag}, or the key {name!r} to the recipe", field=name)
        check_objective(self.objective or DEFAULT_OBJECTIVE)
        self._refuse_ignored()
        given = self._method_arguments()
        name = given.pop("name")
        method = check_method(name, given)
        if method is not None and "space" in method.takes:
            check_space(given.get("space", "none"), given)
        check_tolerance(self.gate, name, "sequential" if method is None else method.regime)
        if self.label is not None and not self.labelled:
            raise InputError(
                f"the method {name} would ignore label: leave it out, or choose experts, which learns an "
                "adapter for each label",
                field="label",
            )
        self.training_options()
        self.adapter_options()
        self._sections_of_objective()
        check_trackers(self.trackers)
        check_model_path(self.model or "")

    def learner_arguments(self, needs_tasks: bool = True) -> dict[str, Any]:
        """Returns keyword arguments of `Learner`; what is not given is left to its defaults. Errors as in `check`."""
        self.check(needs_tasks)
        method, training = self.make_method(), self.training_options()
        method.check_fits(self.objective or DEFAULT_OBJECTIVE, training.reference, bool(self._given("adapter")))
        given, log_to = self._given(), self.trackers
        plain = ("model", "base_adapter", "objective", "output", "seed", "reward", "gate", "gate_scorer", "cache")
        return {
            "sample_answers": SAMPLE_ANSWERS if self.sample_answers is None else self.sample_answers,
            **{name: given[name] for name in (*plain, "allow_overlap") if name in given},
            **({"log_to": log_to} if log_to else {}),
            "method": method,
            "training": training,
            "adapter": None if method.prompts is not None else self.adapter_options(),
            **self._sections_of_objective(),
        }

    def complete(self) -> dict[str, Any]:
        """Returns a recipe's keys with the values they will have: presets and defaults in full."""
        method = self.make_method()
        gamma = {} if method.gamma is None else {"gamma": method.gamma}
        sections = {
            name: weighting_settings(self.objective, options) if isinstance(options, WeightOptions) else dict(options)
            for name, options in self._sections_of_objective().items()
        }
        training = self.training_options().resolved(self.objective or DEFAULT_OBJECTIVE, method.reference)
        whole = {
            "objective": DEFAULT_OBJECTIVE,
            "seed": 0,
            "sample_answers": SAMPLE_ANSWERS,
            **{key: value for key, value in self._given().items() if key != "preset"},
            "method": {"name": method.name, **gamma, **method.settings()},
            "training": {name: value for name, value in training if name not in self._ignored()},
            "adapter": None if method.prompts is not None else dict(self.adapter_options()),
            **sections,
        }
        return {key: value for key, value in whole.items() if value is not None}

    def _sections_of_objective(self) -> dict[str, WeightOptions | RolloutOptions | CorrectionTaskOptions]:
        """Returns the options of those sections that the objective, or a scorer of answers, looks at."""
        found: dict[str, Any] = {}
        if reads(self.objective, "weighting"):
            found["weighting"] = WeightOptions(**self._given("weighting"))
        if self.reward is not None:
            found["rollouts"] = RolloutOptions(**self._given("rollouts"))
        if reads(self.objective, "correction"):
            found["correction"] = CorrectionTaskOptions(**self._given("correction"))
        return found

    def _refuse_ignored(self) -> None:
        training, weighting, correction, rollouts = map(
            self._given, ("training", "weighting", "correction", "rollouts")
        )
        for name in self._ignored():
            if name in training:
                why = OBJECTIVES[str(self.objective)].why
                raise InputError(f"the objective {self.objective} {why} and would ignore {name}: leave it out")
        check_weighting(self.objective, weighting)
        if correction and not reads(self.objective, "correction"):
            raise InputError(f"{next(iter(correction))} is for the objective correction: leave it out")
        if rollouts and self.reward is None:
            raise InputError(f"{next(iter(rollouts))} is for answers that are sampled, which need a reward: add reward")

    def _ignored(self) -> list[str]:
        """Returns the training options of a margin that the objective does not read."""
        return [name for name in ("reference", "beta") if not reads(self.objective, name)]

    def _given(self, section: str | None = None) -> dict[str, Any]:
        values = self.model_dump(exclude_none=True)
        return values if section is None else values.get(section, {})


def _in_words(problem: Problem, name: str) -> str:
    """One sentence on a problem with what is called `name`."""
    where = problem.where
    if not problem.unknown:
        return f"{name}{problem.what}"
    key, section = str(where[-1]), str(where[0]) if len(where) > 1 else ""
    levels: Mapping[str, type[BaseModel]] = {"": Recipe, **SECTIONS}
    known = list(levels[section].model_fields)
    homes = [name for name, level in levels.items() if key in level.model_fields]
    if near := difflib.get_close_matches(key, known, n=1):
        hint = f"did you mean {near[0]!r}?"
    elif homes:
        hint = f"it belongs under {homes[0]!r}" if homes[0] else "it belongs outside, beside 'model'"
    else:
        hint = f"known are {', '.join(known)}"
    return f"unknown key {key!r}{f' in {_dotted(where[:-1])}' if section else ''}: {hint}"


def _dotted(where: Location) -> str:
    if where[0] == "tasks" and len(where) > 1:
        where = (f"task {int(where[1]) + 1}", *where[2:])
    return ".".join(str(part) for part in where)


_FILE = "recipe.yaml"


def write_recipe(run: Path, recipe: Recipe) -> None:
    """Writes a run's recipe with the tasks of earlier ones, whose paths hold in any working directory."""
    path = run / _FILE
    tasks = {task.name: task for task in (Recipe.read(path).tasks or [] if path.exists() else [])}
    for task in recipe.tasks or []:
        # Files are named from the root; names on the Hub stay.
        files = {name: file for name in ("train", "test") if (file := getattr(task, name)) and Path(file).exists()}
        changes: dict[str, Any] = {name: str(Path(file).resolve()) for name, file in files.items()}
        # A later task may come from files with other columns.
        changes["columns"] = task.columns or recipe.columns
        tasks[task.name] = task.model_copy(update=changes)
    kept = recipe.model_dump(exclude_none=True, exclude={"tasks", "output", "columns"})
    kept = {name: value for name, value in kept.items() if value != {}}
    if tasks:
        kept["tasks"] = [task.model_dump(exclude_none=True) for task in tasks.values()]
    write_text(path, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))


def is_begun(recipe: Recipe) -> bool:
    """Whether a run was begun in a recipe's output."""
    return recipe.output is not None and (Path(recipe.output) / "run.json").exists()


def completed(recipe: Recipe) -> Recipe:
    """Fills a recipe in with what the run in its output was started with.

    Without tasks of its own it gets those that the run was given and has not finished.
    """
    if not is_begun(recipe):
        return recipe
    path = Path(recipe.output or "")
    run = load_run(path)
    known = Recipe.read(path / _FILE) if (path / _FILE).exists() else _from_facts(run)
    whole = recipe.over(known)
    # What was left at a default stays at the default that the run was begun with.
    if whole._given("method").get("name", DEFAULT_METHOD) == run.facts.method.name:
        whole = whole.over(Recipe(method=_method_settings(run)))
    temperature = run.facts.settings.get("temperature")
    if temperature is not None and reads(whole.objective, "temperature"):
        whole = whole.over(Recipe.model_validate({"weighting": {"temperature": temperature}}))
    if recipe.tasks is not None:
        return whole
    done = {version.task for version in run.all_versions}
    left = [task for task in known.tasks or [] if task.name not in done]
    return whole.model_copy(update={"tasks": None if run.regime == "joint" and done else left or None})


def nothing_left(recipe: Recipe) -> InputError:
    """Returns the error that a run to continue has no task left."""
    return InputError(
        f"{recipe.output}: every task that it was given is learned, or was not promoted: name the next with --task, or "
        "feedback with --from-feedback"
    )


def _from_facts(run: RunData) -> Recipe:
    """The recipe of a run that Python code has begun; a scorer is not on record by name."""
    facts = run.facts
    given: dict[str, Any] = {"model": facts.model, "objective": facts.objective, "seed": facts.seed}
    if run.base_adapter is not None:
        given["base_adapter"] = run.base_adapter
    gates = [version.manifest.gate for version in run.all_versions]
    if gates and gates[-1] is not None:
        given["gate"] = gates[-1].tolerance
    settings = {name: value for name, value in facts.settings.items() if value not in (None, "")}
    for section in ("training", "adapter", "weighting", "correction"):
        keys = {name: settings[name] for name in SECTIONS[section].model_fields if name in settings}
        if keys and (section != "correction" or reads(facts.objective, "correction")):
            given[section] = keys
    given["method"] = _method_settings(run)
    return Recipe.model_validate(given)


def _method_settings(run: RunData) -> dict[str, Any]:
    """Returns the method's name and arguments, as a recipe has them."""
    known, method = SECTIONS["method"].model_fields, run.facts.method
    # `fpo` has an exponent of its own, also where the method has none.
    drop = () if method.name == DEFAULT_METHOD else ("gamma",)
    return {n: v for n, v in method.model_dump().items() if n in known and n not in drop and v is not None}
