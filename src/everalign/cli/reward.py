"""The verbs `reward train` and `reward score`: a reward model from preferences, and rewards for answers."""

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.console import Display, show, show_json, show_line
from everalign.cli.options import Json, TrustRemoteCode, option, report_unused, resumable

if TYPE_CHECKING:
    from rich.table import Table

    from everalign.data import PreferenceSet
    from everalign.evaluation.score_rows import JudgeOptions, Scorer, ScoringResult
    from everalign.training.reward_model import RewardReport, TrainedRewardModel

reward = typer.Typer(help="Train a reward model on preferences, and score answers.", no_args_is_help=True)


@reward.command(
    epilog="Example: everalign reward train --model tiny --data pairs.jsonl --test pairs.test.jsonl "
    "--output runs/reward --learning-rate 1e-3"
)
def train(
    model: Annotated[str, option("A Hugging Face folder, a Hub name, a .gguf file, `tiny` or `smollm2`.")],
    data: Annotated[str, option("Preferences to learn.", "PAIRS")],
    output: Annotated[Path, option("The reward model's folder.", "DIR")],
    test: Annotated[str | None, option("Held-out preferences, for the report.", "PAIRS")] = None,
    seed: Annotated[int, option("Seeds everything random.")] = 0,
    learning_rate: Annotated[float | None, option("Peak of the learning rate.")] = None,
    epochs: Annotated[float | None, option("Passes over the pairs; fractions allowed.")] = None,
    batch_size: Annotated[int | None, option("Pairs of an optimiser step.")] = None,
    max_length: Annotated[int | None, option("Longest prompt plus answer, in tokens.")] = None,
    tokens_per_batch: Annotated[int | None, option("Tokens computed at once; fewer save memory.")] = None,
    checkpointing: Annotated[
        str | None, option("Compute activations twice to save memory: auto, on or off.", "WHEN")
    ] = None,
    centring: Annotated[float | None, option("Pull of a pair's rewards towards 0.")] = None,
    lora_rank: Annotated[int | None, option("Train an adapter of this rank and merge it; 0 for all weights.")] = None,
    lora_alpha: Annotated[float | None, option("The adapter's α; twice the rank if not given.")] = None,
    precision: Annotated[str | None, option("auto, fp32 or bf16.", "PRECISION")] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", metavar="", help="Let rows be in both sets.")
    ] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", metavar="", help="Leave bad rows out, and say so.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train a Bradley-Terry reward model on preferences: the whole model or an adapter, with one score per answer."""
    from everalign.training.options import RewardOptions
    from everalign.training.reward_model import train_reward_model

    given = {
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "max_length": max_length,
        "tokens_per_batch": tokens_per_batch,
        "checkpointing": checkpointing,
        "centring": centring,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "precision": precision,
    }
    options = RewardOptions(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    with Display() as display:
        display.log("data")
        trained = train_reward_model(
            model,
            _load(data, skip_bad_rows),
            output,
            test=None if test is None else _load(test, skip_bad_rows),
            options=options,
            seed=seed,
            allow_overlap=allow_overlap,
            log=display.log,
            progress=display.progress,
        )
    (_show_training_json if as_json else _show_training)(trained)


@reward.command(
    epilog="Example: everalign reward score --model runs/reward --data answers.jsonl --output scored.jsonl; "
    "with a judge, whose key is read from OPENAI_API_KEY: --model http://127.0.0.1:8000/v1#qwen2.5"
)
def score(
    model: Annotated[
        str,
        option(
            "A reward model's folder, a Python function MODULE:FUNCTION, or a judge on a server as URL#MODEL.",
            "DIR|FUNCTION|JUDGE",
        ),
    ],
    data: Annotated[str, option("Rows with prompt and completions, or preferences.", "ROWS")],
    output: Annotated[Path, option("The rows with their rewards.", "FILE.jsonl")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Ignore rewards that rows have, and replace FILE.jsonl.")
    ] = False,
    batch_size: Annotated[int | None, option("Answers scored at once; kept after each batch.")] = None,
    tokens_per_batch: Annotated[int | None, option("Tokens a reward model computes at once.")] = None,
    judge_instructions: Annotated[Path | None, option("What makes an answer good, for a judge.", "FILE")] = None,
    cache: Annotated[Path | None, option("Keep a judge's rewards here, to ask for none twice.", "DIR")] = None,
    concurrency: Annotated[int | None, option("Requests to a judge under way at once.")] = None,
    requests_per_minute: Annotated[float | None, option("Begin no more requests to a judge.")] = None,
    timeout: Annotated[float | None, option("Seconds a judge has for one reply.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Score answers, and write them as rows to learn from with `--objective var`.

    Killed in the middle, the same command goes on where it was.
    """
    with resumable():
        from everalign.evaluation.score_rows import JudgeOptions

        judge = JudgeOptions(judge_instructions, cache, concurrency, requests_per_minute, timeout)
        _score(model, data, output, overwrite, batch_size, tokens_per_batch, judge, as_json)


