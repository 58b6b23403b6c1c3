"""The verbs `reward train` and `reward score`: a reward model from preferences, and rewards for answers."""

import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.bulk.job import BulkOptions
from everalign.cli.console import Display, show, show_json, show_line, table
from everalign.cli.launch import Processes, share_work
from everalign.cli.options import (
    AllowOverlap,
    Columns,
    Concurrency,
    Json,
    JudgeInstructions,
    RequestsPerMinute,
    Seed,
    SkipBadRows,
    Timeout,
    TokensPerBatch,
    TrustRemoteCode,
    check_inputs,
    flags,
    option,
    report_skipped,
    report_unused,
    resumable,
    source,
)
from everalign.training.options import RewardOptions

if TYPE_CHECKING:
    from everalign.bulk.job import Finished
    from everalign.data import PreferenceSet
    from everalign.data.readers import Source
    from everalign.evaluation.judge import JudgeOptions
    from everalign.evaluation.scoring import ScoringWork
    from everalign.training.reward_model import TrainedRewardModel

reward = typer.Typer(help="Train a reward model on preferences, and score answers.", no_args_is_help=True)


@reward.command(
    epilog="Example: everalign reward train --model tiny --data pairs.jsonl --test pairs.test.jsonl "
    "--output runs/reward --learning-rate 1e-3"
)
@flags(RewardOptions)
def train(
    context: typer.Context,
    model: Annotated[str, option("A Hugging Face folder, a Hub name, a .gguf file, `tiny` or `smollm2`.")],
    data: Annotated[str, option("Preferences to learn.", "PAIRS")],
    output: Annotated[Path, option("The reward model's folder.", "DIR")],
    test: Annotated[str | None, option("Held-out preferences, for the report.", "PAIRS", default="none")] = None,
    columns: Columns = None,
    seed: Seed = 0,
    allow_overlap: AllowOverlap = False,
    skip_bad_rows: SkipBadRows = False,
    trust_remote_code: TrustRemoteCode = False,
    processes: Processes = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Train a Bradley-Terry reward model on preferences: the whole model or an adapter, with one score per answer.

    If it is killed, the same command continues from its last checkpoint.
    """
    options = RewardOptions.from_flags(given)
    share_work(processes, context, lambda: check_inputs(model, data, test, output=output))
    with resumable(), Display() as display:
        display.log("data")
        rows = _load(source(data, columns), skip_bad_rows)
        held_out = None if test is None else _load(source(test, columns), skip_bad_rows)
        from everalign.training.reward_model import train_reward_model

        trained = train_reward_model(
            model,
            rows,
            output,
            test=held_out,
            options=options,
            seed=seed,
            allow_overlap=allow_overlap,
            log=display.log,
            progress=display.progress,
            figures=display.figures,
        )
    if not as_json:
        _show_training(trained)
        return
    facts, training = trained.facts, trained.training
    show_json(
        {
            "output": str(trained.path),
            "held_out": None if trained.report is None else asdict(trained.report),
            **{name: getattr(facts, name) for name in ("mean", "scale", "max_length")},
            "steps": training.steps,
            "seconds": round(training.seconds, 3),
        }
    )


def _load(source: "Source", skip_bad_rows: bool) -> "PreferenceSet":
    from everalign.data import load_preferences

    rows = load_preferences(source, skip_bad_rows=skip_bad_rows)
    report_unused(rows)
    return rows


def _show_training(trained: "TrainedRewardModel") -> None:
    from everalign.reporting.formats import fixed, percent, seconds, significant

    report = trained.report
    if report is None:
        show("No held-out pairs (--test), so the reward model was not evaluated.")
    else:
        calibrating = "makes the log-loss smallest; fitted on these pairs"
        if report.temperature is None:
            calibrating = "none is best: the model ranks no pair wrongly, or no more pairs rightly than chance"
        lines = [
            ("accuracy", percent(report.accuracy), "chosen answer has the higher reward"),
            ("log-loss", fixed(report.log_loss, 3), "nats; 0.693 is a coin's"),
            ("calibration error", percent(report.calibration_error), "of σ(reward difference) as a probability"),
            ("temperature", significant(report.temperature), calibrating),
        ]
        if report.calibrated_error is not None:
            lines.append(("error at it", percent(report.calibrated_error), "on the same pairs, so too low"))
        lines.append(("length correlation", fixed(report.length_correlation, 2), "of reward and answer length"))
        show(table(("measure", "value", "meaning"), lines, title=f"{report.pairs} held-out pairs"))
    show_line("time", seconds(trained.training.seconds))
    show_line("model", trained.path)


_USAGE = ("requests", "prompt_tokens", "completion_tokens", "untold")  # of a judge


@reward.command(
    epilog="Example: everalign reward score --model runs/reward --data answers.jsonl --output scored.jsonl; "
    "with a judge, whose key is read from OPENAI_API_KEY: --model http://127.0.0.1:8000/v1#qwen2.5"
)
@flags(BulkOptions)
def score(
    model: Annotated[
        str,
        option("A reward model's folder, a Python function, or a judge on a server.", "DIR|MODULE:FUNCTION|URL#MODEL"),
    ],
    data: Annotated[str, option("Rows with prompt and completions, or preferences.", "ROWS")],
    output: Annotated[str, option("The rows with their rewards: .jsonl or .parquet.", "FILE|URL")],
    columns: Columns = None,
    overwrite: Annotated[
        bool, option("Ignore rewards that rows have, and replace the output.", "", "--overwrite")
    ] = False,
    skip_bad_rows: SkipBadRows = False,
    batch_size: Annotated[
        int | None, option("Answers scored at once; results are kept after each batch.", default="64")
    ] = None,
    tokens_per_batch: TokensPerBatch = None,
    judge_instructions: JudgeInstructions = None,
    cache: Annotated[
        Path | None, option("Folder that keeps a judge's rewards for later calls.", "DIR", default="none")
    ] = None,
    concurrency: Concurrency = None,
    requests_per_minute: RequestsPerMinute = None,
    timeout: Timeout = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Score answers, and write them as rows to learn from with `--objective var`.

    Memory does not grow with the rows. If it is killed, the same command continues.
    """
    started = time.perf_counter()
    check_inputs(None, data)
    with resumable(), Display() as display:
        from everalign.bulk.run import run_bulk
        from everalign.data.readers import unscored_reader
        from everalign.data.streams import RowStream
        from everalign.evaluation.judge import JudgeOptions
        from everalign.evaluation.scoring import ANSWERS_PER_BATCH, ScoringWork, cut_warnings

        judge = JudgeOptions(judge_instructions, cache, concurrency, requests_per_minute, timeout)
        answers_per_batch = ANSWERS_PER_BATCH if batch_size is None else batch_size
        done = run_bulk(
            RowStream(source(data, columns), unscored_reader(overwrite), skip_bad_rows),
            partial(_scoring_work, model, tokens_per_batch, judge, answers_per_batch),
            output,
            ScoringWork.words,
            options=BulkOptions.from_flags(given),
            overwrite=overwrite,
            log=display.log,
            progress=display.progress,
            found=partial(report_skipped, data),
        )
        for warning in cut_warnings(int(done.totals["cut"]), int(done.totals["computed"])):
            display.log(f"  warning: {data}: {warning}")
    _show_scores(done, time.perf_counter() - started, as_json)


def _scoring_work(
    model: str, tokens_per_batch: int | None, judge: "JudgeOptions", answers_per_batch: int
) -> "ScoringWork":
    """Loads the scorer; a Ray worker calls it too."""
    from everalign.evaluation.scorers import make_scorer
    from everalign.evaluation.scoring import ScoringWork

    return ScoringWork(make_scorer(model, tokens_per_batch, judge), answers_per_batch)


def _show_scores(done: "Finished", seconds: float, as_json: bool) -> None:
    totals = done.totals
    mean = totals["sum"] / totals["answers"]
    usage = {name: int(totals[name]) for name in _USAGE if name in totals}
    facts: dict[str, Any] = {
        "output": done.output,
        "rows": done.rows,
        "resumed": done.resumed,
        "skipped": done.checked.skipped,
        "answers": int(totals["answers"]),
        "mean": mean,
        "spread": math.sqrt(max(totals["squares"] / totals["answers"] - mean * mean, 0.0)),
        **usage,
        "seconds": round(seconds, 3),
    }
    if as_json:
        show_json(facts)
        return
    for label in ("rows", "answers", "mean", "spread"):
        show_line(label, f"{facts[label]:.3f}" if isinstance(facts[label], float) else facts[label])
    if usage:
        untold = f"; {usage['untold']} replies did not report theirs" if usage["untold"] else ""
        tokens = f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens"
        show_line("judge", f"{usage['requests']} requests, {tokens} asked and answered{untold}")
    show_line("scored", facts["output"])
