"""The verb `estimate`: what a run would take, before anything is loaded. Most of its flags are those of `learn`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.console import Display, say, show, show_json, show_line, table
from everalign.cli.learn import parse_task
from everalign.cli.options import Columns, TrustRemoteCode, flags, option
from everalign.errors import InputError
from everalign.estimate.machines import Layout, find_machine
from everalign.estimate.value import Value, WinRate, parse_api_price, read_win_rate
from everalign.learning.options import (
    AdapterOptions,
    CorrectionTaskOptions,
    MethodOptions,
    RolloutOptions,
    TrainingOptions,
)
from everalign.learning.recipe import Recipe
from everalign.storage import write_json
from everalign.training.options import WeightOptions

if TYPE_CHECKING:
    from everalign.estimate.alternatives import Alternative
    from everalign.estimate.estimator import Estimated, Measured
    from everalign.estimate.prediction import Prediction, Range

_PANEL = "Estimate"


@flags(
    Recipe,
    MethodOptions,
    TrainingOptions,
    AdapterOptions,
    WeightOptions,
    RolloutOptions,
    CorrectionTaskOptions,
)
def estimate(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe of learn; flags win.", show_default=False),
    ] = None,
    task: Annotated[
        list[str] | None,
        option(
            "A task's name and files; once for each task, in order; those of the recipe by default.",
            "NAME=TRAIN[,TEST]",
        ),
    ] = None,
    columns: Columns = None,
    method: Annotated[str | None, option("As for learn; lifealign by default.")] = None,
    gpu: Annotated[
        str,
        option(
            "h100, h200, a100-80, a100-40, l40s, l4, rtx4090, mi300x, or cpu (this machine), the default.",
            "NAME",
            panel=_PANEL,
        ),
    ] = "cpu",
    price: Annotated[
        float | None, option("Dollars for an hour of one accelerator.", "DOLLARS", panel=_PANEL, default="none")
    ] = None,
    processes: Annotated[
        int, option("Accelerators that share the run, 8 a machine; 1 by default.", "N", panel=_PANEL)
    ] = 1,
    fsdp: Annotated[
        bool,
        option("Those of a machine share the base model's layers, as with learn --fsdp.", "", "--fsdp", panel=_PANEL),
    ] = False,
    measure: Annotated[
        bool,
        option(
            "Load the model, train three steps here, and correct the estimate by them.", "", "--measure", panel=_PANEL
        ),
    ] = False,
    upstream: Annotated[
        str | None,
        option("The model whose answers a corrector corrects, to compare with.", "MODEL", panel=_PANEL, default="none"),
    ] = None,
    api_price: Annotated[
        str | None,
        option(
            "A larger model's price: dollars for a million tokens read, and written.",
            "IN,OUT",
            panel=_PANEL,
            default="none",
        ),
    ] = None,
    answers: Annotated[
        float | None, option("Answers served over the time that counts.", "N", panel=_PANEL, default="none")
    ] = None,
    value_per_better_answer: Annotated[
        float | None,
        option("Dollars that a better answer is worth; needs --evaluation.", "DOLLARS", panel=_PANEL, default="none"),
    ] = None,
    evaluation: Annotated[
        Path | None,
        option(
            "Your own evaluation: a run that everalign evaluate has judged, or its results.json.",
            "RUN|FILE",
            panel=_PANEL,
            default="none",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, option("Write everything as JSON, - prints it.", "FILE", "--json", panel=_PANEL, default="none")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    **given: Any,
) -> None:
    """Estimate steps, hours, memory, disk and cost of a run, beside its alternatives, without loading weights."""
    machine, layout = find_machine(gpu), Layout(processes, fsdp)
    if processes < 1:
        raise InputError(f"--processes {processes}: must be at least 1", field="--processes")
    if measure and processes > 1:
        raise InputError("--measure: takes steps on one accelerator; leave --processes out", field="--measure")
    for name, number in (("price", price), ("answers", answers), ("value-per-better-answer", value_per_better_answer)):
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise InputError(f"--{name}: must be a number of at least 0, found {number}", field=f"--{name}")
    price = None if price is None else price * processes  # of all of them
    prices = parse_api_price(api_price)
    win_rate = _win_rate(value_per_better_answer, evaluation, price)
    tasks = [parse_task(text) for text in task or []]
    wanted = Recipe.from_flags({**given, "method": method, "tasks": tasks or None, "columns": columns})
    if recipe is not None:
        wanted = wanted.over(Recipe.read(recipe))
    # A run's folder is not needed, and none is written.
    wanted = wanted.model_copy(update={"output": wanted.output or "runs/everalign"})
    _check_output(json_file)
    arguments = wanted.learner_arguments()

    from everalign.estimate.alternatives import alternatives
    from everalign.estimate.estimator import estimate_run
    from everalign.estimate.estimator import measure as measure_steps
    from everalign.learning.task_files import load_tasks

    with Display() as display:
        loaded = load_tasks(wanted)
        estimated = estimate_run(arguments, loaded, machine, display.log, layout)
        measured: Measured | None = None
        if measure:
            estimated, measured = measure_steps(arguments, estimated, display.log)
        others = alternatives(estimated, arguments, upstream, prices, answers, display.log)
    cost = None if price is None else estimated.prediction.total.times(price / 3600)
    worth = None
    if win_rate is not None and value_per_better_answer is not None and cost is not None:
        worth = Value(win_rate, value_per_better_answer, (cost.middle, cost.low, cost.high), answers)
    facts = _facts(estimated.prediction, price, measured, others, worth)
    if json_file is not None and str(json_file) == "-":
        show_json(facts)
        return
    _show(estimated, price, measured, others, worth)
    if json_file is not None:
        write_json(json_file, facts)
        show_line("json", json_file)


def _win_rate(each: float | None, evaluation: Path | None, price: float | None) -> WinRate | None:
    """Read the user's evaluation, if it is asked for whole."""
    if each is None and evaluation is None:
        return None
    if each is None:
        raise InputError(
            "--evaluation: says what answers are worth only with --value-per-better-answer", field="--evaluation"
        )
    if evaluation is None:
        raise InputError(
            "--value-per-better-answer: needs --evaluation, your own: how often the new answers win",
            field="--evaluation",
        )
    if price is None:
        raise InputError(
            "--value-per-better-answer: needs --price, or nothing is set against the value", field="--price"
        )
    return read_win_rate(evaluation)


