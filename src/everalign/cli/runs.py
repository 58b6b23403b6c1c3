"""Verbs that read run directories: `report` and `versions`."""

from pathlib import Path
from typing import Annotated

import typer

from everalign.cli.output import show, show_json, show_line
from everalign.cli.verbs import Json


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, as `learn` writes them.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write one HTML page on a run, or on several side by side."""
    from everalign.cli import results
    from everalign.learning.run_data import load_run
    from everalign.reporting import write_report

    path = write_report(runs, output)
    loaded = [load_run(run) for run in runs]
    if as_json:
        show_json({"report": str(path), "runs": [{"run": str(run.path), **results.scores(run)} for run in loaded]})
        return
    show(*results.summary(loaded))
    show_line("report", path)


def versions(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, as `learn` writes it.")],
    as_json: Json = False,
) -> None:
    """List a run's versions with their scores, then and now."""
    from everalign.cli import results
    from everalign.learning.run_data import load_run

    loaded = load_run(run)
    if as_json:
        show_json({"run": str(run), "current": loaded.current, "versions": results.versions(loaded)})
    else:
        show(results.version_table(loaded))
