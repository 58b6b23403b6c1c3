"""The verb `learn`: tasks in, a run directory out. Most of its flags are the keys of a recipe."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.console import (
    Display,
    run_answers,
    run_scores,
    run_summary,
    show,
    show_json,
    show_line,
)
from everalign.cli.feedback import check_is_there
from everalign.cli.launch import Fsdp, Processes, share_work
from everalign.cli.options import Columns, Json, TrustRemoteCode, flags, option, report_unused, resumable
from everalign.data.file_formats import check_source
from everalign.distributed import gather, on_main, world
from everalign.errors import GateRefusedError, InputError
from everalign.learning.options import (
    AdapterOptions,
    CorrectionTaskOptions,
    MethodOptions,
    RolloutOptions,
    TrainingOptions,
)
from everalign.learning.promotion import check_output, exclusive_run
from everalign.learning.recipe import Recipe, completed, is_begun, nothing_left, write_recipe
from everalign.learning.task_files import LoadedTask, left_to_learn, load_tasks
from everalign.training.options import WeightOptions

if TYPE_CHECKING:
    from everalign.learning.learner import Learner
    from everalign.learning.run_data import RunData

_FEEDBACK = "Feedback"


@flags(
    Recipe,
    MethodOptions,
    TrainingOptions,
    AdapterOptions,
    WeightOptions,
    RolloutOptions,
    CorrectionTaskOptions,
)
def learn(
    context: typer.Context,
    task: Annotated[
        list[str] | None,
        option(
            "A task's name and files; once for each task, in order; those of the recipe by default.",
            "NAME=TRAIN[,TEST]",
        ),
    ] = None,
    method: Annotated[
        str | None,
        option(
            "lifealign (default), lifealign-rf, er, seqft, mtl, stl, gem, ewc, olora, l2p, cppo, copr, ogpsa, slao, "
            "gdumb, experts (an adapter for each label), or a class in a file, FILE.py:CLASS."
        ),
    ] = None,
    columns: Columns = None,
    recipe: Annotated[Path | None, option("Read options from a file, flags win; none by default.", "FILE.yaml")] = None,
    print_recipe: Annotated[bool, option("Print all options as a recipe, and exit.", "", "--print-recipe")] = False,
    resume: Annotated[
        bool, option("Continue the run in DIR, with the options it was started with.", "", "--resume")
    ] = False,
    processes: Processes = None,
    fsdp: Fsdp = False,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
    from_feedback: Annotated[
        str | None,
        option("Learn a gateway's feedback as the next task; the gate is 0.05 by default.", "URL", panel=_FEEDBACK),
    ] = None,
    minimum: Annotated[int | None, option("Fewest rows of a task; 50 by default.", panel=_FEEDBACK)] = None,
    key_share: Annotated[
        float | None, option("Largest share of a task from one key; 0.5 by default.", panel=_FEEDBACK)
    ] = None,
    agreement: Annotated[
        float | None, option("Share of the keys that must agree on an answer; 2/3 by default.", panel=_FEEDBACK)
    ] = None,
    held_out: Annotated[
        float | None,
        option("Share of the questions to test on, now and in all later tasks; 0.2 by default.", panel=_FEEDBACK),
    ] = None,
    **given: Any,
) -> None:
    """Teach a model task after task, and keep what it learned before."""
    with resumable("the same command with --resume"):
        tasks = [parse_task(text) for text in task or []]
        wanted = Recipe.from_flags({**given, "method": method, "tasks": tasks or None, "columns": columns})
        if recipe is not None:
            wanted = wanted.over(Recipe.read(recipe))
        if print_recipe:
            import yaml

            print(yaml.safe_dump(wanted.complete(), sort_keys=False, allow_unicode=True), end="")
            return
        feedback = {"minimum": minimum, "key_share": key_share, "agreement": agreement, "held_out": held_out}
        of_feedback = from_feedback is not None or any(value is not None for value in feedback.values())
        goes_on = resume and wanted.tasks is None and is_begun(wanted)
        if resume and not of_feedback:
            wanted = completed(wanted)
        share_work(processes, context, lambda: None if of_feedback else _check(wanted, resume, goes_on), fsdp)
        started, refusal = time.perf_counter(), None
        with Display() as display:
            if of_feedback:
                run, refusal = _learn_feedback(from_feedback, feedback, bool(tasks), wanted, display)
            else:
                with exclusive_run(Path(wanted.output or "")):
                    learner, loaded = _begin(wanted, resume, goes_on, fsdp, display)
                    try:
                        learner.learn_all(loaded)
                    except GateRefusedError as error:
                        refusal = error  # raised after the results
                    run = learner.run
            report = None if wanted.report is False else on_main(_write_report)(run.path)
        seconds = time.perf_counter() - started
    _show(run, refusal, report, seconds, as_json)
    gather(None)  # a process that ends with an error ends the others, which may still be printing
    if refusal is not None:
        raise refusal


def _check(recipe: Recipe, resume: bool, goes_on: bool) -> None:
    """Finds mistakes in flags, files and folders while nothing heavy is loaded."""
    if goes_on and recipe.tasks is None:
        raise nothing_left(recipe)
    recipe.check()
    for task in recipe.tasks or []:
        for source in filter(None, (task.train, task.test)):
            check_source(source)
    check_output(Path(recipe.output or ""), resume)


def _begin(
    recipe: Recipe, resume: bool, goes_on: bool, fsdp: bool, display: Display
) -> tuple["Learner", list[LoadedTask]]:
    """Returns the learner of a recipe, and its tasks; `goes_on` says that the run was given them before."""
    loaded = load_tasks(recipe)
    display.log("data")
    for name, train, test in loaded:
        held_out = "no held-out rows, so it is not scored" if test is None else f"{len(test)} held out"
        display.log(f"  {name}: {len(train)} rows to learn, {held_out}")
        for rows in (train, test):
            if rows is not None:
                report_unused(rows)
    loaded = left_to_learn(recipe, loaded) if goes_on else loaded
    arguments = recipe.learner_arguments()
    from everalign.learning.learner import Learner

    learner = Learner(
        **arguments,
        resume=resume,
        fsdp=fsdp,
        log=display.log,
        progress=display.progress,
        figures=display.figures,
    )
    on_main(write_recipe)(learner.run.path, recipe)
    _predict(learner, loaded, arguments, display)
    return learner, loaded


def parse_task(text: str) -> dict[str, str]:
    """Splits NAME=TRAIN[,TEST] into a recipe's task."""
    name, _, files = text.partition("=")
    paths = files.split(",")
    if not name.strip() or not all(path.strip() for path in paths) or len(paths) > 2:
        comma = "; a file with a comma in its name goes into a recipe" if len(paths) > 2 else ""
        raise InputError(f"--task {text}: must be NAME=TRAIN or NAME=TRAIN,TEST{comma}", field="--task")
    return {"name": name, **dict(zip(("train", "test"), paths, strict=False))}


