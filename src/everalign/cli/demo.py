"""The verb `demo`: Everalign's main job on the embedded assistant."""

from pathlib import Path
from typing import Annotated

import typer

from everalign.cli.console import Display, has_colours, show, show_json, show_line
from everalign.cli.options import Json


def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the runs and the report.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(metavar="N", help="Seeds the tasks and the training.")] = 0,
    as_json: Json = False,
) -> None:
    """Learn four conflicting tasks with plain sequential training and with LifeAlign, compare, and train a corrector.

    What an earlier demo learned in the same folder is taken as it is.
    """
    from everalign.cli import results
    from everalign.demo.run import run_demo
    from everalign.learning.run_data import load_run
    from everalign.reporting import score_table
    from everalign.reporting.answers import corrector_texts
    from everalign.reporting.sampling_error import error_matrix

    with Display() as display:
        result = run_demo(output, display.log, display.progress, seed)
    runs = [load_run(path) for path in result.runs.values()]
    if as_json:
        values = {name: results.scores(run) for name, run in zip(result.runs, runs, strict=True)}
        facts = {"report": str(result.report), "seconds": result.seconds}
        show_json({**facts, "runs": values, "corrector": result.corrector.to_dict()})
        return
    for name, run in zip(result.runs, runs, strict=True):
        show(score_table(run.scores(), title=name, errors=error_matrix(run)))
    show(*results.summary(runs))
    show(*corrector_texts(result.corrector, marks=not has_colours()))
    show_line("time", f"{result.seconds:.0f} s")
    show_line("report", result.report)
