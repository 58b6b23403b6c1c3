"""The verb `evaluate`: what a run's policies answer to held-out prompts, and what the answers are worth."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from everalign.cli.console import Display, show, show_json, show_line, table
from everalign.cli.options import (
    Concurrency,
    Json,
    RequestsPerMinute,
    Timeout,
    TrustRemoteCode,
    option,
    resumable,
)
from everalign.cli.runs import Run
from everalign.errors import InputError


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
    _show(found)
    show_line("results", run / RESULTS)


def _show(found: Mapping[str, Any]) -> None:
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
