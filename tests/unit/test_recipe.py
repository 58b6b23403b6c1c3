"""Recipes: what a YAML file may hold, what its mistakes are called, and what comes of it and of flags."""

import inspect
from pathlib import Path
from typing import get_args

import pytest

from everalign.cli.learn import learn as learn_verb
from everalign.cli.serve import serve
from everalign.errors import InputError
from everalign.learning.options import (
    PAPER_ADAPTER,
    AdapterOptions,
    CorrectionTaskOptions,
    RolloutOptions,
    TrainingOptions,
)
from everalign.learning.recipe import Recipe
from everalign.learning.task_files import load_tasks
from everalign.methods import METHODS
from everalign.objectives import Estimator
from everalign.options import declared
from everalign.training.objectives import OBJECTIVES
from everalign.training.options import WeightOptions

FULL = """
model: tiny
method: {name: lifealign, gamma: 3, energy: 0.8, space: factors}
objective: fpo
output: runs/a
seed: 4
preset: paper
cache: cache
allow_overlap: true
tasks:
  - {name: harmless, train: "a,b.jsonl", test: c.jsonl}
  - {name: "2024", train: d.jsonl}
training: {learning_rate: 1e-4, epochs: 2, reference: base}
adapter: {rank: 16}
"""


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return Recipe.read(path)

    return read


def test_a_full_recipe(read):
    recipe = read(FULL)
    arguments = recipe.learner_arguments()
    method = arguments.pop("method")
    assert arguments == {
        "model": "tiny",
        "objective": "fpo",
        "output": "runs/a",
        "seed": 4,
        "cache": "cache",
        "allow_overlap": True,
        "sample_answers": 4,
        "training": TrainingOptions.preset("paper", learning_rate=1e-4, epochs=2.0, reference="base"),
        "adapter": AdapterOptions(rank=16, alpha=PAPER_ADAPTER.alpha, targets=PAPER_ADAPTER.targets),
    }
    assert (method.name, method.gamma, method.energy, method.keep, method.space) == (
        "lifealign",
        3,
        0.8,
        0.5,
        "factors",
    )
    assert [(task.name, task.train, task.test) for task in recipe.tasks] == [
        ("harmless", "a,b.jsonl", "c.jsonl"),
        ("2024", "d.jsonl", None),
    ]


def test_what_is_not_given_is_left_to_the_learner(read):
    recipe = read("{model: tiny, output: x, tasks: [{name: a, train: b}]}")
    arguments = recipe.learner_arguments()
    assert arguments.keys() == {"model", "output", "method", "training", "adapter", "sample_answers"}
    assert arguments["training"] == TrainingOptions()
    assert arguments["adapter"] == AdapterOptions()
    assert arguments["method"].settings() == METHODS["lifealign"]().settings()


def test_the_papers_preset_consolidates_factors_unless_another_space_is_named(read):
    assert read("preset: paper").make_method().settings()["space"] == "factors"
    assert read("{preset: paper, method: {space: product}}").make_method().settings()["space"] == "product"
    assert read("{preset: paper, method: er}").make_method().settings() == METHODS["er"]().settings()
    assert read("preset: default").make_method().settings()["space"] == "none"


def test_a_method_may_be_its_name_alone(read):
    assert read("method: er").make_method().name == "er"
    assert read("method: {replay: 0.5}").make_method().settings()["replay"] == 0.5