def _predict(learner: "Learner", tasks: list[LoadedTask], arguments: Mapping[str, Any], display: Display) -> None:
    """Writes into the run what its tasks will take; `versions` shows it beside what they took."""
    if world() > 1:
        display.log("  how long it takes is not predicted: estimates are for one process")
        return
    from everalign.estimate.estimator import predict_learner

    try:
        done = [version.task for version in learner.run.versions]
        found = predict_learner(learner.context, tasks, arguments["sample_answers"], arguments.get("gate"), done)
    except InputError as error:
        display.log(f"how long it takes is not predicted: {error}")
        return
    if found is None:
        return
    from everalign.learning.run_store import RunDirectory
    from everalign.reporting.formats import seconds as duration

    RunDirectory(learner.run.path).record_prediction(found.tasks_to_dict())
    time_needed = " to ".join(duration(part) for part in (found.total.low, found.total.high))
    display.log(f"predicted: {found.steps} steps, {time_needed}, {found.memory.peak / 2**30:.1f} GiB of memory")
    needed, free = sum(found.disk.values()), shutil.disk_usage(learner.run.path).free
    if needed > free:
        room = f"about {needed / 2**20:,.1f} MiB are going to be written, and {free / 2**20:,.1f} MiB are free"
        display.log(f"warning: {learner.run.path}: {room}: make room before the disk is full")


def _learn_feedback(
    store: str | None, flags: dict[str, Any], has_tasks: bool, recipe: Recipe, display: Display
) -> tuple["RunData", GateRefusedError | None]:
    """Learns feedback as the next task of the run in the output, or the first of a new one.

    Such a run starts from the corrector in service: its promoted version, or for a new run the model that is named.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if store is None:
        name = next(iter(given)).replace("_", "-")
        raise InputError(f"--{name}: is for feedback; name its store with --from-feedback", field=name)
    if world() > 1:
        raise InputError(f"--from-feedback: feedback is learned in one process, found {world()}: leave --processes out")
    if recipe.label is not None:
        raise InputError("label: feedback has no labels; leave it out", field="label")
    if has_tasks:
        raise InputError("--task: what is learned from feedback is the only task; leave --task out")
    if recipe.tasks:
        raise InputError("tasks: what is learned from feedback is the only task; leave them out of the recipe")
    from everalign.serving.feedback.task import NextTaskOptions
    from everalign.serving.store import FeedbackStore

    check_is_there(store)
    options = NextTaskOptions.from_flags(given)
    from everalign.correction.corrector_files import FACTS_FILE, is_corrector
    from everalign.learning.learner import Learner
    from everalign.serving.feedback.loop import GATE, learn_from_feedback

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
    with exclusive_run(Path(arguments["output"])), FeedbackStore.open(store) as opened:
        learner = Learner(
            **arguments, resume=resume, log=display.log, progress=display.progress, figures=display.figures
        )
        write_recipe(learner.run.path, recipe)
        learned = learn_from_feedback(opened, learner, options, display.log)
    return learner.run, learned.refusal


def _write_report(run: Path) -> Path:
    from everalign.reporting import write_report

    return write_report([run], run / "report.html")


def _show(run: "RunData", refusal: GateRefusedError | None, report: Path | None, seconds: float, as_json: bool) -> None:
    from everalign.learning.run_data import version_rows
    from everalign.reporting.formats import seconds as duration

    if as_json:
        show_json(
            {
                **run_scores(run),
                "answers": run_answers(run),
                "versions": version_rows(run),
                "refused": None if refusal is None else refusal.version,
                "output": str(run.path),
                "report": None if report is None else str(report),
                "seconds": round(seconds, 3),
            }
        )
        return
    show(*run_summary([run]))
    show_line("time", duration(seconds))
    show_line("run", run.path)
    if report is not None:
        show_line("report", report)
