"""The verb `demo`, and those on run directories: `report`, `versions`, `watch`, `evaluate`, `rollback`, `export`."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from everalign.cli.console import (
    Display,
    run_scores,
    run_summary,
    say,
    show,
    show_json,
    show_line,
    table,
    version_table,
)
from everalign.cli.options import (
    Concurrency,
    Json,
    RequestsPerMinute,
    Timeout,
    TrustRemoteCode,
    option,
    require,
    resumable,
)
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


def evaluate(
    run: Run,
    prompts: Annotated[
        list[str] | None,
        option(
            "Held-out prompts of a task, with chosen or completions as references if they have them; repeatable. "
            "The run's own held-out rows when left out.",
            "NAME=FILE",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        option(
            "Rate the answers, and count wins, by a reward model or function.", "DIR|MODULE:FUNCTION", default="none"
        ),
    ] = None,
    judge: Annotated[
        str | None,
        option("Do so by an LLM judge on any OpenAI-compatible server, in both orders.", "URL#MODEL", default="none"),
    ] = None,
    against: Annotated[
        Path | None, option("Opponent: this run's answers; the base model's when left out.", "RUN")
    ] = None,
    rubric: Annotated[
        str | None,
        option("What the judge looks at, such as helpful or truthful; by each task's name when left out.", "NAME"),
    ] = None,
    every: Annotated[bool, option("Evaluate every version, not the last one alone.", "", "--every")] = False,
    limit: Annotated[int | None, option("Most prompts of a task.", "N", default="all")] = None,
    max_new_tokens: Annotated[int, option("Longest answer, in tokens; 160 by default.", "N")] = 160,
    compat: Annotated[
        bool, option("Also BLEU-4 and ROUGE-L as in LifeAlign's published tables.", "", "--compat")
    ] = False,
    standard: Annotated[
        bool, typer.Option("--standard/--no-standard", help="BLEU-4 and ROUGE-L by sacreBLEU and rouge-score.")
    ] = True,
    likelihoods: Annotated[
        bool,
        typer.Option(
            "--likelihoods/--no-likelihoods",
            help="Perplexity, changes of log-likelihood and the KL to the base model, which take passes of the model.",
        ),
    ] = True,
    device_map: Annotated[
        str | None,
        option("Spread the model over this machine's devices, one of them by default.", "auto|balanced|FILE"),
    ] = None,
    concurrency: Concurrency = None,
    requests_per_minute: RequestsPerMinute = None,
    timeout: Timeout = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Answer held-out prompts greedily with the base model and with what was learned, and measure the answers.

    If it is killed, the same command continues; answers and verdicts are kept in RUN/evaluation.
    """
    files = []
    for text in prompts or ():
        name, _, file = text.partition("=")
        if not name.strip() or not file.strip():
            raise InputError(f"--prompts {text}: must be NAME=FILE", field="--prompts")
        files.append((name.strip(), file.strip()))
    names = [name for name, _ in files]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"--prompts: two files are called {repeated!r}: name each differently", field="--prompts")
    if limit is not None and limit < 1:
        raise InputError(f"--limit: must be at least 1, found {limit}", field="--limit")
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: must be at least 1, found {max_new_tokens}", field="--max-new-tokens")
    if judge is None:
        for_judges = {"rubric": rubric, "concurrency": concurrency, "timeout": timeout}
        for name, value in {**for_judges, "requests-per-minute": requests_per_minute}.items():
            if value is not None:
                raise InputError(f"--{name}: is for a judge; name one with --judge URL#MODEL", field=f"--{name}")
    with resumable(), Display() as display:
        from everalign.evaluation.judge import JudgeOptions, JudgeScorer
        from everalign.evaluation.scorers import make_scorer
        from everalign.learning.answer_evaluation import AnswerSettings, evaluate_run, load_held_out_prompts
        from everalign.learning.run_data import RESULTS, load_run

        loaded = load_run(run)
        options = JudgeOptions(concurrency=concurrency, requests_per_minute=requests_per_minute, timeout=timeout)
        found = evaluate_run(
            loaded,
            {name: load_held_out_prompts(file) for name, file in files} or None,
            AnswerSettings(
                every=every,
                limit=limit,
                max_new_tokens=max_new_tokens,
                compat=compat,
                standard=standard,
                likelihoods=likelihoods,
                rubric=rubric,
                device_map=device_map,
            ),
            reward=None if reward is None else make_scorer(reward),
            judge=None if judge is None else JudgeScorer.from_name(judge, options),
            against=None if against is None else load_run(against),
            log=display.log,
            progress=display.progress,
        )
    if as_json:
        show_json({"run": str(run), **found})
        return
    _show_evaluation(found)
    show_line("results", run / RESULTS)


def _show_evaluation(found: Mapping[str, Any]) -> None:
    """Tables of the metrics with their intervals, one for each task, and the worst task of each metric."""
    from everalign.learning.run_data import BASE
    from everalign.reporting.formats import ANSWER_METRICS, interval_cell

    tasks = list(dict.fromkeys(row["task"] for row in found["results"]))
    for task in tasks:
        rows = [row for row in found["results"] if row["task"] == task]
        lines = [
            (title, *(interval_cell(row["metrics"].get(name), factor) for row in rows))
            for name, (title, factor) in ANSWER_METRICS.items()
            if any(name in row["metrics"] for row in rows)
        ]
        title = f"{task}: {rows[0]['prompts']} prompts"
        show(table(("measure", *(row["version"] for row in rows)), lines, title=title))
        for row in rows:
            for name, count in row["failed"].items():
                if count:
                    left_out = f"{count} of {row['prompts']} prompts are left out"
                    title = ANSWER_METRICS[name][0]
                    show(f"{row['version']}, {title}: {left_out}, because the judge's replies could not be read")
    against = "the base model" if found["against"] == BASE else found["against"]
    about = (
        f"Means with their 95 % intervals over prompts. {BASE} is the base model; wins are those over {against}, ties "
        "count half. Δ log p (change since the base model) and KL are in nats per token."
    )
    show(Text(about))
    for name, worst in found["worst"].items():
        title, factor = ANSWER_METRICS[name]
        show_line("worst", f"{title}: {worst['value'] * factor:.3g} on {worst['task']}")


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