def _check_output(file: Path | None) -> None:
    if file is None or str(file) == "-":
        return
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(f"--json {file}: must name a file in a folder that exists", field="--json")


def _facts(
    prediction: "Prediction",
    price: float | None,
    measured: "Measured | None",
    others: "Sequence[Alternative]",
    worth: Value | None,
) -> dict[str, Any]:
    cost = None if price is None else prediction.total.times(price / 3600)
    return {
        **prediction.to_dict(),
        "price": price,
        "cost": None if cost is None else {"low": cost.low, "expected": cost.middle, "high": cost.high},
        "measured": None if measured is None else measured.to_dict(),
        "alternatives": [other.to_dict(price) for other in others],
        "value": None if worth is None else worth.to_dict(),
    }


# ---- on a terminal ----


def _show(
    estimated: "Estimated",
    price: float | None,
    measured: "Measured | None",
    others: "Sequence[Alternative]",
    worth: Value | None,
) -> None:
    prediction, context = estimated.prediction, estimated.context
    memory, stages = prediction.memory, [stage for task in estimated.plan.tasks for stage in task.stages]
    rows, replayed = sum(stage.rows for stage in stages), sum(stage.replayed for stage in stages)
    parts = ", ".join(f"{name} {_time(part)}" for name, part in prediction.seconds.items() if part.high)
    cost = "–" if price is None else _dollars(prediction.total.times(price / 3600))
    lines = [
        ("steps", f"{prediction.steps:,}", f"{rows:,} rows, {replayed:,} of them replayed"),
        ("time", _time(prediction.total), parts),
        ("peak memory", _fits(memory.peak, memory.available), _sizes(memory.parts)),
        ("disk", size(sum(prediction.disk.values())), _sizes(prediction.disk)),
        ("cost", cost, "give --price DOLLARS" if price is None else f"at ${price:g} an hour"),
    ]
    count, machines = prediction.layout.processes, prediction.machine.name
    if count > 1:
        machines = f"{count} x {machines}{', FSDP' if prediction.layout.fsdp else ''}"
    title = f"{context.model_name}, {context.method.name}, {context.objective.name} on {machines}"
    show(table(("measure", "", "meaning"), lines, title=title))
    if memory.checkpointing:
        show("Activations are computed twice (checkpointing): memory would not suffice otherwise, or it was asked for.")
    if measured is not None:
        show(measured.one_line())
    rest = [
        (
            other.name,
            "–" if other.seconds is None else _time(other.seconds),
            "–" if (spent := other.cost(price)) is None else _dollars(spent),
            "–" if other.memory is None else _fits(other.memory, other.available),
            other.note,
        )
        for other in others
    ]
    learning = prediction.learning
    spent_here = "–" if price is None else _dollars(learning.times(price / 3600))
    alone = "what teaches alone, as in the other rows: no start, no held-out rows"
    own = ("this run", _time(learning), spent_here, _fits(memory.peak, memory.available), alone)
    show(table(("measure", "time", "cost", "memory", "meaning"), [own, *rest], title="Beside the alternatives"))
    if worth is not None:
        _show_value(worth)
    say("note", f"{prediction.machine.source}; formulas and assumptions: docs/estimate.md", "cyan")


