"""The verbs of correctors: `correct train`, from corrections or from preferences, and its neighbours."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everalign.cli import (
    correct_data,
    correct_run,
    correct_steer,
)
from everalign.cli import (
    correct_data as correct_distill,
)
from everalign.cli import (
    correct_run as correct_evaluate,
)
from everalign.cli.console import Display, say, show, show_json, show_line
from everalign.cli.options import Json, TrustRemoteCode, option, phrases, report_unused, resumable

if TYPE_CHECKING:
    from rich.table import Table

    from everalign.correction import CorrectorOptions, CorrectorReport, TrainedCorrector
    from everalign.data import CorrectionSet

correct = typer.Typer(
    help="Make a corrector, which reads an answer and writes a better one, and use it.", no_args_is_help=True
)


correct.command(epilog=correct_data.DATA_EPILOG)(correct_data.data)
correct.command(epilog=correct_run.EPILOG)(correct_run.run)
correct.command(epilog=correct_distill.DISTILL_EPILOG)(correct_distill.distill)
correct.command(epilog=correct_evaluate.EPILOG)(correct_evaluate.evaluate)
correct.command(epilog=correct_steer.EPILOG)(correct_steer.steer)


@correct.command(
    epilog="Example: everalign correct train --model Qwen/Qwen2.5-0.5B-Instruct --data edits.jsonl "
    "--test edits.test.jsonl --output runs/corrector --lora-rank 16"
)
def train(
    model: Annotated[
        str, option("A Hugging Face folder, a Hub name, a .gguf file, `tiny`, `smollm2`, or a corrector to go on with.")
    ],
    data: Annotated[str, option("Corrections to learn, or preferences (rejected into chosen).", "ROWS")],
    output: Annotated[Path, option("The corrector's folder.", "DIR")],
    test: Annotated[str | None, option("Held-out rows, for the report.", "ROWS")] = None,
    template: Annotated[str | None, option("What the corrector reads: everalign-1, aligner-1, ...", "ID")] = None,
    objectives: Annotated[str | None, option('What answers should be more of: "helpful,harmless".', "WORDS")] = None,
    identity: Annotated[float | None, option("Share of rows that the warm-up learns to copy; 0 for none.")] = None,
    identity_epochs: Annotated[float | None, option("Passes of the warm-up over them.")] = None,
    identity_learning_rate: Annotated[float | None, option("The warm-up's peak of the learning rate.")] = None,
    seed: Annotated[int, option("Seeds everything random.")] = 0,
    learning_rate: Annotated[float | None, option("Peak of the learning rate.")] = None,
    epochs: Annotated[float | None, option("Passes over the corrections; fractions allowed.")] = None,
    batch_size: Annotated[int | None, option("Rows of an optimiser step.")] = None,
    max_length: Annotated[int | None, option("Longest prompt plus correction, in tokens.")] = None,
    tokens_per_batch: Annotated[int | None, option("Tokens computed at once; fewer save memory.")] = None,
    checkpointing: Annotated[
        str | None, option("Compute activations twice to save memory: auto, on or off.", "WHEN")
    ] = None,
    lora_rank: Annotated[int | None, option("Train an adapter of this rank and merge it; 0 for all weights.")] = None,
    lora_alpha: Annotated[float | None, option("The adapter's α; twice the rank if not given.")] = None,
    precision: Annotated[str | None, option("auto, fp32 or bf16.", "PRECISION")] = None,
    checkpoint_steps: Annotated[int | None, option("Steps between two checkpoints; 0 for none.")] = None,
    filtered: Annotated[
        bool, typer.Option("--filter", metavar="", help="Leave out corrections that teach nothing, and say why.")
    ] = False,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", metavar="", help="Let rows be in both sets.")
    ] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", metavar="", help="Leave bad rows out, and say so.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train a corrector on corrections: first to copy a share of the answers, then to correct all of them.

    Killed in the middle, the same command goes on where it was.
    """
    from everalign.correction import CorrectorOptions

    given = {
        "template": template,
        "objectives": phrases(objectives),
        "identity": identity,
        "identity_epochs": identity_epochs,
        "identity_learning_rate": identity_learning_rate,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "max_length": max_length,
        "tokens_per_batch": tokens_per_batch,
        "checkpointing": checkpointing,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "precision": precision,
        "checkpoint_steps": checkpoint_steps,
    }
    options = CorrectorOptions(**{name: value for name, value in given.items() if value is not None})
    with resumable():
        trained = _train(model, data, test, output, options, seed, filtered, allow_overlap, skip_bad_rows)
    (_show_json if as_json else _show)(trained)


def _train(
    model: str,
    data: str,
    test: str | None,
    output: Path,
    options: "CorrectorOptions",
    seed: int,
    filtered: bool,
    allow_overlap: bool,
    skip_bad_rows: bool,
) -> "TrainedCorrector":
    from everalign.correction import filter_corrections, get_template, train_corrector

    with Display() as display:
        display.log("data")
        rows = _load(data, skip_bad_rows)
        if filtered:
            kept = filter_corrections(
                rows, template=None if options.template is None else get_template(options.template)
            )
            display.log(f"  {kept.one_line()}")
            rows = kept.rows
        return train_corrector(
            model,
            rows,
            output,
            test=None if test is None else _load(test, skip_bad_rows),
            options=options,
            seed=seed,
            allow_overlap=allow_overlap,
            log=display.log,
            progress=display.progress,
        )


def _load(source: str, skip_bad_rows: bool) -> "CorrectionSet":
    from everalign.data import CorrectionSet, load_edits

    rows = load_edits(source, skip_bad_rows=skip_bad_rows)
    report_unused(rows)
    if isinstance(rows, CorrectionSet):
        return rows
    say("note", f"{source} holds preferences: each rejected answer is corrected into the chosen one", "bold")
    return CorrectionSet.of_preferences(rows)


def _show_json(trained: "TrainedCorrector") -> None:
    facts = trained.facts
    stages = {
        name: {"steps": stage.steps, "seconds": round(stage.seconds, 3)} for name, stage in trained.stages.items()
    }
    about = {"template": facts.template, "objectives": list(facts.objectives), "max_length": facts.max_length}
    show_json({"output": str(trained.path), "held_out": facts.held_out, "rows": facts.rows, **about, "stages": stages})


def _show(trained: "TrainedCorrector") -> None:
    from everalign.reporting.formats import seconds

    if trained.report is None:
        show("No held-out rows (--test), so what the corrector is worth is not known.")
    else:
        show(_report_table(trained.report))
    show_line("time", seconds(sum(stage.seconds for stage in trained.stages.values())))
    show_line("model", trained.path)


def _report_table(report: "CorrectorReport") -> "Table":
    from rich.table import Table

    from everalign.reporting.formats import fixed, percent

    table = Table(title=f"{report.rows} held-out rows", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("meaning", overflow="fold")
    table.add_row("perplexity", fixed(report.perplexity, 2), "per token of the corrections")
    table.add_row("copying", fixed(report.copy_log_likelihood, 3), "nats per token of the answers as output")
    table.add_row("starts by copying", percent(report.starts_by_copying), "greedy decoding begins like the answer")
    table.add_row("copies", percent(report.copies), "it would return the answer unchanged")
    if report.keeps is not None:
        table.add_row("keeps", percent(report.keeps), f"of {report.identities} answers that need no correction")
    return table
