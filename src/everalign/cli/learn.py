"""The verb `learn`: tasks in, a run directory out. Its flags are the keys of a recipe (`everalign.learning.recipe`)."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.console import Display, show, show_json, show_line, show_yaml
from everalign.cli.feedback import check_is_there
from everalign.cli.options import (
    REWARDS,
    DropConstant,
    Estimator,
    LengthNormalize,
    ScaleRewards,
    TargetEss,
    Temperature,
    TrustRemoteCode,
    WeightCap,
    WeightFloor,
    flag,
    report_unused,
    resumable,
)
from everalign.errors import GateRefusedError, InputError

if TYPE_CHECKING:
    from everalign.data.rows import RowSet
    from everalign.learning.recipe import Recipe
    from everalign.learning.run_data import RunData

# These say how this one command behaves; every other flag is a recipe's key.
_FROM_FEEDBACK = ("minimum", "key_share", "agreement", "held_out")
_NOT_IN_A_RECIPE = (
    "recipe",
    "resume",
    "as_json",
    "print_recipe",
    "trust_remote_code",
    "from_feedback",
    *_FROM_FEEDBACK,
)

_ROLLOUTS = "Sampled answers (given --reward)"
_DATA, _METHOD, _TRAINING, _STEPS = "Data and files", "Method", "Training", "Optimiser and steps"
_CORRECTORS = "Correctors (objective correction)"
_FEEDBACK = "Feedback"


def learn(
    context: typer.Context,
    model: Annotated[str | None, flag("A Hugging Face folder, a Hub name, a .gguf file, `tiny` or `smollm2`.")] = None,
    base_adapter: Annotated[
        str | None, flag("A PEFT adapter to start from, merged into the model.", None, "DIR", "--adapter")
    ] = None,
    task: Annotated[
        list[str] | None,
        flag("A task's name and files; one --task for each task, in order.", metavar="NAME=TRAIN[,TEST]"),
    ] = None,
    method: Annotated[str | None, flag("lifealign, er, seqft, mtl or stl.")] = None,
    objective: Annotated[str | None, flag("fpo, dpo or sft; var for scored rows; snkl for both; correction.")] = None,
    output: Annotated[str | None, flag("The run directory.", metavar="DIR")] = None,
    seed: Annotated[int | None, flag("Seeds everything random.")] = None,
    resume: Annotated[
        bool, flag("Go on with the run that DIR holds; what it knows need not be said again.", None, "", "--resume")
    ] = False,
    recipe: Annotated[str | None, flag("Read settings from a file; flags win.", metavar="FILE.yaml")] = None,
    preset: Annotated[str | None, flag("default, or paper (LifeAlign's scripts).")] = None,
    print_recipe: Annotated[
        bool, flag("Print all settings as a recipe, and exit.", None, "", "--print-recipe")
    ] = False,
    gate: Annotated[
        float | None,
        flag(
            "Promote a task only where its held-out rows show that no accuracy fell by more than this; "
            "exit code 3 where one did, 4 where they do not suffice to tell."
        ),
    ] = None,
    gate_scorer: Annotated[
        str | None, flag("Whom the gate asks about a corrector's corrections, too.", None, "DIR|MODULE:F|URL#MODEL")
    ] = None,
    from_feedback: Annotated[
        str | None,
        flag("Learn a gateway's feedback as the next task; the gate is 0.05 unless given.", _FEEDBACK, "DATABASE_URL"),
    ] = None,
    minimum: Annotated[int | None, flag("Fewest rows of a task; 50.", _FEEDBACK)] = None,
    key_share: Annotated[float | None, flag("Most of it from one key, as a share; 0.5.", _FEEDBACK)] = None,
    agreement: Annotated[float | None, flag("Share of the keys that must agree on an answer.", _FEEDBACK)] = None,
    held_out: Annotated[
        float | None, flag("Share of the questions to test on, now and in all later tasks; 0.2.", _FEEDBACK)
    ] = None,
    as_json: Annotated[bool, flag("Print the result as one JSON object.", None, "", "--json")] = False,
    trust_remote_code: TrustRemoteCode = False,
    skip_bad_rows: Annotated[bool | None, flag("Leave bad rows out, and say so.", _DATA, "")] = None,
    allow_overlap: Annotated[bool | None, flag("Let rows be in training and test sets.", _DATA, "")] = None,
    cache: Annotated[
        str | None, flag("Encoded rows and reference log-probabilities; runs may share it.", _DATA, "DIR")
    ] = None,
    sample_answers: Annotated[
        int | None, flag("Held-out prompts of a task that the policy answers for the report; 4.", _DATA)
    ] = None,
    report: Annotated[bool | None, flag("Write DIR/report.html at the end; on unless refused.", _DATA, "")] = None,
    gamma: Annotated[float | None, flag("Focusing exponent of fpo (lifealign).", _METHOD)] = None,
    energy: Annotated[float | None, flag("Share of an update's energy to keep (lifealign).", _METHOD)] = None,
    keep: Annotated[float | None, flag("Share of what overlaps earlier tasks to keep (lifealign).", _METHOD)] = None,
    space: Annotated[str | None, flag("Consolidate in product or factors space (lifealign).", _METHOD)] = None,
    rank_cap: Annotated[int | None, flag("Highest rank of the long-term memory (lifealign).", _METHOD)] = None,
    replay: Annotated[float | None, flag("Share of a task's rows to replay later (lifealign, er).", _METHOD)] = None,
    capacity: Annotated[int | None, flag("Most rows kept for replay (lifealign, er).", _METHOD)] = None,
    reference: Annotated[str | None, flag("base, stage_start or previous_task.", _TRAINING)] = None,
    learning_rate: Annotated[float | None, flag("Peak, in the preference stage.", _TRAINING)] = None,
    epochs: Annotated[float | None, flag("Passes over the rows; fractions allowed.", _TRAINING)] = None,
    sft_epochs: Annotated[float | None, flag("Supervised passes before that; 0 for none.", _TRAINING)] = None,
    sft_learning_rate: Annotated[float | None, flag("Peak, in the supervised stage.", _TRAINING)] = None,
    beta: Annotated[float | None, flag("Inverse temperature of the implicit reward.", _TRAINING)] = None,
    max_length: Annotated[int | None, flag("Longest prompt plus response, in tokens.", _TRAINING)] = None,
    rank: Annotated[int | None, flag("Rank of a task's LoRA adapter.", _TRAINING)] = None,
    alpha: Annotated[float | None, flag("LoRA's α: an update is (α/rank)·B·A.", _TRAINING)] = None,
    targets: Annotated[str | None, flag("Modules: names with commas, an expression, all-linear.", _TRAINING)] = None,
    estimator: Estimator = None,
    temperature: Temperature = None,
    target_ess: TargetEss = None,
    scale_rewards: ScaleRewards = None,
    weight_cap: WeightCap = None,
    length_normalize: LengthNormalize = None,
    weight_floor: WeightFloor = None,
    drop_constant: DropConstant = None,
    reward: Annotated[
        str | None,
        flag("Score answers that have no rewards, and sample answers to prompts.", REWARDS, "DIR|MODULE:F|URL#MODEL"),
    ] = None,
    samples: Annotated[int | None, flag("Answers sampled to each prompt.", _ROLLOUTS)] = None,
    sampling_temperature: Annotated[float | None, flag("What logits are divided by; 1.", _ROLLOUTS)] = None,
    max_new_tokens: Annotated[int | None, flag("Longest answer, in tokens.", _ROLLOUTS)] = None,
    rounds: Annotated[int | None, flag("Sample anew so often, from what was learned.", _ROLLOUTS)] = None,
    template: Annotated[str | None, flag("What the corrector reads: everalign-1, ...", _CORRECTORS, "ID")] = None,
    objectives: Annotated[
        str | None, flag('What answers should be more of: "helpful,harmless".', _CORRECTORS, "WORDS")
    ] = None,
    identity: Annotated[float | None, flag("Share of rows that leave a good answer as it is.", _CORRECTORS)] = None,
    batch_size: Annotated[int | None, flag("Pairs of an optimiser step.", _STEPS)] = None,
    tokens_per_batch: Annotated[int | None, flag("Tokens computed at once; fewer save memory.", _STEPS)] = None,
    precision: Annotated[str | None, flag("auto, fp32 or bf16, for the base model.", _STEPS)] = None,
    attention: Annotated[str | None, flag("sdpa, or flex on a GPU.", _STEPS)] = None,
    checkpointing: Annotated[
        str | None, flag("Compute activations twice to save memory: auto, on or off.", _STEPS, "WHEN")
    ] = None,
    warmup: Annotated[float | None, flag("Share of the steps in which the rate rises.", _STEPS)] = None,
    scheduler: Annotated[str | None, flag("cosine, linear or constant_with_warmup.", _STEPS)] = None,
    max_grad_norm: Annotated[float | None, flag("Gradient clipping; 0 for none.", _STEPS)] = None,
    logging_steps: Annotated[int | None, flag("Steps between points of the training curve.", _STEPS)] = None,
    checkpoint_steps: Annotated[int | None, flag("Steps between checkpoints; 0 for none.", _STEPS)] = None,
    test_limit: Annotated[int | None, flag("Most held-out pairs scored of a task; 0 for all.", _STEPS)] = None,
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


def _completed(recipe: "Recipe") -> "Recipe":
    from everalign.learning.recipe import completed

    return completed(recipe)


def _print_recipe(flags: dict[str, Any]) -> None:
    show_yaml(_recipe(flags).complete())


def _learn(flags: dict[str, Any]) -> None:
    started = time.perf_counter()
    with Display() as display:
        recipe = _recipe(flags)
        if flags["resume"] and flags["from_feedback"] is None:
            recipe = _completed(recipe)
        run, refusal = _run(recipe, flags["resume"], feedback_flags(flags), display)
        report = None if recipe.report is False else _write_report(run.path)
    seconds = time.perf_counter() - started
    if flags["as_json"]:
        _show_json(run, refusal, report, seconds)
    else:
        _show(run, report, seconds)
    if refusal is not None:
        raise refusal


def _run(
    recipe: "Recipe", resume: bool, feedback: "FeedbackFlags | None", display: Display
) -> tuple["RunData", GateRefusedError | None]:
    """Learn; what the gate has refused ends it, and is told of after the results."""
    from everalign.learning.learner import Learner
    from everalign.learning.promotion import exclusive_run
    from everalign.learning.recipe import load_tasks, nothing_left, write_recipe

    if feedback is not None:
        return learn_feedback(feedback, recipe, display)
    if resume and recipe.tasks is None and (Path(recipe.output or "") / "run.json").exists():
        raise nothing_left(recipe)
    arguments = recipe.learner_arguments()
    with exclusive_run(Path(arguments["output"])):
        tasks = load_tasks(recipe)
        display.log("data")
        for name, train, test in tasks:
            _announce_data(name, train, test, display)
        learner = Learner(**arguments, resume=resume, log=display.log, progress=display.progress)
        write_recipe(learner.run.path, recipe)
        try:
            learner.learn_all(tasks)
        except GateRefusedError as refusal:
            return learner.run, refusal
        return learner.run, None


def _announce_data(name: str, train: "RowSet[Any]", test: "RowSet[Any] | None", display: Display) -> None:
    held_out = "no held-out rows, so it is not scored" if test is None else f"{len(test)} held out"
    display.log(f"  {name}: {len(train)} rows to learn, {held_out}")
    for rows in (train, test):
        if rows is not None:
            report_unused(rows)


def _write_report(run: Path) -> Path:
    from everalign.reporting import write_report

    return write_report([run], run / "report.html")


def _show_json(run: "RunData", refusal: GateRefusedError | None, report: Path | None, seconds: float) -> None:
    from everalign.cli import results
    from everalign.learning.run_data import version_rows

    facts = {"output": str(run.path), "report": None if report is None else str(report), "seconds": round(seconds, 3)}
    refused = None if refusal is None else refusal.version
    shown = {"answers": results.answers(run), "versions": version_rows(run), "refused": refused}
    show_json({**results.scores(run), **shown, **facts})


def _show(run: "RunData", report: Path | None, seconds: float) -> None:
    from everalign.cli import results
    from everalign.reporting.formats import seconds as duration

    show(*results.summary([run]))
    show_line("time", duration(seconds))
    show_line("run", run.path)
    if report is not None:
        show_line("report", report)


_OPTIONS = ("minimum", "key_share", "agreement", "held_out")


@dataclass(frozen=True)
class FeedbackFlags:
    """Where feedback is, and how it becomes a task.

    Args:
        store: the store's address.
        options: of `NextTaskOptions`, as far as they are given.
    """

    store: str
    options: dict[str, Any]


def feedback_flags(flags: dict[str, Any]) -> FeedbackFlags | None:
    """Return what is said of feedback; None where nothing is to be learned from it."""
    given = {name: flags[name] for name in _OPTIONS if flags[name] is not None}
    if flags["from_feedback"] is None:
        for name in given:
            raise InputError(f"--{name.replace('_', '-')}: is for feedback; name its store with --from-feedback")
        return None
    if flags["task"]:
        raise InputError("--task: what is learned from feedback is the only task; leave --task out")
    return FeedbackFlags(flags["from_feedback"], given)


def learn_feedback(
    flags: FeedbackFlags, recipe: "Recipe", display: Display
) -> tuple["RunData", GateRefusedError | None]:
    """Learn feedback as the next task of the run that is there, or the first of a new one.

    Such a run starts from the corrector in service: its promoted version, or for a new run the model that is named.
    """
    from everalign.correction.corrector_files import FACTS_FILE, is_corrector
    from everalign.learning.learner import Learner
    from everalign.learning.promotion import exclusive_run
    from everalign.learning.recipe import completed, write_recipe
    from everalign.serving.feedback.loop import GATE, learn_from_feedback
    from everalign.serving.feedback.task import NextTaskOptions
    from everalign.serving.store import FeedbackStore

    if recipe.tasks:
        raise InputError("tasks: what is learned from feedback is the only task; leave them out of the recipe")
    check_is_there(flags.store)
    options = NextTaskOptions(**flags.options)
    # Unfinished tasks of the run's own wait for a command that names them, or says --resume alone.
    recipe = completed(recipe).model_copy(update={"tasks": None})
    output = Path(recipe.output or "")
    resume = (output / "run.json").exists()
    if not resume and recipe.output is not None and (output / FACTS_FILE).exists():
        raise InputError(
            f"--output {output}: is a corrector, and what is learned from feedback goes into a run: name another "
            f"folder, and begin with this corrector by --model {output}"
        )
    if recipe.objective is None and recipe.model is not None and is_corrector(recipe.model):
        recipe = recipe.model_copy(update={"objective": "correction"})
    arguments = {"gate": GATE, **recipe.learner_arguments(needs_tasks=False)}
    with exclusive_run(Path(arguments["output"])), FeedbackStore.open(flags.store) as store:
        learner = Learner(**arguments, resume=resume, log=display.log, progress=display.progress)
        write_recipe(learner.run.path, recipe)
        learned = learn_from_feedback(store, learner, options, display.log)
    return learner.run, learned.refusal