def _show_value(worth: Value) -> None:
    rate = worth.win_rate
    per_answer, net, (after, fewest, most) = worth.per_answer, worth.net, worth.break_even
    answers = "give --answers N" if net is None else f"over {worth.answers:,.0f} answers, the run's cost taken off"
    lines = [
        (
            "answers that get better, less worse",
            f"{100 * rate.better[0]:+.1f} %",
            f"{100 * rate.better[1]:+.1f} to {100 * rate.better[2]:+.1f} %: {rate.metric} of {rate.version}, "
            f"{rate.prompts:,} prompts",
        ),
        (
            "value of an answer",
            _signed(per_answer[0], 4),
            f"{_signed(per_answer[1], 4)} to {_signed(per_answer[2], 4)}",
        ),
        (
            "net value",
            "–" if net is None else _signed(net[0]),
            answers if net is None else f"{_signed(net[1])} to {_signed(net[2])} {answers}",
        ),
        ("break-even", _count(after), f"answers; {_count(fewest)} to {_count(most)}"),
    ]
    show(table(("measure", "", "meaning"), lines, title="What it is worth, by your evaluation"))


def _count(answers: float | None) -> str:
    return "never" if answers is None else f"{answers:,.0f}"


def _signed(dollars: float, places: int = 2) -> str:
    return f"{'−' if dollars < 0 else ''}${abs(dollars):,.{places}f}"


def _dollars(cost: "Range") -> str:
    return f"${cost.low:,.2f} to {cost.high:,.2f}"


def _time(part: "Range") -> str:
    unit, size = next(((u, s) for u, s in (("h", 3600.0), ("min", 60.0)) if part.high >= 1.5 * s), ("s", 1.0))
    low, high = part.low / size, part.high / size
    return f"{low:.3g} to {high:.3g} {unit}"


def _sizes(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {size(part)}" for name, part in parts.items() if part >= 1)


def _fits(peak: float, available: float) -> str:
    return f"{size(peak)} of {size(available)}" + ("" if peak <= available else ": does not fit")


def size(number: float) -> str:
    """Returns bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"
