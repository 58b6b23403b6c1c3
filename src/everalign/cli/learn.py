"""The verb `learn`: tasks in, a run directory out. Its flags are the keys of a recipe (`everalign.learning.recipe`)."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.display import Display
from everalign.cli.output import show, show_json, show_line, show_yaml
from everalign.cli.verbs import resumable, warn_of_bad_rows
from everalign.errors import InputError

if TYPE_CHECKING:
    from everalign.data.row_set import RowSet
    from everalign.learning.recipe import Recipe
    from everalign.learning.run_data import RunData

# These say how this one command behaves; every other flag is a recipe's key.
_NOT_IN_A_RECIPE = ("recipe", "resume", "as_json", "print_recipe")


def _flag(text: str, panel: str | None = None, metavar: str | None = None, name: str | None = None) -> Any:
    """A flag with its help; without `name` it is called as its parameter. No metavar where it takes no value: ""."""
    names = [] if name is None else [name]
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


_ROLLOUTS = "Sampled answers (given --reward)"
_DATA, _METHOD, _TRAINING, _STEPS = "Data and files", "Method", "Training", "Optimiser and steps"
_REWARDS = "Rewards (objectives var, snkl)"
_CORRECTORS = "Correctors (objective correction)"
_ESTIMATORS = "Normaliser of var: group, group_loo, in_batch, reference, quantile or support."


def learn(
    context: typer.Context,
    model: Annotated[str | None, _flag("A Hugging Face folder, a Hub name, or `tiny`.")] = None,
    task: Annotated[
        list[str] | None,
        _flag("A task's name and files; one --task for each task, in order.", metavar="NAME=TRAIN[,TEST]"),
    ] = None,
    method: Annotated[str | None, _flag("lifealign, er, seqft, mtl or stl.")] = None,
    objective: Annotated[str | None, _flag("fpo, dpo or sft; var for scored rows; snkl for both; correction.")] = None,
    output: Annotated[str | None, _flag("The run directory.", metavar="DIR")] = None,
    seed: Annotated[int | None, _flag("Seeds everything random.")] = None,
    resume: Annotated[bool, _flag("Go on with the run that DIR holds.", None, "", "--resume")] = False,
    recipe: Annotated[str | None, _flag("Read settings from a file; flags win.", metavar="FILE.yaml")] = None,
    preset: Annotated[str | None, _flag("default, or paper (LifeAlign's scripts).")] = None,
    print_recipe: Annotated[
        bool, _flag("Print all settings as a recipe, and exit.", None, "", "--print-recipe")
    ] = False,
    as_json: Annotated[bool, _flag("Print the result as one JSON object.", None, "", "--json")] = False,
    skip_bad_rows: Annotated[bool | None, _flag("Leave bad rows out, and say so.", _DATA, "")] = None,
    allow_overlap: Annotated[bool | None, _flag("Let rows be in training and test sets.", _DATA, "")] = None,
    cache: Annotated[
        str | None, _flag("Encoded rows and reference log-probabilities; runs may share it.", _DATA, "DIR")
    ] = None,
    report: Annotated[bool | None, _flag("Write DIR/report.html at the end; on unless refused.", _DATA, "")] = None,
    gamma: Annotated[float | None, _flag("Focusing exponent of fpo (lifealign).", _METHOD)] = None,
    energy: Annotated[float | None, _flag("Share of an update's energy to keep (lifealign).", _METHOD)] = None,
    keep: Annotated[float | None, _flag("Share of what overlaps earlier tasks to keep (lifealign).", _METHOD)] = None,
    space: Annotated[str | None, _flag("Consolidate in product or factors space (lifealign).", _METHOD)] = None,
    rank_cap: Annotated[int | None, _flag("Highest rank of the long-term memory (lifealign).", _METHOD)] = None,
    replay: Annotated[float | None, _flag("Share of a task's rows to replay later (lifealign, er).", _METHOD)] = None,
    capacity: Annotated[int | None, _flag("Most rows kept for replay (lifealign, er).", _METHOD)] = None,
    reference: Annotated[str | None, _flag("base, stage_start or previous_task.", _TRAINING)] = None,
    learning_rate: Annotated[float | None, _flag("Peak, in the preference stage.", _TRAINING)] = None,
    epochs: Annotated[float | None, _flag("Passes over the rows; fractions allowed.", _TRAINING)] = None,
    sft_epochs: Annotated[float | None, _flag("Supervised passes before that; 0 for none.", _TRAINING)] = None,
    sft_learning_rate: Annotated[float | None, _flag("Peak, in the supervised stage.", _TRAINING)] = None,
    beta: Annotated[float | None, _flag("Inverse temperature of the implicit reward.", _TRAINING)] = None,
    max_length: Annotated[int | None, _flag("Longest prompt plus response, in tokens.", _TRAINING)] = None,
    rank: Annotated[int | None, _flag("Rank of a task's LoRA adapter.", _TRAINING)] = None,
    alpha: Annotated[float | None, _flag("LoRA's α: an update is (α/rank)·B·A.", _TRAINING)] = None,
    targets: Annotated[str | None, _flag("Modules to adapt, with commas, or all-linear.", _TRAINING)] = None,
    estimator: Annotated[str | None, _flag(_ESTIMATORS, _REWARDS)] = None,
    temperature: Annotated[float | None, _flag("Reward that is worth one nat.", _REWARDS)] = None,
    target_ess: Annotated[float | None, _flag("Find the temperature for this effective share.", _REWARDS)] = None,
    scale_rewards: Annotated[bool | None, _flag("Divide rewards by their deviation; on.", _REWARDS, "")] = None,
    weight_cap: Annotated[float | None, _flag("Largest weight (var); 0 for none.", _REWARDS)] = None,
    length_normalize: Annotated[
        bool | None, _flag("Log-probabilities per token (estimator support).", _REWARDS, "")
    ] = None,
    weight_floor: Annotated[float | None, _flag("Completions that weigh less are left out.", _REWARDS)] = None,
    drop_constant: Annotated[bool | None, _flag("Leave out prompts whose rewards are all one.", _REWARDS, "")] = None,
    reward: Annotated[
        str | None,
        _flag("Score answers that have no rewards, and sample answers to prompts.", _REWARDS, "DIR|MODULE:F|URL#MODEL"),
    ] = None,
    samples: Annotated[int | None, _flag("Answers sampled to each prompt.", _ROLLOUTS)] = None,
    sampling_temperature: Annotated[float | None, _flag("What logits are divided by; 1.", _ROLLOUTS)] = None,
    max_new_tokens: Annotated[int | None, _flag("Longest answer, in tokens.", _ROLLOUTS)] = None,
    rounds: Annotated[int | None, _flag("Sample anew so often, from what was learned.", _ROLLOUTS)] = None,
    template: Annotated[str | None, _flag("What the corrector reads: everalign-1, ...", _CORRECTORS, "ID")] = None,
    objectives: Annotated[
        str | None, _flag('What answers should be more of: "helpful,harmless".', _CORRECTORS, "WORDS")
    ] = None,
    identity: Annotated[float | None, _flag("Share of rows that leave a good answer as it is.", _CORRECTORS)] = None,
    batch_size: Annotated[int | None, _flag("Pairs of an optimiser step.", _STEPS)] = None,
    tokens_per_batch: Annotated[int | None, _flag("Tokens computed at once; fewer save memory.", _STEPS)] = None,
    precision: Annotated[str | None, _flag("fp32 or bf16, for the base model.", _STEPS)] = None,
    attention: Annotated[str | None, _flag("sdpa, or flex on a GPU.", _STEPS)] = None,
    warmup: Annotated[float | None, _flag("Share of the steps in which the rate rises.", _STEPS)] = None,
    scheduler: Annotated[str | None, _flag("cosine, linear or constant_with_warmup.", _STEPS)] = None,
    max_grad_norm: Annotated[float | None, _flag("Gradient clipping; 0 for none.", _STEPS)] = None,
    logging_steps: Annotated[int | None, _flag("Steps between points of the training curve.", _STEPS)] = None,
    checkpoint_steps: Annotated[int | None, _flag("Steps between checkpoints; 0 for none.", _STEPS)] = None,
    test_limit: Annotated[int | None, _flag("Most held-out pairs scored of a task; 0 for all.", _STEPS)] = None,
) -> None:
    """Teach a model task after task, and keep what it learned before."""
    with resumable("the same command with --resume"):
        _print_recipe(context.params) if print_recipe else _learn(context.params)


def parse_task(text: str) -> dict[str, str]:
    """Split NAME=TRAIN[,TEST] into a recipe's task."""
    name, _, files = text.partition("=")
    paths = files.split(",")
    if not name.strip() or not all(path.strip() for path in paths) or len(paths) > 2:
        comma = "; a file with a comma in its name goes into a recipe" if len(paths) > 2 else ""
        raise InputError(f"--task {text}: must be NAME=TRAIN or NAME=TRAIN,TEST{comma}")
    return {"name": name, **dict(zip(("train", "test"), paths, strict=False))}


