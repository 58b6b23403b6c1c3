"""The verb `demo`, and those on run directories: `report`, `versions`, `rollback` and `export`."""

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from everalign.cli.console import (
    Display,
    run_scores,
    run_summary,
    say,
    show,
    show_json,
    show_line,
    version_table,
)
from everalign.cli.options import Json, TrustRemoteCode, option, require
from everalign.errors import InputError

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, as `learn` writes it.")]


def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the runs and the report.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the tasks and the training.")] = 0,
    as_json: Json = False,
) -> None:
    """Learn four conflicting tasks with plain sequential training and with LifeAlign, compare, and train a corrector.

    What an earlier demo learned in the same folder is reused.
    """
    from everalign.demo.run import run_demo
    from everalign.learning.run_data import load_run
    from everalign.reporting import score_table
    from everalign.reporting.answers import corrector_texts
    from everalign.reporting.formats import error_matrix

    with Display() as display:
        result = run_demo(output, display.log, display.progress, seed, display.figures)
    runs = {name: load_run(path) for name, path in result.runs.items()}
    if as_json:
        facts = {"report": str(result.report), "seconds": result.seconds}
        values = {name: run_scores(run) for name, run in runs.items()}
        show_json({**facts, "runs": values, "corrector": asdict(result.corrector)})
        return
    for name, run in runs.items():
        show(score_table(run.scores(), title=name, errors=error_matrix(run)))
    show(*run_summary(list(runs.values())))
    terminal = Console()
    coloured = terminal.color_system is not None and not terminal.no_color
    show(*corrector_texts(result.corrector, marks=not coloured))
    show_line("time", f"{result.seconds:.0f} s")
    show_line("report", result.report)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, as `learn` writes them.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write one HTML page on a run, or on several side by side."""
    from everalign.learning.run_data import load_run
    from everalign.reporting import write_report

    path = write_report(runs, output)
    loaded = [load_run(run) for run in runs]
    if as_json:
        show_json({"report": str(path), "runs": [{"run": str(run.path), **run_scores(run)} for run in loaded]})
        return
    show(*run_summary(loaded))
    show_line("report", path)


def versions(run: Run, as_json: Json = False) -> None:
    """List a run's versions with their scores, then and now, and what became of each."""
    from everalign.learning.run_data import load_run, version_rows

    loaded = load_run(run)
    if as_json:
        show_json({"run": str(run), "current": loaded.current, "versions": version_rows(loaded)})
    else:
        show(version_table(loaded))


def watch(
    run: Run,
    port: Annotated[int, typer.Option(metavar="N", help="Port to listen on; 0 for any free one.")] = 8765,
) -> None:
    """Show a run in a browser while it trains: curves, scores and versions, on this machine alone."""
    require("watching", "fastapi", "uvicorn")
    import uvicorn

    from everalign.learning.run_data import check_is_run
    from everalign.serving.pages.dashboard import watch_app
    from everalign.serving.server import bound_socket

    check_is_run(run)
    listening = bound_socket("127.0.0.1", port)
    say("watching", f"http://127.0.0.1:{listening.getsockname()[1]}/ (Ctrl+C ends it)", "bold")
    config = uvicorn.Config(watch_app(run), access_log=False, log_level="warning", timeout_graceful_shutdown=1)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def rollback(
    run: Run,
    version: Annotated[
        str | None,
        typer.Argument(
            metavar="[VERSION]",
            help="Name or number of the version, 000 for the base model; by default the current version's parent.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", metavar="", help="Allow a version that the gate did not promote.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make an earlier version current, or one that was rolled back; learning goes on from there.

    Nothing is deleted: what is left out can be taken back by its name.
    """
    from everalign.learning.promotion import rollback as roll_back

    done = roll_back(run, version, force)
    if as_json:
        show_json({"run": str(run), **asdict(done)})
        return
    show_line("current", f"{done.current}{' (the base model)' if done.current == '000' else ''}")
    for label, versions in (("rolled back", done.left_out), ("restored", done.taken_back)):
        if versions:
            show_line(label, ", ".join(versions))


def export(
    run: Run,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the model; must not exist yet.")],
    version: Annotated[str | None, option("Version to export; the current one by default.", "VERSION")] = None,
    model: Annotated[
        str | None, option("Where the base model is now, if it was moved.", "MODEL", default="where it was")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", metavar="", help="Write the adapter alone, for peft or vLLM.")
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE", help="auto, fp32, bf16 or fp16; auto is the base model's, or fp32 for an adapter."
        ),
    ] = "auto",
    label: Annotated[
        str | None, option("Whose adapter, of a run that keeps one for each label.", "LABEL", default="all of them")
    ] = None,
    base: Annotated[
        str | None,
        option("Merge into this full-precision model; for a run on a quantised copy of it.", "MODEL", default="none"),
    ] = None,
    pad_rank: Annotated[
        bool, option("Fill the adapter up with zeros to a rank that every server takes.", "", "--pad-rank")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write what was learned, merged into the base model, as the folder that the base model came in.

    It is merged in fp32, checked, and rounded once. Of a run that learned corrections, it is a corrector.
    """
    from everalign.learning.export import export_adapter, export_version
    from everalign.learning.run_data import load_run
    from everalign.modeling.model_files import checked_dtype
    from everalign.modeling.runtime import prepare_process

    kind = checked_dtype(dtype)
    if adapter and base is not None:
        raise InputError("--base: an adapter is merged into nothing: leave it out, or leave --adapter out")
    if pad_rank and not adapter:
        raise InputError("--pad-rank: a merged model has no rank: give --adapter too, or leave it out")
    prepare_process()
    if adapter:
        done = export_adapter(load_run(run), folder, version, model, None, kind, label, pad_rank)
    else:
        done = export_version(load_run(run), folder, version, model, None, kind, label, base)
    if as_json:
        shown = {"version": done.version, "model": str(folder), "corrector": done.corrector, "dtype": done.dtype}
        shown |= {} if label is None else {"label": label}
        more: dict[str, Any] = {"rank": done.rank, "vllm": done.command} if adapter else {"rounding": done.rounding}
        more |= {} if done.quantisation is None else {"quantisation": done.quantisation}
        show_json({"run": str(run), **shown, **more})
        return
    show_line("version", done.version)
    show_line("adapter" if adapter else "corrector" if done.corrector else "model", folder)
    show_line("dtype", done.dtype)
    if done.quantisation is not None:
        show_line("quantised", f"logits differ by {done.quantisation:.1%} of their norm from those it was learned with")
    if adapter:
        show_line("rank", done.rank)
        show_line("vllm", done.command or "takes no adapter of this rank: export the merged model, without --adapter")