@pytest.mark.parametrize(
    ("number", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("2e5", 2e5), ("1.5e-3", 1.5e-3), ("3", 3.0), ("0.1", 0.1)]
)
def test_numbers_mean_what_they_look_like(number, value, read):
    assert read(f"training: {{learning_rate: {number}}}").training.learning_rate == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("modell: x", "unknown key 'modell': did you mean 'model'?"),
        ("training: {lerning_rate: 1}", "unknown key 'lerning_rate' in training: did you mean 'learning_rate'?"),
        ("tasks: [{name: a, train: b}, {name: b, tran: x}]", "unknown key 'tran' in task 2: did you mean 'train'?"),
        ("method: {name: er, replaay: 1}", "unknown key 'replaay' in method: did you mean 'replay'?"),
        ("learning_rate: 1e-4", "unknown key 'learning_rate': it belongs under 'training'"),
        ("energy: 0.5", "unknown key 'energy': it belongs under 'method'"),
        ("training: {objective: fpo}", "unknown key 'objective' in training: it belongs outside, beside 'model'"),
        ("adapter: {zzz: 1}", "unknown key 'zzz' in adapter: known are rank, alpha, targets"),
        ("training: {learning_rate: fast}", "training.learning_rate must be a number above 0, found 'fast'"),
        ("training: {learning_rate: '1e-4'}", "training.learning_rate must be a number above 0, found '1e-4'"),
        ("training: {epochs: .nan}", "training.epochs must be a number above 0, found nan"),
        ("training: {batch_size: 2.5}", "training.batch_size must be a whole number of at least 1, found 2.5"),
        ("training: {batch_size: true}", "training.batch_size must be a whole number of at least 1, found True"),
        ("training: {precision: fp16}", "training.precision must be one of auto, fp32, bf16, found 'fp16'"),
        ("training: 3", "training must be keys and values, found 3"),
        ("method: {name: er, space: x}", "method.space must be one of none, product, factors, found 'x'"),
        ("seed: one", "seed must be a whole number, found 'one'"),
        ("allow_overlap: 1", "allow_overlap must be true or false, found 1"),
        ("model: ''", "model must be text that is not empty, found ''"),
        ("model: 7", "model must be text that is not empty, found 7; put it in quotes"),
        ("tasks: [{name: no, train: x}]", "task 1.name must be text"),
        ("tasks: [{name: a}]", "task 1.train is missing"),
        ("tasks: a=b", "tasks must be a list that is not empty, found 'a=b'"),
        ("tasks: []", "tasks must be a list that is not empty"),
        ("tasks: [{name: a, train: b}, {name: a, train: c}]", "tasks: the name 'a' is given twice"),
        ("1: x", "1: Keys should be strings"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_key(text, problem, read, tmp_path):
    with pytest.raises(InputError) as caught:
        read(text)
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.yaml'}:1: {problem}")
    assert caught.value.where == f"{tmp_path / 'recipe.yaml'}:1"


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("model: tiny\ntraining:\n  epochs: 1\n  lerning_rate: 1\n", 4, "lerning_rate"),
        ("model: tiny\ntraining:\n  epochs: 1\n  batch_size: 0\n", 4, "batch_size"),
        ("tasks:\n- {name: a, train: b}\n- name: b\n  train: 3\n", 4, "train"),
        ("tasks:\n- {name: a, train: b}\n- name: b\n", 3, "train"),
    ],
)
def test_a_mistake_is_found_at_its_line(read, tmp_path, text, line, field):
    with pytest.raises(InputError) as caught:
        read(text)
    assert (caught.value.where, caught.value.field) == (f"{tmp_path / 'recipe.yaml'}:{line}", field)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"seed: 1\nmodel: a\nseed: 2\n", ":3: broken YAML: key 'seed' is given twice"),
        (b"training:\n  beta: 1\n  beta: 2\n", ":3: broken YAML: key 'beta' is given twice"),
        (b"model: [\n", ":2: broken YAML"),
        (b"- a\n", ": must hold keys and values"),
        (b"", ": must hold keys and values"),
        (b"model: \xff\n", ": not a UTF-8 text file"),
        (b"model: \x07\n", ": broken YAML"),
        (b"? {a: b}\n: c\n", ":1: broken YAML"),
        (b"model: !!python/object:os.system x\n", ":1: broken YAML"),
    ],
)
def test_what_is_no_recipe_at_all(content, problem, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        Recipe.read(path)
    assert str(caught.value).startswith(f"{path}{problem}")


@pytest.mark.parametrize(("name", "problem"), [("no.yaml", "no such file"), (".", "cannot be read: is a directory")])
def test_a_recipe_that_is_not_there_or_a_folder(name, problem, tmp_path):
    with pytest.raises(InputError, match=problem):
        Recipe.read(tmp_path / name)


def test_values_over_values(read):
    file = read(FULL)
    flags = Recipe.from_flags({"method": None, "keep": 0.1, "epochs": 5.0, "learning_rate": None, "seed": 9})
    both = flags.over(file)
    assert both.seed == 9
    assert both.training_options().epochs == 5.0
    assert both.training_options().learning_rate == 1e-4
    assert both.training_options().max_length == TrainingOptions.preset("paper").max_length
    assert (both.make_method().keep, both.make_method().energy) == (0.1, 0.8)
    assert both.tasks == file.tasks
    assert both.model == "tiny"


def test_a_given_false_or_zero_counts(read):
    flags = Recipe.from_flags({"allow_overlap": False, "seed": 0, "sft_epochs": 0.0})
    both = flags.over(read("{allow_overlap: true, seed: 3, training: {sft_epochs: 2}}"))
    assert (both.allow_overlap, both.seed, both.training_options().sft_epochs) == (False, 0, 0.0)


def test_a_wrong_flag_is_named_as_a_flag():
    for flags, problem in (
        ({"learning_rate": float("nan")}, "--learning-rate must be a number above 0"),
        ({"gamma": -1.0}, "--gamma must be a number of at least 0, found -1.0"),
        ({"temperature": 0.0}, "--temperature must be a number above 0, found 0.0"),
        ({"tasks": [{"name": "a", "train": "b"}] * 2}, "--task: the name 'a' is given twice"),
        ({"method": ""}, "--method must be text that is not empty"),
    ):
        with pytest.raises(InputError, match=problem):
            Recipe.from_flags(flags)


OPTIONS = (TrainingOptions, AdapterOptions, WeightOptions, CorrectionTaskOptions, RolloutOptions)
# Flags that say how one command behaves; every other one is a recipe's key.
OF_THE_COMMAND = {
    *("context", "processes", "fsdp", "recipe", "resume", "as_json", "print_recipe", "trust_remote_code"),
    *("from_feedback", "minimum", "key_share", "agreement", "held_out"),
}


def test_flags_are_the_keys_of_a_recipe_and_nothing_is_left_out():
    flags = set(inspect.signature(learn_verb).parameters) - OF_THE_COMMAND
    arguments = {name for method in METHODS.values() for name in inspect.signature(method).parameters}
    options = {name for kind in OPTIONS for name in kind.model_fields}
    keys = set(Recipe.model_fields) - {"tasks", "training", "adapter", "weighting", "rollouts", "correction"} | {"task"}
    assert flags == keys | arguments | options
    assert len(keys) + len(arguments) + len(options) == len(flags)  # no name means two things


def test_a_flag_that_is_not_given_leaves_no_trace():
    parameters = inspect.signature(learn_verb).parameters
    given = {name: parameter.default for name, parameter in parameters.items()}
    assert all(
        given[name] is None
        for name in given
        if name not in ("context", "fsdp", "resume", "as_json", "print_recipe", "trust_remote_code")
    )


def test_help_names_every_choice():
    def text(flag: str) -> str:
        about = inspect.signature(learn_verb).parameters[flag].annotation.__metadata__[0]
        return f"{about.help} {about.metavar}"

    assert all(name in text("method") for name in METHODS)
    assert all(name in text("objective") for name in OBJECTIVES)
    assert all(name in text("estimator") for name in get_args(Estimator))
    for flag in ("reference", "precision", "attention", "scheduler"):
        assert all(name in text(flag) for name in get_args(declared(TrainingOptions.model_fields[flag]).type))


def test_help_tells_the_defaults():
    parameters = inspect.signature(learn_verb).parameters
    assert "none by default" in inspect.signature(serve).parameters["root_path"].annotation.__metadata__[0].help
    assert "; 16 by default" in parameters["batch_size"].annotation.__metadata__[0].help
    assert "; 0.0001 by default" in parameters["learning_rate"].annotation.__metadata__[0].help


def test_all_files_are_read_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "chosen": "x", "rejected": "y"}}\n')
    tasks = [{"name": "one", "train": "a.jsonl", "test": "b.jsonl"}, {"name": "two", "train": "b.jsonl"}]
    with pytest.raises(InputError, match="rows are in both"):
        load_tasks(Recipe.from_flags({"tasks": tasks}))
    loaded = load_tasks(Recipe.from_flags({"tasks": tasks, "allow_overlap": True}))
    assert [(name, train.source, test and test.source) for name, train, test in loaded] == [
        ("one", "a.jsonl", "b.jsonl"),
        ("two", "b.jsonl", None),
    ]