def _recipe(flags: dict[str, Any]) -> "Recipe":
    """Flags over the recipe file, if there is one."""
    keys = {name: value for name, value in flags.items() if name not in _NOT_IN_A_RECIPE}
    tasks = [parse_task(text) for text in keys.pop("task") or []]

    from everalign.learning.recipe import Recipe

    given = Recipe.from_flags({**keys, "tasks": tasks or None})
    return given if flags["recipe"] is None else given.over(Recipe.read(Path(flags["recipe"])))


def _print_recipe(flags: dict[str, Any]) -> None:
    show_yaml(_recipe(flags).complete())


def _learn(flags: dict[str, Any]) -> None:
    started = time.perf_counter()
    with Display() as display:
        recipe = _recipe(flags)
        run = _run(recipe, flags["resume"], display)
        report = None if recipe.report is False else _write_report(run.path)
    seconds = time.perf_counter() - started
    (_show_json if flags["as_json"] else _show)(run, report, seconds)


def _run(recipe: "Recipe", resume: bool, display: Display) -> "RunData":
    from everalign.learning.learner import Learner
    from everalign.learning.task_files import load_tasks

    arguments = recipe.learner_arguments()
    tasks = load_tasks(recipe)
    display.announce("data")
    for name, train, test in tasks:
        _announce_data(name, train, test, display)
    learner = Learner(**arguments, resume=resume, announce=display.announce, progress=display.progress)
    learner.learn_all(tasks)
    return learner.run


def _announce_data(name: str, train: "RowSet[Any]", test: "RowSet[Any] | None", display: Display) -> None:
    held_out = "no held-out rows, so it is not scored" if test is None else f"{len(test)} held out"
    display.announce(f"  {name}: {len(train)} rows to learn, {held_out}")
    for rows in (train, test):
        if rows is not None:
            warn_of_bad_rows(rows)


def _write_report(run: Path) -> Path:
    from everalign.reporting import write_report

    return write_report([run], run / "report.html")


def _show_json(run: "RunData", report: Path | None, seconds: float) -> None:
    from everalign.cli import results

    facts = {"output": str(run.path), "report": None if report is None else str(report), "seconds": round(seconds, 3)}
    show_json({**results.scores(run), "versions": results.versions(run), **facts})


def _show(run: "RunData", report: Path | None, seconds: float) -> None:
    from everalign.cli import results
    from everalign.reporting.formats import seconds as duration

    show(*results.summary([run]))
    show_line("time", duration(seconds))
    show_line("run", run.path)
    if report is not None:
        show_line("report", report)
