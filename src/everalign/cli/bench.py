"""The verb `bench`: methods, seeds, orders and models from one recipe, tuned alike, tested once and compared."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everalign.bench.recipe import Bench
from everalign.cli.console import Display, show, show_json, show_line
from everalign.cli.options import Json, TrustRemoteCode, option, resumable, split_commas
from everalign.errors import EveralignError, InputError

if TYPE_CHECKING:
    from everalign.bench.data import Part
    from everalign.bench.phases import Tuned


def bench(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to compare; see recipes/.")],
    output: Annotated[
        Path | None, option("Folder for records, results and the report; the recipe's by default.", "DIR")
    ] = None,
    tune: Annotated[
        bool, option("Try every contender's settings on validation rows, and choose.", "", "--tune")
    ] = False,
    validation: Annotated[
        bool, option("Compare on validation rows; test rows stay untouched.", "", "--validation")
    ] = False,
    only: Annotated[list[str] | None, option("Contenders to run; all if not given.", "NAME,...")] = None,
    without: Annotated[
        list[str] | None,
        option("Tasks to leave out of what is compared; they are learned.", "NAME,...", default="none"),
    ] = None,
    jobs: Annotated[int, option("Runs side by side, one thread each; 1 by default.", "N")] = 1,
    keep_runs: Annotated[
        bool, option("Keep the run directories with their versions, not the records alone.", "", "--keep-runs")
    ] = False,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare methods over seeds, orders of tasks and models: tune with --tune, then test once.

    Finished runs are never repeated: the same command goes on where it was stopped.
    """
    if tune and without:
        raise InputError(
            "--without is for what is compared, and tuning uses all tasks: leave it out", field="--without"
        )
    if tune and validation:
        raise InputError("--tune and --validation: give one of them; tune first", field="--tune")
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, found {jobs}", field="--jobs")
    wanted = Bench.read(recipe)
    folder = output or (Path(wanted.output) if wanted.output else None)
    if folder is None:
        raise InputError("no output given: add --output, or the key 'output' to the recipe", field="--output")
    names, left_out = ([name for text in texts or [] for name in split_commas(text) or ()] for texts in (only, without))
    with resumable():
        from everalign.bench import phases
        from everalign.bench.execution import Settings

        settings = Settings(folder, names, left_out, jobs, keep_runs)
        started = time.perf_counter()
        with Display() as display:
            progress = partial(display.progress, unit="tasks")
            if tune:
                tuned = phases.tune(wanted, settings, display.log, progress)
            else:
                part: Part = "validation" if validation else "test"
                outcome = phases.confirm(wanted, settings, part, display.log, progress)
                from everalign.bench.report import write_bench_report

                report = write_bench_report(wanted, outcome, folder / f"{phases.result_name(part, settings)}.html")
        seconds = time.perf_counter() - started
    from everalign.reporting.formats import seconds as duration

    if tune:
        _show_tuned(tuned, folder, as_json)
    elif as_json:
        show_json({**phases.outcome_json(wanted, outcome), "output": str(folder), "report": str(report)})
    else:
        from everalign.bench.tables import outcome_tables

        show(*outcome_tables(outcome))
        show_line("results", report.with_suffix(".json"))
        show_line("report", report)
    if not as_json:
        show_line("time", duration(seconds))
    if not tune and outcome.failed:
        raise EveralignError(f"{len(outcome.failed)} runs failed, the first: {outcome.failed[0]}")


def _show_tuned(tuned: "Tuned", folder: Path, as_json: bool) -> None:
    if as_json:
        show_json({**tuned.file.model_dump(), "notes": list(tuned.notes), "output": str(folder)})
        return
    from everalign.bench.tables import tuning_tables

    show(*tuning_tables(tuned))
    show_line("chosen", folder / "chosen.json")