def _load(source: str, skip_bad_rows: bool) -> "PreferenceSet":
    from everalign.data import load_preferences

    rows = load_preferences(source, skip_bad_rows=skip_bad_rows)
    report_unused(rows)
    return rows


def _score(
    model: str,
    data: str,
    output: Path,
    overwrite: bool,
    batch_size: int | None,
    tokens_per_batch: int | None,
    judge: "JudgeOptions",
    as_json: bool,
) -> None:
    from everalign.data import load_unscored
    from everalign.evaluation.score_rows import ANSWERS_PER_BATCH, make_scorer, score_rows
    from everalign.storage import exclusive, lock_of

    started = time.perf_counter()
    # Before anything is loaded: a second process is told at once.
    with Display() as display, exclusive(lock_of(Path(output))):
        rows = load_unscored(data, overwrite=overwrite)
        display.log(f"{len(rows)} rows to score")
        scorer = make_scorer(model, tokens_per_batch, judge)
        scored = score_rows(
            rows,
            scorer,
            output,
            overwrite=overwrite,
            answers_per_batch=ANSWERS_PER_BATCH if batch_size is None else batch_size,
            log=display.log,
            progress=display.progress,
        )
    cost = _judging_cost(scorer)
    facts = {**_scoring_facts(scored), **cost, "seconds": round(time.perf_counter() - started, 3)}
    if as_json:
        show_json(facts)
        return
    for label in ("rows", "answers", "mean", "spread"):
        show_line(label, f"{facts[label]:.3f}" if isinstance(facts[label], float) else facts[label])
    if cost:
        untold = f"; {cost['untold']} replies did not tell theirs" if cost["untold"] else ""
        tokens = f"{cost['prompt_tokens']} + {cost['completion_tokens']} tokens"
        show_line("judge", f"{cost['requests']} requests, {tokens} asked and answered{untold}")
    show_line("scored", facts["output"])


def _scoring_facts(scored: "ScoringResult") -> dict[str, Any]:
    rewards = [reward for row in scored.rows for reward in row.rewards]
    return {
        "output": str(scored.path),
        "rows": len(scored.rows),
        "resumed": scored.resumed,
        "answers": len(rewards),
        "mean": statistics.fmean(rewards),
        "spread": statistics.pstdev(rewards),
    }


def _judging_cost(scorer: "Scorer") -> dict[str, int]:
    """What a judge has used; nothing for other scorers."""
    from dataclasses import asdict

    from everalign.evaluation.score_rows import JudgeScorer

    return asdict(scorer.client.usage) if isinstance(scorer, JudgeScorer) else {}


def _show_training_json(trained: "TrainedRewardModel") -> None:
    from dataclasses import asdict

    report = None if trained.report is None else asdict(trained.report)
    costs = {"steps": trained.training.steps, "seconds": round(trained.training.seconds, 3)}
    facts = {"mean": trained.facts.mean, "scale": trained.facts.scale, "max_length": trained.facts.max_length}
    show_json({"output": str(trained.path), "held_out": report, **facts, **costs})


def _show_training(trained: "TrainedRewardModel") -> None:
    from everalign.reporting.formats import seconds

    if trained.report is None:
        show("No held-out pairs (--test), so what the reward model is worth is not known.")
    else:
        show(_report_table(trained.report))
    show_line("time", seconds(trained.training.seconds))
    show_line("model", trained.path)


def _report_table(report: "RewardReport") -> "Table":
    from rich.table import Table

    from everalign.reporting.formats import fixed, percent, significant

    table = Table(title=f"{report.pairs} held-out pairs", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("meaning", overflow="fold")
    table.add_row("accuracy", percent(report.accuracy), "chosen answer has the higher reward")
    table.add_row("log-loss", fixed(report.log_loss, 3), "nats; 0.693 is a coin's")
    table.add_row("calibration error", percent(report.calibration_error), "of σ(reward difference) as a probability")
    table.add_row("temperature", significant(report.temperature), _temperature_note(report))
    if report.calibrated_error is not None:
        table.add_row("error at it", percent(report.calibrated_error), "on the same pairs, so too low")
    table.add_row("length correlation", fixed(report.length_correlation, 2), "of reward and answer length")
    return table


def _temperature_note(report: "RewardReport") -> str:
    if report.temperature is not None:
        return "calibrates it; fitted on these pairs"
    return "none is best: the model ranks no pair wrongly, or no more pairs rightly than chance"
